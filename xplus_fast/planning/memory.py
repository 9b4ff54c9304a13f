"""How many bytes training takes, by purpose, and at which moment they are most.

What stays (weights, states, buffers) is a sum. What comes and goes is replayed: the block's and the
head's allocations and frees in the order of their code (`replay.py`), over all layers forward and
back, and the peak is read off. Nothing here is fitted to a measurement; what is assumed is a named
constant.

Legend: T packed tokens, R of them predict something, Q those and what comes after them in their
sequences (the last layer computes q for these and the rest for R), H hidden, N query heads, K
key/value heads, D head_dim, F ffn, V vocabulary.
"""

import math
from dataclasses import dataclass

from xplus_fast.model.families import Shape
from xplus_fast.model.layout import Format, LayerLayout, Layout, UpdateLayout
from xplus_fast.planning.replay import (
    Batch,
    backward_peak,
    forward_peak,
    head_peaks,
    kept_bytes,
)

# CUDA context, libraries, kernels: what a process takes beside PyTorch's allocator, by the major of
# its capability. On an H100 it was 1.03 GB at the end of a run of ours (torch 2.11, CUDA 13.0). Of
# others there are messages: where memory runs out, PyTorch says what the process has, and what its
# allocator. The difference was, in one process each, GB: RTX 6000 Ada 0.45
# (DINGYANB/MTVCrafter#21), L40S 0.54 (huggingface/sentence-transformers#3214); H200 0.71, GH200
# 0.79 (Lightning-AI/litgpt#1892); B200 0.75, before any product (stas00/ml-engineering); RTX 5090
# 0.64.
CONTEXT = {8: 600_000_000, 9: 1_050_000_000, 10: 900_000_000, 12: 700_000_000}
MARGIN = 0.02  # of all else: the allocator's rounding and fragmentation
UPDATE_CHUNK = 2**24  # elements that the update takes through the device at a time


def context_bytes(capability: tuple[int, int]) -> int:
    """What CUDA itself takes on a card of this capability."""
    return CONTEXT.get(capability[0], max(CONTEXT.values()))


def matrices(shape: Shape) -> list[tuple[int, int]]:
    """[out, in] of a block's four matrices."""
    return [(s[0], s[1]) for s in shape.packed_shapes().values() if len(s) == 2]


def layer_bytes(shape: Shape, form: Format, element: int = 2) -> int:
    """A layer's four matrices in a format."""
    total = 0
    for rows, columns in matrices(shape):
        n = rows * columns
        if form == "fp8":
            total += n + 4 * rows
        elif form == "int8":
            total += n + 4 * math.ceil(n / 64)
        elif form == "nf4":
            total += math.ceil(n / 2) + 4 * math.ceil(n / 64)
        else:
            total += element * n
    return total


def vector_bytes(shape: Shape, element: int = 2) -> int:
    """A layer's norms and biases, which are never quantized."""
    return element * sum(s[0] for s in shape.packed_shapes().values() if len(s) == 1)


def layer_parameters(shape: Shape) -> int:
    return sum(math.prod(s) for s in shape.packed_shapes().values())


def largest_parameter(shape: Shape, also: tuple[str, ...]) -> int:
    table = shape.vocabulary * shape.hidden if {"embedding", "head"} & set(also) else 0
    return max(table, *(math.prod(s) for s in shape.packed_shapes().values()))


def state_bytes(update: UpdateLayout, element: int) -> float:
    """Bytes of optimizer state and master for each trained parameter."""
    moments = 8.0 if update.bits == 32 else 2 + 8 / 256  # codes, and two fp32 scales a block
    return moments + (4 if update.master and element == 2 else 0)


def gradient_bytes(update: UpdateLayout, element: int) -> int:
    """Bytes of a trained parameter's gradient."""
    return max(element, update.sums // 8)


@dataclass(frozen=True)
class Moment:
    """The moment of most bytes, of those that come and go."""

    activations: int  # kept for the backward
    workspace: int
    gradients: int
    updating: bool = False  # in the optimizer's update, not in forward or backward

    @property
    def total(self) -> int:
        return self.activations + self.workspace + self.gradients


def peak_moment(shape: Shape, layout: Layout, update: UpdateLayout, b: Batch) -> Moment:
    """Replay a micro-batch (the second of a step, where there is one) and the update."""
    layers, also = layout.layers, layout.also
    trained = [i for i, layer in enumerate(layers) if layer.trains]
    lowest = 0 if "embedding" in also else min(trained, default=len(layers))
    x = b.tokens * shape.hidden * b.element
    # cos and sin in fp32; ids, labels and positions in int64
    pack = b.tokens * (4 * shape.head_dim + 24)
    width = gradient_bytes(update, b.element)
    one = width * layer_parameters(shape)
    beside = width * beside_parameters(shape, also)
    at_once = len(trained) if layout.at_once is None else layout.at_once
    whole = one * at_once + beside
    on_host = update.gradients == "host"
    gradients = 0 if on_host or b.steps == 1 else whole
    best = Moment(0, 0, 0)
    # few kinds: a search replays thousands of times
    kinds = [(id(layer), i == len(layers) - 1) for i, layer in enumerate(layers)]
    known = dict(zip(kinds, layers, strict=True))
    forwards = {k: forward_peak(shape, b, _in_fp8(i, b), k[1]) for k, i in known.items()}
    kept = {k: kept_bytes(shape, b, i.activations, k[1]) for k, i in known.items()}
    backwards = {
        k: backward_peak(
            shape, b, i.activations, _in_fp8(i, b), i.trains, k[1],
            "made" if not b.adds else "brought" if on_host else "there", width,
        )
        for k, i in known.items()
    }  # fmt: skip

    def at(workspace: int, updating: bool = False) -> None:
        nonlocal best
        if saved + workspace + gradients > best.total:
            best = Moment(saved, workspace, gradients, updating)

    # an input on its way to the host while the next layer computes, or back
    moving = [x if layer.activations == "offload" else 0 for layer in layers]
    moving[:lowest] = [0] * lowest
    saved = away = 0
    for i in range(len(layers)):
        at(pack + x + forwards[kinds[i]] + away)
        away = moving[i]
        if i >= lowest:
            saved += kept[kinds[i]]
    if not (trained or also):
        return best
    forward, backward = head_peaks(shape, b, layout.head == "fp8", "head" in also)
    at(pack + away + forward)
    wider = width * shape.vocabulary * shape.hidden if width > b.element and "head" in also else 0
    at(pack + away + backward + wider)
    # the head's and the norm's gradients are there while the layers' are made
    made = beside_gradients(shape, also, width)
    arriving = made if on_host else 0
    if not on_host and b.steps == 1:
        gradients += made
    # of one tensor, the head's waits for the embedding's to be added
    table = width * shape.vocabulary * shape.hidden if shape.tied and "embedding" in also else 0
    held = 0 if b.steps == 1 and not on_host else table
    for i, layer in reversed(list(enumerate(layers))[lowest:]):
        away = max(moving[:i], default=0) if moving[i] else 0
        dy = b.supervised * shape.hidden * b.element if i == len(layers) - 1 else x
        at(pack + away + dy + backwards[kinds[i]] + arriving + held)
        saved -= kept[kinds[i]]
        arriving = 0
        if layer.trains and on_host:
            arriving = one  # on its way while the next layer computes
        elif layer.trains and b.steps == 1 and at_once:
            gradients += one
            at_once -= 1
    if "embedding" in also:
        each = b.element + (width if width > b.element else 0)
        at(pack + 2 * x + each * shape.vocabulary * shape.hidden + held + table)
    saved, gradients = 0, 0 if on_host else whole
    at(update_buffers(shape, also, update, b.element), updating=True)
    return best


def beside_gradients(shape: Shape, also: tuple[str, ...], width: int) -> int:
    """Gradients that the loss's own backward makes: the head's and the final norm's."""
    table = shape.vocabulary * shape.hidden if "head" in also else 0
    return width * (table + (shape.hidden if "final_norm" in also else 0))


def update_buffers(shape: Shape, also: tuple[str, ...], update: UpdateLayout, element: int) -> int:
    """On the device while it updates: two pieces of a parameter's state that the host holds."""
    n = min(UPDATE_CHUNK, largest_parameter(shape, also))
    each = state_bytes(update, element) if update.states == "host" else 0.0
    each += gradient_bytes(update, element) if update.gradients == "host" else 0
    return int(2 * n * each)


def _in_fp8(layer: LayerLayout, b: Batch) -> bool:
    return not layer.trains and layer.format == "fp8" and b.fp8_gemm


def beside_parameters(shape: Shape, also: tuple[str, ...]) -> int:
    """How many parameters train beside the layers."""
    tables = len({"embedding", "head"} & set(also))
    tables = min(tables, 1) if shape.tied else tables
    return tables * shape.vocabulary * shape.hidden + shape.hidden * ("final_norm" in also)


def scratch_bytes(shape: Shape, layout: Layout, b: Batch) -> int:
    """The one buffer in which frozen matrices are unpacked or transposed."""
    largest = max(rows * columns for rows, columns in matrices(shape))
    trained = [i for i, layer in enumerate(layout.layers) if layer.trains]
    lowest = 0 if "embedding" in layout.also else min(trained, default=shape.layers)
    most = 0
    for i, layer in enumerate(layout.layers):
        if layer.trains or layer.format == "bf16":
            continue
        if layer.format != "fp8" or not b.fp8_gemm:
            most = max(most, b.element * largest)
        elif i >= lowest:
            most = max(most, largest)
    return most


def standing(
    shape: Shape, layout: Layout, update: UpdateLayout, b: Batch
) -> tuple[dict[str, int], dict[str, int]]:
    """What stays all through training, by purpose: on the device, and pinned on the host."""
    e, table = b.element, shape.vocabulary * shape.hidden
    trained = sum(layer.trains for layer in layout.layers)
    frozen = [layer for layer in layout.layers if not layer.trains]
    of = {form: layer_bytes(shape, form, e) for form in {i.format for i in frozen}}
    streamed = [of[i.format] for i in frozen if i.placement == "host"]
    resident = sum(of[i.format] for i in frozen if i.placement == "device")
    # in a rotation the states of a layer that rests wait on the host
    at_once = trained if layout.at_once is None else layout.at_once
    parameters = at_once * layer_parameters(shape) + beside_parameters(shape, layout.also)
    states = int(parameters * state_bytes(update, e))
    resting = int((trained - at_once) * layer_parameters(shape) * state_bytes(update, e))
    head = table + 4 * shape.vocabulary if layout.head == "fp8" else e * table
    tables = e * table if shape.tied else head + (e * table if layout.embedding == "device" else 0)
    x = b.tokens * shape.hidden * e
    device = {
        "trained layers": trained * e * layer_parameters(shape),
        "frozen layers": resident + len(frozen) * vector_bytes(shape, e),
        "stream buffers": 2 * max(streamed, default=0),
        "embedding and head": tables + e * shape.hidden,
        "scratch": scratch_bytes(shape, layout, b),
        "optimizer": states if update.states == "device" else 0,
        # DistributedDataParallel has a place of its own for each, beside `p.grad`
        "gradient buckets": gradient_bytes(update, e) * parameters if b.exchanged else 0,
    }
    host = {
        "frozen layers": sum(streamed),
        "embedding": e * table if layout.embedding == "host" else 0,
        "gradients": gradient_bytes(update, e) * parameters if update.gradients == "host" else 0,
        "optimizer": resting + (states if update.states == "host" else 0),
        "activations": x * sum(i.activations == "offload" for i in layout.layers),
    }
    return device, host


def account(
    shape: Shape, layout: Layout, update: UpdateLayout, b: Batch, *, context: int = CONTEXT[8]
) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes by purpose at the peak: on the device, and pinned on the host.

    context: what CUDA itself takes; 0 on a CPU, where the allocator's margin is none either.
    """
    device, host = standing(shape, layout, update, b)
    moment = peak_moment(shape, layout, update, b)
    device["gradients"] = moment.gradients
    device["activations"] = moment.activations
    device["update buffers" if moment.updating else "workspace"] = moment.workspace
    if context:
        device["margin"] = int(MARGIN * sum(device.values()))
        device["CUDA context"] = context
    return device, host
