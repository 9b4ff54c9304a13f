"""Decontamination: pairs that hold sentences of the evaluation sets.

A text is contaminated where it is one of their lines, case, punctuation and white space aside, or
shares a good part of its character n-grams with one line: the most that either of them could. So a
line with some words changed, cut, joined to another or segmented into words is found.
"""

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xplus_fast.data.steps.batch import Judged, Reject, judged
from xplus_fast.data.steps.format import FormatOptions, tidy
from xplus_fast.data.steps.grams import Hashes, gram_hashes
from xplus_fast.data.steps.plain import glued
from xplus_fast.options import Positive

SIZE, DENSE_SIZE = 8, 4  # characters of an n-gram, without spaces; of Chinese, Japanese, Korean
# n-grams that a text must share at least: less is a phrase that anybody may use
LEAST, DENSE_LEAST = 24, 11
SAMPLE = 2  # every other n-gram, as its hash has it: half of the work, and as good; of dense, all
_DENSE = re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
_FILTER_BITS = 24


@dataclass(frozen=True)
class DecontaminateOptions:
    # share of the n-grams of a text or of a line, whichever has fewer; above 1: whole lines only
    overlap: Annotated[float, Positive] = 0.35


@dataclass(frozen=True)
class Index:
    """What evaluation sets hold: their lines, and the lines' n-grams as sorted hashes."""

    lines: frozenset[str]
    grams: Hashes
    owner: NDArray[np.int32]  # of each n-gram, the line
    sizes: NDArray[np.int32]  # of each line, its n-grams
    seen: NDArray[np.bool_]  # whether an n-gram's hash begins so: few of a clean text's do


def build_index(lines: Iterable[str]) -> Index:
    """Index the lines of evaluation sets, of any languages, in the forms that they come in."""
    found: set[str] = set()
    for line in lines:
        found.add(glued(unicodedata.normalize("NFC", line)))
        try:
            found.add(glued(tidy(line, FormatOptions())))
        except Reject:
            continue
    found.discard("")
    ordered = sorted(found)
    grams, owner = _grams(ordered, _dense(ordered))
    order = np.argsort(grams, kind="stable")
    seen = np.zeros(1 << _FILTER_BITS, bool)
    seen[_beginning(grams)] = True
    sizes = np.bincount(owner, minlength=len(ordered)).astype(np.int32)
    return Index(frozenset(found), grams[order], owner[order].astype(np.int32), sizes, seen)


def decontaminate_pairs(
    batch: pa.RecordBatch, options: DecontaminateOptions, index: Index
) -> Judged:
    """Reject pairs either side of which is in the evaluation sets."""
    reasons: list[str | None] = [None] * batch.num_rows
    details: list[str | None] = [None] * batch.num_rows
    for side in ("target", "source") if index.lines else ():
        texts = [glued(text) for text in batch.column(side).to_pylist()]
        found = _shared(texts, options, index) if options.overlap <= 1 else {}
        found |= {i: side for i, text in enumerate(texts) if text in index.lines}
        for i, detail in found.items():
            reasons[i] = "in an evaluation set"
            details[i] = detail if detail == side else f"{side}: {detail}"
    return judged(batch, reasons, details)


def _shared(texts: list[str], options: DecontaminateOptions, index: Index) -> dict[int, str]:
    """The texts that share enough n-grams with a line, and how many."""
    dense = _dense(texts)
    grams, owner = _grams(texts, dense)
    sizes = np.bincount(owner, minlength=len(texts))
    likely = index.seen[_beginning(grams)]
    grams, owner = grams[likely], owner[likely]
    first, last = (np.searchsorted(index.grams, grams, side) for side in ("left", "right"))
    lines = last - first  # that have this n-gram
    at = np.repeat(first - np.cumsum(lines) + lines, lines) + np.arange(lines.sum())
    pairs = np.repeat(owner, lines) * len(index.sizes) + index.owner[at]
    pairs, shared = np.unique(pairs, return_counts=True)
    text, line = np.divmod(pairs, max(len(index.sizes), 1))
    least = np.minimum(sizes[text], index.sizes[line])
    enough = (shared >= options.overlap * least) & (
        shared >= np.where(dense[text], DENSE_LEAST, LEAST // SAMPLE)
    )
    return {
        int(i): f"{n} of {m} n-grams"
        for i, n, m in zip(text[enough], shared[enough], least[enough], strict=True)
    }


def _dense(texts: list[str]) -> NDArray[np.bool_]:
    return np.array([2 * len(_DENSE.findall(t[:40])) > len(t[:40]) for t in texts], bool)


def _grams(texts: list[str], dense: NDArray[np.bool_]) -> tuple[Hashes, NDArray[np.intp]]:
    found = []
    for size, sample, chosen in ((SIZE, SAMPLE, ~dense), (DENSE_SIZE, 1, dense)):
        which = np.flatnonzero(chosen)
        grams, owner = gram_hashes([texts[i] for i in which], size)
        sampled = grams % np.uint64(sample) == 0
        found.append((grams[sampled], which[owner[sampled]]))
    return np.concatenate([g for g, _ in found]), np.concatenate([o for _, o in found])


def _beginning(grams: Hashes) -> NDArray[np.intp]:
    return (grams >> np.uint64(64 - _FILTER_BITS)).astype(np.intp)
