"""Characters: the scripts that languages are written in, and what a text is made of."""

import unicodedata
from collections import Counter
from functools import cache

# Scripts by the names that Unicode gives their letters
SCRIPTS = {
    "ar": ("ARABIC",), "bn": ("BENGALI",), "ja": ("HIRAGANA", "KATAKANA", "CJK"),
    "ko": ("HANGUL", "CJK"), "ru": ("CYRILLIC",), "sr": ("CYRILLIC",), "te": ("TELUGU",),
    "th": ("THAI",), "zh": ("CJK",), "el": ("GREEK",), "he": ("HEBREW",), "hi": ("DEVANAGARI",),
    "bg": ("CYRILLIC",), "uk": ("CYRILLIC",), "mk": ("CYRILLIC",), "be": ("CYRILLIC",),
    "kk": ("CYRILLIC",), "fa": ("ARABIC",), "ur": ("ARABIC",), "ka": ("GEORGIAN",),
    "hy": ("ARMENIAN",), "ta": ("TAMIL",), "kn": ("KANNADA",), "ml": ("MALAYALAM",),
    "gu": ("GUJARATI",), "pa": ("GURMUKHI",), "mr": ("DEVANAGARI",), "ne": ("DEVANAGARI",),
    "my": ("MYANMAR",), "km": ("KHMER",), "lo": ("LAO",), "am": ("ETHIOPIC",), "si": ("SINHALA",),
}  # fmt: skip
SCRIPT_NAMES = {  # of ISO 15924
    "Latn": "LATIN", "Cyrl": "CYRILLIC", "Arab": "ARABIC", "Hans": "CJK", "Hant": "CJK",
}  # fmt: skip
NO_MARKS = {"th", "lo", "km", "my"}  # written without full stops and question marks


def scripts_of(code: str) -> tuple[str, ...]:
    """The scripts of a canonical language code."""
    language, _, script = code.partition("_")
    if script in SCRIPT_NAMES:
        return (SCRIPT_NAMES[script],)
    return SCRIPTS.get(language, ("LATIN",))


@cache
def _kind(character: str) -> str:
    """The script of a letter; "0" of digits, "." of punctuation and symbols, "" of others."""
    category = unicodedata.category(character)
    if category[0] == "L":
        return unicodedata.name(character, "OTHER").split()[0].split("-")[0]
    if category == "Nd":
        return "0"
    return "." if category[0] in "PS" else ""


def census(text: str, scripts: tuple[str, ...]) -> tuple[int, int, int, int, int]:
    """Letters, those of other scripts, digits, punctuation and symbols, all but spaces."""
    letters = wrong = digits = punctuation = solid = 0
    for character, n in Counter(text).items():
        if character == " ":
            continue
        solid += n
        kind = _kind(character)
        if kind == "0":
            digits += n
        elif kind == ".":
            punctuation += n
        elif kind:
            letters += n
            if kind not in scripts and not (kind == "FULLWIDTH" or kind == "HALFWIDTH"):
                wrong += n
    return letters, wrong, digits, punctuation, solid
