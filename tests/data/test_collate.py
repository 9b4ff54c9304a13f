"""Batches where shared first tokens are there once: what is in them, and in parts of them."""

import itertools
import time
from collections import Counter

import numpy as np
import pytest
import torch

from xplus_fast.data.collate import PackCollator, split_batch


def row(sequences: list[tuple[list[int], int]]) -> dict:
    """Sequences, each with the position of its first supervised token."""
    ids = [torch.tensor(ids) for ids, _ in sequences]
    labels = [
        torch.where(torch.arange(len(i)) >= n, i, -100)
        for i, (_, n) in zip(ids, sequences, strict=True)
    ]
    return {
        "input_ids": torch.cat(ids), "labels": torch.cat(labels), "lengths": [len(i) for i in ids],
    }  # fmt: skip


def corpus(seed: int, n: int = 30, directions: int = 3) -> list[tuple[list[int], int]]:
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, 50, int(rng.integers(5, 20))).tolist() for _ in range(directions)]
    made = []
    for _ in range(n):
        prompt = prompts[int(rng.integers(directions))]
        source, answer = (rng.integers(100, 200, int(rng.integers(1, 20))).tolist() for _ in "ab")
        made.append((prompt + source + answer, len(prompt + source)))
    return made


def contents(batch: dict) -> Counter:
    """Each sequence of a batch, put together again: (token, position, label) of each row."""
    layout, edges = batch["layout"], batch["layout"].edges.tolist()
    columns = (batch[k][0].tolist() for k in ("input_ids", "position_ids", "labels"))
    rows = list(zip(*columns, strict=True))
    parts = [tuple(rows[a:b]) for a, b in itertools.pairwise(edges)]
    found, groups = Counter(), layout.groups.tolist()
    for g, (a, b) in enumerate(itertools.pairwise(groups)):
        found.update(parts[g] + parts[s] for s in range(a, b))
    found.update(parts[groups[-1] :])
    return found


def plain(sequences: list[tuple[list[int], int]]) -> Counter:
    return Counter(
        tuple((t, p, t if p >= max(first, 1) else -100) for p, t in enumerate(ids))
        for ids, first in sequences
    )


def test_two_that_begin_alike_by_hand():
    head = list(range(8))
    rows = [row([([*head, 20, 30, 31], 9), ([9, 9], 1)]), row([([*head, 21, 40], 9)])]
    batch = PackCollator(shared_prefixes=True)(rows)
    assert batch["input_ids"].tolist() == [[*head, 20, 30, 31, 21, 40, 9, 9]]
    assert batch["position_ids"].tolist() == [[*range(8), 8, 9, 10, 8, 9, 0, 1]]
    none = [-100] * 9
    assert batch["labels"].tolist() == [[*none, 30, 31, -100, 40, -100, 9]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 8, 11, 13, 15]
    assert batch["supervised_rows"].tolist() == [8, 9, 11, 13]
    layout = batch["layout"]
    assert layout.members.tolist() == [2] and layout.data_tokens == 23
    assert layout.query_counts.tolist() == [0, 3, 2, 2]
    # 8, 3, 2 and 2 tokens by themselves, and 5 of suffixes to 8 of their prefix
    assert layout.pairs == 36 + 6 + 3 + 3 + 5 * 8
    assert layout.last_pairs == 6 + 3 + 3 + 5 * 8


@pytest.mark.parametrize("seed", range(10))
def test_nothing_is_lost_and_nothing_else_is_there(seed):
    sequences = corpus(seed)
    rows = [row(sequences[:13]), row(sequences[13:])]
    batch = PackCollator(shared_prefixes=True)(rows)
    assert contents(batch) == plain(sequences)
    layout = batch["layout"]
    assert layout.data_tokens == sum(len(ids) for ids, _ in sequences) > layout.edges[-1]
    labels = batch["labels"][0]
    assert (labels[layout.edges[:-1]] == -100).all()
    expected = (labels != -100).nonzero()[:, 0] - 1
    assert batch["supervised_rows"].tolist() == expected.tolist()
    assert np.flatnonzero(layout.predicts).tolist() == expected.tolist()
    for tokens in (40, 100, 300):
        parts = split_batch(batch, tokens)
        assert sum((contents(p) for p in parts), Counter()) == plain(sequences)
        single = [p for p in parts if p["input_ids"].shape[1] > tokens]
        assert all(sum(contents(p).values()) == 1 for p in single)
        assert split_batch(parts[0], tokens)[0] is parts[0]


def test_without_sharing_the_order_stays():
    sequences = corpus(0)
    for rows in ([row(sequences)], [row([s]) for s in sequences]):
        batch = PackCollator(shared_prefixes=False)(rows)
        assert batch["input_ids"][0].tolist() == [t for ids, _ in sequences for t in ids]
        assert not len(batch["layout"].members)
    apart = [([i, *ids], n + 1) for i, (ids, n) in enumerate(sequences, 1000)]
    batch = PackCollator(shared_prefixes=True)([row(apart)])  # nothing to share
    assert batch["input_ids"][0].tolist() == [t for ids, _ in apart for t in ids]


def test_a_prefix_ends_before_what_predicts_an_answer():
    ids = list(range(20))
    batch = PackCollator(shared_prefixes=True)([row([(ids, 12), (ids, 12), (ids, 10), (ids, 20)])])
    assert batch["layout"].members.tolist() == [4]
    assert batch["layout"].lengths.tolist() == [9, 11, 11, 11, 11]  # 9 predicts token 10
    # everything is supervised: nothing can be shared
    batch = PackCollator(shared_prefixes=True)([row([(ids, 0), (ids, 1)])])
    assert not len(batch["layout"].members)


def test_parts_are_as_few_as_their_groups_allow_and_even():
    sequences = corpus(3, n=400, directions=4)
    batch = PackCollator(shared_prefixes=True)([row(sequences)])
    total = batch["input_ids"].shape[1]
    for tokens in (512, 1024, 2048):
        sizes = [p["input_ids"].shape[1] for p in split_batch(batch, tokens)]
        assert len(sizes) <= -(-total // tokens) + 1 and max(sizes) <= tokens
        assert sum(sizes) - total <= 20 * len(sizes)  # a cut group's prefix twice


def test_thousands_of_sequences_are_cut_at_once():
    sequences = corpus(5, n=4000, directions=8)
    batch = PackCollator(shared_prefixes=True)([row(sequences)])
    start = time.perf_counter()
    assert len(split_batch(batch, 4096)) > 10
    assert time.perf_counter() - start < 2  # 0.1 s here


@pytest.mark.parametrize(
    ("bad", "what"),
    [({"input_ids": [1, 2]}, "labels"), ({"input_ids": [], "labels": []}, "tokens")],
)
def test_a_row_with_nothing_in_it_is_named(bad, what):
    with pytest.raises(ValueError, match=f"row 1 of a batch: without {what}"):
        PackCollator()([{"input_ids": [1, 2], "labels": [1, 2]}, bad])
