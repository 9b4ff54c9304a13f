"""Hashes of the character n-grams of many texts at once."""

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]


def gram_hashes(texts: list[str], size: int) -> tuple[Hashes, NDArray[np.intp]]:
    """64-bit hashes of the texts' n-grams of `size` characters, in order, and whose each is: an
    index into `texts`. A text that is shorter has none."""
    lengths = np.array([len(t) for t in texts], np.intp)
    codes = np.frombuffer("".join(texts).encode("utf-32-le"), np.uint32).astype(np.uint64)
    total = len(codes) - size + 1
    if total <= 0:
        return np.zeros(0, np.uint64), np.zeros(0, np.intp)
    grams = np.zeros(total, np.uint64)
    for i in range(size):
        grams = mix(grams ^ codes[i : total + i])
    owner = np.repeat(np.arange(len(texts)), lengths)[:total]
    # grams that run over a text's end belong to no text
    inside = np.arange(total) + size <= np.cumsum(lengths)[owner]
    return grams[inside], owner[inside]


def mix(x: Hashes) -> Hashes:
    """SplitMix64's finalizer: every bit of the input changes half of the output's."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x ^= x >> np.uint64(shift)
            x *= np.uint64(factor)
    return x ^ (x >> np.uint64(31))
