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

from xplus_fast.data.steps.apart import apart
from xplus_fast.data.steps.batch import Judged, Reject, by_code, judge_rows
from xplus_fast.data.steps.characters import NO_MARKS, census, scripts_of
from xplus_fast.data.steps.lengths import RELATIVE_LENGTH, Lengths, compare
from xplus_fast.data.steps.numbers import contradiction
from xplus_fast.data.steps.plain import UNSPACED, words
from xplus_fast.options import Amount, AtLeast0, Count, Positive, Share

# letters, those of other scripts, digits, punctuation, all but spaces, question and quotation marks
_Census = Sequence[int]


@dataclass(frozen=True)
class CleanOptions:
    min_letters: Amount = 1  # of either text
    max_characters: Count = 1500  # of either text
    # |ln(target / expected)| of the lengths allowed, and so much more over the square root of a
    # length: short texts differ more
    ratio: Annotated[float, Positive] = 0.35
    ratio_short: Annotated[float, AtLeast0] = 3.5
    max_digits: Share = 0.5  # share of the characters that are no spaces
    max_punctuation: Share = 0.5
    max_links: Share = 0.6  # share of the characters in URLs and e-mail addresses
    max_repeated: Count = 3  # times that one word may follow itself
    min_script: Share = 0.5  # share of the letters in the language's script, names left room
    max_copied: Share = 0.8  # share of the target's words that the source has, of 4 words or more
    numbers: bool = True  # reject numbers of two digits and more that contradict each other
    truncated: bool = True  # reject targets that end without the source's full stop
    # evidence that the texts do not go together, see `apart.WEIGHTS`; a large number: not asked
    max_apart: Annotated[float, Positive] = 3.1


# Full stops, and what ends a sentence else: of Armenian, Ethiopic, Khmer, Tibetan and Burmese, too
_STOPS = re.compile(
    "[.!?:;~*\u2026\u2025\u3002\uff01\uff1f\uff0e\uff1a\uff1b\uff61\u0964\u0965\u061f\u061b\u06d4"
    "\u0589\u055c\u055e\u1362\u1367\u1368\u17d4\u17d5\u0f0d\u104a\u104b\u037e\u203c\u2047-\u2049\u2e2e]"
    '[^\\w\\s]{0,4}$|["\u201c\u201d\u00bb\u00ab\u300d\u300f\u3011)\\]\uff09]$'  # or closed
)
END = 6  # characters at the end of a text, at most, that `_STOPS` is about
LOOP = 15  # characters of a text that repeats itself
SUNG = 60  # characters, at most, of what may be said over and over in both languages
_AGAIN = re.compile(r"\b(\w{1,12})(?:\W+\1\b){2}|(\w{1,4})\2{3}", re.I)
# More letters than a word has, in scripts that part their words
_GLUED = re.compile(r"[^\W\d_]{45}")
# A text that breaks off is shorter than expected, too: by so much, in ln of the lengths, and more
# over the square root of the length. Headlines have no full stop either, and are shorter than their
# translations.
SHORTER = {"target": (0.05, 1.0), "te": (0.1, 1.8), "unmarked": (0.12, 2.6), "source": (0.1, 4.5)}
# Syllables of Thai and Lao that are not whole: a vowel that is written before its consonant, one
# that a consonant must follow (a tone between or not; one word ends in a short e), and a single
# consonant after a vowel that none can close
_UNFINISHED = re.compile(
    "(?:[\u0e40-\u0e44\u0ec0-\u0ec4]|[\u0e31\u0e37][\u0e48-\u0e4b]?|[^\u0e01]\u0e47"
    "|[\u0eb1\u0ebb][\u0ec8-\u0ecb]?|[\u0e30\u0e33][\u0e01-\u0e2e]"
    "|[\u0e43\u0e44][\u0e01-\u0e2e]{1,2}[\u0e48-\u0e4b][\u0e01-\u0e2e])[^\\w\u0e00-\u0eff]*$"
)
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
        _repetitions(source, target, options)
        _run_together(source, target)
        _copy(source, target, options)
        bases = a.partition("_")[0], b.partition("_")[0]
        digits = ours[2], theirs[2]
        lengths = compare(source, target, bases, digits)
        if options.truncated:
            _broken(source, target, bases, lengths)
        _sizes(lengths, options)
        if options.numbers and (digits[0] or digits[1]):
            if found := contradiction(source, target, (a, b)):
                raise Reject("numbers disagree", found)
        counted = digits if options.numbers else (0, 0)
        marks = ours[5:], theirs[5:]
        if found := apart(source, target, bases, lengths, counted, marks, options.max_apart):
            raise Reject("lengths and marks disagree", found)

    return judge_rows(
        batch, judge, *(_censuses(batch, side, options) for side in ("source", "target"))
    )


def _censuses(batch: pa.RecordBatch, side: str, options: CleanOptions) -> list[_Census]:
    """What each text of a side is made of; one that is too long is not looked at."""
    texts = [
        text if len(text) <= options.max_characters else ""
        for text in batch.column(side).to_pylist()
    ]
    found: list[_Census] = [(0,) * 7] * len(texts)
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
    relative = RELATIVE_LENGTH.get(language.partition("_")[0], 1.0)
    right, foreign = letters - wrong, wrong * relative
    if right < options.min_script * (right + foreign):
        raise Reject("wrong script", f"{wrong} of {letters} letters")
    # and so do digits, but for few in a word
    others = (solid - digits) / min(relative, 1.0)
    if digits > (digits + others) * options.max_digits:
        raise Reject("mostly digits", f"{digits} of {solid} characters")
    if punctuation > solid * options.max_punctuation:
        raise Reject("mostly punctuation", f"{punctuation} of {solid} characters")
    if _DOTTED.search(text):
        linked = sum(len(m[0]) for m in _LINK.finditer(text))
        if linked > solid * options.max_links:
            raise Reject("mostly links", f"{linked} of {solid} characters")


def _repetitions(source: str, target: str, options: CleanOptions) -> None:
    """Reject a text that says something over and over; one that is sung or shouted in both
    languages is none."""
    found = _repeated(source, options), _repeated(target, options)
    if any(found) and _sung(source, target):
        return
    for side, what in (("source", found[0]), ("target", found[1])):
        if what:
            raise Reject(f"{side}: repeated text", what)


def _sung(source: str, target: str) -> bool:
    if max(len(source), len(target)) > SUNG:
        return False
    return all(_AGAIN.search(text) for text in (source, target))


def _repeated(text: str, options: CleanOptions) -> str:
    parts = text.casefold().split()
    different = len(set(parts))
    if len(parts) - different >= options.max_repeated:
        run = 1
        for before, part in zip(parts, parts[1:], strict=False):
            run = run + 1 if part == before else 1
            if run > options.max_repeated:
                return part
    if len(parts) >= 10 and different < 0.4 * len(parts):
        return f"{different} different of {len(parts)} words"
    return _loop(text)


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


def _run_together(source: str, target: str) -> None:
    for side, text, other in (("source", source, target), ("target", target, source)):
        if text.count(" ") * 30 < len(text) - 44 and not UNSPACED.search(text):
            if (found := _GLUED.search(text)) and not _GLUED.search(other):
                raise Reject(f"{side}: words run together", found[0])


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
    if twice[0] != twice[1] and not _sung(source, target):
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


def _sizes(lengths: Lengths, options: CleanOptions) -> None:
    off = lengths.off
    # of the source, or of both: a target that lost its end does not say how much it may have lost
    size = min(lengths.source, math.sqrt(lengths.source * lengths.target))
    allowed = options.ratio * lengths.varied + options.ratio_short / math.sqrt(size)
    if off > allowed + lengths.spare:
        raise Reject("target too long for its source", f"{math.exp(off):.1f}x as long as expected")
    if -off > allowed + lengths.spare:
        raise Reject("target too short for its source", f"{math.exp(off):.2f}x as long as expected")


def _broken(source: str, target: str, bases: Sequence[str], lengths: Lengths) -> None:
    stops = bool(_STOPS.search(source[-END:])), bool(_STOPS.search(target[-END:]))
    if stops[0] == stops[1]:
        return
    side = how = "source" if stops[1] else "target"
    size, sign = (lengths.target, 1) if stops[1] else (lengths.source, -1)
    if side == "target" and not NO_MARKS.isdisjoint(bases):
        how = "unmarked"
    elif side == "target" and "te" in bases:  # often without, in all but news
        how = "te"
    least, more = SHORTER[how]
    broken = source if stops[1] else target
    short = size >= MEASURED and lengths.off * sign > least + more / math.sqrt(size)
    if short or _UNFINISHED.search(broken):
        raise Reject(f"{side} breaks off", broken[-20:])
