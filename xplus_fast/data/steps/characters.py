"""Characters: the scripts that languages are written in, and what a text is made of."""

import unicodedata
from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

# Scripts of ISO 15924 -> how Unicode begins the names of their letters
SCRIPTS = {
    "Latn": ("LATIN",), "Cyrl": ("CYRILLIC",), "Grek": ("GREEK",), "Armn": ("ARMENIAN",),
    "Geor": ("GEORGIAN",), "Hebr": ("HEBREW",), "Arab": ("ARABIC",), "Syrc": ("SYRIAC",),
    "Thaa": ("THAANA",), "Deva": ("DEVANAGARI",), "Beng": ("BENGALI",), "Guru": ("GURMUKHI",),
    "Gujr": ("GUJARATI",), "Orya": ("ORIYA",), "Taml": ("TAMIL",), "Telu": ("TELUGU",),
    "Knda": ("KANNADA",), "Mlym": ("MALAYALAM",), "Sinh": ("SINHALA",), "Thai": ("THAI",),
    "Laoo": ("LAO",), "Tibt": ("TIBETAN",), "Mymr": ("MYANMAR",), "Khmr": ("KHMER",),
    "Ethi": ("ETHIOPIC",), "Mong": ("MONGOLIAN",), "Olck": ("OL",), "Mtei": ("MEETEI",),
    "Tfng": ("TIFINAGH",), "Nkoo": ("NKO",), "Cher": ("CHEROKEE",), "Cans": ("CANADIAN",),
    "Hans": ("CJK",), "Hant": ("CJK",), "Hani": ("CJK",), "Kore": ("HANGUL", "CJK"),
    "Jpan": ("HIRAGANA", "KATAKANA", "CJK"), "Hira": ("HIRAGANA",), "Kana": ("KATAKANA",),
    "Hrkt": ("HIRAGANA", "KATAKANA"), "Hang": ("HANGUL",), "Aran": ("ARABIC",),
}  # fmt: skip
NO_MARKS = {"th", "lo", "km", "my"}  # written without full stops and question marks

_SOUTH = "\u0452\u0453\u0455\u0458\u0459\u045a\u045b\u045c\u045f"  # Serbian and Macedonian
_EAST = "\u044b\u044d\u0451"  # Russian and Belarusian
_WEST = "\u0454\u0456\u0457\u0491\u045e"  # Ukrainian and Belarusian
_SOFT = "\u0439\u0449\u044a\u044c\u044e\u044f"
# Letters that a language has not
FOREIGN = {
    "ru": {*_SOUTH, *_WEST}, "bg": {*_SOUTH, *_WEST, *_EAST},
    "uk": {*_SOUTH, *_EAST, "\u044a", "\u045e"},
    "sr": {*_EAST, *_WEST, *_SOFT, "\u0453", "\u0455", "\u045c"},
    "mk": {*_EAST, *_WEST, *_SOFT, "\u0452", "\u045b"},
}  # fmt: skip


@cache
def scripts_of(code: str) -> tuple[str, ...]:
    """The scripts of a canonical language code.

    Latin where no other is known, as of ""; ("",) for one that is not in `SCRIPTS`.
    """
    from langcodes import Language

    script = Language.get(code or "und").maximize().script
    return SCRIPTS.get(script, ("",)) if script else ("LATIN",)


# Those who open their questions with a mark, too
OPENING = {"es", "gl", "ast", "an", "ext", "ca", "eu", "oc", "tl", "fil", "ceb", "pap", "cbk", "qu",
           "gn", "gug", "ay", "nah", "la"}  # fmt: skip


def has_foreign(text: str, base: str) -> bool:
    """Whether a text has a character that its language, of which this is the code, has not."""
    if base in FOREIGN:
        return not FOREIGN[base].isdisjoint(text.lower())
    return ("\u00bf" in text or "\u00a1" in text) and base not in OPENING


# Kinds of characters in a census; more than these: letters, of the script `_SCRIPTS[kind]`
_UNKNOWN, _SPACE, _SOLID, _DIGIT, _PUNCTUATION, _ASK, _QUOTE = range(7)
_SCRIPTS = [""] * 7
_KINDS = np.zeros(0x110000, np.uint8)  # of every character that was met
ASKS = "?\u061f\uff1f\u055e\u1367\u2e2e\u203d\u2047\u2048\u2049"  # question marks
QUOTES = '"\u201c\u201d\u201e\u201f\u00ab\u00bb\u300a\u300b\u300c\u300d\u300e\u300f'
_WIDTHS = ("FULLWIDTH", "HALFWIDTH")  # in names of letters of several scripts


def census(texts: Sequence[str], scripts: tuple[str, ...]) -> NDArray[np.intp]:
    """What each of the texts is made of, [len(texts), 7]: letters, those of other scripts (none,
    where `scripts` are not known), digits, punctuation and symbols, all but spaces, question marks,
    quotation marks."""
    lengths = np.array([len(text) for text in texts], np.intp)
    codes = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)
    kinds = _KINDS[codes]
    if not kinds.all():
        for code in np.unique(codes[kinds == _UNKNOWN]).tolist():
            _KINDS[code] = _kind(chr(code))
        kinds = _KINDS[codes]
    many = len(_SCRIPTS)
    keys = np.repeat(np.arange(len(texts)) * many, lengths) + kinds
    found = np.bincount(keys, minlength=len(texts) * many).reshape(len(texts), many)
    letters = found[:, _QUOTE + 1 :]
    right = {*scripts, *_WIDTHS}
    wrong = ["" not in scripts and name not in right for name in _SCRIPTS[_QUOTE + 1 :]]
    return np.stack(
        [
            letters.sum(1), letters[:, wrong].sum(1), found[:, _DIGIT],
            found[:, _PUNCTUATION : _QUOTE + 1].sum(1), found[:, _SOLID:].sum(1),
            found[:, _ASK], found[:, _QUOTE],
        ],
        axis=1,
    )  # fmt: skip


def _kind(character: str) -> int:
    if character == " ":
        return _SPACE
    category = unicodedata.category(character)
    if category[0] == "L":
        script = unicodedata.name(character, "OTHER").split()[0].split("-")[0]
        if script not in _SCRIPTS:
            _SCRIPTS.append(script)
        return _SCRIPTS.index(script)
    if category == "Nd":
        return _DIGIT
    if character in ASKS:
        return _ASK
    if character in QUOTES:
        return _QUOTE
    return _PUNCTUATION if category[0] in "PS" else _SOLID
