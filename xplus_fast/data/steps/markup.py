"""Markup of texts: entities, tags, RTF and subtitle codes, wiki text, BBCode.

What is no markup stays: "a <b and c> d", "<john@example.org>", "&notable", "[i]t". Every pattern
takes time in proportion to the text, whatever is in it.
"""

import html
import re
from collections.abc import Iterator

from xplus_fast.data.steps.batch import Reject

# One look for all that begins markup; few texts have any
_MARKED = re.compile(r"[&<>{}\[\]\\|=;#@/\u2581\u0120\uffed]")
_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z]\w{1,31});")
# Some are known without their semicolon, too
_OPEN = re.compile(
    r"&(?:[A-Za-z](?:acute|grave|circ|uml|tilde|cedil)|[Aa]ring|[Oo]slash|szlig|nbsp|[lr]aquo|#\d{2,4}(?!\d))(?!;)"
)
_BARE = re.compile(  # entities that lost their ampersand
    r"(?<=\w)#(?:x?2[27]|3[489]|6[02]|9[13]|124|160|8[12]\d\d);"
    r"|(?<![\w&])#(?:x?2[27]|3[489]|6[02]|8[12]\d\d);(?=\w)"
    r"|(?<!&)(?:quot|apos|nbsp|[lr][sd]quo|hellip|[lr]aquo|[nm]dash);"
    r"|(?<![\w&])(?<!\d )(?:amp|[lg]t);"
)
# Tags that a tokenizer took apart, and those whose end was cut off
_SPACED = re.compile(r"<\s?(/?)\s?([A-Za-z]\w{0,10})\s?(/?)\s?>")
_TAG = re.compile(
    r"<(/?)([A-Za-z][\w:-]{0,30})((?:\s[^<>]{0,400})?)(/?)>|<!--|<!\[CDATA\[|\]\]>|<[!?][^<>]{0,400}>"
)
_ATTRIBUTES = re.compile(
    r"(?:\s+[\w:.-]+\s*=\s*(?:\"[^\"]*\"|'[^']*'|[^\s\"'<>=]+)"
    r"|\s+(?:nowrap|disabled|checked|selected|hidden|controls|defer|async|allowfullscreen))*\s*"
)
_INLINE = frozenset(
    "a abbr acronym b bdi bdo big cite code data del dfn em font g hi i ins kbd label mark mrk nobr"
    " q rp rt ruby s samp seg small span strike strong sub sup time tt u var wbr x bx ex bpt ept ph"
    " it ut cf c v".split()
)
_BLOCK = frozenset(
    "address area article aside audio base blockquote body br button canvas caption center col"
    " colgroup dd details dialog dir div dl dt embed fieldset figcaption figure footer form frame"
    " frameset h1 h2 h3 h4 h5 h6 head header hgroup hr html iframe img input legend li link main"
    " map menu meta nav noscript object ol optgroup option p param picture pre progress section"
    " select source summary svg table tbody td template textarea tfoot th thead title tr track ul"
    " video".split()
)
# Their content is no text: programs, and the native codes of TMX
_CODE = frozenset("script style bpt ept ph it ut".split())
# RTF groups and subtitle codes: {\b Save}, {\an8}, {\pos(1,2)\fs20}; the words in them are text
_GROUP = re.compile(r"\{(\\[^{}]{0,200})\}")
_CONTROL = re.compile(r"\\(?:fn[^\\]*|\*|[A-Za-z]+-?[\d.]*(?:\([^()]*\)|&\w+&?)?|\d\w+&?\w*&?) ?")
# Subtitles: MicroDVD's frames and styles (not "{c:>8}" of Python), WebVTT's times
_SUBTITLE = re.compile(
    r"^\{\d{2,7}\}\{\d{2,7}\}|\{(?:[yY]:/?[biusBIUS](?:,?[biusBIUS]){0,3}|[cC]:\$[0-9A-Fa-f]{6}"
    r"|[fF]:[A-Za-z][\w -]{2,30}|[sS]:\d{1,3}|[pP]:\d{1,4}(?:,\d{1,4})?)\}"
    r"|<(?:\d\d:)?\d\d:\d\d\.\d{3}>"
)
_WIKI = re.compile(r"'''?|(?<!=)={2,}(?=\s*$)|^={2,}|\[\[(?:[^\[\]|]*\|)?([^\[\]]*)\]\]")
_BBCODE = re.compile(
    r"\[(/?)(b|i|u|s|url|img|quote|code|size|color|font|center|list)(=[^\[\]]{0,200})?\]", re.I
)
# Markdown's links and bold text
_MARKDOWN = re.compile(
    r"\[([^\[\]]{1,300})\]\((?:https?://|mailto:|[/#])[^()\s]{0,500}\)"
    r"|(?<![*\w])\*\*(?=[^\s*])([^*]{1,300})(?<=\S)\*\*(?![*\w])"
)
_BREAK = re.compile(r"(?<![:\\])(?<=[\w.,;:!?\"')])(?:\\+[nrt])+(?=\s|\w|$)")
_PATH = re.compile(r"\b[A-Za-z]:\\|\\\\\w|\w\\\w+\\\w")
_QUOTED = re.compile(r"\\(['\"])")
# Placeholders that look like wiki templates: {{name}}, and the messages of ICU, which end in }}
TEMPLATE = re.compile(
    r"\{\{\s?[A-Za-z_][\w.]{0,60}\s?\}\}"
    r"|\{\s?\w{1,60}\s?,\s?(?:plural|select|selectordinal)\s?,(?:[^{}]{0,60}\{[^{}]{0,300}\}){1,9}\s?\}"
)
_SUBWORDS = re.compile(
    r"\S@@(?:\s|$)|(?:^|\s)@@\S|\u2581\w|(?:\s|^)##\w+(?=[^#]*\s##\w)|\u0120\w(?=.*\u0120\w)|\uffed"
)
_SUBWORDS_HAVE = ("@@", "\u2581", "##", "\u0120", "\uffed")  # any match has one of these
_DEBRIS = re.compile(
    r"</[A-Za-z]|<(?:" + "|".join(sorted(n for n in _INLINE | _BLOCK if len(n) > 2)) + r"|br|td|tr"
    r"|li|ul|hr|h[1-6]|script)\b|<[a-z]\s+(?:\w+=|(?:href|class|style|src|id|title)\b)|/>|<!--|-->|\[\[\w+:\w|\{\{|\}\}|\{\\[a-z]|\\u[0-9a-fA-F]{4}"
    r"|&(?:[a-z]{2,8}|#\d+|#x[0-9a-f]+);|\\[nrtu](?![a-z])|\[(?:url|img|size|color|quote|font)="
    r"|\[/(?:b|i|u|s|url|img|quote|code|size|color)\]|\b(?:style|class|href)=[\"']"
)
_DEBRIS_HAS = ("<", "/>", "-->", "[", "{{", "}}", "\\", "&", '="', "='")
_DOUBTFUL = re.compile(
    r"\|\||\[\[|\]\]|\\[a-z]{3,20}\{|\bfunction\s?\w{0,30}\(|\b(?:document|window)\.\w|\{\s*[a-z-]+\s*:[^{};]{1,60}[;}]"
)
_DOUBTFUL_HAS = ("||", "[[", "]]", "{", "function", "document.", "window.")


def doubtful_markup(text: str) -> str:
    """What looks like a program or a table; a fault where only one side of a pair has it."""
    if not any(map(text.__contains__, _DOUBTFUL_HAS)):
        return ""
    found = _DOUBTFUL.search(text)
    return found[0] if found else ""


def strip_markup(text: str, *, reject: bool = False) -> str:
    """The text without markup; raises `Reject` where some is left, or, if asked, where any was."""
    if not _MARKED.search(text) and "''" not in text:
        return text
    if any(map(text.__contains__, _SUBWORDS_HAVE)) and (found := _SUBWORDS.search(text)):
        raise Reject("subwords of a tokenizer", found[0].strip())
    plain = _entities(text)
    if "{" in plain or "<" in plain:
        plain = _SUBTITLE.sub("", plain)
    if "<" in plain:
        plain = _joined(plain)
        plain = "".join(_without_tags(plain))
    for _ in range(3):  # groups within groups
        if "{\\" not in plain:
            break
        plain = _GROUP.sub(lambda m: _CONTROL.sub("", m[1]), plain)
    if "''" in plain or "[[" in plain or "==" in plain:
        plain = _WIKI.sub(lambda m: m[1] or "", plain)
    if "](" in plain or "**" in plain:
        plain = _MARKDOWN.sub(lambda m: m[1] or m[2], plain)
    if "[/" in plain:
        ended = {m[2].lower() for m in _BBCODE.finditer(plain) if m[1]}
        plain = _BBCODE.sub(lambda m: "" if m[2].lower() in ended else m[0], plain)
    if "\\" in plain and not _is_path(plain):
        plain = _QUOTED.sub(r"\1", _BREAK.sub(" ", plain))
    if plain != text and reject:
        raise Reject("markup")
    if any(map(plain.__contains__, _DEBRIS_HAS)) and not _is_path(plain):
        if found := _DEBRIS.search(TEMPLATE.sub("", plain)):
            raise Reject("markup debris", found[0])
    return plain


def _is_path(text: str) -> bool:
    return "\\" in text and _PATH.search(text) is not None


def _entities(text: str) -> str:
    for _ in range(4):  # some were escaped several times over
        again = _ENTITY.sub(lambda m: html.unescape(m[0]), text)
        again = _OPEN.sub(lambda m: html.unescape(m[0] + ";"), again)
        if again == text:
            break
        text = again
    return _BARE.sub(lambda m: html.unescape("&" + m[0]), text) if ";" in text else text


def _joined(text: str) -> str:
    """The text with tags in one piece that were taken apart: "< b >" where "< / b >" is."""
    spaced = [tag for tag in _SPACED.finditer(text) if " " in tag[0]]
    ended = {tag[2].lower() for tag in spaced if tag[1]}

    def join(tag: re.Match[str]) -> str:
        name = tag[2].lower()
        known = name in _INLINE or name in _BLOCK
        return f"<{tag[1]}{name}{tag[3]}>" if known and (name in ended or tag[3]) else tag[0]

    return _SPACED.sub(join, text) if spaced else text


def _without_tags(text: str) -> Iterator[str]:
    """The pieces of a text between its tags."""
    ended = set(re.findall(r"</([A-Za-z][\w:-]{0,30})", text))
    at = 0
    for tag in _TAG.finditer(text):
        if tag.start() < at:  # in a comment or a program
            continue
        name, rest = (tag[2] or "").lower(), tag[3] or ""
        if tag[0] == "<!--":
            end = text.find("-->", tag.end())
            if end < 0:
                raise Reject("markup debris", "<!--")
            yield text[at : tag.start()]
            yield " "
            at = end + 3
            continue
        if name and not _is_tag(tag[1], tag[2], name, rest, tag[4], ended):
            continue
        yield text[at : tag.start()]
        if name not in _INLINE:
            yield " "
        at = tag.end()
        if name in _CODE and not tag[1] and not tag[4] and not rest.endswith("/"):
            closing = re.compile(f"</{name}\\s*>", re.I).search(text, at)
            if closing is None:
                raise Reject("markup debris", tag[0])
            at = closing.end()
    yield text[at:]


def _is_tag(closes: str, written: str, name: str, rest: str, empty: str, ended: set[str]) -> bool:
    if closes:
        return not rest.strip()
    rest = rest[:-1] if rest.endswith("/") and not empty else rest
    if not _ATTRIBUTES.fullmatch(rest):
        return False
    # others are as often names in brackets
    return (
        name in _INLINE
        or name in _BLOCK
        or name in _CODE
        or bool(empty or "=" in rest or written in ended)
    )
