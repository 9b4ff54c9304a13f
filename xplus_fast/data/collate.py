"""Rows of sequences -> one batch of a single row, its sequences' common first tokens there once.

A row is {"input_ids" int64 [T], "labels" int64 [T], "lengths" [S]}: S sequences one after another,
`labels` equal to `input_ids` where the loss counts and -100 elsewhere (not shifted). With "places"
[S], each sequence's place in the data, a token can be found again in another epoch; with "sources"
[S], of each its source's number, losses can be told apart.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xplus_fast.data.prefixes import Group, find_groups, partition
from xplus_fast.model.packing import PackLayout, send


class PackCollator:
    """Rows -> one batch of a single row, in the form that variable-length attention takes.

    shared_prefixes: whether tokens that sequences begin with in common are there once, which only a
    prepared model understands; its losses and gradients are the same. None: where `XPlusTrainer`
    takes the collator, and not elsewhere. Trainer's `remove_unused_columns` spares the columns that
    it reads.
    """

    columns = ("input_ids", "labels", "lengths", "places", "sources")

    def __init__(self, *, shared_prefixes: bool | None = None) -> None:
        self.shared_prefixes = shared_prefixes

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Put sequences end to end.

        Returns input_ids, labels (-100 where a sequence begins), position_ids (restarting there,
        but where a suffix goes on after its prefix) int64 [1, T];
        cu_seq_lens_q and _k int32 [S + 1]; max_length_q and _k, Python ints; supervised_rows int64
        [R]: the t whose hidden state predicts a supervised token t + 1 of the same sequence;
        layout, a `PackLayout`.
        A row without "lengths" is one sequence. Raises `ValueError` for a row without tokens or
        without labels.
        """
        for i, row in enumerate(rows):
            if "labels" not in row or not len(row["input_ids"]):
                what = "labels" if "labels" not in row else "tokens"
                raise ValueError(f"row {i} of a batch: without {what}")
        ids, labels = (
            torch.cat([torch.as_tensor(row[name], dtype=torch.int64) for row in rows])
            for name in ("input_ids", "labels")
        )
        lengths = np.array(
            [n for row in rows for n in row.get("lengths", [len(row["input_ids"])])], np.int64
        )
        ends = np.cumsum(lengths)
        assert ends[-1] == len(ids) == len(labels) and lengths.min() > 0
        labels[torch.from_numpy(ends - lengths)] = -100  # nothing stands before a first token
        spans = [[(b - n, b)] for n, b in zip(lengths.tolist(), ends.tolist(), strict=True)]
        places, sources = (
            np.array([x for row in rows for x in row[name]], np.int64)
            if all(name in row for row in rows)
            else None
            for name in ("places", "sources")
        )
        groups = [Group(0, (i,)) for i in range(len(spans))]
        if self.shared_prefixes:
            found = group_sequences(ids.numpy(), labels.numpy() != -100, lengths)
            groups = found if any(g.prefix for g in found) else groups  # else in their order
        host = ids.numpy(), (labels != -100).numpy()
        return _lay_out(ids, labels, host, spans, groups, places, sources)


def group_sequences(ids: np.ndarray, supervised: np.ndarray, lengths: np.ndarray) -> list[Group]:
    """The groups of sequences that lie end to end: ids int [T], supervised bool [T], lengths [S].

    What predicts a supervised token is of its own sequence; all before it may be shared.
    """
    ends = np.cumsum(lengths)
    first = np.append(np.flatnonzero(supervised), len(ids))  # positions of supervised tokens
    first = first[np.searchsorted(first, ends - lengths)]
    # its predictor stands one before; without any, the last token stays
    shareable = np.minimum(first, ends) - 1 - (ends - lengths)
    tokens = [ids[b - n : b] for n, b in zip(lengths, ends, strict=True)]
    return find_groups(tokens, np.maximum(shareable, 0).tolist())


Spans = list[tuple[int, int]]  # pieces of a source that make a sequence


def _lay_out(
    ids: Tensor, labels: Tensor, host: tuple[np.ndarray, np.ndarray], spans: list[Spans],
    groups: list[Group], places: np.ndarray | None, sources: np.ndarray | None,
) -> dict[str, Any]:  # fmt: skip
    """A batch of the sequences of `groups`, taken from a source.

    ids, labels: int64 [source], on any device; host: the ids there, and bool, which labels count.
    spans: the pieces of the source that make each sequence, the first one's beginning -100.
    places, sources: int64, of each sequence. A prefix has those of its first suffix.
    """
    shared = [g for g in groups if g.prefix]
    pieces: list[Spans] = [_cut(spans[g.members[0]], 0, g.prefix) for g in shared]
    pieces += [_cut(spans[i], g.prefix, None) for g in shared for i in g.members]
    pieces += [spans[i] for g in groups if not g.prefix for i in g.members]
    begins = [0] * len(shared) + [g.prefix for g in shared for _ in g.members]
    begins += [0] * (len(pieces) - len(begins))
    flat = [span for piece in pieces for span in piece]
    at = np.concatenate([np.arange(a, b) for a, b in flat])
    lengths = np.array([sum(b - a for a, b in piece) for piece in pieces], np.int64)
    counted = host[1][at]
    edges = np.concatenate([[0], np.cumsum(lengths)])
    predicts = np.append(counted[1:], False)
    of = [g.members[0] for g in shared] + [i for g in shared for i in g.members]
    of += [i for g in groups if not g.prefix for i in g.members]
    starts = None if places is None else places[of] + np.array(begins, np.int64)
    kept = None if sources is None else sources[of]
    members = np.array([len(g.members) for g in shared], np.int64)
    layout = PackLayout(lengths, members, predicts, starts, host[0][at], kept)
    offsets = np.repeat(np.array(begins, np.int64) - edges[:-1], lengths)
    made = [at, np.arange(len(at)) + offsets, np.flatnonzero(predicts), edges]
    index, positions, rows, cu = (send(torch.from_numpy(x), ids.device) for x in made)
    longest, cu_seqlens = int(lengths.max()), cu.int()
    return {
        "input_ids": ids[index][None],
        "labels": labels[index][None],
        "position_ids": positions[None],
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": longest,
        "max_length_k": longest,
        "supervised_rows": rows,
        "layout": layout,
    }


def _cut(spans: Spans, first: int, past: int | None) -> Spans:
    """Tokens first:past of a sequence, as pieces of the source."""
    made, at = [], 0
    past = sum(b - a for a, b in spans) if past is None else past
    for a, b in spans:
        low, high = max(a, a + first - at), min(b, a + past - at)
        if low < high:
            made.append((low, high))
        at += b - a
    return made


def split_batch(batch: dict[str, Any], tokens: int) -> list[dict[str, Any]]:
    """A batch of `PackCollator` in several, each of at most `tokens` or of a single sequence.

    Filled one after another along its groups, and as even as so many can be. A batch that needs no
    split comes back as it is.
    """
    layout: PackLayout = batch["layout"]
    if batch["input_ids"].shape[1] <= tokens:
        return [batch]
    groups, spans, places, sources = _sequences(layout)
    lengths = [sum(b - a for a, b in piece) for piece in spans]
    fewest = len(partition(groups, lengths, tokens))
    even = bisect_left(
        range(tokens), -fewest, key=lambda most: -len(partition(groups, lengths, most))
    )
    parts = partition(groups, lengths, even)
    if len(parts) == 1:
        return [batch]
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    assert layout.ids is not None
    host = layout.ids, np.insert(layout.predicts[:-1], 0, False)
    return [_lay_out(ids, labels, host, spans, part, places, sources) for part in parts]


def _sequences(
    layout: PackLayout,
) -> tuple[list[Group], list[Spans], np.ndarray | None, np.ndarray | None]:
    """A layout's groups, the pieces of its row that make each sequence, places and sources."""
    edges = layout.edges.tolist()
    groups, spans = list[Group](), list[Spans]()
    for g, (a, b) in enumerate(zip(layout.groups[:-1], layout.groups[1:], strict=True)):
        prefix = (edges[g], edges[g + 1])
        groups.append(Group(prefix[1] - prefix[0], tuple(range(len(spans), len(spans) + b - a))))
        spans += [[prefix, (edges[s], edges[s + 1])] for s in range(a, b)]
    for s in range(int(layout.groups[-1]), len(layout.lengths)):
        groups.append(Group(0, (len(spans),)))
        spans.append([(edges[s], edges[s + 1])])
    sources = None if layout.sources is None else layout.sources[layout.groups[0] :]
    if layout.starts is None:
        return groups, spans, None, sources
    before = np.zeros(len(layout.lengths), np.int64)  # tokens of its prefix
    before[layout.groups[0] : layout.groups[-1]] = np.repeat(
        layout.lengths[: len(layout.members)], layout.members
    )
    return groups, spans, (layout.starts - before)[layout.groups[0] :], sources


@contextmanager
def whole_sequences(collator: Any) -> Iterator[None]:
    """Within it a collator of ours gives sequences as they are, in their order."""
    if not isinstance(collator, PackCollator):
        yield
        return
    before, collator.shared_prefixes = collator.shared_prefixes, False
    try:
        yield
    finally:
        collator.shared_prefixes = before
