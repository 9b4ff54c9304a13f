"""py3langid's scores of many texts at once.

The identifier reads a text byte by byte, and each byte moves a state machine; here all texts move
theirs together, a byte of each at a time. Sums are in another order than py3langid's: scores are
its own but for rounding, far less than `ROUNDING`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROUNDING = 0.5  # nats: of float32 sums over 10,000 characters
NO_CONTENT = "zxx"  # a label for what is in no language
FEW = 64  # texts: fewer are walked through one by one
AT_ONCE = 1 << 19  # bytes of texts, about: 30 bytes each while they are walked through


def gaps(
    texts: Sequence[str], language: str, identifier: Any, same: dict[str, str]
) -> NDArray[np.float32]:
    """By how many nats the likeliest other language is likelier than this one, about.

    same: labels that count as others. 0 for a language that the identifier does not know.
    """
    labels = np.array([same.get(label, label) for label in identifier.nb_classes])
    own = labels == same.get(language, language)
    if not own.any():
        return np.zeros(len(texts), np.float32)
    scores = label_scores(texts, identifier)
    others = ~own & (labels != NO_CONTENT)
    return scores[:, others].max(axis=1) - scores[:, own].max(axis=1)


def label_scores(texts: Sequence[str], identifier: Any) -> NDArray[np.float32]:
    """Log-likelihoods of the identifier's classes, [len(texts), classes]; zeros for a text that has
    none of its n-grams."""
    encoded = [identifier._encode(text) for text in texts]
    lengths = np.array([len(text) for text in encoded], np.intp)
    order = np.argsort(-lengths, kind="stable")
    pieces = np.flatnonzero(np.diff(np.cumsum(lengths[order]) // AT_ONCE)) + 1
    scores = np.zeros((len(texts), len(identifier.nb_classes)), np.float32)
    for piece in np.split(order, pieces):
        found, counts, starts = _features([encoded[i] for i in piece], identifier)
        weights = np.log1p(counts.astype(np.float32))
        # the few rows that are wanted, once in float32: the table is of half precision
        row = np.zeros(len(identifier.nb_ptc), np.intp)
        row[found] = 1
        used = np.flatnonzero(row)
        row[used] = np.arange(len(used))
        table, rows = identifier.nb_ptc[used].astype(np.float32), row[found]
        for i, start, end in zip(piece.tolist(), starts, starts[1:], strict=False):
            if start < end:
                at = slice(start, end)
                np.add(weights[at] @ table.take(rows[at], axis=0), identifier.nb_pc, out=scores[i])
    return scores


def _features(
    texts: Sequence[bytes], identifier: Any
) -> tuple[NDArray[np.integer], NDArray[np.intp], list[int]]:
    """The features of texts, longest first, how often each is in its text, and where each text's
    begin."""
    lengths = np.array([len(text) for text in texts], np.intp)
    letters = np.frombuffer(b"".join(texts), np.uint8)
    moves = np.frombuffer(identifier.tk_nextmove, identifier.tk_nextmove.typecode)
    rows = np.asarray(identifier.tk_row).astype(np.int32) << 8
    states = np.empty(len(letters), np.int32)
    owners = np.empty(len(letters), np.int32)
    at, row = np.cumsum(lengths) - lengths, np.full(len(lengths), rows[0])
    everyone, done = np.arange(len(lengths), dtype=np.int32), 0
    longer = len(lengths) - np.cumsum(np.bincount(lengths))[:-1]  # than 0, 1, 2, ... bytes
    longer = longer[longer >= FEW]
    for n in longer.tolist():
        here = slice(done, done + n)
        states[here] = moves.take(row[:n] + letters.take(at[:n]))
        owners[here] = everyone[:n]
        row = rows.take(states[here])
        at[:n] += 1
        done += n
    for i in range(int((lengths > len(longer)).sum())):
        here = slice(done, done + lengths[i] - len(longer))
        states[here] = _walk(texts[i][len(longer) :], int(row[i]), identifier)
        owners[here] = i
        done = here.stop
    features = np.asarray(identifier.tk_output, np.int32)[states]
    size = len(identifier.nb_ptc)
    known = features >= 0
    keys = owners[known].astype(np.min_scalar_type(len(texts) * size))  # narrow sorts are faster
    keys = keys * size + features[known].astype(keys.dtype)
    keys.sort()
    first = np.flatnonzero(np.append(True, keys[1:] != keys[:-1])[: len(keys)])
    owner, feature = np.divmod(keys[first], size)
    starts = np.searchsorted(owner, np.arange(len(texts) + 1))
    return feature, np.diff(first, append=len(keys)), starts.tolist()


def _walk(text: bytes, row: int, identifier: Any) -> list[int]:
    moves, rows, states = identifier.tk_nextmove, identifier.tk_row, []
    for letter in text:
        state = moves[row + letter]
        states.append(state)
        row = rows[state] << 8
    return states
