"""Step 1, format: every text in one form, and what cannot be brought into it goes.

Unicode NFC, mojibake, entities, markup, control and invisible characters, white space, and the
placeholders of user interfaces.
"""

import html
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from xplus_fast.data.steps.batch import Judged, Reject, judge_rows


@dataclass(frozen=True)
class FormatOptions:
    mojibake: Literal["repair", "reject"] = "repair"  # UTF-8 that was read as another encoding
    markup: Literal["strip", "reject", "keep"] = "strip"  # HTML, wiki and subtitle markup
    # %(name)s, {name}, %d: "agree": the same ones on both sides
    placeholders: Literal["agree", "reject", "keep"] = "agree"


# Characters that a text made of whole words may lose: controls, byte order marks, soft hyphens,
# directional marks; not the joiners of Indic and Arabic scripts.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064"
    "\u2066-\u206f\ufeff\ufff9-\ufffb]"
)
_SPACE = re.compile(r"\s+")  # of str: the no-break and ideographic ones, too
_TAG = re.compile(r"</?[A-Za-z][^<>]{0,200}>|<!--.*?-->|\{\\[^{}]{0,80}\}")
_WIKI = re.compile(r"'''?|={2,}\s*$|^={2,}|\[\[(?:[^\[\]|]*\|)?([^\[\]]*)\]\]")
_DEBRIS = re.compile(
    r"</?[A-Za-z]+|/>|\[\[|\]\]|\{\{|\}\}|&(?:[a-z]{2,8}|#\d+|#x[0-9a-f]+);|\\[nrtu](?![a-z])"
    r"|\[/?(?:b|i|u|s|url|img|quote|code|size|color)[\]=]|\|\||style=|class=|href="
)
_PLACEHOLDER = re.compile(
    r"%\([A-Za-z_]\w*\)[#0\- +]*\d*(?:\.\d+)?[a-zA-Z]|%\d+\$[a-z]|%[sdifrxg](?![\w%])"
    r"|\$?\{[A-Za-z_][\w.]*\}|\{\d+\}|\{\}"
)
# A lead byte and its continuation bytes, as cp1252 (with Latin-1 where that has none) shows them
_CP1252 = {bytes([b]).decode("cp1252", "replace"): b for b in range(0x80, 0x100)}
_CP1252 = {c: b for c, b in _CP1252.items() if c != "\ufffd"} | {
    chr(b): b for b in (0x81, 0x8D, 0x8F, 0x90, 0x9D)
}
_LATIN1 = {chr(b): b for b in range(0x80, 0x100)}
_BYTE = _LATIN1 | _CP1252
_TAIL = "".join(re.escape(c) for c, b in _BYTE.items() if 0x80 <= b < 0xC0)
_MOJIBAKE = re.compile(
    f"[\u00c2-\u00df][{_TAIL}]|[\u00e0-\u00ef][{_TAIL}]{{2}}|[\u00f0-\u00f4][{_TAIL}]{{3}}"
)
# UTF-8 Cyrillic read as cp1251: capital ER or ES, then a character of its upper half
_CP1251 = re.compile(
    "[\u0420\u0421][\u0080-\u00bf\u0401-\u040f\u0451-\u045f\u0490\u0491\u2013-\u2122]"
)
# What such sequences stand for where they are no accident, as "\u00c9\u00bb" ends a quotation
_LIKELY = re.compile(
    "[\u00a0-\u017f\u0218-\u021b\u0300-\u03ff\u0400-\u04ff\u0590-\u06ff\u0900-\u0dff"
    "\u0e00-\u0e7f\u1e00-\u1eff\u2010-\u2044\u20ac\u2122\u3000-\u30ff\u4e00-\u9fff\uac00-\ud7af"
    "\uff00-\uffef]"
)


def format_pairs(batch: pa.RecordBatch, options: FormatOptions) -> Judged:
    """Bring both texts of every pair into one form."""

    def judge(row: dict[str, str]) -> tuple[str, str]:
        texts = []
        for side in ("source", "target"):
            try:
                texts.append(tidy(row[side] or "", options))
            except Reject as e:
                raise Reject(f"{side}: {e.reason}", e.detail) from None
        if options.placeholders != "keep":
            _placeholders(texts[0], texts[1], options)
        return texts[0], texts[1]

    return judge_rows(batch, judge)


def tidy(text: str, options: FormatOptions) -> str:
    """One text in its form; raises `Reject` where that cannot be."""
    if "\ufffd" in text:
        raise Reject("broken characters", "U+FFFD")
    text = _mend(text, options)
    text = unicodedata.normalize("NFC", text)
    if options.markup != "keep":
        text = _strip(text, options)
    text = _SPACE.sub(" ", _INVISIBLE.sub("", text)).strip()
    if not text:
        raise Reject("empty")
    return text


def _mend(text: str, options: FormatOptions) -> str:
    if text.isascii():
        return text
    mended = _decode(text, "cp1252") if _MOJIBAKE.search(text) else text
    if len(_CP1251.findall(mended)) >= 2:
        mended = _decode(mended, "cp1251")
    if mended != text and options.mojibake == "reject":
        raise Reject("mojibake", mended[:60])
    if len(_CP1251.findall(mended)) >= 3 or "\u00e2\u20ac" in mended:
        raise Reject("mojibake", mended[:60])
    return mended


def _decode(text: str, encoding: str) -> str:
    """Read again, as UTF-8, what was read as `encoding`."""
    if encoding == "cp1251":
        try:
            return text.encode("cp1251").decode("utf-8")
        except UnicodeError:
            return text

    def one(match: re.Match[str]) -> str:
        made = bytes(_BYTE[c] for c in match[0]).decode("utf-8", "replace")
        return made if _LIKELY.fullmatch(made) else match[0]

    for _ in range(2):  # some texts went through it twice
        again = _MOJIBAKE.sub(one, text)
        if again == text:
            break
        text = again
    return text


def _strip(text: str, options: FormatOptions) -> str:
    plain = text
    if "&" in plain:
        plain = html.unescape(html.unescape(plain))
    if "<" in plain or "{\\" in plain:
        plain = _TAG.sub(" ", plain)
    if "''" in plain or "[[" in plain or "==" in plain:
        plain = _WIKI.sub(lambda m: m[1] or "", plain)
    if plain != text and options.markup == "reject":
        raise Reject("markup")
    if found := _DEBRIS.search(plain):
        raise Reject("markup debris", found[0])
    return plain


def _placeholders(source: str, target: str, options: FormatOptions) -> None:
    if "%" not in source and "{" not in source and "%" not in target and "{" not in target:
        return
    ours, theirs = (Counter(_PLACEHOLDER.findall(t)) for t in (source, target))
    if options.placeholders == "reject" and (ours or theirs):
        raise Reject("placeholders", ", ".join(ours | theirs))
    if ours != theirs:
        odd = (ours - theirs) + (theirs - ours)
        raise Reject("placeholders differ", ", ".join(odd))
