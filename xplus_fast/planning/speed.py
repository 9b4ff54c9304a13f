"""How long a training step should take on a card: a prediction, to choose between plans by.

Every matrix product at a share of the card's rate, everything else at a share of its bandwidth,
copies over PCIe beside the computation they overlap. The shares below were assumed before a card
was asked; an H200 then gave what they foretell to 5.5 %, plans for 24 GB included, an H100 to 4.4 %
(test_speed.py).
"""

import math
from functools import lru_cache

from xplus_fast.model.families import Shape
from xplus_fast.model.layout import LayerLayout, Layout, UpdateLayout
from xplus_fast.planning.cards import Card
from xplus_fast.planning.flops import Work, layer_gemms, recompute_flops
from xplus_fast.planning.memory import (
    beside_parameters,
    gradient_bytes,
    layer_bytes,
    layer_parameters,
    matrices,
    state_bytes,
)
from xplus_fast.planning.replay import FP8_LOGITS_BYTES, Batch

GEMM, GEMM_FP8, ATTENTION, BANDWIDTH = 0.7, 0.6, 0.35, 0.8  # shares of a data sheet's figure
LAUNCH = 100e-6  # seconds a layer and direction: launches, small kernels


@lru_cache(maxsize=8192)
def layer_seconds(
    shape: Shape, layer: LayerLayout, b: Batch, card: Card, passes: bool, least: bool, work: Work,
    last: bool,
) -> float:  # fmt: skip
    """A layer's forward and, where it `passes` a gradient, its backward; recomputation included.

    least: as if nothing had to be recomputed or offloaded. work: of the micro-batch.
    """
    t, d, e = b.tokens, shape.head_dim, b.element
    weights = sum(rows * columns for rows, columns in matrices(shape))
    pairs = work.last_pairs if last else work.pairs
    gemms = layer_gemms(shape, work, last=last)
    fast = not layer.trains and layer.format == "fp8" and b.fp8_gemm
    rate = card.fp8 * GEMM_FP8 if fast else card.bf16 * GEMM
    policy = "keep" if least else layer.activations
    product = 2 * shape.heads * d * pairs
    h, qk, f = shape.hidden, (shape.heads + shape.kv_heads) * d, shape.ffn
    # elements a token of norms, RoPE and SwiGLU; in the backward, theirs and what they repeat
    forward_elements, backward_elements = 4 * h + 2 * qk + 3 * f, 8 * h + 5 * qk + 5 * f
    unpacked = 0.0
    if not layer.trains and layer.format != "bf16" and not fast:
        unpacked = layer_bytes(shape, layer.format, e) + 2 * e * weights  # read; write, read again
    elif fast and passes:
        unpacked = weights  # transposed: read and written, halved over the two passes
    bandwidth = card.bandwidth * BANDWIDTH
    forward = gemms / rate + 2 * product / (card.bf16 * ATTENTION)
    forward += (t * forward_elements * e + unpacked) / bandwidth + LAUNCH
    backward = 0.0
    if passes:
        backward = gemms * (1 + layer.trains) / rate
        backward += 5 * product / (card.bf16 * ATTENTION)
        backward += recompute_flops(shape, policy, work, last=last) / rate
        again = 0 if policy == "keep" else forward_elements
        backward += (t * (backward_elements + again) * e + unpacked) / bandwidth + LAUNCH
    copied = 0.0
    if layer.placement == "host" and not layer.trains:
        copied += layer_bytes(shape, layer.format, e) / card.pcie
    away = t * h * e / card.pcie if policy == "offload" and passes else 0.0
    return max(forward, copied + away) + max(backward, (copied + away) if passes else 0.0)


def step_seconds(
    shape: Shape, layout: Layout, update: UpdateLayout, b: Batch, card: Card, *,
    tokens_per_step: int, work: Work, least: bool = False,
) -> float:  # fmt: skip
    """One optimizer step of `tokens_per_step` of the data, accumulated over micro-batches.

    work: of data like these, in any amount.
    """
    layers = layout.layers
    of_step = tokens_per_step / work.data_tokens * work.tokens  # computed
    work = work.at(b.tokens)
    trained = [i for i, layer in enumerate(layers) if layer.trains]
    lowest = 0 if "embedding" in layout.also else min(trained, default=len(layers))
    micro, seconds = 0.0, {}
    for i, layer in enumerate(layers):
        key = (id(layer), i >= lowest, i == len(layers) - 1)
        if key not in seconds:
            seconds[key] = layer_seconds(shape, layer, b, card, key[1], least, work, key[2])
        micro += seconds[key]
    table = shape.vocabulary * shape.hidden
    rows = work.supervised
    head = 2 * rows * table * (2 + ("head" in layout.also)) / (card.bf16 * GEMM)
    logits = 3 * rows * shape.vocabulary * b.element
    chunks = math.ceil(rows * shape.vocabulary * b.element / FP8_LOGITS_BYTES)
    unpacked = 2 * chunks * table * (1 + 2 * b.element) if layout.head == "fp8" else 0
    micro += head + (logits + unpacked) / (card.bandwidth * BANDWIDTH)
    if layout.embedding == "host":
        micro += b.tokens * shape.hidden * b.element / card.pcie
    parameters = len(trained) * layer_parameters(shape) + beside_parameters(shape, layout.also)
    gradients = parameters * gradient_bytes(update, b.element)
    moved = gradients / card.pcie
    if update.gradients == "host":
        # beside the backward, about two thirds of the time, of the trained layers
        micro += max(0.0, moved - micro * 0.6 * len(trained) / max(1, len(layers)))
    state = parameters * (state_bytes(update, b.element) + 0.0)
    # a state is read and written, a weight too, a gradient read
    on_device = (2 * state + 2 * b.element * parameters + gradients) / (card.bandwidth * BANDWIDTH)
    over = state / card.pcie if update.states == "host" else 0.0  # both ways at once
    over += moved if update.gradients == "host" else 0.0
    return micro * of_step / b.tokens + max(on_device, over)
