"""Step 4, deduplication: exact, then near, over sources, targets and pairs, across corpora.

`fingerprints` is a function of a batch: 64-bit hashes of the texts without case, punctuation and
white space, and their SimHashes (Charikar 2002; Manku et al. 2007) over character 3-grams.
`survivors` looks at all rows' fingerprints at once, 40 bytes a row. A pair is a duplicate where

- both texts are another pair's: an exact duplicate;
- one text is another pair's and the other text is near it (`near_one`): a variant of it;
- the SimHashes of the whole pairs are within `near` bits.

Of duplicates, the one of the first corpus, then of the best score, then of the smallest hash stays,
whatever the order of the rows.
"""

import re
from dataclasses import dataclass
from hashlib import blake2b
from typing import Annotated

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xplus_fast.options import Range

WINDOW = 16  # rows of a bucket that each row is compared with: buckets of common hashes stay cheap
BITS = 64
AT_ONCE = 300  # texts: 64 bytes a character while they are hashed
COLUMNS = ("source_hash", "target_hash", "source_simhash", "target_simhash", "pair_simhash")
REASONS = ("", "exact duplicate", "near duplicate: same source", "near duplicate: same target",
           "near duplicate")  # fmt: skip


@dataclass(frozen=True)
class DedupOptions:
    # bits of 64 in which whole pairs may differ; -1: exact duplicates only
    near: Annotated[int, Range(-1, 15)] = 3
    # bits in which one text may differ where the other is the same
    near_one: Annotated[int, Range(-1, 63)] = 14
    shingle: Annotated[int, Range(1, 100)] = 3  # characters


_NOISE = re.compile(r"[\W_]+")
Hashes = NDArray[np.uint64]


def fingerprints(batch: pa.RecordBatch, options: DedupOptions) -> pa.RecordBatch:
    """The batch's rows as hashes: uint64 columns `COLUMNS`."""
    sides = []
    for name in ("source", "target"):
        texts = batch.column(name).to_pylist()
        sides.append([_NOISE.sub(" ", t.casefold()).strip() or t for t in texts])
    source, target = sides
    pair = [f"{s} | {t}" for s, t in zip(source, target, strict=True)]
    columns = [
        np.array([text_hash(t) for t in source], np.uint64),
        np.array([text_hash(t) for t in target], np.uint64),
        simhash(source, options.shingle),
        simhash(target, options.shingle),
        simhash(pair, options.shingle),
    ]
    return pa.RecordBatch.from_arrays([pa.array(c) for c in columns], names=list(COLUMNS))


def text_hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode("utf-8"), digest_size=8).digest(), "little")


def simhash(texts: list[str], shingle: int = 3) -> Hashes:
    """64-bit SimHashes of texts over their character n-grams; [len(texts)]."""
    if len(texts) > AT_ONCE:
        pieces = [texts[i : i + AT_ONCE] for i in range(0, len(texts), AT_ONCE)]
        return np.concatenate([simhash(piece, shingle) for piece in pieces])
    if not texts:
        return np.zeros(0, np.uint64)
    padded = [f" {t} ".ljust(shingle) for t in texts]
    lengths = np.array([len(t) for t in padded])
    codes = np.frombuffer("".join(padded).encode("utf-32-le"), np.uint32).astype(np.uint64)
    grams = np.zeros(len(codes) - shingle + 1, np.uint64)
    for i in range(shingle):
        grams = _mix(grams ^ codes[i : len(codes) - shingle + 1 + i])
    starts = np.concatenate(([0], np.cumsum(lengths)[:-1]))
    # grams that run over a text's end belong to no text
    owner = np.repeat(np.arange(len(texts)), lengths)
    inside = np.arange(len(grams)) + shingle <= (starts + lengths)[owner[: len(grams)]]
    grams, owner = grams[inside], owner[: len(inside)][inside]
    first = np.searchsorted(owner, np.arange(len(texts)))
    counts = np.diff(np.append(first, len(owner)))
    bits = np.unpackbits(grams.view(np.uint8).reshape(-1, 8), axis=1, bitorder="little")  # [G, 64]
    ones = np.add.reduceat(bits, first, axis=0, dtype=np.int32)
    majority = (2 * ones > counts[:, None]).astype(np.uint8)
    return np.packbits(majority, axis=1, bitorder="little").view(np.uint64)[:, 0]


def _mix(x: Hashes) -> Hashes:
    """SplitMix64's finalizer: every bit of the input changes half of the output's."""
    with np.errstate(over="ignore"):
        x = (x + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def survivors(
    hashes: dict[str, Hashes],
    languages: NDArray[np.integer],
    priority: NDArray[np.integer],
    score: NDArray[np.floating],
    options: DedupOptions,
) -> NDArray[np.uint8]:
    """Which rows go: an index into `REASONS` for each, 0 where it stays.

    Args:
        hashes: the columns of `fingerprints`, over all rows.
        languages: a number for each language pair; rows of different pairs are never duplicates.
        priority: of each row's corpus; the lowest stays.
        score: of each row, NaN where there is none; the highest stays.
    """
    rows = len(priority)
    reason = np.zeros(rows, np.uint8)
    best = -np.nan_to_num(score.astype(np.float32), nan=-np.inf)
    pair = _mix(hashes["source_hash"] ^ _mix(hashes["target_hash"] ^ languages.astype(np.uint64)))
    rank = np.empty(rows, np.int64)
    rank[np.lexsort((hashes["target_hash"], pair, best, priority))] = np.arange(rows)

    order = np.lexsort((rank, pair))
    same = pair[order][1:] == pair[order][:-1]
    reason[order[1:][same]] = 1
    if options.near < 0:
        return reason
    for code, (same_text, other) in enumerate(
        (("source_hash", "target_simhash"), ("target_hash", "source_simhash")), 2
    ):
        key = _mix(hashes[same_text] ^ languages.astype(np.uint64))
        _mark(reason, code, key, hashes[other], rank, options.near_one)
    # Within 3 bits, one of 4 bands of 16 bits is the same
    bands = options.near + 1
    width = BITS // bands
    for band in range(bands):
        part = (hashes["pair_simhash"] >> np.uint64(band * width)) & np.uint64((1 << width) - 1)
        key = _mix(part ^ (languages.astype(np.uint64) << np.uint64(48)))
        _mark(reason, 4, key, hashes["pair_simhash"], rank, options.near)
    return reason


def _mark(
    reason: NDArray[np.uint8], code: int, key: Hashes, value: Hashes, rank: NDArray[np.int64],
    most: int,
) -> None:  # fmt: skip
    """Mark rows within `most` bits of a row of the same key that ranks before them.

    In a bucket, rows are sorted by value and compared with the next `WINDOW` ones.
    """
    alive = np.flatnonzero(reason == 0)
    order = alive[np.lexsort((rank[alive], value[alive], key[alive]))]
    for step in range(1, WINDOW + 1):
        a, b = order[:-step], order[step:]
        close = key[a] == key[b]
        if not close.any():
            break
        a, b = a[close], b[close]
        near = np.bitwise_count(value[a] ^ value[b]) <= most
        worse = np.where(rank[a] > rank[b], a, b)[near]
        reason[worse] = code
