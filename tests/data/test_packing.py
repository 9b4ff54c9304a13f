"""Packs: everything once, nothing over the budget, nearly full, mixed, and always the same."""

import numpy as np
import pytest

from xplus_fast.data.packing import pack


def sums(lengths: np.ndarray, items: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    return np.add.reduceat(lengths[items], offsets[:-1])


@pytest.mark.parametrize("seed", range(30))
def test_every_sequence_once_and_none_over_the_budget(seed: int) -> None:
    rng = np.random.default_rng(seed)
    budget = int(rng.integers(1, 200))
    lengths = rng.integers(1, budget + 1, int(rng.integers(1, 400)))
    items, offsets = pack(lengths, budget, seed)
    assert sorted(items.tolist()) == list(range(len(lengths)))
    assert offsets[0] == 0 and offsets[-1] == len(items) and (np.diff(offsets) > 0).all()
    filled = sums(lengths, items, offsets)
    assert filled.max() <= budget
    # Any two packs that fit into one would have been one.
    assert len(filled) == 1 or np.sort(filled)[:2].sum() > budget


@pytest.mark.parametrize(("kind", "at_least"), [("sentences", 0.995), ("uniform", 0.99)])
def test_packs_are_nearly_full(kind: str, at_least: float) -> None:
    rng = np.random.default_rng(0)
    budget = 1024
    lengths = (
        np.clip(rng.lognormal(4.2, 0.6, 20000), 5, budget).astype(np.int64)
        if kind == "sentences"
        else rng.integers(1, budget + 1, 20000)
    )
    _, offsets = pack(lengths, budget, 0)
    assert lengths.sum() / ((len(offsets) - 1) * budget) > at_least


def test_short_and_long_sentences_are_mixed() -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(4.2, 0.6, 20000), 5, 200).astype(np.int64)
    items, offsets = pack(lengths, 4096, 0)
    means = sums(lengths, items, offsets)[:-1] / np.diff(offsets)[:-1]
    assert means.std() < 0.25 * lengths.mean()  # best fit alone: 0.6


def test_the_seed_decides() -> None:
    lengths = np.random.default_rng(0).integers(1, 50, 500)
    a, b, c = (pack(lengths, 100, seed) for seed in (1, 1, 2))
    assert (a[0] == b[0]).all() and (a[1] == b[1]).all()
    assert a[0].tolist() != c[0].tolist()


def test_sequences_that_fill_a_pack_and_none_at_all() -> None:
    items, offsets = pack(np.array([7, 7, 7]), 7, 0)
    assert sorted(items.tolist()) == [0, 1, 2] and offsets.tolist() == [0, 1, 2, 3]
    items, offsets = pack(np.array([], np.int64), 7, 0)
    assert len(items) == 0 and offsets.tolist() == [0]
