"""What is known of all rows at once: fingerprints, tokens, languages; never their texts."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from xplus_fast.data.preparation.engines import run_calls
from xplus_fast.data.preparation.parts import SAMPLES, Part, quality_part, sample, smallest
from xplus_fast.data.preparation.recipe import PrepareRecipe, of_corpus
from xplus_fast.data.steps.dedup import (
    COLUMNS,
    REASONS,
    SAME_FIRST,
    SAME_SECOND,
    survivors,
    text_hash,
)
from xplus_fast.data.steps.quality import COLUMNS as SCORES
from xplus_fast.data.steps.quality import judge as judge_quality

_FACTS = ("source_language", "target_language", "score", "source_tokens", "target_tokens")


@dataclass
class Rows:
    """What is known of all rows at once: 69 bytes a row."""

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
        sizes = [pq.read_metadata(work / f"{name}.parquet").num_rows for name in names]
        total = sum(sizes)
        rows = Rows(
            work, names, sizes, {c: np.empty(total, np.uint64) for c in COLUMNS}, [],
            np.empty(total, np.int16), np.empty(total, np.int16), np.empty(total, np.float32),
            np.empty(total, np.int32), np.ones(total, bool),
        )  # fmt: skip
        pairs: dict[str, int] = {}
        for name, at, size in zip(names, np.cumsum([0, *sizes]), sizes, strict=False):
            table = pq.read_table(work / f"{name}.parquet", columns=[*COLUMNS, *_FACTS])
            here = slice(at, at + size)
            for column in COLUMNS:
                rows.hashes[column][here] = table[column].to_numpy()
            codes = pc.binary_join_element_wise(
                table["source_language"], table["target_language"], "-"
            )
            known = codes.combine_chunks().dictionary_encode()
            numbers = [pairs.setdefault(pair, len(pairs)) for pair in known.dictionary.to_pylist()]
            rows.pair[here] = np.array(numbers, np.int16)[known.indices.to_numpy()]
            rows.corpus[here] = int(name[:5])
            rows.score[here] = table["score"].to_numpy()
            rows.tokens[here] = pc.add(table["source_tokens"], table["target_tokens"]).to_numpy()
        # numbered by their names: duplicates are decided by hashes that these numbers go into
        rows.pairs = sorted(pairs)
        rows.pair = np.array([rows.pairs.index(p) for p in pairs], np.int16)[rows.pair]
        return rows

    def by_part(self, values: NDArray[Any]) -> Iterator[tuple[str, NDArray[Any]]]:
        at = 0
        for name, size in zip(self.names, self.sizes, strict=True):
            yield name, values[at : at + size]
            at += size

    def per_pair(self) -> dict[str, int]:
        found = np.bincount(self.pair[self.kept], minlength=len(self.pairs))
        return {pair: int(n) for pair, n in zip(self.pairs, found, strict=True)}

    def _drop(
        self, counts: dict[str, Any], step: str, found: NDArray[np.integer], reasons: Sequence[str]
    ) -> None:
        """Count rows by their reasons (an index for each row, 0 where it stays), with samples."""
        self.kept &= found == 0
        for code, reason in enumerate(reasons):
            gone = np.flatnonzero(found == code)
            if code == 0 or not len(gone):
                continue
            pairs = np.bincount(self.pair[gone], minlength=len(self.pairs)).tolist()
            first = np.argsort(self._hash(gone), kind="stable")[:SAMPLES]
            counts["rejects"][f"{step}: {reason}"] = {
                "pairs": {pair: n for pair, n in zip(self.pairs, pairs, strict=True) if n},
                "samples": smallest(list(self._samples(np.sort(gone[first]).tolist()))),
            }
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
        both = [sorted(pair.split("-")) for pair in self.pairs]
        spoken = np.array([both.index(codes) for codes in both], np.int16)[self.pair]
        found = survivors(self.hashes, spoken, self.corpus, self.score, recipe.dedup)
        # fingerprints are in the order of the languages' codes
        orders = zip(self.pairs, both, strict=True)
        turned = np.array([pair.split("-") != codes for pair, codes in orders], bool)
        one = turned[self.pair] & ((found == SAME_FIRST) | (found == SAME_SECOND))
        found[one] = SAME_FIRST + SAME_SECOND - found[one]
        self._drop(counts, "dedup", found, REASONS)

    def drop_poor(
        self, recipe: PrepareRecipe, counts: dict[str, Any], bar: Callable[..., Any]
    ) -> None:
        recipes = [of_corpus(recipe, i) for i in range(len(recipe.corpora))]
        calls = (
            (Part(name, str(self.work)), kept, recipes[int(name[:5])])
            for name, kept in self.by_part(self.kept)
            if not (self.work / f"{name}.quality.parquet").exists()
        )
        with bar("quality", len(self.names), "parts") as progress:
            for _ in run_calls(recipe.engine, quality_part, calls, recipe.workers):
                progress.update()
        rows = np.flatnonzero(self.kept)
        scores = [np.empty(len(rows), np.float32) for _ in SCORES]
        at = 0
        for name in self.names:
            table = pq.read_table(self.work / f"{name}.quality.parquet")
            here = slice(at, at + table.num_rows)
            for values, name in zip(scores, SCORES, strict=True):
                values[here] = table[name].to_numpy()
            at += table.num_rows
        judged = self._judge_quality(rows, scores, recipes)
        reasons = ["", *sorted({reason for reason in judged if reason})]
        number = {reason or None: i for i, reason in enumerate(reasons)}
        found = np.zeros(len(self.kept), np.uint8)
        found[rows] = [number[reason] for reason in judged]
        self._drop(counts, "quality", found, reasons)

    def _judge_quality(
        self, rows: NDArray[np.intp], scores: Sequence[NDArray[np.floating]],
        recipes: Sequence[PrepareRecipe],
    ) -> list[str | None]:  # fmt: skip
        """Corpora with the same options together: `best` is a choice among them all."""
        judged: list[str | None] = [None] * len(rows)
        all_options = [recipe.quality for recipe in recipes]
        for options in dict.fromkeys(all_options):
            alike = [i for i, own in enumerate(all_options) if own == options]
            at = np.flatnonzero(np.isin(self.corpus[rows], alike))
            quality, margin, least = (values[at] for values in scores)
            found = judge_quality(
                quality, margin, least, self.pair[rows[at]], self._hash(rows[at]), options
            )
            for i, reason in zip(at, found, strict=True):
                judged[i] = reason
        return judged

    def _hash(self, rows: Any) -> NDArray[np.uint64]:
        first, second = (self.hashes[f"{side}_hash"][rows] for side in ("first", "second"))
        return first ^ (second >> np.uint64(1))

    def order(self, rows: NDArray[np.intp], seed: int) -> NDArray[np.uint64]:
        """A hash of each of the rows and the seed: an order that no file decides."""
        with np.errstate(over="ignore"):
            mixed = self._hash(rows) ^ np.uint64(text_hash(str(seed)))
            mixed = mixed * np.uint64(0x9E3779B97F4A7C15)
        return mixed ^ (mixed >> np.uint64(29))
