"""The work on one part of a corpus: what runs in other processes and on other machines.

A finished part is two files, renamed into place: the pairs that stayed, with their fingerprints and
tokens, and a JSON of what was counted. Finding them is all that "done already" means.
"""

import glob
import heapq
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from xplus_fast.data.compressed import kind
from xplus_fast.data.files import Rejected, read_lines, read_records
from xplus_fast.data.folders import RECORDS
from xplus_fast.data.preparation.balance import count_tokens
from xplus_fast.data.preparation.recipe import EvaluationSets, PrepareRecipe
from xplus_fast.data.steps.batch import SCHEMA, Judged
from xplus_fast.data.steps.clean import clean_pairs
from xplus_fast.data.steps.decontaminate import Index, build_index, decontaminate_pairs
from xplus_fast.data.steps.dedup import fingerprints, text_hash
from xplus_fast.data.steps.format import format_pairs
from xplus_fast.data.steps.identify import identify_pairs
from xplus_fast.data.steps.instruct import SCHEMA as CONVERSATION
from xplus_fast.data.steps.instruct import Direction, instruct_pairs
from xplus_fast.data.steps.quality import COLUMNS as SCORES
from xplus_fast.data.steps.quality import score_pairs
from xplus_fast.errors import UserError
from xplus_fast.files import resolve, write_bytes, write_json

STEPS = ("format", "clean", "identify", "decontaminate")  # of a part; the others see all parts
CONVERSATIONS = ".conversations.parquet"
SAMPLES = 20  # rejects kept of each reason
SLICE = 2000  # pairs that go through the steps together: what these hold at once stays small
EDGES = (10, 20, 40, 80, 160, 320, 640, 1280)  # of the length histogram, characters


@dataclass(frozen=True)
class Part:
    """A run of pairs of one corpus, and where its result goes."""

    name: str  # "00003-000012": corpus and part
    folder: str

    def file(self, suffix: str) -> Path:
        return Path(self.folder) / f"{self.name}{suffix}"


def judge(batch: pa.RecordBatch, step: str, recipe: PrepareRecipe) -> Judged:
    """One of `STEPS` on a batch."""
    if step == "format":
        return format_pairs(batch, recipe.format)
    if step == "clean":
        return clean_pairs(batch, recipe.clean)
    if step == "identify":
        return identify_pairs(batch, recipe.identify)
    index = evaluation_index(tuple(map(str, evaluation_files(recipe.evaluation))))
    return decontaminate_pairs(batch, recipe.decontaminate, index)


def filter_part(part: Part, batch: pa.RecordBatch, recipe: PrepareRecipe) -> str:
    """Steps 1 to 3 and decontamination; then fingerprints and token counts. Returns the name."""
    made, counts = filter_batch(batch, recipe)
    write_table(made, part.file(".parquet"))
    # last: its being there says that the part is whole
    write_json(part.file(".json"), counts)
    return part.name


def filter_batch(batch: pa.RecordBatch, recipe: PrepareRecipe) -> tuple[pa.Table, dict[str, Any]]:
    """The rows that stay, with fingerprints and tokens; and what was counted."""
    counts: dict[str, Any] = {
        "read": per_pair(batch), "steps": {step: Counter() for step in STEPS}, "rejects": {},
        "lengths": {},
    }  # fmt: skip
    slices = (batch.slice(at, SLICE) for at in range(0, batch.num_rows, SLICE))
    made = [_filter(rows, recipe, counts) for rows in slices]
    return pa.Table.from_batches(made), counts


def _filter(batch: pa.RecordBatch, recipe: PrepareRecipe, counts: dict[str, Any]) -> pa.RecordBatch:
    for step in STEPS:
        found = judge(batch, step, recipe)
        _note_rejects(counts["rejects"], step, found)
        batch = found.kept
        counts["steps"][step].update(per_pair(batch))
    hashes = fingerprints(batch, recipe.dedup)
    for name, column in zip(hashes.schema.names, hashes.columns, strict=True):
        batch = batch.append_column(name, column)
    for side in ("source", "target"):
        texts, codes = (batch.column(n).to_pylist() for n in (side, f"{side}_language"))
        for code, text in zip(codes, texts, strict=True):
            bins = counts["lengths"].setdefault(code, [0] * (len(EDGES) + 1))
            bins[bisect_right(EDGES, len(text))] += 1
        tokens = count_tokens(texts, codes, recipe.balance.tokenizer)
        batch = batch.append_column(f"{side}_tokens", pa.array(tokens, pa.int32()))
    return batch


def quality_part(part: Part, kept: NDArray[np.bool_], recipe: PrepareRecipe) -> str:
    """Step 5's scores for the rows of a finished part that deduplication left."""
    table = pq.read_table(part.file(".parquet"), columns=SCHEMA.names)
    # one batch: the pairs that tell the least margin are the part's
    batches = table.filter(pa.array(kept)).combine_chunks().to_batches()
    scored = [score_pairs(b, recipe.quality).select(SCORES) for b in batches]
    schema = pa.schema([(name, pa.float32()) for name in SCORES])
    write_table(pa.Table.from_batches(scored, schema=schema), part.file(".quality.parquet"))
    return part.name


def instruct_part(
    part: Part, chosen: dict[Direction, NDArray[np.bool_]], recipe: PrepareRecipe
) -> str:
    """Step 6: conversations from the chosen rows of a finished part, direction by direction."""
    table = pq.read_table(part.file(".parquet"), columns=SCHEMA.names)
    made = [
        instruct_pairs(batch, recipe.instruct, direction=direction, seed=recipe.seed)
        for direction, rows in chosen.items()
        for batch in table.filter(pa.array(rows)).to_batches(SLICE)
    ]
    write_table(pa.Table.from_batches(made, schema=CONVERSATION), part.file(CONVERSATIONS))
    return part.name


def per_pair(batch: pa.RecordBatch) -> dict[str, int]:
    """Rows of each language pair."""
    codes = (batch.column(f"{side}_language").to_pylist() for side in ("source", "target"))
    return dict(Counter("-".join(pair) for pair in zip(*codes, strict=True)))


def _note_rejects(rejects: dict[str, Any], step: str, found: Judged) -> None:
    """Count them by language pair, and keep those of the smallest hashes as samples."""
    gone = found.batch.filter(found.reason.is_valid()).to_pylist()
    reasons = found.reason.drop_null().to_pylist()
    details = found.detail.filter(found.reason.is_valid()).to_pylist()
    for row, reason, detail in zip(gone, reasons, details, strict=True):
        note = rejects.setdefault(f"{step}: {reason}", {"pairs": {}, "samples": []})
        pair = f"{row['source_language']}-{row['target_language']}"
        note["pairs"][pair] = note["pairs"].get(pair, 0) + 1
        note["samples"].append(sample(row, detail))
    for note in rejects.values():
        note["samples"] = smallest(note["samples"])


def sample(row: dict[str, Any], detail: str | None) -> list[Any]:
    """[hash, where, source, target, detail], texts cut."""
    key = text_hash(f"{row['where']}|{row['source']}|{row['target']}")
    return [key, row["where"], row["source"][:200], row["target"][:200], detail]


def smallest(samples: list[list[Any]]) -> list[list[Any]]:
    return heapq.nsmallest(SAMPLES, samples, key=lambda s: (s[0], s[1]))


def evaluation_files(sets: EvaluationSets) -> list[Path]:
    """The files of the evaluation sets. Raises `UserError` where a named one is missing."""
    found = []
    for pattern in sets.files:
        paths = sorted(glob.glob(str(resolve(pattern)), recursive=True))
        if not paths:
            raise UserError(f"evaluation.files: {pattern}: no such file")
        found += paths
    for pattern in sets.flores:
        found += sorted(glob.glob(str(resolve(pattern)), recursive=True))
    return [Path(p) for p in dict.fromkeys(found) if Path(p).is_file()]


@cache
def evaluation_index(files: tuple[str, ...]) -> Index:
    return build_index(line for file in files for line in evaluation_lines(Path(file)))


def evaluation_lines(file: Path) -> Iterator[str]:
    """What an evaluation set says: the lines of a text, the texts of records and tables.

    Raises `UserError` for what cannot be read.
    """
    items: Iterator[tuple[str, Any]] = (
        read_records(file, header=False)
        if kind(file) in RECORDS and kind(file) != ".tsv"  # whose rows may be ragged
        else read_lines(file)
    )
    for _, item in items:
        if isinstance(item, Rejected):
            raise UserError(f"evaluation.files: {item}")
        yield from _texts(item) if isinstance(item, dict) or "\t" in item else (item,)


def _texts(value: Any) -> Iterator[str]:
    """The texts in a record, line by line; not its codes and names, which have no spaces."""
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)
    elif isinstance(value, str):
        lines = (part for line in value.split("\n") for part in line.split("\t"))
        yield from (line for line in lines if " " in line.strip() or not line.isascii())


def write_table(table: pa.Table, path: Path) -> None:
    """Whole or not at all."""
    write_bytes(path, lambda out: pq.write_table(table, out, compression="zstd"))
