"""How many FLOPs a selection of layers makes necessary.

A frozen layer below the lowest trained one costs its forward; one above it costs forward and dX; a
trained one forward, dX and dW. The head sees supervised rows only. Attention counts the causal half
of each sequence's square: two products forward; in the backward four, and the scores once more,
since no attention worth using stores the probabilities (FlashAttention, arXiv 2205.14135, counts
the same). Elementwise work is not counted. A multiply-add is 2 FLOPs.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass

from xplus_fast.model.families import Shape


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
    shape: Shape,
    layers: Collection[int],
    also: Collection[str] = (),
    *,
    tokens: int,
    supervised: int,
    pairs: int,
) -> Flops:
    """FLOPs of one forward and backward.

    Args:
        shape: the model's sizes.
        layers: ids of the trained decoder layers.
        also: what trains beside them: "embedding", "final_norm", "head".
        tokens: T, in all sequences together, padding not counted.
        supervised: R, rows that predict something.
        pairs: query-key pairs of causal attention, see `causal_pairs`.
    """
    lowest = 0 if "embedding" in also else min(layers, default=shape.layers)
    backwards = shape.layers - lowest  # layers that pass a gradient on
    weights = sum(math.prod(s) for s in shape.packed_shapes().values() if len(s) == 2)
    # one product with every weight: forward everywhere, dX from `lowest` up, dW where trained
    linear = 2 * tokens * weights * (shape.layers + backwards + len(layers))
    product = 2 * shape.heads * shape.head_dim * pairs
    attention = product * (2 * shape.layers + 5 * backwards)
    trains_below = bool(layers) or "embedding" in also or "final_norm" in also
    head = 2 * supervised * shape.hidden * shape.vocabulary * (1 + trains_below + ("head" in also))
    return Flops(linear, attention, head)


def recompute_flops(shape: Shape, policy: str, *, tokens: int, pairs: int) -> int:
    """FLOPs that a layer's backward repeats because its forward did not keep what they gave.

    "keep" none, "recompute_mlp" the gate_up GEMM, "recompute" and "offload" the attention half,
    too: its two GEMMs and attention's forward. Wdown never: no backward needs its output.
    """
    if policy == "keep":
        return 0
    sizes = shape.packed_shapes()
    again = ("gate_up",) if policy == "recompute_mlp" else ("gate_up", "qkv", "o")
    gemms = 2 * tokens * sum(math.prod(sizes[name]) for name in again)
    return gemms + (len(again) > 1) * 4 * shape.heads * shape.head_dim * pairs


def causal_pairs(lengths: Collection[int]) -> int:
    """Query-key pairs of causal attention over sequences of these lengths."""
    return sum(n * (n + 1) // 2 for n in lengths)


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
