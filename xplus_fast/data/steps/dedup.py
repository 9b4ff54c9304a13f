"""Step 4, deduplication: exact, then near, over both texts and pairs, across corpora.

`fingerprints` is a function of a batch: 64-bit hashes of the texts without case, punctuation and
white space; their SimHashes (Charikar 2002; Manku et al. 2007) over character 3-grams; and four
MinHashes of both texts together (Broder 1997), by which pairs that are alike find each other.
`survivors` looks at all rows' fingerprints at once, 56 bytes a row. A pair is a duplicate where

- both texts are another pair's: an exact duplicate;
- one text is another pair's and the other text is near it (`near_one`): a variant of it;
- both texts are near another pair's (`near`).

A pair and the same pair the other way round are one: fingerprints are of the texts in the order of
their languages' codes. Of duplicates, the one of the first corpus, then of the best score, then of
the plainest spelling (not in capitals), then of the smallest hash stays, however rows are ordered.
"""

from dataclasses import dataclass
from hashlib import blake2b
from typing import Annotated

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xplus_fast.data.steps.grams import Hashes, gram_hashes, mix
from xplus_fast.data.steps.plain import UNSPACED, plain
from xplus_fast.options import Range

WINDOW = 16  # rows of a bucket that each row is compared with: buckets of common hashes stay cheap
AT_ONCE = 300  # texts: 64 bytes a character while they are hashed
COLUMNS = ("first_hash", "second_hash", "first_simhash", "second_simhash", "keys_0", "keys_1",
           "spelling")  # fmt: skip
# By code: the other text is near where the first language's, or the second's, is the same
REASONS = ("", "exact duplicate", "near duplicate: same source", "near duplicate: same target",
           "near duplicate")  # fmt: skip
SAME_FIRST, SAME_SECOND = 2, 3
_SEEDS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93)


@dataclass(frozen=True)
class DedupOptions:
    # bits of 64 in which either text may differ; -1: exact duplicates only
    near: Annotated[int, Range(-1, 63)] = 12
    # bits in which one text may differ where the other is the same
    near_one: Annotated[int, Range(-1, 63)] = 14
    shingle: Annotated[int, Range(1, 100)] = 3  # characters


def fingerprints(batch: pa.RecordBatch, options: DedupOptions) -> pa.RecordBatch:
    """The batch's rows as hashes: uint64 columns `COLUMNS`."""
    names = ("source", "target", "source_language", "target_language")
    rows = list(zip(*(batch.column(name).to_pylist() for name in names), strict=True))
    ordered = [(s, t) if a < b else (t, s) for s, t, a, b in rows]
    sides = [[_bare(text) for text in side] for side in zip(*ordered, strict=True)] or [[], []]
    hashes = [np.array([text_hash(t.replace(" ", "")) for t in side], np.uint64) for side in sides]
    sketches = [_sketch(side, options.shingle) for side in sides]
    # four keys of 32 bits
    keys = [
        mix(a ^ mix(b)) >> np.uint64(32) for a, b in zip(*(s[1] for s in sketches), strict=True)
    ]
    columns = [
        *hashes, *(simhash for simhash, _ in sketches),
        *(low | high << np.uint64(32) for low, high in (keys[:2], keys[2:])),
        np.array([_spelling(*pair) for pair in ordered], np.uint64),
    ]  # fmt: skip
    return pa.RecordBatch.from_arrays([pa.array(c) for c in columns], names=list(COLUMNS))


def _bare(text: str) -> str:
    bare = plain(text) or text
    # segmented into words or not, Chinese is the same
    return bare.replace(" ", "") if UNSPACED.search(bare) else bare


def _spelling(first: str, second: str) -> int:
    """Orders spellings of one pair: those in capitals last, others by a hash."""
    loud = sum(text.isupper() and len(text) > 1 for text in (first, second))
    return loud << 62 | text_hash(f"{first}\n{second}") >> 2


def text_hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode("utf-8"), digest_size=8).digest(), "little")


def simhash(texts: list[str], shingle: int = 3) -> Hashes:
    """64-bit SimHashes of texts over their character n-grams; [len(texts)]."""
    return _sketch(texts, shingle)[0]


def _sketch(texts: list[str], shingle: int) -> tuple[Hashes, Hashes]:
    """SimHashes of texts, [N], and their MinHashes, [4, N], over character n-grams."""
    if len(texts) > AT_ONCE:
        pieces = [_sketch(texts[i : i + AT_ONCE], shingle) for i in range(0, len(texts), AT_ONCE)]
        return (
            np.concatenate([simhashes for simhashes, _ in pieces]),
            np.concatenate([minhashes for _, minhashes in pieces], axis=1),
        )
    if not texts:
        return np.zeros(0, np.uint64), np.zeros((len(_SEEDS), 0), np.uint64)
    grams, owner = gram_hashes([f" {t} ".ljust(shingle) for t in texts], shingle)
    first = np.searchsorted(owner, np.arange(len(texts)))
    counts = np.diff(np.append(first, len(owner)))
    majority = (2 * _ones(grams, first) > counts[:, None]).astype(np.uint8)
    simhashes = np.packbits(majority, axis=1, bitorder="little").view(np.uint64)[:, 0]
    # a product with an odd number orders the grams anew
    minhashes = [np.minimum.reduceat(grams * np.uint64(seed), first) for seed in _SEEDS]
    return simhashes, np.stack(minhashes)


def _ones(grams: Hashes, first: NDArray[np.intp]) -> NDArray[np.int32]:
    """How many of each text's grams have each of the 64 bits; `first`: where texts begin."""
    bits = np.unpackbits(grams.view(np.uint8).reshape(-1, 8), axis=1, bitorder="little")  # [G, 64]
    # eight counters of a byte in a word: enough for pieces of up to 255 grams
    pieces = np.union1d(first, np.arange(0, len(grams), 255))
    ones = np.add.reduceat(bits.view(np.uint64), pieces, axis=0).view(np.uint8)
    return np.add.reduceat(ones, np.searchsorted(pieces, first), axis=0, dtype=np.int32)


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
        languages: a number for each two languages, whichever is the source; rows of others are
            never duplicates.
        priority: of each row's corpus; the lowest stays.
        score: of each row, NaN where there is none; the highest stays.
    """
    rows = len(priority)
    reason = np.zeros(rows, np.uint8)
    best = -np.nan_to_num(score.astype(np.float32), nan=-np.inf)
    spoken = languages.astype(np.uint64)
    pair = mix(hashes["first_hash"] ^ mix(hashes["second_hash"] ^ spoken))
    rank = np.empty(rows, np.int64)
    rank[np.lexsort((hashes["spelling"], best, priority))] = np.arange(rows)

    order = np.lexsort((rank, pair))
    same = pair[order][1:] == pair[order][:-1]
    reason[order[1:][same]] = 1
    if options.near < 0:
        return reason
    first, second = hashes["first_simhash"], hashes["second_simhash"]
    for code, same_text, other in (
        (SAME_FIRST, "first_hash", second), (SAME_SECOND, "second_hash", first)
    ):  # fmt: skip
        key = mix(hashes[same_text] ^ spoken)
        _mark(reason, code, key, rank, [(other, options.near_one)])
    for column in ("keys_0", "keys_1"):
        for shift in (0, 32):
            key = (hashes[column] >> np.uint64(shift)) & np.uint64(0xFFFFFFFF)
            key = mix(key ^ (spoken << np.uint64(32)))
            _mark(reason, 4, key, rank, [(first, options.near), (second, options.near)])
    return reason


def _mark(
    reason: NDArray[np.uint8], code: int, key: Hashes, rank: NDArray[np.int64],
    values: list[tuple[Hashes, int]],
) -> None:  # fmt: skip
    """Mark rows of which every value is within so many bits of that of a row of the same key which
    ranks before them.

    In a bucket, rows are sorted by the first value and compared with the next `WINDOW` ones.
    """
    alive = np.flatnonzero(reason == 0)
    order = alive[np.lexsort((rank[alive], values[0][0][alive], key[alive]))]
    for step in range(1, WINDOW + 1):
        a, b = order[:-step], order[step:]
        close = key[a] == key[b]
        if not close.any():
            break
        a, b = a[close], b[close]
        for value, most in values:
            near = np.bitwise_count(value[a] ^ value[b]) <= most
            a, b = a[near], b[near]
        reason[np.where(rank[a] > rank[b], a, b)] = code
