"""Decontamination: pairs that hold sentences of the evaluation sets.

A text is contaminated where it is one of their lines, case, punctuation and white space aside, or
shares half of its n-grams with them: 8 words, or 13 characters where words are not spaced
(the sizes of GPT-3's and PaLM's reports).
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import pyarrow as pa

from xplus_fast.data.steps.batch import Judged, Reject, judge_rows
from xplus_fast.options import Positive

WORDS, CHARACTERS = 8, 13
SPACED = 0.08  # share of white space from which a text counts as spaced
_NOISE = re.compile(r"[\W_]+")


@dataclass(frozen=True)
class DecontaminateOptions:
    # share of a text's n-grams; above 1: whole lines only
    overlap: Annotated[float, Positive] = 0.5


@dataclass(frozen=True)
class Index:
    """What evaluation sets hold, without case, punctuation and white space: lines and n-grams."""

    lines: frozenset[str]
    grams: frozenset[str]


def build_index(lines: Iterable[str]) -> Index:
    """Index the lines of evaluation sets, of any languages."""
    found: set[str] = set()
    grams: set[str] = set()
    for line in lines:
        text = _plain(line)
        if text:
            found.add(text)
            grams.update(_grams(text))
    return Index(frozenset(found), frozenset(grams))


def decontaminate_pairs(
    batch: pa.RecordBatch, options: DecontaminateOptions, index: Index
) -> Judged:
    """Reject pairs either side of which is in the evaluation sets."""

    def judge(row: dict[str, str]) -> None:
        for side in ("source", "target"):
            text = _plain(row[side])
            if text in index.lines:
                raise Reject("in an evaluation set", side)
            grams = _grams(text)
            shared = sum(g in index.grams for g in grams)
            if grams and shared >= options.overlap * len(grams):
                raise Reject("in an evaluation set", f"{side}: {shared} of {len(grams)} n-grams")

    return judge_rows(batch, judge)


def _plain(text: str) -> str:
    return _NOISE.sub(" ", text.casefold()).strip()


def _grams(text: str) -> list[str]:
    if text.count(" ") >= SPACED * len(text):
        words = text.split()
        return [" ".join(words[i : i + WORDS]) for i in range(len(words) - WORDS + 1)]
    text = text.replace(" ", "")
    return [text[i : i + CHARACTERS] for i in range(len(text) - CHARACTERS + 1)]
