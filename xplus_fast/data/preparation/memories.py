"""Translation memories (TMX) and translators' files (XLIFF) -> units of texts by language.

A TMX is cut into its units by their tags, and each is parsed by itself: one that is broken costs
nothing but itself, and no more than one is in memory. What stands around them is parsed, too.
"""

import codecs
import html
import html.entities
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree
from xml.parsers import expat

from xplus_fast.data.compressed import opened
from xplus_fast.data.files import Rejected
from xplus_fast.data.languages import canonical, is_language
from xplus_fast.errors import UserError

XML_LANG = "{http://www.w3.org/XML/1998/namespace}lang"
CODES = ("bpt", "ept", "it", "ph", "ut")  # elements that hold codes of the original's format
_TYPES = ("type", "ctype", "subType", "equiv-text", "equiv")  # attributes that tell of a break
_NATIVE = re.compile(r"[\\<]|^[{}\s]+$")
_BREAK = re.compile(r"<(?:br|p|div|li|tr|td|hr)\b|\\(?:par|line|tab|n)\b", re.IGNORECASE)
_CHUNK = 1 << 16
_TAG_LENGTH = 64  # of the longest tag that ends a unit
# A comment and CDATA may hold the tag that ends a unit
_STOP = re.compile(r"<!--|<!\[CDATA\[|</(?:[\w.-]+:)?tu\s*>")
_UNIT = re.compile(r"<(?:[\w.-]+:)?tu(?=[\s>])")
_NAMED = re.compile(r"&([A-Za-z][A-Za-z0-9]*);")
# States of a target that nobody has translated yet: of XLIFF 1.2 (where needs-adaptation is of what
# is no text), of 2.x
_UNTRANSLATED = ("new", "needs-translation", "needs-l10n", "initial")
_OF_XML = ("amp", "lt", "gt", "quot", "apos")


def read_tmx(path: Path, limit: int) -> Iterator[tuple[str, dict[str, str] | Rejected]]:
    """Stream (where, {language: text}) of a memory's units, plain or compressed.

    limit: characters of a unit at most. Raises `UserError` for what is broken outside of units.
    """
    around = _Around(path)
    number, line = 0, 1
    unfed = 0  # lines of units and between them, which errors behind them count, too
    for piece in _pieces(path, limit):
        start = _UNIT.search(piece)
        before = piece[: start.start()] if start else piece
        unit = piece[len(before) :]
        if before.strip():
            around.feed("\n" * unfed + before)
            unfed = 0
        else:
            unfed += before.count("\n")
        line += before.count("\n")
        if start:
            number += 1
            where = f"{path}: unit {number}"
            yield where, _unit(unit, around.namespaces, where, line)
            unfed += unit.count("\n")
            line += unit.count("\n")
    around.feed("\n" * unfed, last=True)


class _Around:
    """The file without its units, which must be well-formed as well."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.namespaces = ""  # of the root, which the units are written in
        self._root = ""
        self._parser = expat.ParserCreate()
        self._parser.StartElementHandler = self._started

    def _started(self, tag: str, attributes: dict[str, str]) -> None:
        if not self._root:
            self._root = tag.rpartition(":")[2]
            spaces = {k: v for k, v in attributes.items() if k.partition(":")[0] == "xmlns"}
            self.namespaces = "".join(f' {k}="{html.escape(v)}"' for k, v in spaces.items())

    def feed(self, text: str, last: bool = False) -> None:
        if "<!ENTITY" in text:
            raise UserError(f"{self.path}: declares entities, which are not read")
        try:
            self._parser.Parse(text, last)
        except expat.ExpatError as e:
            raise UserError(
                f"{self.path}:{e.lineno}: not valid TMX ({expat.ErrorString(e.code)})"
            ) from None
        if self._root not in ("", "tmx"):
            raise UserError(f"{self.path}: not TMX: its root is <{self._root}>")


def _pieces(path: Path, limit: int) -> Iterator[str]:
    """The text, cut behind the end of each unit, without comments; what is left at the end."""
    text, done, at = "", 0, 0  # what is at hand, where the piece begins, up to where it was seen
    for more in _texts(path):
        text, done, at = text[done:] + more, 0, at - done
        while stop := _STOP.search(text, at):
            if stop[0] in ("<!--", "<![CDATA["):
                comment = stop[0] == "<!--"
                end = text.find("-->" if comment else "]]>", stop.end())
                if end < 0:
                    at = stop.start()
                    break
                at = end + 3
                if comment:
                    lines = "\n" * text.count("\n", stop.start(), at)
                    text = text[: stop.start()] + lines + text[at:]
                    at = stop.start() + len(lines)
            else:
                yield text[done : stop.end()]
                done = at = stop.end()
        else:
            at = max(at, len(text) - _TAG_LENGTH)
        if len(text) - done > limit:
            raise UserError(f"{path}: a unit of more than {limit:,} bytes")
    yield text[done:]


def _texts(path: Path) -> Iterator[str]:
    """The file's text in chunks, whatever of Unicode it is written in."""
    with opened(path) as stream:
        chunk = stream.read(_CHUNK)
        if not chunk:
            raise UserError(f"{path}: the file is empty")
        decoder = codecs.getincrementaldecoder(_encoding(chunk, path))("replace")
        while chunk:
            yield decoder.decode(chunk)
            chunk = stream.read(_CHUNK)
        yield decoder.decode(b"", final=True)


def _encoding(head: bytes, path: Path) -> str:
    """By the byte order mark, else by the first bytes, else as the file says."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if head.startswith(b"<\0"):
        return "utf-16-le"
    if head.startswith(b"\0<"):
        return "utf-16-be"
    told = re.match(rb"\s*<\?xml[^>]*?\sencoding\s*=\s*[\"']([\w.-]+)", head)
    name = told[1].decode() if told else "utf-8"
    try:
        known = codecs.lookup(name).name
    except LookupError:
        raise UserError(f"{path}: in an unknown encoding, {name:.40}") from None
    return "utf-8-sig" if known in ("utf-8", "utf-16") else known


def _unit(unit: str, namespaces: str, where: str, line: int) -> dict[str, str] | Rejected:
    if "\ufffd" in unit:
        return Rejected(where, "broken characters", f"line {line}")
    try:
        tree = _parsed(unit, namespaces)
    except ElementTree.ParseError as e:
        said = str(e).partition(":")[0]
        return Rejected(where, "a unit that is no XML", f"line {line}: {said}")
    texts: dict[str, str] = {}
    for variant in tree[0]:
        if _bare(variant) != "tuv":
            continue
        code = variant.get(XML_LANG) or variant.get("lang") or ""
        segment = next((child for child in variant if _bare(child) == "seg"), None)
        if is_language(code) and segment is not None:
            text, language = "".join(_words(segment)), canonical(code)
            if not texts.get(language, "").strip():  # of en-US and en-GB the first that says a word
                texts[language] = text
    return texts


def _parsed(unit: str, namespaces: str) -> ElementTree.Element:
    try:
        return ElementTree.fromstring(f"<unit{namespaces}>{unit}</unit>")
    except ElementTree.ParseError as e:
        if "undefined entity" not in str(e) or "<![CDATA[" in unit:
            raise
    # those of HTML, which XML does not know
    mended = _NAMED.sub(
        lambda m: m[0] if m[1] in _OF_XML else html.entities.html5.get(f"{m[1]};", m[0]), unit
    )
    return ElementTree.fromstring(f"<unit{namespaces}>{mended}</unit>")


def _bare(element: ElementTree.Element) -> str:
    """An element's tag without its namespace."""
    return str(element.tag).rpartition("}")[2]


def _words(element: ElementTree.Element) -> Iterator[str]:
    """A segment's text without native codes: RTF's and HTML's marks within inline elements."""
    tag = _bare(element)
    if tag == "sub" or any(_breaks(element.get(name, "")) for name in _TYPES):
        yield " "  # a footnote in a code; a line's end
    yield _told(element.text or "", tag)
    for child in element:
        yield from _words(child)
        yield _told(child.tail or "", tag)
    if tag == "sub":
        yield " "


def _told(text: str, tag: str) -> str:
    """What is no code of what stands right in an element."""
    if tag not in CODES or not _NATIVE.search(text):
        return text
    return " " if _breaks(text) else ""


def _breaks(text: str) -> bool:
    return text.rpartition(":")[2] in ("lb", "x-html-br") or _BREAK.search(text) is not None


def read_xliff(
    path: Path, limit: int, languages: Sequence[str] = ()
) -> Iterator[tuple[str, dict[str, str] | Rejected]]:
    """Stream (where, {language: text}) of the translated units of an XLIFF file, 1.x or 2.x.

    limit: characters of the file, which is read whole. languages: where a file does not
    tell one that is known, it is among these. Raises `UserError`.
    """
    text = ""
    for more in _texts(path):
        text += more
        if len(text) > limit:
            raise UserError(f"{path}: more than {limit:,} characters, which are read at most")
    if "<!ENTITY" in text:
        raise UserError(f"{path}: declares entities, which are not read")
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as e:
        said = str(e).partition(":")[0]
        raise UserError(f"{path}:{e.position[0]}: not valid XLIFF ({said})") from None
    if _bare(root) != "xliff":
        raise UserError(f"{path}: not XLIFF: its root is <{_bare(root)}>")
    number = 0
    for file in (e for e in root if _bare(e) == "file"):
        codes = [file.get("source-language") or root.get("srcLang") or "",
                 file.get("target-language") or root.get("trgLang") or ""]  # fmt: skip
        told = [canonical(code) for code in codes if is_language(code)]
        left = iter(code for code in languages if canonical(code) not in told)
        codes = [code if is_language(code) else next(left, code) for code in codes]
        if bad := [code for code in codes if not is_language(code)]:
            raise UserError(
                f"{path}: a source or target language is not told, or unknown: {bad};"
                " `languages: [en, sw]` tells them"
            )
        as_it_is: set[int] = set()
        for group in file.iter():  # the innermost tells
            if (asked := group.get("translate")) is not None:
                change = as_it_is.update if asked == "no" else as_it_is.difference_update
                change(map(id, group.iter()))
        for unit in (e for e in file.iter() if _bare(e) in ("trans-unit", "segment")):
            number += 1
            states = {e.get("state") for e in unit if _bare(e) == "target"} | {unit.get("state")}
            if id(unit) in as_it_is or not states.isdisjoint(_UNTRANSLATED):
                continue
            parts = {_bare(child): "".join(_words(child)) for child in unit}
            if parts.get("target", "").strip():  # translated
                sides = (parts.get("source", ""), parts["target"])
                yield (
                    f"{path}: unit {number}",
                    dict(zip(map(canonical, codes), sides, strict=True)),
                )
