"""Step 2, clean: pairs that their own characters give away, in no particular language's model.

Lengths and their ratio, copies, wrong scripts, repeated text, shares of digits, punctuation and
links, numbers that disagree, targets that break off.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import pyarrow as pa

from xplus_fast.data.steps.batch import Judged, Reject, by_code, judge_rows
from xplus_fast.data.steps.characters import ASKS, NO_MARKS, census, scripts_of
from xplus_fast.data.steps.numbers import contradiction
from xplus_fast.data.steps.plain import words
from xplus_fast.options import Amount, AtLeast0, Count, Positive, Share

# letters, those of other scripts, digits, punctuation, all but spaces, question marks
_Census = Sequence[int]


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
    max_links: Share = 0.6  # share of the characters in URLs and e-mail addresses
    max_repeated: Count = 3  # times that one word may follow itself
    min_script: Share = 0.5  # share of the letters in the language's script, names left room
    max_copied: Share = 0.8  # share of the target's words that the source has, of 4 words or more
    numbers: bool = True  # reject numbers of two digits and more that contradict each other
    truncated: bool = True  # reject targets that end without the source's full stop
    # evidence that the texts do not go together, see `APART`; a large number: not asked
    max_apart: Annotated[float, Positive] = 3.1


# Characters of a text relative to its English: means over FLORES-200 devtest (1012 sentences).
RELATIVE_LENGTH = {
    "ar": 0.881, "bn": 0.978, "cs": 0.964, "de": 1.166, "en": 1.000, "es": 1.190,
    "fr": 1.195, "hu": 1.050, "ja": 0.431, "ko": 0.500, "ru": 1.077, "sr": 0.991,
    "sw": 1.047, "te": 1.004, "th": 0.956, "vi": 1.050, "zh": 0.328,
    **dict.fromkeys(("yue", "wuu", "lzh"), 0.328),  # not measured; written as zh is
}  # fmt: skip
# Written without marks for questions, or with a semicolon
NO_QUESTIONS = NO_MARKS | {"el", "bo", "dz"}
# Full stops, and what ends a sentence else: of Armenian, Ethiopic, Khmer, Tibetan and Burmese, too
_STOPS = re.compile(
    "[.!?:;~*\u2026\u2025\u3002\uff01\uff1f\uff0e\uff1a\uff1b\uff61\u0964\u0965\u061f\u061b\u06d4"
    "\u0589\u055c\u055e\u1362\u1367\u1368\u17d4\u17d5\u0f0d\u104a\u104b\u037e\u203c\u2047-\u2049\u2e2e]"
    '[^\\w\\s]{0,4}$|["\u201c\u201d\u00bb\u00ab\u300d\u300f\u3011)\\]\uff09]$'  # or closed
)
END = 6  # characters at the end of a text, at most, that `_STOPS` is about
LOOP = 15  # characters of a text that repeats itself
# A text that breaks off is shorter than expected, too: by so much, in ln of the lengths, and more
# over the square root of the length. Headlines have no full stop either, and are shorter than their
# translations.
SHORTER = {"target": (0.05, 1.0), "te": (0.1, 1.8), "unmarked": (0.12, 2.6), "source": (0.1, 4.5)}
# Vowels of Thai and Lao that are written before the consonant of their syllable
_UNFINISHED = re.compile("[\u0e40-\u0e44\u0ec0-\u0ec4]\\W*$")
# Lengths, question marks and digits (some or none) each differ in some translations, but seldom
# two at once. The evidence is these times the logs of the ratios (of lengths: in standard
# deviations), none alone enough.
APART = {"length": 1.5, "question marks": 2.25, "digits": 1.2}
ALONE = 2.5  # the most of each
UNMEASURED = 0.3  # spared where a language is not in `RELATIVE_LENGTH`
VARIED = {"zh": 1.4, "ja": 1.4}  # languages whose lengths vary more
BOTH = 1.4  # so do those of texts that were translated from English both
_ASKS = re.compile(f"[{ASKS}]+")  # "What???" asks once
# Japanese asks with a particle as well; East Asia writes numbers out, Europe its centuries in Roman
_ASKED = re.compile("\u304b(?:\u306a|\u306d|\u3044)?(?:[\u3002\u300d\u300f]|$)")
_NUMERALS = re.compile(
    "[\u3007\u4e00\u4e8c\u4e09\u56db\u4e94\u516d\u4e03\u516b\u4e5d\u5341\u767e\u5343\u4e07]{2}"
    "|[\u5341\u767e\u5343\u4e07]"
)
_ROMAN = re.compile(r"\b(?:[IVX]{2,}|[VX])(?![A-Z])")
MEASURED = 22  # characters of a text, at least, whose end is looked at
_DOTTED = re.compile(r"\.\w|@|//")
_LINK = re.compile(
    r"https?://\S+|www\.\S+|\b[\w.+-]{1,64}@[\w-]+\.\w\S*|\b\w+\.(?:com|org|net|html?|php)\b\S*"
)
_NAME = re.compile(r"[A-Z\u00c0-\u00de\u0410-\u042f]\w*")


def clean_pairs(batch: pa.RecordBatch, options: CleanOptions) -> Judged:
    """Judge every pair by its characters."""

    def judge(source: str, target: str, a: str, b: str, ours: _Census, theirs: _Census) -> None:
        for side, text, language, made_of in (
            ("source", source, a, ours), ("target", target, b, theirs)
        ):  # fmt: skip
            try:
                _one(text, language, made_of, options)
            except Reject as e:
                raise Reject(f"{side}: {e.reason}", e.detail) from None
        _copy(source, target, options)
        off = _lengths(source, target, (a, b), options)
        if options.numbers and (ours[2] or theirs[2]):  # there are digits
            if found := contradiction(source, target, (a, b)):
                raise Reject("numbers disagree", found)
        if ours[2] != theirs[2] or ours[5] != theirs[5]:
            _apart(source, target, (a, b), ours, theirs, off, options)

    return judge_rows(
        batch, judge, *(_censuses(batch, side, options) for side in ("source", "target"))
    )


def _censuses(batch: pa.RecordBatch, side: str, options: CleanOptions) -> list[_Census]:
    """What each text of a side is made of; one that is too long is not looked at."""
    texts = [
        text if len(text) <= options.max_characters else ""
        for text in batch.column(side).to_pylist()
    ]
    found: list[_Census] = [(0,) * 6] * len(texts)
    for code, at in by_code(batch.column(f"{side}_language").to_pylist()):
        made_of = census([texts[i] for i in at], scripts_of(code)).tolist()
        for i, counts in zip(at, made_of, strict=True):
            found[i] = counts
    return found


def _one(text: str, language: str, made_of: _Census, options: CleanOptions) -> None:
    if len(text) > options.max_characters:
        raise Reject("too long", f"{len(text)} characters")
    letters, wrong, digits, punctuation, solid = made_of[:5]
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
    if _DOTTED.search(text):
        linked = sum(len(m[0]) for m in _LINK.finditer(text))
        if linked > solid * options.max_links:
            raise Reject("mostly links", f"{linked} of {solid} characters")
    _repetition(text, options)


def _repetition(text: str, options: CleanOptions) -> None:
    parts = text.casefold().split()
    different = len(set(parts))
    if len(parts) - different >= options.max_repeated:
        run = 1
        for before, part in zip(parts, parts[1:], strict=False):
            run = run + 1 if part == before else 1
            if run > options.max_repeated:
                raise Reject("repeated text", part)
    if len(parts) >= 10 and different < 0.4 * len(parts):
        raise Reject("repeated text", f"{different} different of {len(parts)} words")
    if found := _loop(text):
        raise Reject("repeated text", found)


def _loop(text: str) -> str:
    """What a text says over and over, with or without spaces; "" for nothing."""
    for eighth in (1, 3, 5, 7):
        at = len(text) * eighth // 8
        gram = text[at : at + 4]
        if text.count(gram) < 4 or not any(c.isalpha() for c in gram):
            continue
        again = text.find(gram, at + 1)
        if again < 0:
            at, again = text.rfind(gram, 0, at + 3), at
        period = again - at
        start = end = at
        while start > 0 and text[start - 1] == text[start - 1 + period]:
            start -= 1
        while end + period < len(text) and text[end] == text[end + period]:
            end += 1
        # laughs and long vowels are no loops
        if end + period - start >= max(4 * period, LOOP):
            return text[start : start + period].strip()
    return ""


def _copy(source: str, target: str, options: CleanOptions) -> None:
    ours, theirs = words(source), words(target)
    if ours == theirs:
        raise Reject("copy of the source")
    if len(theirs) >= 4:
        shared = _shared(ours, theirs)
        if shared >= options.max_copied:
            # names are the same in both: a text that is mostly of them is judged by the rest
            names = {word for name in _NAME.findall(target) for word in words(name)}
            others = [word for word in theirs if word not in names]
            if 2 * len(others) >= len(theirs) or _shared(ours, others) >= options.max_copied:
                raise Reject("copy of the source", f"{shared:.0%} of the words")
    twice = _twice(ours), _twice(theirs)
    if twice[0] != twice[1]:
        side = "source" if twice[0] else "target"
        raise Reject(f"{side}: repeated text", "its halves are the same")


def _shared(ours: list[str], theirs: list[str]) -> float:
    """The share of their words that are ours, by characters: Chinese has few spaces."""
    known = set(ours)
    return sum(len(w) for w in theirs if w in known) / max(sum(map(len, theirs)), 1)


def _twice(words: list[str]) -> bool:
    """Whether a text says the same thing twice."""
    half = len(words) // 2
    if len(words) >= 4:
        return len(words) % 2 == 0 and words[:half] == words[half:]
    whole = "".join(words)
    half = len(whole) // 2
    return half >= 4 and len(whole) % 2 == 0 and whole[:half] == whole[half:]


def _lengths(source: str, target: str, languages: tuple[str, str], options: CleanOptions) -> float:
    """ln(target / expected) of the lengths."""
    relative = [RELATIVE_LENGTH.get(code.partition("_")[0], 1.0) for code in languages]
    expected = len(source) * relative[1] / relative[0]
    off = math.log(len(target) / expected)
    # in English characters, so that Chinese texts count as long as they are
    allowed = options.ratio + options.ratio_short / math.sqrt(len(source) / relative[0])
    if off > allowed:
        raise Reject("target too long for its source", f"{math.exp(off):.1f}x as long as expected")
    if -off > allowed:
        raise Reject("target too short for its source", f"{math.exp(off):.2f}x as long as expected")
    if not options.truncated:
        return off
    stops = bool(_STOPS.search(source[-END:])), bool(_STOPS.search(target[-END:]))
    if stops[0] == stops[1]:
        return off
    bases = [code.partition("_")[0] for code in languages]
    side = how = "source" if stops[1] else "target"
    size, sign = (len(target) / relative[1], 1) if stops[1] else (len(source) / relative[0], -1)
    if side == "target" and not NO_MARKS.isdisjoint(bases):
        how = "unmarked"
    elif side == "target" and "te" in bases:  # often without, in all but news
        how = "te"
    least, more = SHORTER[how]
    broken = source if stops[1] else target
    short = size >= MEASURED and off * sign > least + more / math.sqrt(size)
    if short or _UNFINISHED.search(broken):
        raise Reject(f"{side} breaks off", broken[-20:])
    return off


def _apart(
    source: str, target: str, languages: tuple[str, str], ours: _Census, theirs: _Census,
    off: float, options: CleanOptions,
) -> None:  # fmt: skip
    """Reject texts that differ in several ways which go together in translations."""
    bases = [code.partition("_")[0] for code in languages]
    size = sum(
        len(text) / RELATIVE_LENGTH.get(base, 1.0)
        for text, base in zip((source, target), bases, strict=True)
    )
    spare = UNMEASURED if any(base not in RELATIVE_LENGTH for base in bases) else 0.0
    usual = 0.05 + 1.6 / math.sqrt(size / 2)
    usual *= max(VARIED.get(base, 1.0) for base in bases) * (1.0 if "en" in bases else BOTH)
    differ = {"length": max(abs(off) - spare, 0.0) / usual}
    asks = [len(_ASKS.findall(text)) for text in (source, target)]
    if asks[0] != asks[1] and NO_QUESTIONS.isdisjoint(bases):
        if not _otherwise(_ASKED, source, target, bases):
            differ["question marks"] = abs(math.log((asks[0] + 0.7) / (asks[1] + 0.7)))
    digits = max(ours[2], theirs[2])  # one alone may count a list
    if options.numbers and digits > 1 and not (ours[2] and theirs[2]):
        without = target if ours[2] else source
        if not _otherwise(_NUMERALS, source, target, bases) and not _ROMAN.search(without):
            differ["digits"] = math.log((digits + 0.7) / 0.7)
    if len(differ) == 1:
        return
    evidence = {name: min(APART[name] * value, ALONE) for name, value in differ.items()}
    if sum(evidence.values()) > options.max_apart:
        said = (f"{name} {value:.1f}" for name, value in evidence.items() if value >= 0.1)
        raise Reject("lengths and marks disagree", ", ".join(said))


def _otherwise(pattern: re.Pattern[str], source: str, target: str, bases: Sequence[str]) -> bool:
    texts = zip((source, target), bases, strict=True)
    return any(base in ("ja", "zh") and pattern.search(text) for text, base in texts)
