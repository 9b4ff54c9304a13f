"""Letters of a text as its language writes them: NFC, and none that only look like its own.

Shapes of letters (of Arabic within a word, half and full width, of mathematics, radicals), letters
of another script or another language that look the same, digits in the place of signs.
"""

import re
import unicodedata
from collections.abc import Mapping, Set
from functools import partial
from typing import NamedTuple

from xplus_fast.data.steps.batch import Reject
from xplus_fast.data.steps.characters import OPENING

# Ligatures, the shapes that Arabic letters take in a word (not honorifics, which are words), kana
# of half width, radicals for the characters that they are, letters of mathematics
_SHAPED = "\u210e\u2e80-\u2fdf\ufb00-\ufdcf\ufe70-\ufefc\uff65-\uff9f\U0001d400-\U0001d7ff"
_SHAPES = re.compile(f"[{_SHAPED}]+")
_FULL_WIDTH = re.compile("[\uff01-\uff5e]+")
_WIDE = {"CJK", "HIRAGANA", "HANGUL"}  # scripts that have letters of full width besides


class _Alphabet(NamedTuple):
    script: str
    letter: re.Pattern[str]
    mixed: re.Pattern[str]
    whole: re.Pattern[str]
    from_latin: Mapping[int, int | str]  # letters that look alike
    to_latin: Mapping[int, int | str]
    unlike: Set[str]  # Latin letters that are taken for its own only within longer words


def _alphabet(script: str, letters: str, latin: str, own: str, more: dict[str, str]) -> _Alphabet:
    """letters: a range; latin and own: what looks alike; more: what else may become the other."""
    to_own, to_latin = (
        {ord(a): b for a, b in more.items() if (a < "\u0300") == own_too}
        for own_too in (True, False)
    )
    return _Alphabet(
        script, re.compile(f"[{letters}]"),
        re.compile(f"[A-Za-z][{letters}]|[{letters}][A-Za-z]"),
        re.compile(f"[{letters}\u0301\u04d0-\u04ff\u1f00-\u1fff]+"),
        {**str.maketrans(latin, own), **to_own}, {**str.maketrans(own, latin), **to_latin},
        {a for a in more if a < "\u0300"},
    )  # fmt: skip


_CYRILLIC = _alphabet(
    "CYRILLIC", "\u0400-\u045f", "ABCEHKMOPTXYaceopxyk",
    "\u0410\u0412\u0421\u0415\u041d\u041a\u041c\u041e\u0420\u0422\u0425\u0423"
    "\u0430\u0441\u0435\u043e\u0440\u0445\u0443\u043a",
    {"\u0406": "I", "\u0408": "J", "\u0456": "i", "\u0458": "j", "\u0405": "S", "\u0455": "s"},
)  # fmt: skip
_GREEK = _alphabet(
    "GREEK", "\u0370-\u03ff", "ABEZHIKMNOPTYXo",
    "\u0391\u0392\u0395\u0396\u0397\u0399\u039a\u039c\u039d\u039f\u03a1\u03a4\u03a5\u03a7\u03bf",
    # one way: a small alpha after Latin letters is meant
    {"a": "\u03b1", "p": "\u03c1", "v": "\u03bd", "x": "\u03c7", "u": "\u03c5", "i": "\u03b9",
     "k": "\u03ba", "w": "\u03c9", "\u00e1": "\u03ac", "\u00f3": "\u03cc", "\u00ed": "\u03af"},
)  # fmt: skip
_UNIT = re.compile("[A-Za-z]?[\u0394\u03a9\u03bc][A-Za-z]?")  # and differences: kOhm, Delta x
_MARKED = re.compile("[\u0370-\u045f]")  # one class for both is found much faster
# Letters that some of the languages in Cyrillic have
_OWN_CYRILLIC: dict[str, Mapping[int, int | str]] = {
    **dict.fromkeys(
        ("uk", "be", "kk"), {**_CYRILLIC.from_latin, **str.maketrans("Ii", "\u0406\u0456")}
    ),
    **dict.fromkeys(("sr", "mk"), {**_CYRILLIC.from_latin, **str.maketrans("Jj", "\u0408\u0458")}),
}
_WORD = re.compile(r"[^\W\d_]+")
# Letters of others that a language has in another shape: of Arabic, of Turkish
_PERSIAN = str.maketrans("\u064a\u0643\u0649", "\u06cc\u06a9\u06cc")
_OWN = {
    "fa": _PERSIAN, "ur": _PERSIAN,
    "ro": str.maketrans("\u015e\u015f\u0162\u0163", "\u0218\u0219\u021a\u021b"),
}  # fmt: skip
# A zero within a word, that looks like a sign or a letter: Telugu, Kannada, Malayalam, Burmese
_ZEROS = {
    "te": (re.compile("(?<=[\u0c05-\u0c4d])\u0c66(?![\u0c66-\u0c6f])"), "\u0c02"),
    "kn": (re.compile("(?<=[\u0c85-\u0ccd])\u0ce6(?![\u0ce6-\u0cef])"), "\u0c82"),
    "ml": (re.compile("(?<=[\u0d05-\u0d4d])\u0d66(?![\u0d66-\u0d6f])"), "\u0d02"),
    # before a sign, or a consonant that closes the syllable: "0 percent" has neither
    "my": (
        re.compile("(?<![\u1040-\u1049])\u1040(?=[\u102b-\u103e]|[\u1000-\u1021]\u103a)"),
        "\u101d",
    ),
}
# What stands for letters that a font or an encoding had not
_LOST = re.compile(
    "[^\\W\\d_][\x80-\x84\x86-\x9f\u25a1\u25af\ue000-\uf8ff]"
    "|[\x80-\x84\x86-\x9f\ue000-\uf8ff][^\\W\\d_]"
)
# Controls that are quotation marks, dashes and signs of cp1252
_WINDOWS = {
    code: bytes([code]).decode("cp1252")
    for code in (0x80, 0x82, 0x84, 0x8B, *range(0x91, 0x98), 0x99, 0x9B)
}
_LOST_AS_MARK = re.compile("[^\\W\\d_]\u00bf|(?:^|\\W)\u00bf\\w\u00bf")
_STACKED = re.compile("[\u0300-\u036f]{3}")
# A character of any of these
_RARE = re.compile(
    f"[{_SHAPED}\uff01-\uff5e\x80-\x84\x86-\x9f\u00bf\u0300-\u036f\u25a1\u25af\ue000-\uf8ff\ufffc]"
)


def own_letters(text: str, language: str, script: str) -> str:
    """A text of a language, in a script, in NFC and in its own letters; raises `Reject` where some
    are lost."""
    text = unicodedata.normalize("NFC", text)
    if _RARE.search(text):
        text = _rare(text, language, script)
    if language in _OWN:
        text = text.translate(_OWN[language])
    if language in _ZEROS:
        zero, sign = _ZEROS[language]
        text = zero.sub(sign, text)
    return _of_one_script(text, language, script) if _MARKED.search(text) else text


def _rare(text: str, language: str, script: str) -> str:
    text = text.translate(_WINDOWS)
    text = _SHAPES.sub(lambda m: unicodedata.normalize("NFKC", m[0]), text)
    if script not in _WIDE:
        text = _FULL_WIDTH.sub(lambda m: unicodedata.normalize("NFKC", m[0]), text)
    lost = _LOST.search(text) or language not in OPENING and _LOST_AS_MARK.search(text)
    if lost:
        raise Reject("lost characters", lost[0])
    if _STACKED.search(text):
        raise Reject("marks upon marks", text[:60])
    return text.replace("\ufffc", "")  # where a picture was


def _of_one_script(text: str, language: str, script: str) -> str:
    for alphabet in (_CYRILLIC, _GREEK):
        if script in (alphabet.script, "LATIN") and alphabet.mixed.search(text):
            text = _WORD.sub(partial(_word, language, script, alphabet), text)
            # Greek letters beside Latin ones are signs: of ohms, of particles
            left = alphabet is _CYRILLIC and script == "LATIN" and alphabet.mixed.search(text)
            if left:
                raise Reject("letters of two scripts in a word", left[0])
    return text


def _word(language: str, script: str, alphabet: _Alphabet, match: re.Match[str]) -> str:
    """A word of an alphabet and Latin letters in one of them, as far as letters look alike."""
    word = match[0]
    table = _OWN_CYRILLIC.get(language, alphabet.from_latin)
    if not alphabet.mixed.search(word):
        # a word of one letter, among mixed ones
        alone = script != "LATIN" and len(word) == 1 and word not in alphabet.unlike
        return word.translate(table) if alone else word
    if alphabet is _GREEK and _UNIT.fullmatch(word):
        return word
    if script != "LATIN":
        made = word.translate(table)
        return made if alphabet.whole.fullmatch(made) else word
    if alphabet is _GREEK and len(word) < 4:
        return word
    made = word.translate(alphabet.to_latin)
    return word if alphabet.letter.search(made) else made
