"""Step 1, format: every text in one form, and what cannot be brought into it goes.

Unicode NFC, mojibake, entities, markup, control and invisible characters, white space, and the
placeholders of user interfaces.
"""

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from xplus_fast.data.steps.batch import Judged, Reject, judge_rows
from xplus_fast.data.steps.characters import NO_MARKS, scripts_of
from xplus_fast.data.steps.markup import doubtful_markup, strip_markup
from xplus_fast.data.steps.mojibake import mend_encoding
from xplus_fast.options import Count


@dataclass(frozen=True)
class FormatOptions:
    max_characters: Count = 10_000  # of either text, before its markup goes
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
_SPACE = re.compile(r"\s\s+|[^\S ]")  # of str: the no-break and ideographic ones, too
# Ligatures and the shapes that Arabic letters take in a word; not honorifics, which are words
_PRESENTED = re.compile("[\ufb00-\ufdcf\ufe70-\ufefc]")
_SHAPES = re.compile(f"{_PRESENTED.pattern}+")
# Latin letters that stand in Cyrillic words for those that look like them
_LATIN = "ABCEHKMOPTXYaceopxyk"
_CYRILLIC = (
    "\u0410\u0412\u0421\u0415\u041d\u041a\u041c\u041e\u0420\u0422\u0425\u0423"
    "\u0430\u0441\u0435\u043e\u0440\u0445\u0443\u043a"
)
_TO_LATIN = str.maketrans(_CYRILLIC + "\u0406\u0408\u0456\u0458\u0405\u0455", _LATIN + "IJijSs")
_TO_CYRILLIC = str.maketrans(_LATIN, _CYRILLIC)
# and letters that some of these languages have
_OWN_CYRILLIC = {
    **dict.fromkeys(("uk", "be", "kk"), _TO_CYRILLIC | str.maketrans("Ii", "\u0406\u0456")),
    **dict.fromkeys(("sr", "mk"), _TO_CYRILLIC | str.maketrans("Jj", "\u0408\u0458")),
}
_MIXED = re.compile("[A-Za-z][\u0400-\u045f]|[\u0400-\u045f][A-Za-z]")
_CYRILLIC_LETTER = re.compile("[\u0400-\u045f]")  # one class is found much faster
_WORD = re.compile(r"[^\W\d_]+")
_ONLY_CYRILLIC = re.compile(r"[\u0400-\u04ff]+")
# Question marks that stand for letters which an encoding had not
_WITHIN = re.compile(r"[^\W\d_]\?+[^\W\d_A-Z]")
_UNWRITTEN = re.compile(
    r"[^\W\d_]\?\s+[^\W\d_A-Z]|[^\W\d_]\?[,;:]|[^\W\d_]\?\.(?!\.)|(?<![\w?])\?+\w|\?\s+\?"
    r"|(?<![\w?])\?{3,}"
)
_LINK = re.compile(r"(?:\w{1,10}://|www\.)\S*")
_ASKS = re.compile("[?;\u037e\u061f\uff1f\u055e\u1367\u00bf]")
_PLACEHOLDER = re.compile(
    r"%\([A-Za-z_]\w*\)[#0\- +]*\d*(?:\.\d+)?[a-zA-Z]|%\d+\$[a-z]|%[sdifrxg](?![\w%])"
    r"|\$?\{[A-Za-z_][\w.]*\}|\{\d+\}|\{\}"
)


def format_pairs(batch: pa.RecordBatch, options: FormatOptions) -> Judged:
    """Bring both texts of every pair into one form."""

    def judge(source: str, target: str, *languages: str) -> tuple[str, str]:
        texts = []
        for side, text, language in zip(
            ("source", "target"), (source, target), languages, strict=True
        ):
            try:
                texts.append(tidy(text or "", options, language))
            except Reject as e:
                raise Reject(f"{side}: {e.reason}", e.detail) from None
        _one_sided(texts[0], texts[1], languages, options)
        if options.placeholders != "keep":
            _placeholders(texts[0], texts[1], options)
        return texts[0], texts[1]

    return judge_rows(batch, judge)


def tidy(text: str, options: FormatOptions, language: str = "") -> str:
    """One text, of the language that a canonical code names, in its form; raises `Reject` where
    that cannot be."""
    if len(text) > options.max_characters:
        raise Reject("too long", f"{len(text)} characters")
    if not text.isascii():
        if "\ufffd" in text:
            raise Reject("broken characters", "U+FFFD")
        text = _letters(text, options, language)
    if options.markup != "keep":
        text = strip_markup(text, reject=options.markup == "reject")
        if "\ufffd" in text:
            raise Reject("broken characters", "U+FFFD")
    # what is printable has no invisible characters, and no white space but spaces
    if not text.isprintable() or "  " in text:
        text = _SPACE.sub(" ", _INVISIBLE.sub("", text))
    text = text.strip()
    if not text:
        raise Reject("empty")
    return text


def _letters(text: str, options: FormatOptions, language: str) -> str:
    script = scripts_of(language)[0]
    mended = mend_encoding(text, language, script)
    if mended != text and options.mojibake == "reject":
        raise Reject("mojibake", mended[:60])
    text = unicodedata.normalize("NFC", mended)
    if _PRESENTED.search(text):
        text = _SHAPES.sub(lambda m: unicodedata.normalize("NFKC", m[0]), text)
    if _CYRILLIC_LETTER.search(text) and _MIXED.search(text):
        table = _OWN_CYRILLIC.get(language, _TO_CYRILLIC)
        text = _WORD.sub(lambda m: _one_script(m[0], script, table), text)
        if script == "LATIN" and (left := _MIXED.search(text)):
            raise Reject("letters of two scripts in a word", left[0])
    return text


def _one_script(word: str, script: str, table: dict[int, int]) -> str:
    """A word of Cyrillic and Latin letters in one of them, where letters that look alike allow."""
    if not _MIXED.search(word):
        # a word of one letter, among mixed ones
        return word.translate(table) if script == "CYRILLIC" and len(word) == 1 else word
    if script == "CYRILLIC":
        made = word.translate(table)
        return made if _ONLY_CYRILLIC.fullmatch(made) else word
    made = word.translate(_TO_LATIN)
    return made if script == "LATIN" and made.isascii() else word


def _one_sided(
    source: str, target: str, languages: tuple[str, ...], options: FormatOptions
) -> None:
    """Reject what is a fault where only one side has it."""
    for side, text, other in (("source", source, target), ("target", target, source)):
        if "?" in text:
            said = _LINK.sub("", text)
            unasked = not NO_MARKS.isdisjoint(code.partition("_")[0] for code in languages)
            more = said.count("?") - len(_ASKS.findall(other)) > 1 or not _ASKS.search(other)
            if _WITHIN.search(said) or more and not unasked and _UNWRITTEN.search(said):
                raise Reject(f"{side}: lost characters", text[:60])
        if options.markup != "keep" and (found := doubtful_markup(text)):
            if not doubtful_markup(other):
                raise Reject(f"{side}: markup debris", found)


def _placeholders(source: str, target: str, options: FormatOptions) -> None:
    if "%" not in source and "{" not in source and "%" not in target and "{" not in target:
        return
    found = _PLACEHOLDER.findall(source), _PLACEHOLDER.findall(target)
    if found[0] == found[1] and options.placeholders == "agree":
        return
    ours, theirs = map(Counter, found)
    if options.placeholders == "reject" and (ours or theirs):
        raise Reject("placeholders", ", ".join(ours | theirs))
    if ours != theirs:
        odd = (ours - theirs) + (theirs - ours)
        raise Reject("placeholders differ", ", ".join(odd))
