"""Which sequences an optimizer step holds: a fixed order, in which every stretch is a fair sample.

A step's loss can be compared with the next one's only if both hold the same mix of kinds
(translation directions, say). So each kind's sequences stand at even distances in the order, from
its first to its last, and a stretch of n holds of a kind what its share of n is, give or take two.
Which sequence of a kind stands where is random.
"""

import numpy as np


def mixed_order(kinds: np.ndarray, seed: int) -> np.ndarray:
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
