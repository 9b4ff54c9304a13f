"""`xplus-fast prepare` as a user runs it: whole, cut off, on a cluster, with broken files."""

import gzip
import hashlib
import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

from tests.data.preparation.runs import recipe, results, rows, run
from xplus_fast import cli

pytest.importorskip("py3langid", reason="identifies languages")


def test_what_comes_out(whole):
    _, found = rows(whole)
    manifest = json.loads((whole / "manifest.json").read_text())
    shards = manifest["shards"]
    assert sum(s["conversations"] for s in shards) == len(found) and len(shards) > 1
    for shard in shards:
        assert hashlib.sha256((whole / shard["name"]).read_bytes()).hexdigest() == shard["sha256"]
    assert {(r["src"], r["tgt"]) for r in found} == {
        ("en", "fr"), ("fr", "en"), ("en", "sw"), ("sw", "en")
    }  # fmt: skip
    first = found[0]["messages"]
    assert [m["role"] for m in first] == ["user", "assistant"]
    assert "Translate the following text from" in first[0]["content"]
    counts = manifest["counts"]
    steps = [sum(left.values()) for left in counts["steps"].values()]
    assert list(counts["steps"]) == ["format", "clean", "identify", "decontaminate", "dedup"]
    assert steps == sorted(steps, reverse=True)
    # every pair that went has a reason
    rejected = sum(sum(note["pairs"].values()) for note in counts["rejects"].values())
    assert sum(counts["input"].values()) - rejected == steps[-1]
    assert sum(counts["rejects"]["clean: copy of the source"]["pairs"].values()) >= 10
    assert sum(counts["rejects"]["dedup: exact duplicate"]["pairs"].values()) >= 7
    assert counts["rejects"]["decontaminate: in an evaluation set"]["pairs"]["en-sw"] >= 1
    assert all(len(note["samples"]) <= 20 for note in counts["rejects"].values())
    tokens = sum(d["tokens"] for d in counts["balance"].values())
    assert 0.95 * 20000 < tokens <= 20000
    # the low-resource pair gives all it has, or as much as the others
    assert counts["balance"]["en-sw"]["tokens"] >= 0.4 * counts["balance"]["en-fr"]["tokens"]
    report = (whole / "report.md").read_text()
    assert "English - Swahili" in report and "clean: copy of the source: " in report
    for picture in ("funnel.png", "lengths.png"):
        assert (whole / picture).read_bytes().startswith(b"\x89PNG")
    assert not (whole / ".work").exists()


def test_again_does_nothing_and_other_options_ask(whole, corpus, capsys):
    code, out, _ = run(capsys, recipe(corpus, whole.parent))
    assert code == 0 and "done already" in out
    code, _, err = run(capsys, recipe(corpus, whole.parent), "seed=1")
    assert code == 2 and "holds another recipe's result; --restart replaces it" in err
    code, out, _ = run(capsys, recipe(corpus, whole.parent), "workers=2", "engine=local")
    assert code == 0 and "done already" in out  # how, not what


def test_done_means_that_the_shards_are_there_and_whole(whole, corpus, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    path = recipe(corpus, whole.parent)
    again = ["prepare", str(path), f"output={out}"]
    assert cli.main(again) == 0
    assert "done already" in capsys.readouterr().out
    shard = out / "data-00001.parquet"
    content = shard.read_bytes()
    for damage, said in (
        (None, "missing, though manifest.json names it"),
        (content[:-1] + bytes([content[-1] ^ 1]), "its SHA-256 is not that of manifest.json"),
    ):
        shard.unlink(missing_ok=True)
        if damage is not None:
            shard.write_bytes(damage)
        assert cli.main(again) == 2
        err = capsys.readouterr().err
        assert f"{shard}: " in err and said in err and "--restart" in err and err.count("\n") == 1
    (out / "manifest.json").write_text("{")
    assert cli.main(again) == 2
    assert "manifest.json: damaged" in capsys.readouterr().err
    assert cli.main([*again, "--restart"]) == 0
    assert rows(out)[0] == rows(whole)[0]


def test_killed_before_its_mark_was_there(whole, corpus, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/..xplus-prepare.tmp").write_text("")
    (tmp_path / "out/.work/another").mkdir(parents=True)  # which came first once
    assert cli.main(["prepare", str(recipe(corpus, tmp_path))]) == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in whole.iterdir()}


def test_the_order_of_the_corpora_and_the_cut_into_parts_change_no_row(whole, corpus, tmp_path):
    path = recipe(corpus, tmp_path, part_pairs=33)
    assert cli.main(["prepare", str(path)]) == 0
    assert rows(tmp_path / "out")[0] == rows(whole)[0]
    tree = yaml.safe_load(path.read_text())
    tree["corpora"].reverse()
    path.write_text(yaml.safe_dump(tree))
    assert cli.main(["prepare", str(path), "--restart"]) == 0
    assert rows(tmp_path / "out")[0] == rows(whole)[0]


def test_the_small_recipe(tmp_path, monkeypatch, capsys):
    """recipes/prepare-small.yaml as it stands, on the catalogs that `make demo` makes."""
    django = pytest.importorskip("django", reason="its catalogs are the corpus")
    root = Path(__file__).parents[3]
    spec = importlib.util.spec_from_file_location("demo_assets", root / "recipes/demo_assets.py")
    assets = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(assets)
    monkeypatch.chdir(tmp_path)
    package = Path(django.__file__).parent
    assets.write_catalogs(package, ("fr", "sw"), Path("build/demo/locale"))
    code, out, err = run(capsys, root / "recipes/prepare-small.yaml", "workers=1")
    assert code == 0 and "build/prepared" in out, err
    _, found = rows("build/prepared")
    assert {r["src"] for r in found} == {"en", "fr", "sw"} and len(found) > 900


def test_pairs_either_way_round(tmp_path, capsys):
    """The same pair from two corpora, and a variant of it, whichever language comes first."""
    pair = (
        "The old mill by the river is closed.",
        "Le vieux moulin au bord de la rivi\u00e8re est ferm\u00e9.",
    )
    variant = (pair[0], pair[1].replace("ferm\u00e9", "fermer"))
    for name, order, pairs in (("a", ("en", "fr"), [pair]), ("b", ("fr", "en"), [pair, variant])):
        lines = [
            {code: dict(zip(("en", "fr"), p, strict=True))[code] for code in order} for p in pairs
        ]
        text = "".join(json.dumps({"translation": line}) + "\n" for line in lines)
        (tmp_path / f"{name}.jsonl").write_text(text)
    path = recipe(tmp_path, tmp_path, evaluation={"flores": []}, corpora=[
        {"path": str(tmp_path / "a.jsonl"), "languages": ["en", "fr"]},
        {"path": str(tmp_path / "b.jsonl"), "languages": ["fr", "en"]},
    ])  # fmt: skip
    code, _, err = run(capsys, path)
    assert code == 0, err
    rejects = json.loads((tmp_path / "out/manifest.json").read_text())["counts"]["rejects"]
    assert {k: v["pairs"] for k, v in rejects.items()} == {
        "dedup: exact duplicate": {"fr-en": 1},
        "dedup: near duplicate: same target": {"fr-en": 1},  # the English one, its target
    }


def test_quality_by_the_corpus_own_score(corpus, tmp_path):
    """A score equal to the threshold stays, one below goes, one that is not there stays."""
    lines = (corpus / "sw.jsonl").read_text().splitlines()[:12]
    for i in range(9):
        lines[i] = json.dumps({**json.loads(lines[i]), "score": (1.06, 1.05, 1.07)[i % 3]})
    file = tmp_path / "scored.jsonl"
    file.write_text("\n".join(lines) + "\n")
    options = {"corpora": [{"path": str(file)}], "clean": {"numbers": False}}
    options |= {"quality": {"method": "score", "threshold": 1.06}, "part_pairs": 5}
    assert cli.main(["prepare", str(recipe(corpus, tmp_path, **options))]) == 0
    counts, _, _ = results(tmp_path / "out")
    gone = counts["rejects"]["quality: low quality"]
    at = sorted(int(where.rpartition(":")[2]) for _, where, *_ in gone["samples"])
    assert at and set(at) <= {2, 5, 8} and gone["pairs"] == {"en-sw": len(at)}
    assert counts["steps"]["quality"]["en-sw"] == counts["steps"]["dedup"]["en-sw"] - len(at)


def test_the_trainer_reads_it_as_it_is(whole, tmp_path):
    from tests.assets import load_tokenizer, save_small_tokenizer
    from xplus_fast.config import DataConfig, Source
    from xplus_fast.data.corpus import load_corpus

    save_small_tokenizer(tmp_path / "tokenizer")
    data = DataConfig(pack_tokens=512, heldout=5, cache=str(tmp_path / "cache"))
    found = load_corpus(
        [Source(str(whole))], data, load_tokenizer(tmp_path / "tokenizer"), seed=0, show=False
    )
    held = {tag: {e.key for e in examples} for tag, examples in found.heldout.items()}
    assert set(held) == {"en-fr", "fr-en", "en-sw", "sw-en"} and len(held["en-fr"]) == 5
    assert held["en-fr"] == held["fr-en"]  # a pair is held out in both directions, or in none
    count = sum(len(row["lengths"]) for row in found.train)
    assert 0.95 * len(rows(whole)[1]) - 20 < count <= len(rows(whole)[1]) - 20


def test_a_pair_explained(corpus, tmp_path, capsys):
    path = recipe(corpus, tmp_path)
    arguments = (path, "--languages", "en-sw", "--explain")
    code, out, _ = run(
        capsys, *arguments, "Hello <b>there</b>, my friend.", "Habari, rafiki yangu."
    )
    assert code == 0 and "source becomes: Hello there, my friend." in out
    assert "so it stays, as" in out and "English source:" in out
    code, out, _ = run(capsys, *arguments, "Hello there.", "Hello there.")
    assert "clean          copy of the source" in out and "so it goes, at the step clean" in out
    sides = ("The weather is fine today.", "Il fait tr\u00e8s beau aujourd'hui.")
    code, out, _ = run(capsys, path, "--explain", *sides)
    assert code == 0 and "languages      English - French, as they look" in out
    code, _, err = run(capsys, path, "--explain", sides[0], "The weather is fine.")
    assert code == 2 and "both texts look like English" in err
    code, _, err = run(capsys, path, "--languages", "en-e!", "--explain", *sides)
    assert code == 2 and "--languages: 'e!': unknown language code" in err
    sides = ("Hello there, my friend.", "Zdravo, prijatelju moj.")
    code, out, _ = run(capsys, path, "--languages", "en-sr-Latn", "--explain", *sides)
    assert code == 0 and "English - Serbian (Latin)" in out and "so it stays" in out
    code, _, err = run(capsys, path, "--languages", "en-sw")
    assert code == 2 and "--languages: goes with --explain" in err


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("truncated", "django.fr.gz: not a whole gzip file"),
        ("lines", "has .* lines and .* has"),
        ("utf8", r"sw.jsonl:3: not UTF-8"),
        ("json", r"sw.jsonl:3: malformed JSON"),
    ],
)
def test_broken_files_stop_with_a_line_or_are_set_aside(corpus, tmp_path, capsys, damage, message):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for file in corpus.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    french, swahili = folder / "django.fr.gz", folder / "sw.jsonl"
    if damage == "truncated":
        french.write_bytes(french.read_bytes()[:-2000])
    elif damage == "lines":
        text = gzip.decompress(french.read_bytes())
        french.write_bytes(gzip.compress(text + b"one more\n"))
    else:
        lines = swahili.read_bytes().split(b"\n")
        lines[2] = b'{"translation": {"en": "\xff"}}' if damage == "utf8" else b'{"translation": '
        swahili.write_bytes(b"\n".join(lines))
    path = recipe(folder, tmp_path)
    code, _, err = run(capsys, path)
    assert code == 2 and err.count("\n") == 1
    import re

    assert re.search(message, err), err
    code, out, _ = run(capsys, path, "on_error=skip")
    assert code == 0 and "1 could not be read: quarantine.jsonl" in out
    line = json.loads((tmp_path / "out/quarantine.jsonl").read_text())
    assert re.search(message.replace(r"sw.jsonl:3: ", ""), f"{line['reason']} {line['detail']}")
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert sum(manifest["quarantined"].values()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"corpora": []}, "corpora: at least one is wanted"),
        ({"corpora": [{"path": "no/where.zip"}]}, "no/where.zip: no such file"),
        ({"corpora": [{"path": "x", "languages": ["en", "e!"]}]}, "corpora.0.languages: 'e!'"),
        (
            {"quality": {"method": "comet"}},
            "quality.method: one of auto, none, score, e5, cometkiwi",
        ),
        (
            {"quality": {"method": "none", "margin": 0.1}},
            "quality.margin: goes with method auto or e5, not none",
        ),
        ({"quality": {"method": "cometkiwi", "python": "no-such-python"}}, "quality.python: "),
        ({"instruct": {"prompts": ["{txt}"]}}, "instruct.prompts.0: only {src}, {tgt} and {text}"),
        ({"evaluation": {"files": ["no/flores"]}}, "evaluation.files: no/flores: no such file"),
        (
            {"balance": {"tokenizer": "no/folder"}},
            "balance.tokenizer: no/folder: its tokenizer cannot be loaded",
        ),
        ({"part_pairs": 0}, "part_pairs: at least 1 is wanted"),
        ({"sources": []}, "sources: unknown option"),
    ],
)
def test_bad_recipes_are_one_line(corpus, tmp_path, capsys, options, message):
    code, _, err = run(capsys, recipe(corpus, tmp_path, **options))
    assert code == 2 and message in err and err.count("\n") == 1


def test_a_folder_of_something_else_is_left_alone(corpus, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("mine")
    code, _, err = run(capsys, recipe(corpus, tmp_path), "--restart")
    assert code == 2 and "holds something else" in err
    assert os.listdir(tmp_path / "out") == ["thesis.txt"]


def test_a_full_disk_is_one_line(corpus, tmp_path, capsys, monkeypatch):
    from xplus_fast.data.preparation import parts

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(parts.pq, "write_table", full)
    code, _, err = run(capsys, recipe(corpus, tmp_path))
    assert code == 2 and "cannot be written (No space left on device)" in err
