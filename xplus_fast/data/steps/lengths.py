"""Lengths of the texts of a pair, in the characters that English takes for the same."""

import math
from collections.abc import Sequence
from typing import NamedTuple

CHINESE = ("zh", "yue", "wuu", "lzh")
# Characters of a text relative to its English: means over FLORES-200 devtest (1012 sentences).
RELATIVE_LENGTH = {
    "ar": 0.881, "bn": 0.978, "cs": 0.964, "de": 1.166, "en": 1.000, "es": 1.190,
    "fr": 1.195, "hu": 1.050, "ja": 0.431, "ko": 0.500, "ru": 1.077, "sr": 0.991,
    "sw": 1.047, "te": 1.004, "th": 0.956, "vi": 1.050,
    **dict.fromkeys(CHINESE, 0.328),  # measured for zh
}  # fmt: skip
UNMEASURED = 0.3  # what ln of the ratio is spared where a language is not in it
VARIED = dict.fromkeys((*CHINESE, "ja"), 1.4)  # languages whose lengths vary more
BOTH = 1.4  # so do those of texts that were translated from English both
# Characters that a digit takes where its number is written out, at most: about that in Swahili and
# French, and 3 to 5 in English
WRITTEN = 7


class Lengths(NamedTuple):
    source: float  # in English characters, so that Chinese texts count as long as they are
    target: float
    off: float  # ln(target / source), as near to 0 as numbers written out on one side allow
    spare: float  # what that may be off for want of measurements
    varied: float  # how much more than others the languages vary


def compare(source: str, target: str, bases: Sequence[str], digits: Sequence[int]) -> Lengths:
    """Lengths of two texts, of the languages `bases`, with so many digits each."""
    ours = len(source) / RELATIVE_LENGTH.get(bases[0], 1.0)
    theirs = len(target) / RELATIVE_LENGTH.get(bases[1], 1.0)
    off = math.log(theirs / ours)
    if digits[0] and not digits[1]:
        off = min(off, max(math.log(theirs / (ours + WRITTEN * digits[0])), 0.0))
    elif digits[1] and not digits[0]:
        off = max(off, min(math.log((theirs + WRITTEN * digits[1]) / ours), 0.0))
    known = bases[0] in RELATIVE_LENGTH and bases[1] in RELATIVE_LENGTH
    varied = max(VARIED.get(bases[0], 1.0), VARIED.get(bases[1], 1.0))
    varied *= 1.0 if "en" in bases else BOTH
    return Lengths(ours, theirs, off, 0.0 if known else UNMEASURED, varied)


def deviations(lengths: Lengths) -> float:
    """How far apart two lengths are, in what is usual of translations of that length."""
    usual = (0.05 + 1.6 / math.sqrt((lengths.source + lengths.target) / 2)) * lengths.varied
    return max(abs(lengths.off) - lengths.spare, 0.0) / usual
