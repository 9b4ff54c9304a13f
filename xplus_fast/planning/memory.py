"""How many bytes training takes, by purpose, and at which moment they are most.

What stays (weights, states, buffers) is a sum. What comes and goes is replayed: the block's and the
head's allocations and frees in the order of their code, over all layers forward and back, and the
peak is read off. Nothing here is fitted to a measurement; what is assumed is a named constant.

Legend: T packed tokens, R of them predict something, Q those and what comes after them in their
sequences (the last layer computes q for these and the rest for R), H hidden, N query heads, K
key/value heads, D head_dim, F ffn, V vocabulary.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

from xplus_fast.model.families import Shape
from xplus_fast.model.layout import Format, LayerLayout, Layout, Policy, UpdateLayout
from xplus_fast.planning.flops import SENTENCE

CONTEXT = 600_000_000  # CUDA context, cuBLAS workspaces, kernels: assumed until measured
MARGIN = 0.02  # of all else: the allocator's rounding and fragmentation
LOGITS_BYTES, LEAST_ROWS, HEAD_TILES = 512 * 2**20, 1024, 8  # of ops.linear_cross_entropy
UPDATE_CHUNK = 2**24  # elements that the update takes through the device at a time
SAVED: dict[Policy, tuple[str, ...]] = {
    "keep": ("x", "qkv", "q_rows", "out", "lse", "h", "gate_up"),
    "recompute_mlp": ("x", "qkv", "q_rows", "out", "lse", "h"),
    "recompute": ("x",),
    "offload": (),
}


@dataclass(frozen=True)
class Batch:
    """One micro-batch, and how its kernels are counted."""

    tokens: int  # T
    supervised: int  # R
    queries: int  # Q
    element: int = 2  # bytes of the run's dtype
    steps: int = 1  # micro-batches of one optimizer step
    fp8_gemm: bool = True  # else FP8 weights are unpacked and the activations stay as they are
    inside: bool = True  # count what flash attention allocates for itself (not on a CPU)
    prefixes: int = 0  # tokens that sequences begin with in common
    suffixes: int = 0  # tokens that attend to these from their own sequences


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


class _Live:
    """Named tensors that are alive, their bytes, and the most there were."""

    def __init__(self) -> None:
        self.alive: dict[str, int] = {}
        self.now = self.peak = 0

    def add(self, **tensors: int) -> None:
        for name, size in tensors.items():
            self.now += size - self.alive.get(name, 0)
            self.alive[name] = size
        self.peak = max(self.peak, self.now)

    def free(self, *names: str) -> None:
        for name in names:
            self.now -= self.alive.pop(name)


def tensor_bytes(s: Shape, b: Batch, last: bool = False) -> dict[str, int]:
    """A block's intermediates; of the last layer's, q in a tensor of its own."""
    t, e, d = b.tokens, b.element, s.head_dim
    q, r = (b.queries, b.supervised) if last else (t, t)
    return {
        "x": t * s.hidden * e,
        "qkv": t * (2 * s.kv_heads + (0 if last else s.heads)) * d * e,
        "q_rows": q * s.heads * d * e if last else 0,
        "q": q * s.heads * d * e,
        "k": t * s.kv_heads * d * e,
        "out": q * s.heads * d * e,
        "lse": q * s.heads * 4,
        "rows": r * s.hidden * e,  # the residual stream after attention
        "h": r * s.hidden * e,
        "gate_up": r * 2 * s.ffn * e,
        "act": r * s.ffn * e,
        "dout": r * s.heads * d * e,
    }


@lru_cache(maxsize=4096)
def kept_bytes(s: Shape, b: Batch, policy: Policy, last: bool = False) -> int:
    """What a layer at or above the lowest trained one holds from its forward to its backward."""
    size = tensor_bytes(s, b, last)
    return sum(size[name] for name in SAVED[policy])


def _fp8(rows: int, width: int) -> int:
    return rows * (width + 4)  # e4m3, and a scale a row


def _attention_half(live: _Live, s: Shape, b: Batch, fp8: bool, last: bool) -> None:
    size = tensor_bytes(s, b, last)
    nd, picks = s.heads * s.head_dim, last and b.supervised < b.queries
    if "qkv" not in live.alive:
        live.add(n=_fp8(b.tokens, s.hidden) if fp8 else size["x"])
        live.add(qkv=size["qkv"])
        if last:
            live.add(n_q=_fp8(b.queries, s.hidden) if fp8 else b.queries * s.hidden * b.element)
            live.add(q_rows=size["q_rows"])
            live.free("n_q")
        live.free("n")
    live.add(k=size["k"])  # v is a view of qkv
    if last:
        live.add(tables=b.queries * 4 * s.head_dim)  # cos and sin of the queries, fp32
    live.add(q=size["q"])
    if last:
        live.free("tables")
    if "out" not in live.alive:
        live.add(out=size["out"], lse=size["lse"])
        asking = min(b.suffixes, b.queries) if last else b.suffixes
        live.add(to_prefixes=asking * s.heads * (s.head_dim * b.element + 4))
        live.free("to_prefixes")
    if "h" not in live.alive:
        live.add(
            picked=(size["rows"] if last else 0) + (size["dout"] if picks else 0),
            o8=_fp8(b.supervised if last else b.tokens, nd) if fp8 else 0, h=size["h"],
        )  # fmt: skip
        live.free("o8", "picked")


def _mlp_half(live: _Live, s: Shape, b: Batch, fp8: bool, last: bool) -> None:
    size = tensor_bytes(s, b, last)
    if "gate_up" not in live.alive:
        live.add(n=_fp8(b.supervised if last else b.tokens, s.hidden) if fp8 else size["rows"])
        live.add(gate_up=size["gate_up"])
        live.free("n")


@lru_cache(maxsize=4096)
def forward_peak(s: Shape, b: Batch, fp8: bool, last: bool = False) -> int:
    """Most bytes alive in a block's forward, its input x not counted."""
    live, size = _Live(), tensor_bytes(s, b, last)
    _attention_half(live, s, b, fp8, last)
    _mlp_half(live, s, b, fp8, last)
    rows = b.supervised if last else b.tokens
    live.add(act=_fp8(rows, s.ffn) if fp8 else size["act"], y=size["rows"])
    return live.peak


@lru_cache(maxsize=4096)
def backward_peak(
    s: Shape, b: Batch, policy: Policy, fp8: bool, trains: bool, last: bool = False
) -> int:
    """Most bytes alive in a block's backward beside what it kept and the gradient dy given to it.

    Of a trained layer, that includes its weights' new gradients; see `block.py` for the order.
    """
    live, size, w = _Live(), tensor_bytes(s, b, last), s.packed_shapes()
    dw = {name: b.element * math.prod(shape) for name, shape in w.items()}
    live.add(**{name: size[name] for name in ("x", *SAVED[policy])})
    _attention_half(live, s, b, fp8, last)
    _mlp_half(live, s, b, fp8, last)
    nd, r = s.heads * s.head_dim, b.supervised if last else b.tokens
    picks = last and b.supervised < b.queries

    if trains:
        live.add(act=size["act"])
        live.add(d_down=dw["down"])
        live.free("act")
    live.add(dy8=_fp8(r, s.hidden) if fp8 else 0, dact=size["act"])
    live.free("dy8")
    live.add(dgu=_fp8(r, 2 * s.ffn) if fp8 else size["gate_up"])
    live.free("dact")
    if trains:
        live.add(n=size["rows"])
        live.add(d_gate_up=dw["gate_up"])
        live.free("n")
    live.add(dn=size["rows"])
    live.add(dh=size["h"])
    live.free("dn")
    if trains:
        live.add(picked=size["dout"] if picks else 0, d_o=dw["o"])
        live.free("picked")
    live.add(dh8=_fp8(r, s.hidden) if fp8 else 0, dout=size["dout"])
    live.free("dh8")
    if picks:
        live.add(dout_q=size["out"])
        live.free("dout")
        live.add(dout=live.alive.get("dout_q", 0))
        live.free("dout_q")
    live.add(dq=size["q"], dk=size["k"], dv=size["k"])
    if b.inside:
        # FlashAttention 2: dq's sum and a row's in fp32, padded by 128 rows a sequence; dk and dv
        # of every query head where heads share them
        rows = (b.queries if last else b.tokens) + 128 * math.ceil(b.tokens / SENTENCE)
        expanded = 2 * b.tokens * nd * b.element if s.heads != s.kv_heads else 0
        live.add(flash=4 * rows * (nd + s.heads) + expanded)
        live.free("flash")
    asking = min(b.suffixes, b.queries) if last else b.suffixes
    live.add(
        to_prefixes=asking * s.heads * (s.head_dim * b.element + 4)
        + 2 * b.prefixes * s.kv_heads * s.head_dim * b.element
    )
    live.free("to_prefixes", "dout")
    if last:
        _last_qkv_backward(live, s, b, fp8, trains, dw["qkv"])
    else:
        live.add(dqkv=size["qkv"])
        if trains:
            live.add(n=size["x"])
            live.add(d_qkv=dw["qkv"])
            live.free("n")
        live.add(dqkv8=_fp8(b.tokens, w["qkv"][0]) if fp8 else 0, dn=size["x"])
        live.free("dqkv8", "dqkv")
    if last:
        live.add(dh_all=size["x"])
        live.free("dh")
    live.add(dx=size["x"])
    return live.peak - kept_bytes(s, b, policy, last)


def _last_qkv_backward(
    live: _Live, s: Shape, b: Batch, fp8: bool, trains: bool, of_weight: int
) -> None:
    size, wide = tensor_bytes(s, b, True), b.queries * s.hidden * b.element
    live.add(tables=b.queries * 4 * s.head_dim)
    live.add(dq_rows=size["q_rows"])
    live.free("tables")
    live.add(dkv=size["qkv"])
    if trains:
        live.add(n=size["x"], d_qkv=of_weight)
        live.add(n_q=wide)
        live.free("n_q", "n")
    live.add(d8=_fp8(b.tokens, 2 * s.kv_heads * s.head_dim) if fp8 else 0, dn=size["x"])
    live.free("d8")
    live.add(d8=_fp8(b.queries, s.heads * s.head_dim) if fp8 else 0, dn_q=wide)
    live.free("d8", "dn_q", "dq_rows", "dkv")


@lru_cache(maxsize=4096)
def head_peaks(s: Shape, b: Batch, fp8: bool, trains: bool) -> tuple[int, int]:
    """Most bytes alive in the loss's forward, and in its backward; x and its gradient included."""
    t, r, e = b.tokens, b.supervised, b.element
    rows, table = r * s.hidden * e, s.vocabulary * s.hidden
    chunk = min(r, max(LEAST_ROWS, LOGITS_BYTES // (e * s.vocabulary)))
    live = _Live()
    live.add(picked=rows, targets=8 * t, rows=8 * r, normed=rows, dn=rows)
    if trains:
        live.add(sum=4 * table)
    live.add(logits=chunk * s.vocabulary * e)
    if fp8:
        tile = math.ceil(s.vocabulary / HEAD_TILES)
        live.add(tile=tile * s.hidden * e, product=chunk * max(tile * e, s.hidden * (4 + e)))
        live.free("tile", "product")
    if trains:
        live.add(product=table * e)
        live.free("product")
    live.free("logits")
    if trains:
        live.add(dhead=table * e)
        live.free("sum")
    live.free("normed")
    live.add(dx=rows)
    saved = rows + (table * e if trains else 0)
    return live.peak, saved + 2 * rows


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
    one = b.element * layer_parameters(shape)
    beside = b.element * beside_parameters(shape, also)
    whole = one * len(trained) + beside
    on_host = update.gradients == "host"
    gradients = 0 if on_host or b.steps == 1 else whole
    best = Moment(0, 0, 0)
    # few kinds: a search replays thousands of times
    kinds = [(id(layer), i == len(layers) - 1) for i, layer in enumerate(layers)]
    known = dict(zip(kinds, layers, strict=True))
    forwards = {k: forward_peak(shape, b, _in_fp8(i, b), k[1]) for k, i in known.items()}
    kept = {k: kept_bytes(shape, b, i.activations, k[1]) for k, i in known.items()}
    backwards = {
        k: backward_peak(shape, b, i.activations, _in_fp8(i, b), i.trains, k[1])
        for k, i in known.items()
    }

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
    at(pack + away + backward)
    # the head's and the norm's gradients are there while the layers' are made
    made = beside_gradients(shape, also, b)
    arriving = made if on_host else 0
    if not on_host and b.steps == 1:
        gradients += made
    # of one tensor, the head's waits for the embedding's to be added
    table = b.element * shape.vocabulary * shape.hidden if shape.tied and "embedding" in also else 0
    held = 0 if b.steps == 1 and not on_host else table
    for i, layer in reversed(list(enumerate(layers))[lowest:]):
        away = max(moving[:i], default=0) if moving[i] else 0
        dy = b.supervised * shape.hidden * b.element if i == len(layers) - 1 else x
        at(pack + away + dy + backwards[kinds[i]] + arriving + held)
        saved -= kept[kinds[i]]
        arriving = 0
        if layer.trains and on_host:
            arriving = one  # on its way while the next layer computes
        elif layer.trains and b.steps == 1:
            gradients += one
    if "embedding" in also:
        at(pack + 2 * x + b.element * shape.vocabulary * shape.hidden + held + table)
    saved, gradients = 0, 0 if on_host else whole
    at(update_buffers(shape, also, update, b.element), updating=True)
    return best


def beside_gradients(shape: Shape, also: tuple[str, ...], b: Batch) -> int:
    """Gradients that the loss's own backward makes: the head's and the final norm's."""
    table = shape.vocabulary * shape.hidden if "head" in also else 0
    return b.element * (table + (shape.hidden if "final_norm" in also else 0))


def update_buffers(shape: Shape, also: tuple[str, ...], update: UpdateLayout, element: int) -> int:
    """On the device while it updates: two pieces of a parameter's state that the host holds."""
    n = min(UPDATE_CHUNK, largest_parameter(shape, also))
    each = state_bytes(update, element) if update.states == "host" else 0.0
    each += element if update.gradients == "host" else 0
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
    parameters = trained * layer_parameters(shape) + beside_parameters(shape, layout.also)
    states = int(parameters * state_bytes(update, e))
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
    }
    host = {
        "frozen layers": sum(streamed),
        "embedding": e * table if layout.embedding == "host" else 0,
        "gradients": e * parameters if update.gradients == "host" else 0,
        "optimizer": states if update.states == "host" else 0,
        "activations": x * sum(i.activations == "offload" for i in layout.layers),
    }
    return device, host


def account(
    shape: Shape, layout: Layout, update: UpdateLayout, b: Batch, *, context: int = CONTEXT
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
