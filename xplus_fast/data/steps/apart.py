"""Texts that differ in two ways which go together in translations: evidence of misalignment.

Lengths, question marks, digits (some or none) and direct speech each differ in some translations,
as numbers are written out, requests are put as questions and speech is reported, but seldom two at
once.
"""

import math
import re
from collections.abc import Sequence

from xplus_fast.data.steps.characters import ASKS, NO_MARKS, QUOTES
from xplus_fast.data.steps.lengths import CHINESE, RELATIVE_LENGTH, Lengths, deviations

# The evidence is these times the logs of the ratios (of lengths: in standard deviations; speech is
# there or not), none alone enough.
WEIGHTS = {"length": 1.5, "question marks": 1.15, "digits": 0.6, "speech": 1.2}
ALONE = 2.5  # the most of each
# Written without marks for questions, or with a semicolon
NO_QUESTIONS = NO_MARKS | {"el", "bo", "dz"}
_DENSE = {*CHINESE, "ja"}  # East Asia asks with particles, and writes numbers out
_ASKS = re.compile(f"[{ASKS}]+")  # "What???" asks once
_ASKED = re.compile(  # particles and requests at the end, question words
    "(?:[\u304b\u306e\u306d\u3088]|[\u3060\u3057]\u3087?\u3046|\u3055\u3044)(?:[\u3002\u300d\u300f]|$)"
    "|\u304b[\u306a\u306d\u3044]|[\u8ab0\u8c01\u4f55\u54ea\u600e\u5417\u55ce\u5462\u5e7e\u51e0\u5427]"
    "|\u4ec0\u4e48|\u591a\u5c11|\u3069[\u3053\u3046\u3093\u308c\u3061]|\u3044\u3064|\u306a\u305c"
)
# English asks for what others bid, and for consent
_BIDS = re.compile(
    "\\b(?:will|would|could|can|may|shall|should|(?:won|can|why don)['\u2019]t) (?:you|we|i)\\b"
    r"|\b(?:how about|what about|why not)\b"
    "|, (?:[a-z]+n['\u2019]t|[a-z]+) (?:i|you|he|she|it|we|they|there)\\?"
    r"|, ?(?:right|ok|okay|yes|no|huh|eh|please)\?",
    re.I,
)
_NUMERALS = re.compile(
    "[\u3007\u4e00\u4e8c\u4e09\u56db\u4e94\u516d\u4e03\u516b\u4e5d\u5341\u767e\u5343\u4e07]{2}"
    "|[\u5341\u767e\u5343\u4e07]"
)
_ROMAN = re.compile(r"\b(?:[IVX]{2,}|[VX])(?![A-Z])")  # Europe's centuries
_SPAN = re.compile(
    f'["\u201c\u201d\u201e\u201f\u00ab\u00bb\u300c\u300e][^{QUOTES}]*["\u201c\u201d\u00ab\u00bb\u300d\u300f]'
)
_PAUSES = re.compile("[.,!?;:\u3002\uff0c\uff01\uff1f\uff1b\uff1a\u2026]")
SENTENCE = 18  # English characters with their quotes; fewer are a title, or the name of a button
# What may mark speech instead: dashes, single quotes
_SAID = re.compile(
    f"[{QUOTES}\u2018\u201a\u2039\u203a\u2014\u2015`]|(?:^|\\W)'|(?:^|\\s)[-\u2013]\\s"
)


def apart(
    source: str, target: str, bases: Sequence[str], lengths: Lengths, digits: Sequence[int],
    marks: Sequence[Sequence[int]], limit: float,
) -> str | None:  # fmt: skip
    """The evidence that two texts of these languages do not go together; None up to a limit.

    digits: how many each has. marks: how many question marks and quotation marks each has.
    """
    differ: dict[str, float] = {}
    if marks[0][0] != marks[1][0] and NO_QUESTIONS.isdisjoint(bases):
        asks = [len(_ASKS.findall(text)) for text in (source, target)]
        if not any(_asks_otherwise(*one) for one in zip((source, target), bases, strict=True)):
            differ["question marks"] = abs(math.log((asks[0] + 0.7) / (asks[1] + 0.7)))
    most = max(digits)  # one alone may count a list
    if most > 1 and not (digits[0] and digits[1]):
        texts = (source, target) if digits[0] else (target, source)
        wordy = bases[1] if digits[0] else bases[0]
        if not (wordy in _DENSE and _NUMERALS.search(texts[1])) and not _ROMAN.search(texts[1]):
            differ["digits"] = math.log((most + 0.7) / 0.7)
    if bool(marks[0][1]) != bool(marks[1][1]):
        texts = (source, target) if marks[0][1] else (target, source)
        quotes = bases[0 if marks[0][1] else 1]
        least = SENTENCE * RELATIVE_LENGTH.get(quotes, 1.0)
        # Chinese puts names and terms in quotes, as long as a short sentence
        said = any(
            len(span) >= least and (quotes not in CHINESE or _PAUSES.search(span))
            for span in _SPAN.findall(texts[0])
        )
        if said and not _SAID.search(texts[1]):
            differ["speech"] = 1.0
    if not differ:
        return None
    differ["length"] = deviations(lengths)
    evidence = {name: min(WEIGHTS[name] * value, ALONE) for name, value in differ.items()}
    if sum(evidence.values()) <= limit:
        return None
    return ", ".join(f"{name} {value:.1f}" for name, value in evidence.items() if value >= 0.1)


def _asks_otherwise(text: str, base: str) -> bool:
    pattern = _BIDS if base == "en" else _ASKED if base in _DENSE else None
    return pattern is not None and pattern.search(text) is not None
