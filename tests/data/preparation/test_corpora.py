"""Corpora in the formats in which they are distributed, whole and broken."""

import gzip
import json
import re
import zipfile

import pytest

from xplus_fast.data.files import Rejected
from xplus_fast.data.languages import canonical, code_of, codes_of, languages_of_name
from xplus_fast.data.preparation.corpora import corpus_format, read_corpus
from xplus_fast.data.preparation.parts import evaluation_lines
from xplus_fast.data.preparation.recipe import Corpus
from xplus_fast.data.steps.format import FormatOptions, tidy
from xplus_fast.errors import UserError

PAIRS = [("Hello there.", "Habari yako."), ("Good morning.", "Habari za asubuhi.")]


def read(path, **options):
    path = [str(p) for p in path] if isinstance(path, list) else str(path)
    return list(read_corpus(Corpus(path, **options)))


def texts(rows):
    assert not any(isinstance(row, Rejected) for row in rows), rows
    return [(row["source"], row["target"]) for row in rows]


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ("sw swh_Latn swa SW swh", "sw"), ("zh zh-CN zho_Hans cmn zh_Hans", "zh"),
        ("zh-TW zho_Hant zh_Hant", "zh_Hant"), ("sr srp srp_Cyrl sr-Cyrl", "sr"),
        ("sr_Latn srp_Latn sr-Latn", "sr_Latn"), ("ar arb_Arab ara", "ar"),
        ("fr fra fra_Latn fr-CA", "fr"), ("ja jpn_Jpan", "ja"), ("bn ben_Beng", "bn"),
    ],
)  # fmt: skip
def test_all_spellings_of_a_language_are_one(codes, expected):
    assert {canonical(code) for code in codes.split()} == {expected}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("WikiMatrix.en-sw.tsv.gz", "en sw"), ("eng_Latn-swh_Latn.gz", "eng_Latn swh_Latn"),
        ("en-zh_TW.tsv", "en zh_TW"), ("x.en-zh_cn.csv", "en zh_cn"), ("x.en_sw.csv", "en sw"),
        ("en-fr-train.jsonl", "en fr"), ("en-ckb.tsv", "en ckb"), ("my-data.csv", ""),
        ("pre-val.csv", ""), ("to-do.csv", ""), ("en-en.csv", ""), ("en-fr.en-sw.csv", ""),
    ],
)  # fmt: skip
def test_what_a_name_says_of_languages(name, expected):
    assert " ".join(languages_of_name(name)) == expected


@pytest.mark.parametrize(
    ("direction", "expected"),
    [
        ("en-sw", "en sw"), ("en-zh-Hant", "en zh-Hant"), ("sr-Latn-en", "sr-Latn en"),
        ("zh-Hant-sr-Latn", "zh-Hant sr-Latn"), ("en-fr-CA", "en fr-CA"), ("en-zh_TW", "en zh_TW"),
        ("pt-BR-en", "pt-BR en"), ("en", "en"), ("en-sw-fr", "en sw fr"), ("en-", "en "),
    ],
)  # fmt: skip
def test_the_codes_of_a_direction(direction, expected):
    assert " ".join(codes_of(direction)) == expected


@pytest.mark.parametrize("name", ["h\0i\0", "\0e\0n", "\x01", "\ud800"])
def test_names_that_are_no_languages(name):
    assert code_of(name) is None


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "x.tsv", "x.jsonl.gz", "x.txt"])
def test_evaluation_sets_in_every_form(tmp_path, name):
    """Escapes, quotes and columns are none of their texts; names of domains are no lines."""
    said = ['The caf\u00e9 is "old".', "Mkahawa ni wa zamani."]
    if "json" in name:
        record = {"lp": "en-sw", "domain": "news", "all": {"source": said[0], "target": [said[1]]}}
        data = json.dumps([record] if name == "x.json" else record)
    elif name == "x.csv":
        data = f'"{said[0].replace(chr(34), chr(34) * 2)}",{said[1]},news\n'
    else:
        data = "\n".join(said) if name == "x.txt" else "\t".join([*said, "news"]) + "\n"
    path = tmp_path / name
    path.write_bytes(gzip.compress(data.encode()) if name.endswith(".gz") else data.encode())
    assert list(evaluation_lines(path)) == said
    path.write_bytes(b"\xff" + path.read_bytes())
    said = "not a whole gzip file" if name.endswith(".gz") else "not UTF-8"
    with pytest.raises(UserError, match=f"{re.escape(str(path))}.*{said}"):
        list(evaluation_lines(path))


def test_unknown_languages_are_refused():
    with pytest.raises(UserError, match="'xx_Yyyy': unknown language code"):
        canonical("xx_Yyyy")


def write_lines(path, lines):
    text = "".join(line + "\n" for line in lines)
    opened = gzip.open(path, "wt", encoding="utf-8") if path.suffix == ".gz" else open(path, "w")
    with opened as f:
        f.write(text)
    return path


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_line_aligned_files_with_scores(tmp_path, suffix):
    sides = [
        write_lines(tmp_path / f"x.{code}{suffix}", side)
        for code, side in zip(("eng_Latn", "swh_Latn"), zip(*PAIRS, strict=True), strict=True)
    ]
    assert texts(read(sides)) == PAIRS
    scores = write_lines(tmp_path / f"x.scores{suffix}", ["1.07", "0.5"])
    rows = read(sides, scores=str(scores))
    assert [row["score"] for row in rows] == [1.07, 0.5]
    assert {(row["source_language"], row["target_language"]) for row in rows} == {("en", "sw")}
    assert rows[1]["where"] == f"{sides[0]}:2"
    write_lines(scores, ["1.07"])
    with pytest.raises(UserError, match="fewer scores than there are pairs"):
        read(sides, scores=str(scores))
    write_lines(scores, ["1.07", "high"])
    assert str(read(sides, scores=str(scores))[1]).endswith(
        "x.scores" + suffix + ":2: not a score (high)"
    )
    write_lines(sides[1], ["one line"])
    with pytest.raises(UserError, match="has 2 lines and .* has 1"):
        read(sides)


def moses(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, lines in members.items():
            data = (
                "".join(line + "\n" for line in lines) if isinstance(lines, list | tuple) else lines
            )
            archive.writestr(name, data)
    return path


def test_an_opus_zip(tmp_path):
    english, swahili = zip(*PAIRS, strict=True)
    members = {"README": ["See www.opus.example."], "LICENSE": ["CC0"],
               "GNOME.en-sw.en": english, "GNOME.en-sw.sw": swahili}  # fmt: skip
    path = moses(tmp_path / "en-sw.txt.zip", members)
    rows = read(path)
    assert texts(rows) == PAIRS and rows[0]["score"] is None
    assert rows[1]["where"] == f"{path}/GNOME.en-sw.en:2"
    moses(path, {**members, "GNOME.en-sw.scores": ["0.9", "0.8"]})
    assert [row["score"] for row in read(path)] == [0.9, 0.8]
    moses(path, {**members, "GNOME.en-sw.sw": swahili[:1]})
    with pytest.raises(UserError, match="GNOME.en-sw.sw is shorter than the other, .*:2"):
        read(path)
    moses(path, {**members, "GNOME.en-sw.sw": b"good\n\xff\xfe\n"})
    rows = read(path)
    assert rows[0]["target"] == "good" and str(rows[1]).endswith(
        ".sw:2: not UTF-8 (byte 1 of the line)"
    )
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="not a whole zip file"):
        read(path)


def test_mined_bitext(tmp_path):
    path = write_lines(
        tmp_path / "eng_Latn-swh_Latn.gz",
        [
            "Hello there.\tHabari yako.\t1.07\teng_Latn\tswh_Latn\tx\ty\tz\tw",
            "only\ttwo",
            "a\tb\tc",
        ],
    )
    first, short, unscored = read(path)
    assert (first["source"], first["target"], first["score"]) == (*PAIRS[0], 1.07)
    assert (first["source_language"], first["target_language"]) == ("en", "sw")
    assert str(short) == f"{path}:2: missing columns (source, target, score are wanted, found 2)"
    assert str(unscored) == f"{path}:3: not a score (c)"
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(UserError, match="not a whole gzip file"):
        read(path)
    other = write_lines(tmp_path / "mined.tsv", ["a\tb\t1"])
    with pytest.raises(UserError, match="its name tells no languages"):
        read(other)
    assert texts(read(other, languages=["en", "sw"])) == [("a", "b")]


def test_records_and_catalogs(tmp_path):
    import datasets

    records = [{"translation": {"en": a, "sw": b}, "score": 0.5} for a, b in PAIRS]
    jsonl = write_lines(tmp_path / "x.jsonl", [json.dumps(r) for r in records])
    assert texts(read(jsonl)) == PAIRS and read(jsonl)[0]["score"] == 0.5
    datasets.Dataset.from_list(records).to_parquet(tmp_path / "x.parquet")
    assert texts(read(tmp_path / "x.parquet")) == PAIRS
    assert len(read(jsonl, limit=1)) == 1
    folder = tmp_path / "locale/sw/LC_MESSAGES"
    folder.mkdir(parents=True)
    (folder / "django.po").write_text('msgid ""\nmsgstr ""\n\nmsgid "Yes"\nmsgstr "Ndiyo"\n')
    assert texts(read(tmp_path / "locale")) == [("Yes", "Ndiyo")]
    same = write_lines(
        tmp_path / "same.jsonl", [json.dumps({"translation": {"en": "a", "eng": "b"}})]
    )
    assert "one language twice" in str(read(same)[0])


def test_records_that_cannot_be_used_come_back_in_their_place(tmp_path):
    records = ['{"translation": {"en": "Yes.", "xx_Yyyy": "?"}}',
               '{"en": "\\ud83d \\ud83d\\ude00", "sw": "Ndiyo."}',
               '{"en": "No.", "sw": "Hapana."}']  # fmt: skip
    path = write_lines(tmp_path / "x.jsonl", records)
    unknown, surrogate, good = read(path)
    assert str(unknown).startswith(f"{path}:1: odd languages ('xx_Yyyy': unknown language code")
    assert str(surrogate) == f"{path}:2: a lone surrogate"
    assert good["target"] == "Hapana."
    with pytest.raises(UserError, match="'xx_Yyyy': unknown language code"):
        read(path, languages=["en", "xx_Yyyy"])


def test_a_data_set_of_the_hub(tmp_path, monkeypatch):
    """By its loader, on a local folder: what `load_dataset` does with an id it does with a path."""
    rows = [{"translation": {"en": a, "sw": b}} for a, b in PAIRS]
    write_lines(tmp_path / "train.jsonl", [json.dumps(r) for r in rows])
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert texts(read(tmp_path, format="hub")) == PAIRS
    with pytest.raises(UserError, match="nowhere/at-all: cannot be loaded from the hub"):
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        read("nowhere/at-all", format="hub")


TMX = """<?xml version="1.0"?>
<tmx version="1.4"><header srclang="en"/><body>
<tu><tuv xml:lang="en"><seg>Hello <b>there</b>.</seg></tuv>
<tuv xml:lang="sw-KE"><seg>Habari yako.</seg></tuv></tu>
<tu><tuv xml:lang="en"><seg>Alone.</seg></tuv></tu>
</body></tmx>"""


def test_words_between_inline_codes_stay(tmp_path):
    """Native codes of TMX go in the reader or in the first step; what is no code is text."""
    coded = 'Press <bpt i="1">{\\b </bpt>%s<ept i="1">}</ept> <ph x="1">%s</ph> <hi>%s</hi>.'
    inner = (("Start", "twice", "now"), ("Anza", "mara mbili", "sasa"))
    memory = TMX
    for old, words in zip(("Hello <b>there</b>.", "Habari yako."), inner, strict=True):
        memory = memory.replace(old, coded % words)
    row = read(write_lines(tmp_path / "x.tmx", [memory]))[0]
    texts = [tidy(row[side], FormatOptions()) for side in ("source", "target")]
    assert texts == ["Press Start twice now.", "Press Anza mara mbili sasa."]
    as_text = (coded % inner[0]).replace("<ph", "<x/><ph").replace("twice", "{\\i}")
    assert tidy(as_text, FormatOptions()) == "Press Start now."


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_translation_memories(tmp_path, suffix):
    path = write_lines(tmp_path / f"x.tmx{suffix}", [TMX])
    good, alone = read(path)
    assert (good["source"], good["target"], good["target_language"]) == (*PAIRS[0], "sw")
    assert str(alone) == f"{path}: unit 2: not two languages (found en)"
    write_lines(path, [TMX.replace("</body>", "")])
    with pytest.raises(UserError, match=r"x.tmx.*:\d+: not valid TMX"):
        read(path)
    bomb = '<!DOCTYPE t [<!ENTITY a "aaaa">]>'
    write_lines(path, [TMX.replace("<tmx", bomb + "<tmx")])
    with pytest.raises(UserError, match="declares entities"):
        read(path)


def test_what_no_name_tells(tmp_path):
    (tmp_path / "x.dat").write_text("x")
    with pytest.raises(UserError, match="its name does not tell the format"):
        corpus_format(Corpus(str(tmp_path / "x.dat")))
    with pytest.raises(UserError, match="a data set of the hub needs format: hub"):
        corpus_format(Corpus("Helsinki-NLP/opus-100"))
    with pytest.raises(UserError, match="no such file"):
        corpus_format(Corpus(str(tmp_path / "nowhere.zip")))
