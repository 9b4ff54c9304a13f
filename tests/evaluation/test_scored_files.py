"""What is written is what was scored: sacrebleu's command on the files says the same."""

import json
import subprocess
import sys

import pytest
import yaml

from tests.evaluation.test_evaluate import run
from xplus_fast.evaluation import generate

REFERENCES = ["The house is red.", "It rains today - again.", "She has two dogs.", "2 + 2 = 4"]
# what the model says to the first sentence; to the others it says what they should be, nearly
ODD = [
    "-\n", "a -\n", "-\nThe house", "The-\nhouse is red.", "The house\nis red.",
    "The house is red.\n", "The house is red.   ", "\t The house is red.", "The\thouse\tis red.",
    "The house\r\nis red.", "The house\ris red.", "\r", "\n\n", "", " ", "\u2028",
    "The house\u2028is red.", "The house is\u2029red.", "The house\x85is red.\x85",
    "The\x0bhouse\x0cis\x1cred.\x1d\x1e\x1f", "The\0house is red.", "\0", "The house is red.\0\n\0",
    "The\u00a0house is red.\u00a0", "\u3000The house\u3000is red.", "\ufeffThe house is red.",
    "The house\u200b is red.\u200b", "\U0001f600 \U0001f468\u200d\U0001f469 red.",
    "The house is red. " * 400, "x" * 20_000, "The house is red .", "The house is red ...",
    "&quot;The house&quot; &amp; &lt;red&gt; &#39;", "<skipped>The house <skipped>",
    "the HOUSE is Red.", "e\u0301 \u00e9 \u212b \u00c5", "\u623f\u5b50\u662f\u7ea2\u7684\u3002",
    "\u0628\u064a\u062a \u0623\u062d\u0645\u0631\u061f", "\u0e1a\u0e49\u0e32\u0e19\u0e2a\u0e35",
    "1,234.56 -- 7-8 3.14%", "$ \\ ' \" ` | { } ~", "- \n- \n-", "\ud83d is red.",
    "<think>red?</think>The house is red.", "<think>red?\n", "red</think>\n\nThe house is red.",
    "\u202eThe house\u202c is red.", "The house is red.\u0007\x1b[31m",
]  # fmt: skip
# each in a process of its own, as it takes standard output for itself; one import for all
CALL = """
import json, os, sys, tempfile
from sacrebleu.sacrebleu import main
calls, found = json.load(sys.stdin), []
for arguments in calls:
    with tempfile.TemporaryFile() as said:
        if not (child := os.fork()):
            os.dup2(said.fileno(), 1)
            sys.argv = ["sacrebleu", *arguments]
            main()
            sys.stdout.flush()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0, arguments
        said.seek(0)
        found.append(json.load(said)["score"])
print(json.dumps(found))
"""
OPTIONS = {"chrf": ["-m", "chrf", "--chrf-word-order", "2"], "bleu": ["-m", "bleu"]}


def test_sacrebleus_command_says_the_same_of_odd_answers(place, tmp_path, capsys, monkeypatch):
    assert len(ODD) >= 40
    sets = []
    for i in range(len(ODD)):
        folder = tmp_path / f"set{i}"
        folder.mkdir()
        # a reference that is as odd; one of its own lines ends with \n alone
        first = (REFERENCES[0], ODD[i].replace("\n", " ").replace("\ud83d", "?"))[i % 2]
        (folder / "en.txt").write_text("".join(f"{i} {j}\n" for j in range(4)))
        text = "".join(f"{line}\n" for line in [first, *REFERENCES[1:]])
        (folder / "fr.txt").write_bytes(text.encode())
        files = str(folder / "{lang}.txt")
        sets.append({"name": f"s{i}", "files": files, "directions": ["en-fr"]})

    def answer(self, prompts, what):
        i = int(what.partition(":")[0].rpartition(" s")[2])
        texts = [ODD[i], *(f"{line[:-3]}x." for line in REFERENCES[1:])]
        return [(text, False) for text in texts]

    monkeypatch.setattr(generate.Generator, "answer", answer)
    out = tmp_path / "out"
    tree = {"output": str(out), "translation": {"sets": sets, "metrics": ["chrf", "bleu"]}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    code, said, err = run(capsys, place / "tuned", tmp_path / "recipe.yaml", "--json")
    assert code == 0, err
    result = json.loads(said)
    calls, ours = [], []
    for row in result["rows"]:
        name = row["name"].replace(":", ".")
        i = int(row["name"].partition(":")[0][1:])
        written = [out / f"tuned.{name}.txt", out / f"reference.{name}.txt"]
        for file in written:
            assert file.read_bytes().count(b"\n") == 4
        references = [written[1]]
        if not REFERENCES[0].startswith("\ufeff") and "\ufeff" not in ODD[i]:
            references.append(tmp_path / f"set{i}/fr.txt")  # the user's own file: the same
        for reference in references:
            calls.append(
                [str(reference), "-i", str(written[0]), *OPTIONS[row["metric"]], "-w", "9"]
            )
            ours.append((row, row["tuned"]))
    ran = subprocess.run(
        [sys.executable, "-c", CALL], input=json.dumps(calls), capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    theirs = json.loads(ran.stdout)
    assert len(theirs) >= 2 * len(ODD)
    for call, (row, score), said in zip(calls, ours, theirs, strict=True):
        assert score == pytest.approx(said, abs=1e-9), (row["name"], call)
    counts = result["counts"]
    thinking = [n for n in counts if counts[n]["thoughts"]]
    assert thinking == [f"tuned s{i}:en-fr" for i, t in enumerate(ODD) if "think>" in t]
    assert "with a think block, which is not scored" in (out / "verdict.md").read_text()


def test_sources_and_references_are_written_as_they_were_asked(
    place, tmp_path, capsys, monkeypatch
):
    """So that a set that is no line-aligned file has something to be scored against."""
    for code, text in {"en": "One.\nTwo.\n\nThree.\n", "fr": "Un.\nDeux.\n\nTrois.\n"}.items():
        (tmp_path / f"{code}.txt").write_text(text)
    asked = {}

    def answer(self, prompts, what):
        asked[what] = prompts
        return [("Un. Deux.", False), ("Trois.", False)]

    monkeypatch.setattr(generate.Generator, "answer", answer)
    named = {"name": "d", "files": str(tmp_path / "{lang}.txt"), "directions": ["en-fr"]}
    asked_for = {"sets": [{**named, "documents": True}], "metrics": ["chrf"]}
    tree = {"output": str(tmp_path / "out"), "translation": asked_for}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    code, said, err = run(capsys, place / "tuned", path, "--json")
    assert code == 0, err
    assert "One.\nTwo." in asked["tuned d:en-fr"][0]  # as its lines are
    assert (tmp_path / "out/source.d.en-fr.txt").read_text() == "One. Two.\nThree.\n"
    assert (tmp_path / "out/reference.d.en-fr.txt").read_text() == "Un. Deux.\nTrois.\n"
    (row,) = json.loads(said)["rows"]
    assert row["tuned"] == 100
