"""What is known of all rows at once: fingerprints, tokens, languages; never their texts."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from xplus_fast.data.preparation.engines import run_calls
from xplus_fast.data.preparation.parts import SAMPLES, Part, quality_part, sample, smallest
from xplus_fast.data.preparation.recipe import PrepareRecipe
from xplus_fast.data.steps.dedup import COLUMNS, REASONS, survivors, text_hash
from xplus_fast.data.steps.quality import judge as judge_quality


@dataclass
class Rows:
    """What is known of all rows at once: 70 bytes a row."""

    work: Path  # the folder of the parts
    names: list[str]  # of the parts, in order
    sizes: list[int]  # rows of each part
    hashes: dict[str, NDArray[np.uint64]]
    pairs: list[str]  # language pairs
    pair: NDArray[np.int16]  # of each row, an index into them
    corpus: NDArray[np.int16]
    score: NDArray[np.float32]
    tokens: NDArray[np.int32]  # of both texts
    kept: NDArray[np.bool_]

    @staticmethod
    def load(work: Path, names: list[str]) -> "Rows":
        columns = [*COLUMNS, "source_language", "target_language", "score", "source_tokens",
                   "target_tokens"]  # fmt: skip
        pairs: dict[str, int] = {}
        made = (*COLUMNS, "pair", "corpus", "score", "tokens")
        parts: dict[str, list[Any]] = {name: [] for name in made}
        sizes = []
        for name in names:
            table = pq.read_table(work / f"{name}.parquet", columns=columns)
            sizes.append(table.num_rows)
            for column in COLUMNS:
                parts[column].append(table.column(column).to_numpy())
            codes = (table.column(f"{s}_language").to_pylist() for s in ("source", "target"))
            found = [pairs.setdefault("-".join(p), len(pairs)) for p in zip(*codes, strict=True)]
            parts["pair"].append(np.array(found, np.int16))
            parts["corpus"].append(np.full(table.num_rows, int(name[:5]), np.int16))
            parts["score"].append(table.column("score").to_numpy().astype(np.float32))
            tokens = [table.column(f"{s}_tokens").to_numpy() for s in ("source", "target")]
            parts["tokens"].append((tokens[0] + tokens[1]).astype(np.int32))
        joined = {name: np.concatenate(arrays) for name, arrays in parts.items()}
        # numbered by their names: duplicates are decided by hashes that these numbers go into
        names_of = sorted(pairs)
        number = np.array([names_of.index(pair) for pair in pairs], np.int16)
        joined["pair"] = number[joined["pair"]]
        return Rows(
            work, names, sizes, {c: joined[c] for c in COLUMNS}, names_of, joined["pair"],
            joined["corpus"], joined["score"], joined["tokens"], np.ones(sum(sizes), bool),
        )  # fmt: skip

    def by_part(self, values: NDArray[Any]) -> Iterator[tuple[str, NDArray[Any]]]:
        at = 0
        for name, size in zip(self.names, self.sizes, strict=True):
            yield name, values[at : at + size]
            at += size

    def per_pair(self) -> dict[str, int]:
        found = np.bincount(self.pair[self.kept], minlength=len(self.pairs))
        return {pair: int(n) for pair, n in zip(self.pairs, found, strict=True)}

    def _note(self, counts: dict[str, Any], step: str, reasons: dict[int, str]) -> None:
        """Count rejects {row: reason}, with samples of the smallest hashes."""
        wanted: dict[str, list[int]] = {}
        for row, reason in reasons.items():
            note = counts["rejects"].setdefault(f"{step}: {reason}", {"pairs": {}, "samples": []})
            pair = self.pairs[self.pair[row]]
            note["pairs"][pair] = note["pairs"].get(pair, 0) + 1
            wanted.setdefault(f"{step}: {reason}", []).append(row)
        for reason, found in wanted.items():
            key = self.hashes["source_hash"][found] ^ self.hashes["target_hash"][found]
            chosen = [found[i] for i in np.argsort(key, kind="stable")[:SAMPLES]]
            counts["rejects"][reason]["samples"] = smallest(list(self._samples(sorted(chosen))))
        counts["steps"][step] = self.per_pair()

    def _samples(self, rows: list[int]) -> Iterator[list[Any]]:
        starts = np.cumsum([0, *self.sizes])
        for row in rows:
            part = int(np.searchsorted(starts, row, side="right")) - 1
            table = pq.read_table(
                self.work / f"{self.names[part]}.parquet", columns=["where", "source", "target"]
            )
            yield sample(table.slice(row - starts[part], 1).to_pylist()[0], None)

    def drop_duplicates(self, recipe: PrepareRecipe, counts: dict[str, Any]) -> None:
        found = survivors(self.hashes, self.pair, self.corpus, self.score, recipe.dedup)
        self.kept &= found == 0
        self._note(counts, "dedup", {int(i): REASONS[found[i]] for i in np.flatnonzero(found)})

    def drop_poor(
        self, recipe: PrepareRecipe, counts: dict[str, Any], bar: Callable[..., Any]
    ) -> None:
        calls = [
            (Part(name, str(self.work)), kept.tolist(), recipe)
            for name, kept in self.by_part(self.kept)
            if not (self.work / f"{name}.quality.parquet").exists()
        ]
        with bar("quality", len(calls), "parts") as progress:
            for _ in run_calls(recipe.engine, quality_part, calls, recipe.workers):
                progress.update()
        tables = [pq.read_table(self.work / f"{n}.quality.parquet") for n in self.names]
        table = pa.concat_tables(tables)
        rows = np.flatnonzero(self.kept)
        quality, margin = (
            table.column(n).to_numpy().astype(np.float64) for n in ("quality", "margin")
        )
        reasons = judge_quality(
            quality, margin, self.pair[rows], self._hash()[rows], recipe.quality
        )
        gone = {int(row): r for row, r in zip(rows, reasons, strict=True) if r is not None}
        self.kept[list(gone)] = False
        self._note(counts, "quality", gone)

    def _hash(self) -> NDArray[np.uint64]:
        return self.hashes["source_hash"] ^ (self.hashes["target_hash"] >> np.uint64(1))

    def order(self, seed: int) -> NDArray[np.uint64]:
        """A hash of each row and the seed: an order that no file decides."""
        with np.errstate(over="ignore"):
            mixed = (self._hash() ^ np.uint64(text_hash(str(seed)))) * np.uint64(0x9E3779B97F4A7C15)
        return mixed ^ (mixed >> np.uint64(29))
