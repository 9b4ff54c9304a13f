"""Step 2, clean: pairs that their own characters give away, in no particular language's model.

Lengths and their ratio, copies, wrong scripts, repeated text, shares of digits, punctuation and
links, numbers that disagree, targets that break off.
"""

import math
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Annotated

import pyarrow as pa

from xplus_fast.data.steps.batch import Judged, Reject, judge_rows
from xplus_fast.options import Amount, AtLeast0, Count, Positive, Share


@dataclass(frozen=True)
class CleanOptions:
    min_letters: Amount = 1  # of either text
    max_characters: Count = 1500  # of either text
    # |ln(target / expected)| of the lengths allowed, and so much more over the square root of the
    # expected length: short texts differ more
    ratio: Annotated[float, Positive] = 0.55
    ratio_short: Annotated[float, AtLeast0] = 3.5
    max_digits: Share = 0.5  # share of the characters that are no spaces
    max_punctuation: Share = 0.5
    max_links: Share = 0.3  # share of the characters in URLs and e-mail addresses
    max_repeated: Count = 3  # times that one word may follow itself
    min_script: Share = 0.5  # share of the letters in the language's script, names left room
    max_copied: Share = 0.8  # share of the target's words that the source has, of 4 words or more
    numbers: bool = True  # reject numbers of two digits and more that contradict each other
    truncated: bool = True  # reject targets that end without the source's full stop


# Characters of a text relative to its English: means over FLORES-200 devtest (1012 sentences).
RELATIVE_LENGTH = {
    "ar": 0.881, "bn": 0.978, "cs": 0.964, "de": 1.166, "en": 1.000, "es": 1.190,
    "fr": 1.195, "hu": 1.050, "ja": 0.431, "ko": 0.500, "ru": 1.077, "sr": 0.991,
    "sw": 1.047, "te": 1.004, "th": 0.956, "vi": 1.050, "zh": 0.328,
}  # fmt: skip
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
NO_STOP = {"th", "lo", "km", "my", "te"}  # written without a full stop, or often so
_STOPS = re.compile(
    "[.!?:;\u2026\u3002\uff01\uff1f\uff0e\uff1a\uff1b\u0964\u0965\u061f\u06d4]"
    "[\"'\u2019\u201d\u00bb\u300d\u300f)\\]]*$"
)
SHORTER = 0.3  # ln of the lengths: a text that breaks off is shorter than expected
_LINK = re.compile(r"https?://\S+|www\.\S+|\S+@\S+\.\w+|\b\w+\.(?:com|org|net|html?|php)\b\S*")
_GROUPS = re.compile(r"(?<=\d)[.,\u00a0\u202f\u066b\u066c' ](?=\d)")
_NUMBER = re.compile(r"\d+")
_WORD = re.compile(r"\w+")


def clean_pairs(batch: pa.RecordBatch, options: CleanOptions) -> Judged:
    """Judge every pair by its characters."""

    def judge(row: dict[str, str]) -> None:
        source, target = row["source"], row["target"]
        languages = row["source_language"], row["target_language"]
        for side, text, language in (
            ("source", source, languages[0]), ("target", target, languages[1])
        ):  # fmt: skip
            try:
                _one(text, language, options)
            except Reject as e:
                raise Reject(f"{side}: {e.reason}", e.detail) from None
        _copy(source, target, options)
        _lengths(source, target, languages, options)
        if options.numbers:
            _numbers(source, target)

    return judge_rows(batch, judge)


def _one(text: str, language: str, options: CleanOptions) -> None:
    if len(text) > options.max_characters:
        raise Reject("too long", f"{len(text)} characters")
    letters, wrong, digits, punctuation, solid = _census(text, scripts_of(language))
    if letters < options.min_letters:
        raise Reject("too short", f"{letters} letters")
    # a Latin name takes three letters where a Chinese word takes one
    right, foreign = letters - wrong, wrong * RELATIVE_LENGTH.get(language, 1.0)
    if right < options.min_script * (right + foreign):
        raise Reject("wrong script", f"{wrong} of {letters} letters")
    if digits > solid * options.max_digits:
        raise Reject("mostly digits", f"{digits} of {solid} characters")
    if punctuation > solid * options.max_punctuation:
        raise Reject("mostly punctuation", f"{punctuation} of {solid} characters")
    if "." in text or "@" in text:
        linked = sum(len(m[0]) for m in _LINK.finditer(text))
        if linked > solid * options.max_links:
            raise Reject("mostly links", f"{linked} of {solid} characters")
    words = text.casefold().split()
    run = 1
    for before, word in zip(words, words[1:], strict=False):
        run = run + 1 if word == before else 1
        if run > options.max_repeated:
            raise Reject("repeated text", word)
    if len(words) >= 10 and len(set(words)) < 0.4 * len(words):
        raise Reject("repeated text", f"{len(set(words))} different of {len(words)} words")


def scripts_of(code: str) -> tuple[str, ...]:
    """The scripts of a canonical language code."""
    language, _, script = code.partition("_")
    if script:
        named = {
            "Latn": "LATIN",
            "Cyrl": "CYRILLIC",
            "Arab": "ARABIC",
            "Hans": "CJK",
            "Hant": "CJK",
        }
        if script in named:
            return (named[script],)
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


def _census(text: str, scripts: tuple[str, ...]) -> tuple[int, int, int, int, int]:
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


def _plain(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _copy(source: str, target: str, options: CleanOptions) -> None:
    ours, theirs = _plain(source), _plain(target)
    if ours == theirs:
        raise Reject("copy of the source")
    if len(theirs) >= 4:
        known = set(ours)
        shared = sum(word in known for word in theirs)
        if shared >= options.max_copied * len(theirs):
            raise Reject("copy of the source", f"{shared} of {len(theirs)} words")


def _lengths(source: str, target: str, languages: tuple[str, str], options: CleanOptions) -> None:
    relative = [RELATIVE_LENGTH.get(code.partition("_")[0], 1.0) for code in languages]
    expected = len(source) * relative[1] / relative[0]
    off = math.log(len(target) / expected)
    # in English characters, so that Chinese texts count as long as they are
    allowed = options.ratio + options.ratio_short / math.sqrt(len(source) / relative[0])
    if off > allowed:
        raise Reject("target too long for its source", f"{math.exp(off):.1f}x as long as expected")
    if -off > allowed:
        raise Reject("target too short for its source", f"{math.exp(off):.2f}x as long as expected")
    # a sentence that breaks off is shorter, too
    if not options.truncated or NO_STOP & {c.partition("_")[0] for c in languages}:
        return
    stops = bool(_STOPS.search(source)), bool(_STOPS.search(target))
    if stops == (True, False) and off < -SHORTER and len(source) / relative[0] >= 20:
        raise Reject("target breaks off", target[-20:])
    if stops == (False, True) and off > SHORTER and len(target) / relative[1] >= 20:
        raise Reject("source breaks off", source[-20:])


def _numbers(source: str, target: str) -> None:
    """Reject numbers of which either side has its own: "1995" against "1959".

    One that only one side has may be written out on the other; thousands are grouped differently,
    and a Chinese or Indian count of ten thousands or lakhs drops zeros.
    """
    ours, theirs = (_found(t) for t in (source, target))
    if not ours and not theirs:
        return
    mine, other = ours - theirs, theirs - ours
    if mine and other or len(mine) > 2 or len(other) > 2:
        raise Reject("numbers disagree", f"{', '.join(sorted(mine))} | {', '.join(sorted(other))}")


def _found(text: str) -> set[str]:
    if not _NUMBER.search(text):
        return set()
    western = "".join(
        str(unicodedata.digit(c)) if c.isdigit() and not c.isascii() else c
        for c in unicodedata.normalize("NFKC", text)
    )
    numbers = _NUMBER.findall(_GROUPS.sub("", western))
    # of two digits and more: small ones are as often words
    return {n.rstrip("0").lstrip("0") or "0" for n in numbers if len(n) > 1}
