"""Groups save as much as any grouping could, and parts hold everything once within their bounds."""

import itertools

import numpy as np
import pytest

from xplus_fast.data.prefixes import LEAST, Group, find_groups, partition, share


def trees(rng: np.random.Generator, n: int) -> list[np.ndarray]:
    """Sequences that branch off one another at random places."""
    made = [rng.integers(0, 9, int(rng.integers(1, 60)))]
    while len(made) < n:
        of = made[int(rng.integers(len(made)))]
        at = int(rng.integers(0, len(of) + 1))
        made.append(np.concatenate([of[:at], rng.integers(0, 9, int(rng.integers(1, 40)))]))
    return [s.astype(np.int32) for s in made]


def saved(groups: list[Group]) -> int:
    return sum((len(g.members) - 1) * g.prefix for g in groups)


def best(sequences: list[np.ndarray], shareable: list[int]) -> int:
    """What the best groups save, by trying every set of beginnings that two have in common."""
    keys = [tuple(s[:k].tolist()) for s, k in zip(sequences, shareable, strict=True)]
    beginnings = set()
    for a, b in itertools.combinations(keys, 2):
        n = next(
            (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
        )
        if n >= LEAST:
            beginnings.add(a[:n])
    most = 0
    for chosen in itertools.product((False, True), repeat=len(beginnings)):
        opened = [b for b, c in zip(sorted(beginnings), chosen, strict=True) if c]
        gains = [max((len(b) for b in opened if k[: len(b)] == b), default=0) for k in keys]
        most = max(most, sum(gains) - sum(map(len, opened)))
    return most


@pytest.mark.parametrize("seed", range(40))
def test_groups_save_as_much_as_can_be(seed):
    rng = np.random.default_rng(seed)
    sequences = trees(rng, int(rng.integers(1, 12)))
    shareable = [int(rng.integers(0, len(s))) for s in sequences]
    groups = find_groups(sequences, shareable)
    assert sorted(i for g in groups for i in g.members) == list(range(len(sequences)))
    for g in groups:
        assert g.prefix >= LEAST if len(g.members) > 1 else g.prefix == 0
        for i in g.members:
            assert g.prefix <= shareable[i] < len(sequences[i])
            assert (sequences[i][: g.prefix] == sequences[g.members[0]][: g.prefix]).all()
    assert saved(groups) == best(sequences, shareable)


def test_directions_are_groups_of_their_own():
    rng = np.random.default_rng(0)
    heads = [np.r_[np.arange(20), np.full(10, d)] for d in range(3)]  # all begin alike
    sequences = [
        np.r_[heads[i % 3], rng.integers(100, 10**6, 30)].astype(np.int32) for i in range(30)
    ]
    groups = find_groups(sequences, [50] * 30)
    assert sorted((g.prefix, len(g.members)) for g in groups) == [(30, 10)] * 3
    assert all(len({i % 3 for i in g.members}) == 1 for g in groups)
    # two of each are worth less apart than all of them together
    assert [(g.prefix, len(g.members)) for g in find_groups(sequences[:6], [25] * 6)] == [(20, 6)]


def test_thousands_of_nested_beginnings():
    """Each is the one before and a token more: a tree that is one long branch."""
    whole = np.arange(4000, dtype=np.int32)
    sequences = [whole[: n + 1] for n in range(10, 3000)]
    groups = find_groups(sequences, [len(s) - 1 for s in sequences])
    assert sorted(i for g in groups for i in g.members) == list(range(len(sequences)))
    assert saved(groups) > 0  # those of the inner levels alone: no data are like this


def test_token_ids_are_compared_as_numbers_of_any_size():
    a = np.r_[np.arange(250, 262), 7].astype(np.int32)
    b = np.r_[np.arange(250, 262), 2**31 - 1].astype(np.int32)
    assert find_groups([a, b], [12, 12]) == [Group(12, (0, 1))]
    assert find_groups([], []) == [] and find_groups([a], [12]) == [Group(0, (0,))]


@pytest.mark.parametrize("seed", range(40))
def test_parts_hold_everything_once(seed):
    rng = np.random.default_rng(seed)
    sequences = trees(rng, int(rng.integers(1, 60)))
    lengths = [len(s) for s in sequences]
    groups = find_groups(sequences, [n - 1 for n in lengths])
    budget = int(rng.integers(1, 400))
    parts = partition(groups, lengths, budget)
    assert sorted(i for p in parts for g in p for i in g.members) == list(range(len(lengths)))
    whole = {i: g.prefix for g in groups for i in g.members}
    for part in parts:
        cost = sum(sum(lengths[i] - g.prefix for i in g.members) + g.prefix for g in part)
        assert cost <= budget or sum(len(g.members) for g in part) == 1
        assert all(g.prefix in (0, whole[i]) for g in part for i in g.members)
    assert len(parts) == 1 or budget < sum(lengths)


def test_parts_follow_groups_and_are_full():
    rng = np.random.default_rng(0)
    groups = [Group(40, tuple(range(50 * g, 50 * (g + 1)))) for g in range(4)]
    groups += [Group(0, (i,)) for i in range(200, 260)]
    lengths = [40 + int(n) for n in rng.integers(5, 60, 200)] + rng.integers(5, 600, 60).tolist()
    parts = partition(groups, lengths, 1024)
    cut = sum(g.prefix > 0 for p in parts for g in p) - 4
    assert cut <= len(parts)
    costs = [
        sum(sum(lengths[i] - g.prefix for i in g.members) + g.prefix for g in p) for p in parts
    ]
    assert sum(costs) / (1024 * len(parts)) > 0.95


@pytest.mark.parametrize("processes", [2, 3, 8])
def test_processes_get_whole_groups_and_even_shares(processes):
    rng = np.random.default_rng(processes)
    groups = [Group(30, tuple(range(40 * g, 40 * (g + 1)))) for g in range(8)]
    lengths = [30 + int(n) for n in rng.integers(5, 60, 320)]
    shares = share(groups, lengths, processes)
    assert sorted(i for s in shares for i in s) == list(range(320))
    touched = sum(len({i // 40 for i in s}) for s in shares)
    assert touched <= 8 + processes - 1
    tokens = [sum(lengths[i] - 30 for i in s) for s in shares]
    assert max(tokens) < 1.1 * min(tokens)
    few = share(
        [Group(0, (i,)) for i in range(processes)], [1000, *[1] * (processes - 1)], processes
    )
    assert all(few)
