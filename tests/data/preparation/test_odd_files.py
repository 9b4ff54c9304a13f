"""Files that are broken in odd ways, or hold more than is read: one line says it, nothing slips."""

import json
import lzma
import zipfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tests.data.preparation.pairs import EN, PAIRS, SW, fault, lines, rows, texts
from tests.data.preparation.runs import recipe, run
from xplus_fast.data.records import check_columns
from xplus_fast.errors import UserError


def test_a_zip_whose_member_is_damaged(tmp_path: Path) -> None:
    """By LZMA, whose errors are not zipfile's own."""
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as made:
        made.writestr("a.en-sw.en", lines(*EN))
        made.writestr("a.en-sw.sw", lines(*SW))
    assert texts(path) == PAIRS
    damaged = bytearray(path.read_bytes())
    for at in range(50, 60):
        damaged[at] ^= 0xFF
    path.write_bytes(bytes(damaged))
    with pytest.raises(lzma.LZMAError), zipfile.ZipFile(path) as made:
        made.read("a.en-sw.en")
    assert fault(path).startswith(f"{path}: not a whole zip file (")


def test_lines_that_end_as_on_old_machines(tmp_path: Path) -> None:
    paths = [tmp_path / "x.en", tmp_path / "x.sw"]
    for path, side in zip(paths, (EN, SW), strict=True):
        path.write_bytes("\r".join(side).encode() + b"\r")
    assert "x.en:1: its lines end in \\r alone" in fault(paths)
    catalog = tmp_path / "x.po"
    catalog.write_bytes(CATALOG.replace("\n", "\r").encode())
    assert texts(catalog, languages=["en", "sw"]) == [('Hello "there".', "Habari yako.\\")]
    listed = tmp_path / "x.json"  # where no line counts
    listed.write_bytes(b'[\r{"en": "Hello there.",\r "sw": "Habari yako."}\r]')
    assert texts(listed) == PAIRS[:1]
    # within a line it is an odd character, and at the end of a file there may be no end of a line
    paths[0].write_bytes(b"Hello\rthere.\nGood morning.")
    paths[1].write_bytes(b"Habari yako.\r\nHabari za asubuhi.\r")
    assert texts(paths) == [("Hello\rthere.", SW[0]), ("Good morning.", SW[1])]


def test_one_file_is_no_pair(tmp_path: Path) -> None:
    path = tmp_path / "x.en"
    path.write_bytes(lines(*EN))
    link = tmp_path / "x.sw"
    link.symlink_to(path)
    for both in ([path, path], [path, link]):
        assert fault(both, languages=["en", "sw"]) == f"{path}: is both files of the pair"


def test_mined_bitext_with_addresses(tmp_path: Path) -> None:
    """Five columns that nothing tells apart; the recipe does."""
    path = tmp_path / "crawl.en-sw.tsv"
    path.write_bytes(lines("http://a.example\thttp://b.example\t" + "\t".join(PAIRS[0]) + "\t0.9"))
    assert "5 columns, and neither the first nor the third has scores; `columns:" in fault(path)
    (row,) = rows(path, columns={"en": 3, "sw": 4, "score": 5})
    assert (row["source"], row["target"], row["score"]) == (*PAIRS[0], 0.9)
    # a line that slipped is one, where others tell
    slipped = "a\tslipped\ttext\t1.1"
    path.write_bytes(lines(slipped, "\t".join(PAIRS[0]) + "\t1.2"))
    first, second = rows(path)
    assert str(first) == f"{path}:1: not a score (text)" and second["target"] == PAIRS[0][1]


@pytest.mark.parametrize("value", [None, 5, ["b"], {"text": "b"}, b"b", True])
def test_texts_that_are_none(value: Any, tmp_path: Path) -> None:
    """The reason names the key and what it holds."""
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"en": ["a"], "sw": [value]}), path)
    (row,) = rows(path)
    assert f"(sw: text is wanted, found {value!r})" in str(row)
    if not isinstance(value, bytes):
        path = tmp_path / "x.jsonl"
        path.write_bytes(lines(json.dumps({"en": "a", "sw": value}), '{"en": "c", "sw": "d"}'))
        first, second = rows(path)
        assert f"{path}:1: " in str(first) and f"(sw: text is wanted, found {value!r})" in str(
            first
        )
        assert (second["source"], second["target"]) == ("c", "d")


def test_a_score_that_is_a_yes(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(lines('{"en": "a", "sw": "b", "score": true}'))
    assert [str(row) for row in rows(path)] == [f"{path}:1: not a score (True)"]


def test_a_column_that_is_named_twice() -> None:
    for columns in ({"en": "a", "sw": "a"}, {"en": 1, "sw": 1, "score": 2}):
        with pytest.raises(UserError, match=r"corpora\.0\.columns: (a|1) is named twice"):
            check_columns(columns, "corpora.0.columns")
    check_columns({"en": "a", "sw": "b"}, "corpora.0.columns")


CATALOG = 'msgid "Hello \\"there\\"."\nmsgstr ""\n"Habari "\n"yako.\\\\"\n'


def test_a_catalog_whose_text_does_not_end(tmp_path: Path) -> None:
    path = tmp_path / "x.po"
    path.write_text(CATALOG)
    asked: dict[str, Any] = {"languages": ["en", "sw"]}
    assert texts(path, **asked) == [('Hello "there".', "Habari yako.\\")]
    for cut, line in (('Hello \\"there\\".', 1), ("yako.\\\\", 4)):
        path.write_text(CATALOG.replace(f'{cut}"', cut))
        assert f"x.po:{line}: a text without its closing quotation mark" in fault(path, **asked)


XLIFF = """<xliff version="{}" xmlns="urn:oasis:names:tc:xliff:document:{}"
 srcLang="en" trgLang="sw"><file source-language="en" target-language="sw">{}</file></xliff>"""
UNIT = (
    '<trans-unit id="1"{}><source>Hello there.</source><target{}>Habari yako.</target></trans-unit>'
)
SEGMENT = (
    '<unit id="1"{}><segment{}><source>Hello there.</source><target>Habari yako.</target></segment>'
    "</unit>"
)


@pytest.mark.parametrize(
    ("unit", "of_target", "read"),
    [
        ("", "", True), ("", ' state="translated"', True), ("", ' state="final"', True),
        ("", ' state="needs-review-translation"', True),
        ("", ' state="needs-adaptation"', True), (' translate="yes"', "", True),
        ("", ' state="new"', False), ("", ' state="needs-translation"', False),
        ("", ' state="initial"', False), (' translate="no"', "", False),
    ],
)  # fmt: skip
def test_units_that_nobody_translated(
    unit: str, of_target: str, read: bool, tmp_path: Path
) -> None:
    path = tmp_path / "x.xlf"
    for version, made in (
        ("1.2", "<body>" + UNIT.format(unit, of_target) + "</body>"),
        ("1.2", f"<body><group{unit}>" + UNIT.format("", of_target) + "</group></body>"),
        ("2.0", SEGMENT.format(unit, of_target)),
    ):
        path.write_text(XLIFF.format(version, version, made))
        assert texts(path) == ([PAIRS[0]] if read else []), made


def test_a_unit_to_translate_in_a_group_that_is_not(tmp_path: Path) -> None:
    path = tmp_path / "x.xlf"
    for unit, read in ((' translate="yes"', True), ("", False)):
        group = f'<group translate="no">{UNIT.format(unit, "")}</group>'
        path.write_text(XLIFF.format("1.2", "1.2", f"<body>{group}</body>"))
        assert texts(path) == ([PAIRS[0]] if read else [])


def test_a_folder_with_files_that_are_not_read(tmp_path: Path, capsys) -> None:
    """The manifest has those as what they are, and the report says it."""
    folder = tmp_path / "folder"
    folder.mkdir()
    made = [f"{{\"en\": \"The mill has {n} old doors.\", \"sw\": \"Kinu lina milango {n} ya"
            f" zamani.\"}}" for n in range(200, 240)]  # fmt: skip
    (folder / "train.jsonl").write_bytes(lines(*made))
    (folder / "test.jsonl").write_bytes(lines(made[0]))
    (folder / "notes.csv").write_bytes(lines("en,sw", "a,b"))
    options = {"corpora": [{"path": str(folder), "name": "mill"}], "evaluation": {"flores": []}}
    code, _, err = run(capsys, recipe(tmp_path, tmp_path, **options))
    assert code == 0, err
    (source,) = json.loads((tmp_path / "out/manifest.json").read_text())["sources"]
    assert [Path(file["path"]).name for file in source["files"]] == ["train.jsonl"]
    assert sorted(Path(path).name for path in source["left"]) == ["notes.csv", "test.jsonl"]
    report = (tmp_path / "out/report.md").read_text()
    assert "mill: its folder has more, not read: notes.csv, test.jsonl." in report
