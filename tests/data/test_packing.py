"""Steps: everything once, nothing over the budget, even, mixed, and always the same."""

import numpy as np
import pytest

from xplus_fast.data.packing import cut, mixed_order


@pytest.mark.parametrize("seed", range(30))
def test_every_sequence_once_and_no_row_over_the_budget(seed: int) -> None:
    rng = np.random.default_rng(seed)
    budget = int(rng.integers(1, 200))
    lengths = rng.integers(1, budget + 1, int(rng.integers(1, 400)))
    order = mixed_order(rng.integers(0, 5, len(lengths)), seed)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    offsets = cut(lengths[order], budget)
    assert offsets[0] == 0 and offsets[-1] == len(order) and (np.diff(offsets) > 0).all()
    filled = np.add.reduceat(lengths[order], offsets[:-1])
    assert filled.max() <= budget
    # in this order there cannot be fewer
    rows, room = 1, budget
    for n in lengths[order]:
        rows, room = (rows, room - n) if n <= room else (rows + 1, budget - n)
    assert len(filled) == rows


def test_rows_are_even() -> None:
    lengths = np.full(1000, 10)
    assert np.diff(cut(lengths, 3500)).tolist() == [334, 334, 332]  # not 350, 350, 300
    lengths = np.clip(np.random.default_rng(0).lognormal(4.2, 0.6, 20000), 5, 200).astype(int)
    filled = np.add.reduceat(lengths, cut(lengths, 16384)[:-1])
    assert filled.min() > 0.95 * filled.max()


@pytest.mark.parametrize("least", [1, 2, 7])
def test_rows_have_a_sequence_for_each_process(least: int) -> None:
    rng = np.random.default_rng(least)
    for n in range(least, 60):
        offsets = cut(rng.integers(50, 100, n), 100, least)
        assert offsets[-1] == n and (np.diff(offsets) >= least).all()


def test_rows_are_the_same_for_any_number_of_processes() -> None:
    for seed in range(30):
        lengths = np.random.default_rng(seed).integers(5, 60, 500)
        one = cut(lengths, 1000)
        assert all((cut(lengths, 1000, least) == one).all() for least in (2, 8))


@pytest.mark.parametrize("directions", [2, 32])
def test_every_stretch_has_the_mix_of_the_whole(directions: int) -> None:
    rng = np.random.default_rng(directions)
    counts = rng.integers(20, 3000, directions)
    kinds = np.repeat(np.arange(directions), counts)
    order = kinds[mixed_order(kinds, 0)]
    for _ in range(50):
        n = int(rng.integers(1, 800))
        at = int(rng.integers(0, len(order) - n))
        here = np.bincount(order[at : at + n], minlength=directions)
        expected = n * counts / counts.sum()
        # a kind's own count is off by less than one in its own time, and time by the others' sum;
        # drawn at random, it is off by three times the root of what is expected now and then
        assert (np.abs(here - expected) <= 2).all()


def test_sequences_of_a_kind_are_in_random_order() -> None:
    kinds = np.arange(4000) % 2
    order = mixed_order(kinds, 0)
    evens = order[kinds[order] == 0]
    assert abs(np.corrcoef(np.arange(2000), evens)[0, 1]) < 0.05
    assert (mixed_order(kinds, 0) == order).all() and (mixed_order(kinds, 1) != order).any()


def test_sequences_that_fill_a_row_and_none_at_all() -> None:
    assert cut(np.array([7, 7, 7]), 7).tolist() == [0, 1, 2, 3]
    assert cut(np.array([], np.int64), 7).tolist() == [0]
    assert len(mixed_order(np.array([], np.int64), 0)) == 0
