"""Packed rows: many sequences in one row of T tokens, nothing padded.

A row is {"input_ids" int64 [T], "labels" int64 [T], "lengths" [S]}: S sequences one after another,
`labels` equal to `input_ids` where the loss counts and -100 elsewhere (not shifted).
"""

from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from xplus_fast.config import DataConfig
from xplus_fast.data.chat import Encoded, beyond_vocabulary, encode
from xplus_fast.data.files import Rejected
from xplus_fast.data.packing import pack
from xplus_fast.data.readers import Example
from xplus_fast.errors import UserError

TOKENS, SUPERVISED = "tokens.bin", "supervised.bin"  # int32 and bool, all sequences end to end
STARTS, ITEMS, PACKS = "starts.npy", "items.npy", "packs.npy"  # int64; see `PackedDataset`


class PackedDataset(Dataset):
    """Packed rows in a folder, read through memory maps: the corpus never has to fit in memory.

    Sequence s is tokens starts[s]:starts[s + 1]; pack p holds items[packs[p]:packs[p + 1]].
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokens = np.memmap(folder / TOKENS, np.int32, "r")
        self.supervised = np.memmap(folder / SUPERVISED, np.bool_, "r")
        self.starts, self.items, self.packs = (
            np.load(folder / name, mmap_mode="r") for name in (STARTS, ITEMS, PACKS)
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.folder,)  # a worker process maps the files, not copies them

    def __len__(self) -> int:
        return len(self.packs) - 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        items = self.items[self.packs[index] : self.packs[index + 1]]
        spans = [slice(self.starts[s], self.starts[s + 1]) for s in items]
        return _row([(self.tokens[s], self.supervised[s]) for s in spans])


class PackCollator:
    """Rows -> one batch of a single row, in the form that variable-length attention takes.

    Trainer's `remove_unused_columns` spares the columns that it reads.
    """

    columns = ("input_ids", "labels", "lengths")

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Put rows end to end.

        Returns input_ids, labels (-100 where a sequence begins), position_ids (restarting there)
        int64 [1, T];
        cu_seq_lens_q and _k int32 [S + 1]; max_length_q and _k, Python ints; supervised_rows int64
        [R]: the t whose hidden state predicts a supervised token t + 1 of the same sequence.
        A row without "lengths" is one sequence.
        """
        ids, labels = (
            torch.cat([torch.as_tensor(row[name], dtype=torch.int64) for row in rows])
            for name in ("input_ids", "labels")
        )
        lengths = [n for row in rows for n in row.get("lengths", [len(row["input_ids"])])]
        edges = torch.tensor([0, *lengths]).cumsum(0)
        assert edges[-1] == len(ids) == len(labels)
        starts = edges[:-1].repeat_interleave(torch.tensor(lengths))
        labels[edges[:-1]] = -100  # nothing stands before the first token of a sequence
        cu_seqlens, longest = edges.int(), max(lengths)
        return {
            "input_ids": ids[None],
            "labels": labels[None],
            "position_ids": (torch.arange(len(ids)) - starts)[None],
            "cu_seq_lens_q": cu_seqlens,
            "cu_seq_lens_k": cu_seqlens,
            "max_length_q": longest,
            "max_length_k": longest,
            "supervised_rows": (labels != -100).nonzero()[:, 0] - 1,
        }


def pack_examples(examples: Sequence[Example], tokenizer: Any, data: DataConfig) -> list[dict]:
    """Pack a few examples in memory, for evaluation.

    Raises `UserError` for an example that cannot be encoded.
    """
    encoded = encode(examples, tokenizer, data.think, data.pack_tokens)
    for item in encoded:
        if isinstance(item, Rejected):
            raise UserError(str(item))
    return _pack_rows([e for e in encoded if isinstance(e, Encoded)], data.pack_tokens)


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
    lengths = np.array([len(e.input_ids) for e in encoded], np.int64)
    items, packs = pack(lengths, budget, seed=0)
    return [
        _row([(encoded[s].input_ids, encoded[s].supervised) for s in items[a:b]])
        for a, b in zip(packs[:-1], packs[1:], strict=True)
    ]


def _row(sequences: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, Tensor | list[int]]:
    ids = torch.from_numpy(np.concatenate([i for i, _ in sequences]).astype(np.int64))
    supervised = torch.from_numpy(np.concatenate([s for _, s in sequences]))
    return {
        "input_ids": ids,
        "labels": ids.masked_fill(~supervised, -100),
        "lengths": [len(i) for i, _ in sequences],
    }


def split_batch(batch: dict[str, Any], tokens: int) -> list[dict[str, Any]]:
    """A batch of `PackCollator` in several, each of at most `tokens` or of a single sequence.

    As few as there can be, between the same sequences, and the longest of them as short as it can
    be. A batch that needs no split comes back as it is.
    """
    if batch["input_ids"].shape[1] <= tokens:
        return [batch]  # without asking the device
    edges = batch["cu_seq_lens_q"].tolist()
    fewest = len(_cuts(edges, tokens))
    even = bisect_left(range(tokens), -fewest, key=lambda most: -len(_cuts(edges, most)))
    cuts = _cuts(edges, even)
    if len(cuts) == 1:
        return [batch]
    device = batch["input_ids"].device
    parts = []
    for a, b in zip(cuts, [*cuts[1:], len(edges) - 1], strict=True):
        rows = {k: batch[k][0, edges[a] : edges[b]] for k in ("input_ids", "labels")}
        lengths = [y - x for x, y in zip(edges[a:b], edges[a + 1 : b + 1], strict=True)]
        part = PackCollator()([{**{k: t.cpu() for k, t in rows.items()}, "lengths": lengths}])
        parts.append({k: t.to(device) if torch.is_tensor(t) else t for k, t in part.items()})
    return parts


def _cuts(edges: Sequence[int], tokens: int) -> list[int]:
    """Where each part begins, as indices into `edges`: parts are filled up to `tokens`."""
    cuts = [0]
    for i in range(1, len(edges)):
        if edges[i] - edges[cuts[-1]] > tokens and i - 1 > cuts[-1]:
            cuts.append(i - 1)
    return cuts
