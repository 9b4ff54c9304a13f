"""How many FLOPs a selection of layers makes necessary.

A frozen layer below the lowest trained one costs its forward; one above it costs forward and dX; a
trained one forward, dX and dW. Tokens that sequences begin with in common are computed once. The
last layer needs k and v of all rows, q of those that predict something and those after them in
their sequence, and the rest, as the head, of those that predict. Attention counts the causal half
of each sequence's square: two products forward; in the backward four, and the scores once more,
since no attention worth using stores the probabilities (FlashAttention, arXiv 2205.14135, counts
the same). Elementwise work is not counted. A multiply-add is 2 FLOPs.
"""

import math
from collections.abc import Collection
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

from xplus_fast.model.families import Shape

if TYPE_CHECKING:  # which would load torch
    from xplus_fast.model.packing import PackLayout

# Of training sequences, where data are not known: a translation pair
SENTENCE, PROMPT, ANSWER = 96, 16, 48  # tokens; of its first that others share; supervised


@dataclass(frozen=True)
class Work:
    """What there is to do in some rows, counted."""

    tokens: int  # T, computed
    data_tokens: int  # of the sequences, each with all its tokens
    supervised: int  # R, rows that predict something
    queries: int  # Q, rows from a sequence's first of these on
    pairs: int  # query-key pairs of attention
    last_pairs: int  # of them, those of the queries above

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def at(self, tokens: int) -> "Work":
        """As much of the same as `tokens` computed ones have."""
        return Work(*(round(n * tokens / self.tokens) for n in astuple(self)))

    @property
    def saved(self) -> float:
        """Share of the data's tokens that another sequence's stand for."""
        return 1 - self.tokens / self.data_tokens


def work_of(layout: "PackLayout") -> Work:
    """Of one row."""
    return Work(
        int(layout.edges[-1]), layout.data_tokens, int(layout.predicts.sum()),
        int(layout.query_counts.sum()), layout.pairs, layout.last_pairs,
    )  # fmt: skip


def assumed_work(shared_prompts: bool) -> Work:
    """Of a million sequences where data are not known."""
    n, prompt = 10**6, PROMPT * shared_prompts
    rest = SENTENCE - prompt
    pairs = prompt * rest + rest * (rest + 1) // 2
    last = (SENTENCE - ANSWER) * ANSWER + ANSWER * (ANSWER + 1) // 2
    return Work(n * rest, n * SENTENCE, n * ANSWER, n * ANSWER, n * pairs, n * last)


@dataclass(frozen=True)
class Flops:
    """Necessary FLOPs of one forward and backward, by purpose."""

    linear: int  # the blocks' GEMMs
    attention: int
    head: int

    @property
    def total(self) -> int:
        return self.linear + self.attention + self.head


def necessary_flops(
    shape: Shape, layers: Collection[int], also: Collection[str], work: Work
) -> Flops:
    """FLOPs of one forward and backward.

    Args:
        shape: the model's sizes.
        layers: ids of the trained decoder layers.
        also: what trains beside them: "embedding", "final_norm", "head".
        work: of the rows.
    """
    lowest = 0 if "embedding" in also else min(layers, default=shape.layers)
    backwards = shape.layers - lowest  # layers that pass a gradient on
    last = shape.layers - 1
    # one product with every weight: forward everywhere, dX from `lowest` up, dW where trained
    products = shape.layers + backwards + len(layers)
    of_last = 1 + (last >= lowest) + (last in layers)
    linear = layer_gemms(shape, work) * (products - of_last)
    linear += layer_gemms(shape, work, last=True) * of_last
    product = 2 * shape.heads * shape.head_dim
    passes = 2 * shape.layers + 5 * backwards
    passes_of_last = 2 + 5 * (last >= lowest)
    attention = product * work.pairs * (passes - passes_of_last)
    attention += product * work.last_pairs * passes_of_last
    trains_below = bool(layers) or "embedding" in also or "final_norm" in also
    head = 2 * work.supervised * shape.hidden * shape.vocabulary
    return Flops(linear, attention, head * (1 + trains_below + ("head" in also)))


def layer_gemms(
    shape: Shape, work: Work, names: Collection[str] = ("qkv", "o", "gate_up", "down"), *,
    last: bool = False,
) -> int:  # fmt: skip
    """FLOPs of one product with a layer's matrices, or those named."""
    total = 0
    for name in names:
        out, inner = shape.packed_shapes()[name]
        rows = work.supervised if last and name != "qkv" else work.tokens
        total += 2 * rows * out * inner
    if last and "qkv" in names:
        q = shape.heads * shape.head_dim
        total -= 2 * (work.tokens - work.queries) * q * shape.hidden
    return total


def below_flops(shape: Shape, work: Work, level: int) -> int:
    """FLOPs of the forward of the layers below one."""
    attention = 4 * shape.heads * shape.head_dim * work.pairs
    return level * (layer_gemms(shape, work) + attention)


def recompute_flops(shape: Shape, policy: str, work: Work, *, last: bool = False) -> int:
    """FLOPs that a layer's backward repeats because its forward did not keep what they gave.

    "keep" none, "recompute_mlp" the gate_up GEMM, "recompute" and "offload" the attention half,
    too: its two GEMMs and attention's forward. Wdown never: no backward needs its output.
    """
    if policy == "keep":
        return 0
    again = ("gate_up",) if policy == "recompute_mlp" else ("gate_up", "qkv", "o")
    pairs = work.last_pairs if last else work.pairs
    attention = (len(again) > 1) * 4 * shape.heads * shape.head_dim * pairs
    return layer_gemms(shape, work, again, last=last) + attention


def trained_parameters(shape: Shape, layers: Collection[int], also: Collection[str] = ()) -> int:
    """How many parameters train."""
    block = sum(math.prod(s) for s in shape.packed_shapes().values())
    table = shape.vocabulary * shape.hidden
    beside = {"embedding": table, "final_norm": shape.hidden, "head": table}
    kinds = set(also)
    if shape.tied and {"embedding", "head"} <= kinds:
        kinds.discard("head")  # one tensor
    return len(layers) * block + sum(beside[k] for k in kinds)


def total_parameters(shape: Shape) -> int:
    return sum(math.prod(s) for s in shape.tensor_shapes().values())
