"""How a model lies in memory while it trains: what a plan decides and the model carries out."""

from dataclasses import dataclass
from typing import Literal

POLICIES = ("keep", "recompute_mlp", "recompute", "offload")
Format = Literal["bf16", "int8", "fp8", "nf4"]
FORMATS: tuple[Format, ...] = ("bf16", "int8", "fp8", "nf4")
Placement = Literal["device", "host"]
Policy = Literal["keep", "recompute_mlp", "recompute", "offload"]


@dataclass(frozen=True)
class LayerLayout:
    """One decoder layer. Format and placement are those of a frozen layer's four matrices."""

    trains: bool = False
    format: Format = "bf16"  # "bf16": as they are, in the run's dtype
    placement: Placement = "device"  # "host": brought in when the layer's turn comes
    activations: Policy = "keep"  # what the layer keeps for its backward


@dataclass(frozen=True)
class Layout:
    """A whole model. Trained layers, norms and biases are always on the device, unquantized."""

    layers: tuple[LayerLayout, ...]
    also: tuple[str, ...] = ()  # what trains beside the layers: embedding, final_norm, head
    embedding: Placement = "device"
    head: Literal["bf16", "fp8"] = "bf16"
    at_once: int | None = None  # of the layers that train, so many do in a step; None: all


def united(also: tuple[str, ...], *, tied: bool) -> tuple[str, ...]:
    """`also` of a model: where embedding and head are one tensor, both train or neither."""
    if not tied or not {"embedding", "head"} & set(also):
        return also
    return tuple(dict.fromkeys((*also, "embedding", "head")))


@dataclass(frozen=True)
class UpdateLayout:
    """Gradients and optimizer of what trains."""

    gradients: Placement = "device"
    states: Placement = "device"  # of master, exp_avg and exp_avg_sq
    bits: Literal[32, 8] = 32  # of exp_avg and exp_avg_sq: fp32, or codes by blocks of 256
    master: bool = True  # fp32 copy of a bf16 weight; without it, stochastic rounding
    sums: Literal[16, 32] = 16  # of gradients, over micro-batches: in the weight's dtype, or fp32
