"""Shares of the token budget."""

import numpy as np
import pytest

from xplus_fast.data.preparation.balance import allot, choose, count_tokens
from xplus_fast.data.preparation.recipe import BalanceOptions

HAVE = {"en-fr": 1_000_000, "en-sw": 1_000, "en-de": 64_000}


def test_everything_where_the_budget_allows():
    assert allot(HAVE, BalanceOptions(tokens=None)) == HAVE
    assert allot(HAVE, BalanceOptions(tokens=2_000_000)) == HAVE


def test_temperature_by_hand():
    """Shares as 100 : 10 : 40 of what is left of 15 000, none of them short."""
    found = allot(HAVE, BalanceOptions(tokens=15_000, temperature=3))
    assert found == pytest.approx({"en-fr": 10_000, "en-sw": 1_000, "en-de": 4_000}, abs=2)
    proportional = allot(HAVE, BalanceOptions(tokens=106_500, temperature=1))
    assert proportional == pytest.approx({d: n / 10 for d, n in HAVE.items()}, abs=2)


def test_what_one_leaves_the_others_share():
    found = allot(HAVE, BalanceOptions(tokens=30_000, temperature=1e9))
    assert found == pytest.approx({"en-sw": 1_000, "en-fr": 14_500, "en-de": 14_500}, abs=2)


def test_floors_and_caps():
    found = allot(HAVE, BalanceOptions(tokens=10_000, temperature=1, floor=900, cap=8_000))
    assert found["en-sw"] == 900 and found["en-fr"] == 8_000
    assert sum(found.values()) == pytest.approx(10_000, abs=3)
    poor = allot(HAVE, BalanceOptions(tokens=900, floor=1_000))
    assert set(poor.values()) == {300}


def test_rows_are_chosen_by_their_hash_alone():
    tokens, order = np.array([5, 5, 5, 5]), np.array([3, 1, 2, 0])
    assert choose(tokens, order, 11).tolist() == [False, True, False, True]
    turned = choose(tokens[::-1], order[::-1], 11)
    assert turned.tolist() == [True, False, True, False]


def test_tokens_by_the_table_and_by_a_tokenizer(tmp_path):
    from tests.assets import qwen_tokenizer_folder

    english = "The quick brown fox jumps over the lazy dog by the river."
    table = count_tokens([english, "x" * 10], ["en", "xx"], None)
    real = count_tokens([english], ["en"], str(qwen_tokenizer_folder()))
    assert table == [12, 4] and real == [13]
