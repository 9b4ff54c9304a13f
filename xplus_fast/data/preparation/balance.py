"""How many tokens of each direction go into the set, and which pairs these are.

A direction with `n` tokens asks for a share of n^(1/temperature) of the budget; none gets more than
it has or its cap, none less than its floor where it has that, and what one leaves the others share.
"""

import math
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xplus_fast.data.preparation.recipe import BalanceOptions
from xplus_fast.errors import UserError
from xplus_fast.model.pretrained import load_tokenizer

# Characters a token of Qwen3's tokenizer: means over FLORES-200 devtest (1012 sentences)
CHARACTERS_PER_TOKEN = {
    "ar": 2.59, "bn": 0.93, "cs": 2.23, "de": 3.57, "en": 4.78, "es": 3.74, "fr": 3.61, "hu": 2.37,
    "ja": 1.47, "ko": 1.47, "ru": 2.93, "sr": 2.03, "sw": 2.58, "te": 0.69, "th": 1.80, "vi": 3.50,
    "zh": 1.56,
}  # fmt: skip
OTHERS = 2.5  # languages that are not in the table


def count_tokens(texts: list[str], languages: list[str], tokenizer: str | None) -> list[int]:
    """Tokens of each text: by a tokenizer's folder, or by the table."""
    if tokenizer is not None:
        encoded = _tokenizer(tokenizer)(texts, add_special_tokens=False)
        return [len(ids) for ids in encoded["input_ids"]]
    return [
        math.ceil(len(text) / CHARACTERS_PER_TOKEN.get(code.partition("_")[0], OTHERS))
        for text, code in zip(texts, languages, strict=True)
    ]


@cache
def _tokenizer(folder: str) -> Any:
    try:
        return load_tokenizer(folder)
    except UserError as e:
        raise UserError(f"balance.tokenizer: {e}") from None


def allot(available: dict[str, int], options: BalanceOptions) -> dict[str, int]:
    """Tokens for each direction, of those it has.

    Args:
        available: direction -> tokens that it has.
    """
    most = {d: min(n, options.cap) if options.cap is not None else n for d, n in available.items()}
    if options.tokens is None or sum(most.values()) <= options.tokens:
        return most
    given = {d: float(min(options.floor, most[d])) for d in most}
    if sum(given.values()) > options.tokens:  # floors that the budget cannot pay
        share = options.tokens / sum(given.values())
        return {d: int(n * share) for d, n in given.items()}
    weight = {d: available[d] ** (1 / options.temperature) for d in most}
    # A level such that everyone's share of it, within floor and cap, makes up the budget
    low, high = 0.0, max((most[d] / weight[d] for d in most if weight[d]), default=0.0)
    for _ in range(100):
        level = (low + high) / 2
        total = sum(min(most[d], max(given[d], level * weight[d])) for d in most)
        low, high = (level, high) if total < options.tokens else (low, level)
    return {d: int(min(most[d], max(given[d], low * weight[d]))) for d in most}


def choose(
    tokens: NDArray[np.integer], order: NDArray[np.integer], budget: int
) -> NDArray[np.bool_]:
    """The rows that fill a budget, in an order of their own: a hash, whatever the files' order."""
    taken = np.zeros(len(tokens), bool)
    by_hash = np.argsort(order, kind="stable")
    taken[by_hash] = np.cumsum(tokens[by_hash]) <= budget
    return taken
