"""Which sequences an optimizer step holds: a fixed order, in which every stretch is a fair sample.

A step's loss can be compared with the next one's only if both hold the same mix of kinds
(translation directions, say). So each kind's sequences stand at even distances in the order, from
its first to its last, and a stretch of n holds of a kind what its share of n is, give or take two.
Which sequence of a kind stands where is random.
"""

from collections.abc import Sequence

import numpy as np


def mixed_order(kinds: np.ndarray, seed: int | Sequence[int]) -> np.ndarray:
    """An order of n sequences, mixed evenly.

    kinds: int [n], of each sequence, from 0.

    Returns int64 [n], the sequences' indices in their new order. Equal arguments give equal orders.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(kinds))
    by_kind = order[np.argsort(kinds[order], kind="stable")]
    counts = np.bincount(kinds)
    rank = np.arange(len(kinds)) - np.repeat(np.cumsum(counts) - counts, counts)  # in its kind
    starts = rng.random(len(counts))  # of kinds, within their distance: not all at one place
    at = (rank + np.repeat(starts, counts)) / np.repeat(counts, counts)
    return by_kind[np.argsort(at, kind="stable")]


def shared_order(
    kinds: np.ndarray, sources: np.ndarray, supervised: np.ndarray,
    shares: Sequence[float | None], seed: int,
) -> np.ndarray:  # fmt: skip
    """An order in which every source has its share of the supervised tokens, at every point of it.

    Sources without a share are in it once, and are as one; of the others so much as goes with them,
    from the beginning again where there is no more. Where all have a share, as many tokens are in
    it as all have together. What a stretch has of a source is its share, give or take two
    sequences.

    kinds, sources: int [n], of each sequence, from 0. supervised: int64 [n], its tokens that count.
    shares: of each source, or None.

    Returns int64 [m], indices of sequences. Every source with a share has a sequence.
    """
    shared = [k for k, share in enumerate(shares) if share is not None]
    rest = np.flatnonzero(~np.isin(sources, shared))
    left = 1 - sum(shares[k] or 0.0 for k in shared)
    whole = supervised.sum() if not len(rest) else supervised[rest].sum() / left
    streams: list[tuple[np.ndarray, float]] = []
    if len(rest):
        streams.append((rest[mixed_order(kinds[rest], seed)], left))
    for k in shared:
        mine, share = np.flatnonzero(sources == k), float(shares[k] or 0.0)
        _, kind = np.unique(kinds[mine], return_inverse=True)
        passes: list[np.ndarray] = []
        need = share * whole
        while need > 0:
            order = mine[mixed_order(kind, [seed, k, len(passes)])]
            given = np.cumsum(supervised[order])
            passes.append(order[: int(np.searchsorted(given, need)) + 1])
            need -= given[-1]
        streams.append((np.concatenate(passes), share))
    # when the middle of a sequence's tokens is due, where its source flows at the rate of its share
    due = [(np.cumsum(supervised[o]) - supervised[o] / 2) / share for o, share in streams]
    items = np.concatenate([order for order, _ in streams])
    return items[np.argsort(np.concatenate(due), kind="stable")]


def cut(lengths: np.ndarray, tokens: int, least: int = 1) -> np.ndarray:
    """Cut sequences, in their order, into rows of at most `tokens`: as few and as even as can be.

    lengths: int [n], each from 1 to `tokens`. least: sequences of a row, which may be longer for
    it; n sequences at least are wanted.

    Returns int64 [rows + 1]: row i holds the sequences offsets[i]:offsets[i + 1].
    """
    n = len(lengths)
    assert n == 0 or (0 < lengths.min() <= lengths.max() <= tokens and n >= least)
    if least > 1:  # the rows are the same for any number of processes, if there is enough in them
        offsets = cut(lengths, tokens)
        if (np.diff(offsets) >= least).all():
            return offsets
    ends = np.cumsum(lengths)

    def filled(most: int) -> np.ndarray:
        offsets = [0]
        while offsets[-1] < n:
            at = offsets[-1]
            before = ends[at - 1] if at else 0
            offsets.append(max(at + least, int(np.searchsorted(ends, before + most, "right"))))
        if offsets[-1] > n or (len(offsets) > 2 and n - offsets[-2] < least):
            del offsets[-2]  # too few are left for a row: the one before takes them
            offsets[-1] = n
        return np.asarray(offsets, np.int64)

    fewest = len(filled(tokens))
    low, high = int(lengths.max(initial=0)), tokens
    while low < high:  # the lowest bound that makes no more rows
        middle = (low + high) // 2
        low, high = (low, middle) if len(filled(middle)) <= fewest else (middle + 1, high)
    return filled(low)
