"""What the steps of data preparation hand on to each other: Arrow batches of translation pairs.

Every step is a pure function of a batch and its own options, so that it runs in any process, in
any order of batches, with the same result.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

SCHEMA = pa.schema(
    [
        ("source", pa.string()),  # the two texts
        ("target", pa.string()),
        ("source_language", pa.string()),  # canonical codes: "en", "sw", "zh", "sr_Latn"
        ("target_language", pa.string()),
        ("corpus", pa.string()),  # the source's name in the recipe
        ("where", pa.string()),  # "file:line"
        ("score", pa.float32()),  # that came with the corpus (LASER, Bicleaner), else null
    ]
)


@dataclass(frozen=True)
class Judged:
    """A step's verdict on every row of a batch, in order.

    batch: the rows, texts as the step left them. reason: null where a row stays, else a fixed
    phrase. detail: particulars of the reason, or null.
    """

    batch: pa.RecordBatch
    reason: pa.StringArray
    detail: pa.StringArray

    @property
    def kept(self) -> pa.RecordBatch:
        return self.batch.filter(self.reason.is_null())


class Reject(Exception):
    """Why a row goes: (reason, detail)."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def judge_rows(
    batch: pa.RecordBatch,
    judge: Callable[..., tuple[str, str] | None],
    *more: Sequence[Any],
) -> Judged:
    """Judge row by row: `judge` returns the texts as they shall be (None: as they are) or raises
    `Reject`. It gets source, target, both languages, and what each of `more` has for the row."""
    names = ("source", "target", "source_language", "target_language")
    columns = [batch.column(name).to_pylist() for name in names]
    texts: tuple[list[str], list[str]] = (columns[0], columns[1])
    reasons: list[str | None] = [None] * batch.num_rows
    details: list[str | None] = [None] * batch.num_rows
    changed = False
    for i, row in enumerate(zip(*columns, *more, strict=True)):
        try:
            made = judge(*row)
            if made is not None:
                texts[0][i], texts[1][i] = made
                changed = True
        except Reject as e:
            reasons[i], details[i] = e.reason, e.detail or None
    return judged(with_texts(batch, *texts) if changed else batch, reasons, details)


def by_code(codes: Sequence[str]) -> Iterator[tuple[str, list[int]]]:
    """Each of the codes with the places where it stands."""
    for code in dict.fromkeys(codes):
        yield code, [i for i, other in enumerate(codes) if other == code]


def judged(
    batch: pa.RecordBatch, reasons: Sequence[str | None], details: Sequence[str | None]
) -> Judged:
    return Judged(batch, pa.array(reasons, pa.string()), pa.array(details, pa.string()))


def with_texts(batch: pa.RecordBatch, source: list[str], target: list[str]) -> pa.RecordBatch:
    for name, texts in (("source", source), ("target", target)):
        at = batch.schema.get_field_index(name)
        batch = batch.set_column(at, name, pa.array(texts, pa.string()))
    return batch


def make_batch(rows: Iterable[dict[str, Any]]) -> pa.RecordBatch:
    """A batch of rows that have at least the texts and the languages."""
    filled = [{"corpus": "", "where": "", "score": None, **row} for row in rows]
    return pa.RecordBatch.from_pylist(filled, schema=SCHEMA)
