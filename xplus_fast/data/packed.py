"""Packed rows: many sequences in one row of T tokens, nothing padded. For rows see `collate`."""

import functools
import operator
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from xplus_fast.config import DataConfig
from xplus_fast.data.chat import Encoded, beyond_vocabulary, encode, pieces
from xplus_fast.data.collate import PackCollator, group_sequences, split_batch
from xplus_fast.data.files import Rejected
from xplus_fast.data.packing import cut
from xplus_fast.data.prefixes import share
from xplus_fast.data.readers import Example
from xplus_fast.errors import UserError
from xplus_fast.planning.flops import Work, work_of

TOKENS, SUPERVISED = "tokens.bin", "supervised.bin"  # int32 and bool, all sequences end to end
STARTS, ITEMS = "starts.npy", "items.npy"  # int64; see `PackedDataset`
SOURCES = "sources.npy"  # int32, of each sequence, where there are several


class PackedDataset(Dataset):
    """Packed rows in a folder, read through memory maps: the corpus never has to fit in memory.

    Sequence s is tokens starts[s]:starts[s + 1]; `items` is the order in which sequences are
    packed, of which every stretch is a fair sample of the corpus.

    tokens: of a row at most. shares: of each row, for so many processes; row r's share p is item
    r * shares + p. steady: rows are to be trained one after another, as what a stretch of them has
    of a source counts. Raises `UserError` where there are fewer sequences than shares.
    """

    def __init__(self, folder: Path, tokens: int, shares: int = 1, *, steady: bool = False) -> None:
        self.folder, self.row_tokens, self.shares, self.steady = folder, tokens, shares, steady
        self.tokens = np.memmap(folder / TOKENS, np.int32, "r")
        self.supervised = np.memmap(folder / SUPERVISED, np.bool_, "r")
        self.starts, self.items = (np.load(folder / n, mmap_mode="r") for n in (STARTS, ITEMS))
        several = (folder / SOURCES).is_file()
        self.sources = np.load(folder / SOURCES, mmap_mode="r") if several else None
        if len(self.items) < shares:
            raise UserError(
                f"data: {len(self.items)} sequences to train on, fewer than processes ({shares})"
            )

    @cached_property
    def rows(self) -> np.ndarray:
        """int64 [rows + 1]: row i holds items[rows[i]:rows[i + 1]]."""
        return cut(np.diff(self.places), self.row_tokens, self.shares)

    @cached_property
    def places(self) -> np.ndarray:
        """int64 [n + 1], of tokens in the order of items."""
        return np.concatenate([[0], np.cumsum(np.diff(self.starts)[self.items])])

    def packed(self, tokens: int, shares: int = 1) -> "PackedDataset":
        """The same sequences in rows of another size."""
        return PackedDataset(self.folder, tokens, shares, steady=self.steady)

    @property
    def total_tokens(self) -> int:
        return int(self.places[-1])

    def __reduce__(self) -> tuple[Any, ...]:
        # a worker process maps the files, not copies them
        made = partial(type(self), steady=self.steady)
        return made, (self.folder, self.row_tokens, self.shares)

    def __len__(self) -> int:
        return (len(self.rows) - 1) * self.shares

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        row, part = divmod(index, self.shares)
        within = slice(self.rows[row], self.rows[row + 1])
        spans = [slice(self.starts[s], self.starts[s + 1]) for s in self.items[within]]
        sequences = [(self.tokens[s], self.supervised[s]) for s in spans]
        about = {"places": self.places[within].tolist()}
        if self.sources is not None:
            about["sources"] = self.sources[self.items[within]].tolist()
        if self.shares > 1:
            ids, supervised = (np.concatenate(x) for x in zip(*sequences, strict=True))
            lengths = np.array([len(i) for i, _ in sequences])
            groups = group_sequences(ids, supervised, lengths)
            ours = share(groups, lengths.tolist(), self.shares)[part]
            sequences = [sequences[i] for i in ours]
            about = {name: [values[i] for i in ours] for name, values in about.items()}
        return {**_row(sequences), **about}


class RowSampler(Sampler[int]):
    """All items of a `PackedDataset`: rows in random order, another one each `epoch`.

    steady: one after another, from a random one on.
    """

    def __init__(self, rows: int, shares: int, seed: int, *, steady: bool = False) -> None:
        self.rows, self.shares, self.seed, self.epoch = rows, shares, seed, 0
        self.steady = steady

    def __len__(self) -> int:
        return self.rows * self.shares

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(self.rows)
        if self.steady:
            order = np.roll(np.arange(self.rows), order[0])
        for row in order:
            yield from range(row * self.shares, (row + 1) * self.shares)


def look_at_work(rows: PackedDataset, tokens: int, *, shared: bool, most: int = 16) -> Work:
    """What there is to do in such rows: counted in a few of them, or in all if they are few.

    tokens: of a micro-batch; in larger ones it is less. shared: whether tokens that sequences begin
    with in common are computed once.
    """
    collate = PackCollator(shared_prefixes=shared)
    chosen = np.unique(np.linspace(0, len(rows) - 1, most).astype(np.int64))
    parts = [p for i in chosen for p in split_batch(collate([rows[int(i)]]), tokens)]
    return functools.reduce(operator.add, [work_of(part["layout"]) for part in parts])


def pack_examples(examples: Sequence[Example], tokenizer: Any, data: DataConfig) -> list[dict]:
    """Pack a few examples in memory, for evaluation.

    Raises `UserError` for an example that cannot be encoded.
    """
    encoded = encode(examples, tokenizer, data.think, data.pack_tokens)
    for item in encoded:
        if isinstance(item, Rejected):
            raise UserError(str(item))
    made = [e for e in encoded if isinstance(e, Encoded)]
    return _pack_rows([p for e in made for p in pieces(e, data.pack_tokens)], data.pack_tokens)


def pack_texts(
    texts: Sequence[str], tokenizer: Any, pack_tokens: int, vocabulary: int | None = None
) -> list[dict]:
    """Pack raw texts in memory: every token but the first is supervised, long texts are cut.

    Raises `UserError` for a text with a token beyond the model's vocabulary.
    """
    encoded = []
    for text in texts:
        ids = tokenizer(text, verbose=False)["input_ids"]
        tokens = np.asarray(ids[:pack_tokens], np.int32)
        if beyond := beyond_vocabulary(tokens, tokenizer, vocabulary):
            raise UserError(f"retention: {text!r:.40}: {beyond}")
        if len(tokens) > 1:
            encoded.append(Encoded(tokens, np.arange(len(tokens)) > 0))
    return _pack_rows(encoded, pack_tokens)


def _pack_rows(encoded: list[Encoded], budget: int) -> list[dict]:
    rows = cut(np.array([len(e.input_ids) for e in encoded], np.int64), budget)
    return [
        _row([(e.input_ids, e.supervised) for e in encoded[a:b]])
        for a, b in zip(rows[:-1], rows[1:], strict=True)
    ]


def _row(sequences: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, Tensor | list[int]]:
    ids = torch.from_numpy(np.concatenate([i for i, _ in sequences]).astype(np.int64))
    supervised = torch.from_numpy(np.concatenate([s for _, s in sequences]))
    return {
        "input_ids": ids,
        "labels": ids.masked_fill(~supervised, -100),
        "lengths": [len(i) for i, _ in sequences],
    }
