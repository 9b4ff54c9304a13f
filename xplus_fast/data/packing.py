"""Sequence lengths -> packs of at most a budget of tokens, no sequence split.

A pack takes the longest sequence that fits, again and again (best fit). Alone, this gives packs of
equal lengths, and training steps of only long or only short sentences. So short sequences, up to a
quarter of the budget, enter in random order as long as the next one fits; best fit places the long
ones before them and fills the room left after them.
"""

from array import array
from bisect import bisect_right

import numpy as np


def pack(lengths: np.ndarray, budget: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Place sequences into packs.

    lengths: int [n], each from 1 to `budget` tokens.

    Returns `items` int64 [n], the sequences' indices pack by pack, and `offsets` int64 [P + 1]:
    pack p holds items[offsets[p]:offsets[p + 1]]. Equal arguments give equal packs.
    """
    n = len(lengths)
    assert n == 0 or 0 < lengths.min() <= lengths.max() <= budget
    rng = np.random.default_rng(seed)
    order = rng.permutation(n)
    shuffled = np.asarray(lengths, np.int32)[order]
    counts = np.bincount(shuffled).tolist()  # sequences left, by length
    present = np.flatnonzero(counts).tolist()  # the lengths left, ascending
    short = budget // 4
    draws = shuffled[shuffled <= short]
    # Only lengths are placed here; which sequence of a length goes where is settled afterwards.
    placed = array("i")
    offsets = [0]

    def take(length: int) -> int:
        placed.append(length)
        counts[length] -= 1
        if not counts[length]:
            del present[bisect_right(present, length) - 1]
        return length

    def best_fit(room: int, above: int) -> int:
        while (i := bisect_right(present, room)) and present[i - 1] > above:
            room -= take(present[i - 1])
        return room

    at = 0
    while present:
        room = best_fit(budget, short)
        while at < len(draws) and (not counts[draws[at]] or draws[at] <= room):
            if counts[draws[at]]:  # else best fit took it before
                room -= take(int(draws[at]))
            at += 1
        best_fit(room, 0)
        offsets.append(len(placed))
    items = np.empty(n, np.int64)
    by_length = np.argsort(np.asarray(placed), kind="stable")
    items[by_length] = order[np.argsort(shuffled, kind="stable")]
    # The packs made first hold the longest sequences: shuffle the packs too.
    sizes = np.diff(offsets)
    rank = rng.permutation(len(sizes))  # [P] pack -> its place
    items = items[np.argsort(np.repeat(rank, sizes), kind="stable")]
    return items, np.concatenate([[0], np.cumsum(sizes[np.argsort(rank)])])
