"""Translation memories and translators' files, whole and broken."""

from pathlib import Path

import pytest

from tests.data.preparation.pairs import PAIRS, TMX, UNIT, fault, rows, texts


def memory(path: Path, *units: str, encoding: str = "utf-8", root: str = "tmx") -> Path:
    body = "\n".join(units)
    declared = f'<?xml version="1.0" encoding="{encoding}"?>\n'
    text = f"{declared}<{root}><header/><body>\n{body}\n</body></{root.partition(' ')[0]}>"
    path.write_bytes(text.encode(encoding.lower()))
    return path


def test_a_broken_unit_costs_itself_alone(tmp_path: Path) -> None:
    good = UNIT.format("a & b".replace("&", "&amp;"), "c")
    bad = [UNIT.format("x&#x1F;", "y"), UNIT.format("x&#0;", "y"), UNIT.format("AT&T", "y"),
           UNIT.format("x <b y", "z"), UNIT.format("x &made_up; y", "z"),
           UNIT.replace("</seg></tuv></tu>", "</tu>").format("x", "y")]  # fmt: skip
    for one in bad:
        path = memory(tmp_path / "x.tmx", good, one, good)
        first, broken, last = rows(path)
        assert (first["source"], first["target"]) == ("a & b", "c") == (last["source"], "c")
        assert str(broken).startswith(f"{path}: unit 2: a unit that is no XML (line 4: ")
        assert last["where"] == f"{path}: unit 3"
    path = memory(tmp_path / "x.tmx", UNIT.format("caf\u00e9&nbsp;&eacute;t&eacute;", "b"))
    assert texts(path) == [("caf\u00e9\u00a0\u00e9t\u00e9", "b")]
    path.write_bytes(path.read_bytes().replace("caf\u00e9".encode(), b"caf\xe9"))
    assert str(rows(path)[0]) == f"{path}: unit 1: broken characters (line 3)"


@pytest.mark.parametrize("encoding", ["utf-8", "UTF-8", "utf-8-sig", "utf-16", "iso-8859-1"])
def test_memories_in_every_encoding(encoding: str, tmp_path: Path) -> None:
    unit = UNIT.format("d\u00e9j\u00e0", "b")
    assert texts(memory(tmp_path / "x.tmx", unit, encoding=encoding)) == [("d\u00e9j\u00e0", "b")]


@pytest.mark.parametrize("order", ["le", "be"])
def test_utf_16_without_a_mark(order: str, tmp_path: Path) -> None:
    path = memory(tmp_path / "x.tmx", UNIT.format("\u4f60\u597d", "b"))
    text = path.read_text("utf-8").replace('"utf-8"', '"utf-16"')
    path.write_bytes(text.encode(f"utf-16-{order}"))
    assert texts(path) == [("\u4f60\u597d", "b")]
    bomb = '<!DOCTYPE t [<!ENTITY a "aaaa">]>\n<tmx>'
    path.write_bytes(text.replace("<tmx>", bomb).encode("utf-16"))
    assert "x.tmx: declares entities, which are not read" in fault(path)


def test_memories_with_namespaces(tmp_path: Path) -> None:
    plain = memory(tmp_path / "a.tmx", UNIT.format(*PAIRS[0]),
                   root='tmx xmlns="http://www.lisa.org/tmx14"')  # fmt: skip
    assert texts(plain) == [PAIRS[0]]
    unit = UNIT.format(*PAIRS[0])
    for tag in ("tuv", "tu", "seg"):
        unit = unit.replace(f"<{tag}", f"<t:{tag}").replace(f"</{tag}", f"</t:{tag}")
    unit = unit.replace("<t:t:", "<t:").replace("</t:t:", "</t:")
    path = tmp_path / "b.tmx"
    path.write_text(f'<t:tmx xmlns:t="http://www.lisa.org/tmx14"><t:body>{unit}</t:body></t:tmx>')
    assert texts(path) == [PAIRS[0]]


def test_comments_and_cdata_in_memories(tmp_path: Path) -> None:
    hidden = f"<!-- {UNIT.format('no', 'no')} -->"
    raw = UNIT.format("<![CDATA[a & b </tu> <!-- c -->]]>", "d")
    path = memory(tmp_path / "x.tmx", hidden, raw, hidden, UNIT.format("e", "f"))
    assert texts(path) == [("a & b </tu> <!-- c -->", "d"), ("e", "f")]
    # over the edges of what is read at a time
    units = [f"{hidden}\n{UNIT.format('x' * (i % 977), f'{i}')}" for i in range(1500)]
    found = texts(memory(path, *units))
    assert [target for _, target in found] == [str(i) for i in range(1500)]
    assert [len(source) for source, _ in found] == [i % 977 for i in range(1500)]


BAD_MEMORIES = [
    (TMX.replace("</body>", ""), "x.tmx:4: not valid TMX (mismatched tag)"),
    (TMX[:-40], "x.tmx:3: not valid TMX"),
    (TMX.replace("</body></tmx>\n", f"{UNIT}\n\n"), "x.tmx:6: not valid TMX (no element found)"),
    (TMX.replace("tmx", "html"), "x.tmx: not TMX: its root is <html>"),
    (TMX.replace('"1.0"?', '"1.0" encoding="klingon"?'), "in an unknown encoding, klingon"),
    ("", "x.tmx: the file is empty"),
    ("no XML", "x.tmx:1: not valid TMX (syntax error)"),
]


@pytest.mark.parametrize(("text", "says"), BAD_MEMORIES, ids=lambda v: v[-40:])
def test_a_memory_that_is_none(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "x.tmx").write_text(text)
    assert says in fault(tmp_path / "x.tmx")


XLIFF = """<?xml version="1.0"?>
<xliff version="1.2" xmlns="urn:oasis:names:tc:xliff:document:1.2">
<file source-language="en-US" target-language="sw" datatype="plaintext" original="x"><body>
<trans-unit id="1"><source>Hello <g id="1">there</g>.</source>
<target>Habari yako.</target></trans-unit>
<trans-unit id="2"><source>Not yet.</source><target/></trans-unit>
<trans-unit id="3"><source>Not yet.</source></trans-unit>
</body></file></xliff>"""
XLIFF_2 = """<xliff version="2.0" srcLang="en" trgLang="sw"
 xmlns="urn:oasis:names:tc:xliff:document:2.0"><file id="f"><unit id="1"><segment>
<source>Hello there.</source><target>Habari yako.</target></segment></unit></file></xliff>"""


@pytest.mark.parametrize("text", [XLIFF, XLIFF_2], ids=["1.2", "2.0"])
@pytest.mark.parametrize("name", ["x.xlf", "x.xliff", "x.sdlxliff"])
def test_files_of_translators(text: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text)
    (row,) = rows(path)
    assert (row["source"], row["target"]) == PAIRS[0] and row["where"] == f"{path}: unit 1"
    assert texts(path, languages=["sw", "en"]) == [PAIRS[0][::-1]]
    path.write_text(text.replace("</file>", ""))
    assert f"{name}:" in fault(path) and "not valid XLIFF (mismatched tag)" in fault(path)
    path.write_text(text.replace('"sw"', '"xx-yyyy"'))
    assert "a source or target language is not told, or unknown" in fault(path)
    path.write_text(TMX)
    assert "not XLIFF: its root is <tmx>" in fault(path)


def test_breaks_within_a_segment_part_words(tmp_path: Path) -> None:
    """Codes that end a line are a space, others are nothing; a footnote is text, in its code."""
    cases = [
        ('Save<ph x="1">&lt;br/&gt;</ph>it', "Save it"), ('Save<ph type="lb"/>it', "Save it"),
        ("Save<ph>&lt;b&gt;</ph>d", "Saved"), ("Save<it>\\par </it>it", "Save it"),
        ("Mill<ph>\\note{<sub>an old one</sub>}</ph>", "Mill an old one "),
    ]  # fmt: skip
    path = tmp_path / "a.tmx"
    for segment, wanted in cases:
        memory(path, UNIT.format(segment, "Hifadhi"))
        assert texts(path) == [(wanted, "Hifadhi")]
    path = tmp_path / "a.xlf"
    unit = '<trans-unit id="1"><source>Save{}it</source><target>Hifadhi</target></trans-unit>'
    head = '<xliff version="1.2"><file source-language="en" target-language="sw"><body>'
    for code, wanted in [('<x id="1" ctype="lb"/>', "Save it"), ('<x id="1"/>', "Saveit")]:
        path.write_text(head + unit.format(code) + "</body></file></xliff>")
        assert texts(path) == [(wanted, "Hifadhi")]


def test_a_language_that_a_file_does_not_tell(tmp_path: Path) -> None:
    path = tmp_path / "a.xlf"
    unit = "<trans-unit><source>Save</source><target>Hifadhi</target></trans-unit>"
    for target in ("", ' target-language=""', ' target-language="Kiswahili"'):
        path.write_text(f'<xliff><file source-language="en"{target}>{unit}</file></xliff>')
        assert "`languages: [en, sw]` tells them" in fault(path)
        assert texts(path, languages=["en", "sw"]) == [("Save", "Hifadhi")]
        assert texts(path, languages=["sw", "en"]) == [("Hifadhi", "Save")]


@pytest.mark.parametrize(("first", "read"), [("Color", "Color"), (" ", "Colour")])
def test_of_two_variants_of_a_language_the_first_that_says_a_word(
    first: str, read: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.tmx"
    both = '</seg></tuv><tuv xml:lang="en-GB"><seg>Colour'
    memory(path, UNIT.format(first + both, "Rangi"))
    assert texts(path) == [(read, "Rangi")]
