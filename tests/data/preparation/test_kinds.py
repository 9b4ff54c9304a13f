"""Every kind of file that parallel corpora come in: read to the letter, or refused in one line."""

import bz2
import gzip
import json
import lzma
import sys
import zipfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import yaml

from tests.data.preparation.pairs import EN, PAIRS, SW, TMX, fault, lines, rows, texts
from xplus_fast.data.preparation.recipe import load_prepare_recipe
from xplus_fast.data.preparation.run import prepare
from xplus_fast.data.preparation.scripts import cyrillic
from xplus_fast.errors import UserError


def archive(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        for name, data in members.items():
            made.writestr(name, data)
    return path


# --- zips

GNOME = {"GNOME.en-sw.en": lines(*EN), "GNOME.en-sw.sw": lines(*SW)}
BESIDE = {
    "README": lines("See opus."), "README.txt": lines("See opus."), "LICENSE": lines("CC0"),
    "LICENSE.md": lines("CC0"), "GNOME.en-sw.ids": lines("a\tb", "c\td", "e\tf"),
    "GNOME.en-sw.xml": b"<cesAlign/>", "__MACOSX/._GNOME.en-sw.en": b"\0\5\26", ".DS_Store": b"\0",
    "__MACOSX/GNOME.en-sw.en": b"\0", "info.txt": b"about",
}  # fmt: skip


def test_a_zip_with_much_beside_the_texts(tmp_path: Path) -> None:
    path = archive(tmp_path / "en-sw.txt.zip", BESIDE | GNOME)
    assert texts(path) == PAIRS
    nested = {f"opus/v1/{name}": data for name, data in (GNOME | BESIDE).items()}
    found = rows(archive(path, nested))
    assert [row["where"] for row in found] == [f"{path}/opus/v1/GNOME.en-sw.en:{i}" for i in (1, 2)]
    assert {(r["source_language"], r["target_language"]) for r in found} == {("en", "sw")}


def test_a_zip_of_texts_that_end_in_txt(tmp_path: Path) -> None:
    members = {f"{name}.txt": data for name, data in GNOME.items()}
    assert texts(archive(tmp_path / "x.zip", BESIDE | members)) == PAIRS


def test_a_zip_with_two_corpora(tmp_path: Path) -> None:
    other = {"KDE4.en-fr.en": lines("Yes."), "KDE4.en-fr.fr": lines("Oui.")}
    path = archive(tmp_path / "x.zip", GNOME | other)
    assert texts(path) == [*PAIRS, ("Yes.", "Oui.")]
    assert rows(path)[2]["target_language"] == "fr"
    assert texts(path, subset="KDE4.en-fr") == [("Yes.", "Oui.")]
    assert texts(path, languages=["fr", "en"]) == [("Oui.", "Yes.")]
    assert "no two line-aligned members of 'JW'; found GNOME.en-sw.en" in fault(path, subset="JW")
    assert "no two line-aligned members in en and de; found" in fault(path, languages=["en", "de"])
    splits = {f"{s}.{c}": lines("a", "b") for s in ("train", "dev") for c in ("en", "sw")}
    path = archive(path, splits)
    assert "holds train, dev; `subset:` names the one to read" in fault(path)
    assert len(texts(path, subset="train")) == 2
    many = {f"x.{code}": lines("a") for code in ("en", "sw", "fr")}
    assert "has members in en, sw, fr; `languages: [en, sw]` chooses two" in fault(
        archive(path, many)
    )
    assert texts(path, languages=["sw", "fr"]) == [("a", "a")]


@pytest.mark.parametrize("short", ["GNOME.en-sw.en", "GNOME.en-sw.sw", "GNOME.en-sw.scores"])
@pytest.mark.parametrize("more", [0, 3])
def test_members_of_unequal_length_leave_nothing(short: str, more: int, tmp_path: Path) -> None:
    members = GNOME | {"GNOME.en-sw.scores": lines("1.1", "0.9")}
    members[short] = lines(*["1.0"] * more) if more else members[short].split(b"\n")[0] + b"\n"
    path = archive(tmp_path / "x.zip", members)
    said = fault(path)
    assert "is shorter than the other, which ends in" in said and "x.zip: GNOME.en-sw." in said
    recipe = prepare_recipe(tmp_path, {"path": str(path)}, on_error="skip")
    with pytest.raises(UserError, match="the corpora hold no pair that can be read"):
        prepare(recipe, show=False)


def test_of_two_corpora_the_whole_one_is_read(tmp_path: Path) -> None:
    short = {"Bible.en-sw.en": lines("a", "b"), "Bible.en-sw.sw": lines("a")}
    path = archive(tmp_path / "x.zip", short | GNOME)
    first, *others = rows(path)
    assert str(first).startswith(f"{path}/Bible.en-sw: a corpus that is not whole (")
    assert [(row["source"], row["target"]) for row in others] == PAIRS


def test_zips_that_cannot_be_read(tmp_path: Path) -> None:
    assert "no two line-aligned members; found nothing" in fault(archive(tmp_path / "x.zip", {}))
    alone = archive(tmp_path / "x.zip", {"x.en": lines("a"), "README": lines("b")})
    assert "no two line-aligned members; found x.en" in fault(alone)
    only_xml = {k: v for k, v in BESIDE.items() if k != "x"}
    assert "no two line-aligned members; found README" in fault(archive(alone, only_xml))
    empty = dict.fromkeys(GNOME, b"")
    assert "GNOME.en-sw.en is empty" in fault(archive(alone, empty))
    whole = archive(alone, GNOME).read_bytes()
    flags = bytearray(whole)
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # says that members are encrypted
        start = 0
        while (start := flags.find(mark, start)) >= 0:
            flags[start + at] |= 1
            start += 4
    alone.write_bytes(bytes(flags))
    assert "cannot be unpacked" in fault(alone)
    alone.write_bytes(b"no zip")
    assert "not a whole zip file" in fault(alone)


# --- lines, tables and records

COMPRESS = {
    "": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress,
    ".zst": lambda data: pyarrow.compress(data, "zstd", asbytes=True),
}  # fmt: skip


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_in_every_way(suffix: str, tmp_path: Path) -> None:
    def put(name: str, data: bytes) -> Path:
        path = tmp_path / f"{name}{suffix}"
        path.write_bytes(COMPRESS[suffix](data))
        return path

    sides = [put("x.en", lines(*EN)), put("x.sw", lines(*SW))]
    scores = put("x.scores", lines("1.1", "0.9"))
    assert texts(sides) == PAIRS
    assert [row["score"] for row in rows(sides, scores=str(scores))] == [1.1, 0.9]
    mined = put("WikiMatrix.en-sw.tsv", lines(*(f"1.01\t{a}\t{b}" for a, b in PAIRS)))
    assert texts(mined) == PAIRS
    records = put("x.jsonl", lines(*(json.dumps({"en": a, "sw": b}) for a, b in PAIRS)))
    assert texts(records) == PAIRS
    assert texts(put("x.csv", lines("en,sw", *(f"{a},{b}" for a, b in PAIRS)))) == PAIRS
    assert texts(put("x.tmx", TMX.encode())) == [PAIRS[0]]
    if suffix:
        path = put("y.tmx", TMX.encode())
        path.write_bytes(path.read_bytes()[:-6])
        assert f"y.tmx{suffix}: not a whole" in fault(path)


def test_scores_are_as_many_as_pairs(tmp_path: Path) -> None:
    sides = [tmp_path / "x.en", tmp_path / "x.sw"]
    for side, text in zip(sides, (EN, SW), strict=True):
        side.write_bytes(lines(*text))
    scores = tmp_path / "x.scores"
    for text, says in [(["1"], "fewer scores than there are pairs: 1 and 2"),
                       (["1"] * 3, "more scores than there are pairs: 3 and 2")]:  # fmt: skip
        scores.write_bytes(lines(*text))
        assert says in fault(sides, scores=str(scores))
    scores.write_bytes(lines("1", "nan"))
    assert str(rows(sides, scores=str(scores))[1]) == f"{scores}:2: not a score (nan)"


TABLES: dict[str, tuple[list[str], dict[str, Any], list[float | None]]] = {
    "eng_Latn-swh_Latn.tsv.gz": (["{a}\t{b}\t1.07\teng_Latn"], {}, [1.07]),
    "WikiMatrix.en-sw.tsv.gz": (["1.07\t{a}\t{b}"], {}, [1.07]),
    "en-sw.bitextf.tsv.gz": (["1.25\t{a}\t{b}"], {}, [1.25]),
    "en_sw.tsv": (["{a}\t{b}"], {}, [None]),
    "en-zh_TW.tsv": (["{a}\t{b}"], {"columns": {"en": 1, "sw": 2}}, [None]),
    "mined.tsv": (["1.5\t{a}\t{b}"], {"languages": ["en", "sw"]}, [1.5]),
    "named.tsv": (["sw\ten\tscore", "{b}\t{a}\t0.5"], {"languages": ["en", "sw"]}, [0.5]),
    "aliases.en-sw.tsv": (["source\ttarget", "{a}\t{b}"], {}, [None]),
    "names.tsv": (["English\tSwahili", "{a}\t{b}"], {}, [None]),
    "columns.tsv": (["x\ty\tz", "9\t{a}\t{b}"],
                    {"columns": {"score": "x", "src": "y", "tgt": "z"}, "languages": ["en", "sw"]},
                    [9.0]),
    "numbers.tsv": (["id1\t{a}\t{b}\t0.7"], {"columns": {"en": 2, "sw": 3, "score": 4}}, [0.7]),
    "x.csv": (["en,sw,laser_score", '"{a}",{b},1.2'], {}, [1.2]),
    "columns.csv": (["Quelle;Ziel", "{a};{b}"],
                    {"columns": {"en": "Quelle", "sw": "Ziel"}}, [None]),
    "x.jsonl": (['{{"s": "{a}", "t": "{b}", "bicleaner": 0.6}}'],
                {"columns": {"src": "s", "tgt": "t", "score": "bicleaner"},
                 "languages": ["en", "sw"]}, [0.6]),
    "own.jsonl": (['{{"src": "{a}", "tgt": "{b}", "src_lang": "eng", "tgt_lang": "swh"}}'],
                  {}, [None]),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_a_table_or_records_with_other_names(name: str, tmp_path: Path) -> None:
    template, options, scores = TABLES[name]
    data = lines(*(line.format(a=EN[0], b=SW[0]) for line in template))
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    found = rows(path, **options)
    assert [(r["source"], r["target"], r["score"]) for r in found] == [(EN[0], SW[0], *scores)]
    assert (found[0]["source_language"], found[0]["target_language"]) == ("en", "sw")


def test_records_with_other_names_in_parquet(tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist([{"a": a, "b": b, "n": 1} for a, b in PAIRS])
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    assert texts(tmp_path / "x.parquet", columns={"en": "a", "sw": "b"}) == PAIRS


BAD_TABLES: list[tuple[str, list[str], dict[str, Any], str]] = [
    ("x.jsonl", ['{"a": "x", "b": "y"}'], {"columns": {"en": "a", "sw": "c"}},
     "x.jsonl:1: columns: no c in a, b"),
    ("x.tsv", ["a\tb"], {}, "x.tsv: its name tells no languages; give languages: [en, sw]"),
    ("x.csv", ["en,sw", "a"], {}, "a row with more or fewer columns (2 are wanted, found 1)"),
    ("x.csv", ["source,target", "a,b"], {}, "nothing tells the languages of src and tgt"),
    ("x.csv", ["en,sw,score", "a,b,good"], {}, "x.csv:2: not a score (good)"),
    ("x.csv", ["title,body", "a,b"], {}, "expected two languages"),
    ("en-sw.tsv", ["a"], {}, "en-sw.tsv:1: missing columns (source, target, score are wanted"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "options", "says"), BAD_TABLES, ids=lambda v: str(v)[:30])
def test_a_table_that_cannot_be_used(
    name: str, text: list[str], options: dict[str, Any], says: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(lines(*text))
    recipe = prepare_recipe(tmp_path, {"path": str(tmp_path / name), **options})
    with pytest.raises(UserError) as e:
        prepare(recipe, show=False)
    assert says in str(e.value) and "\n" not in str(e.value)


# --- scripts


@pytest.mark.parametrize(
    ("latin", "expected"),
    [
        ("Dan, ljudi!", "\u0414\u0430\u043d, \u0459\u0443\u0434\u0438!"),
        ("NJEGO\u0160", "\u040a\u0415\u0413\u041e\u0428"),
        ("Njego\u0161", "\u040a\u0435\u0433\u043e\u0448"),
        ("d\u017eep", "\u045f\u0435\u043f"),
        ("injekcija", "\u0438\u043d\u0458\u0435\u043a\u0446\u0438\u0458\u0430"),
        ("nad\u017eiveti", "\u043d\u0430\u0434\u0436\u0438\u0432\u0435\u0442\u0438"),
        ("\u0110or\u0111e", "\u0402\u043e\u0440\u0452\u0435"),
        ("Otvori Windows", "\u041e\u0442\u0432\u043e\u0440\u0438 Windows"),
        ("www.rts.rs i %(ime)s", "www.rts.rs \u0438 %(ime)s"),
        ("Petar II", "\u041f\u0435\u0442\u0430\u0440 II"),
        ("\u041f\u0435\u0442\u0430\u0440 IBM", "\u041f\u0435\u0442\u0430\u0440 IBM"),
    ],
)  # fmt: skip
def test_serbian_in_cyrillic(latin: str, expected: str) -> None:
    assert cyrillic(latin) == expected


def test_scripts_are_converted_where_the_recipe_asks(tmp_path: Path) -> None:
    sr = archive(tmp_path / "en-sr.zip", {"x.en-sr.en": lines("Day."), "x.en-sr.sr": lines("Dan.")})
    asked: dict[str, Any] = {"languages": ["en", "sr_Latn"]}
    (row,) = rows(sr, **asked)
    assert (row["target"], row["target_language"]) == ("Dan.", "sr_Latn")
    (row,) = rows(sr, **asked, convert={"sr_Latn": "sr"})
    assert (row["target"], row["target_language"]) == ("\u0414\u0430\u043d.", "sr")
    zh = tmp_path / "zh.csv"
    zh.write_text("en,zh-TW\nHair and growth,\u982d\u9aee\u8207\u767c\u5c55\n", "utf-8")
    (row,) = rows(zh, convert={"zh_TW": "zh"})
    assert (row["target"], row["target_language"]) == ("\u5934\u53d1\u4e0e\u53d1\u5c55", "zh")
    assert rows(zh)[0]["target_language"] == "zh_Hant"
    both = archive(tmp_path / "x.zip", {"x.sr_Latn": lines("Dan."), "x.sr": lines("Dan.")})
    (same,) = rows(both, convert={"sr_Latn": "sr"})
    assert str(same) == f"{both}/x.sr_Latn:1: one language twice (sr)"


def test_options_that_a_format_does_not_have(tmp_path: Path) -> None:
    path = archive(tmp_path / "x.zip", GNOME)
    said = fault(path, columns={"en": "a", "sw": "b"})
    assert said == f"{path}: columns: goes with translation, hub, not with moses"
    assert "scores: goes with lines, not with moses" in fault(path, scores="x")
    (tmp_path / "x.tmx").write_text(TMX)
    assert "subset: goes with translation, hub, moses, not with tmx" in fault(
        tmp_path / "x.tmx", subset="a"
    )


def test_a_conversion_that_is_not_installed_is_told_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "opencc", None)
    with pytest.raises(UserError, match=r"convert: to zh: needs opencc: pip install 'xplus-fast"):
        prepare_recipe(tmp_path, {"path": "x.csv", "convert": {"zh_Hant": "zh"}})
    prepare_recipe(tmp_path, {"path": "x.csv", "convert": {"sr_Latn": "sr"}})


# --- recipes


def prepare_recipe(folder: Path, *corpora: dict[str, Any], **options: Any) -> Any:
    tree = {"output": str(folder / "out"), "corpora": list(corpora), "workers": 1,
            "evaluation": {"flores": []}, **options}  # fmt: skip
    (folder / "prepare.yaml").write_text(yaml.safe_dump(tree))
    return load_prepare_recipe(folder / "prepare.yaml")


BAD_OPTIONS = [
    ({"columns": {"source": "a"}}, "corpora.0.columns.source: unknown"),
    ({"convert": {"sr": "en"}}, "corpora.0.convert: sr: en: not known; known: sr_Latn: sr"),
    ({"convert": {"xx_Y": "sr"}}, "unknown language code"),
    ({"steps": {"dedup": {}}}, "corpora.0.steps.dedup: not a step of one corpus; known: format"),
    ({"steps": {"quality": {"treshold": 1}}}, "corpora.0.steps.quality.treshold: unknown option"),
    ({"steps": {"quality": {"threshold": "high"}}}, "corpora.0.steps.quality.threshold: a number"),
    (
        {"steps": {"quality": {"margin": 0, "method": "score"}}},
        "corpora.0.steps.quality.margin: goes with method auto or e5",
    ),
]


@pytest.mark.parametrize(("options", "says"), BAD_OPTIONS, ids=lambda v: str(v)[:40])
def test_options_that_fit_nothing(options: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as e:
        prepare_recipe(tmp_path, {"path": "x.csv", **options})
    assert says in str(e.value) and "\n" not in str(e.value)


ANIMALS = dict(cat="paka", dog="mbwa", bird="ndege", horse="farasi", goat="mbuzi", fish="samaki",
               lion="simba", snake="nyoka", mouse="panya", cow="ng'ombe")  # fmt: skip


def test_each_corpus_has_its_own_threshold_and_options(tmp_path: Path) -> None:
    """LASER's 1.06 and Bicleaner's 0.5 in one recipe; one whose texts are too long for it."""
    corpora: list[dict[str, Any]] = []
    for i, (name, top, steps) in enumerate([
        ("laser", 1.0, {"quality": {"threshold": 1.06}}),
        ("bicleaner", 0.4, {"quality": {"threshold": 0.5}}),
        ("long", 0.4, {"clean": {"max_characters": 10}, "quality": {"method": "none"}}),
        ("unscored", 0.4, {"quality": {"method": "none"}}),
    ]):  # fmt: skip
        text = ["en,sw,score"]
        for n, (a, b) in enumerate(ANIMALS.items()):
            pair = f"The {a} sleeps in house {i}{n}7.,Leo {b} analala nyumba {i}{n}7."
            text.append(f"{pair},{top + n / 50:.2f}")
        (tmp_path / f"{name}.csv").write_bytes(lines(*text))
        corpora.append({"path": str(tmp_path / f"{name}.csv"), "name": name, "steps": steps})
    recipe = prepare_recipe(
        tmp_path, *corpora, quality={"method": "score", "threshold": 0.0},
        identify={"margin": 1e6}, dedup={"near": -1, "near_one": -1},
    )  # fmt: skip
    prepare(recipe, show=False)
    counts = json.loads((tmp_path / "out" / "manifest.json").read_text())["counts"]
    gone = {reason: note["pairs"]["en-sw"] for reason, note in counts["rejects"].items()}
    # below their thresholds: 1.00 to 1.04 of LASER's, 0.40 to 0.48 of Bicleaner's
    assert gone == {"clean: source: too long": 10, "quality: low quality": 3 + 5}
    assert counts["steps"]["quality"] == {"en-sw": 7 + 5 + 10}


# --- encodings, nested keys, numbers of sentences


@pytest.mark.parametrize("order", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["x.tsv", "x.csv", "x.jsonl", "x.en-sw.tsv.gz"])
def test_texts_in_utf_16(name: str, order: str, tmp_path: Path) -> None:
    said = [("caf\u00e9 \u2028", "\U0001f600 \u0a0d")]  # bytes of ends of lines within characters
    if name == "x.jsonl":
        text = "".join(json.dumps({"en": a, "sw": b}, ensure_ascii=False) + "\n" for a, b in said)
    else:
        separator = "," if name == "x.csv" else "\t"
        head = "" if "en-sw" in name else f"en{separator}sw\r\n"
        text = head + "".join(f"{a}{separator}{b}\r\n" for a, b in said * 20_000)
        said = said * 20_000
    path, pack = tmp_path / name, gzip.compress if name.endswith(".gz") else bytes
    path.write_bytes(pack(("\ufeff" + text).encode(order)))
    assert texts(path) == said
    path.write_bytes(pack("en\tsw\nA\tB\n".encode(order)))  # without its mark
    assert f"{path}:1: no text in UTF-8, nor in UTF-16 with its mark" in fault(path)


def test_zips_in_utf_16(tmp_path: Path) -> None:
    members = {name: data.decode().encode("utf-16") for name, data in GNOME.items()}
    assert texts(archive(tmp_path / "x.zip", members)) == PAIRS


def test_keys_in_keys(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    record = {"data": {"en": EN[0], "more": {"sw": SW[0]}}, "data.x": "left", "id": 3}
    path.write_text(json.dumps(record) + "\n")
    assert texts(path, columns={"en": "data.en", "sw": "data.more.sw"}) == [PAIRS[0]]
    assert texts(path, columns={"en": "data.x", "sw": "data.more.sw"}) == [("left", SW[0])]
    said = fault(path, columns={"en": "data.en", "sw": "data.sw"})
    assert "columns: no data.sw in data, data.x, id" in said


def test_what_the_first_lines_tell_of_columns(tmp_path: Path) -> None:
    """A number may be a text: then the next line tells."""
    path = tmp_path / "WikiMatrix.en-sw.tsv"
    path.write_text("1.25\tIn 5\t7\n1.2\tYes\tNdiyo\n")
    assert [(r["source"], r["target"]) for r in rows(path)] == [("In 5", "7"), ("Yes", "Ndiyo")]
    assert [r["score"] for r in rows(path)] == [1.25, 1.2]
    path = tmp_path / "Tatoeba.en-sw.tsv"
    path.write_text("12\tYes.\t99\tNdiyo.\n13\tNo.\t98\tHapana.\n")
    assert texts(path) == [("Yes.", "Ndiyo."), ("No.", "Hapana.")]
