"""A block's and the head's tensors in the order of their code: which are alive when, and how large.

Allocations and frees are replayed as `block.py` and `head.py` make them; the planner reads the
peaks off. Legend as in `memory.py`.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from xplus_fast.model.families import Shape
from xplus_fast.model.layout import Policy
from xplus_fast.planning.flops import SENTENCE

# of ops.linear_cross_entropy
LOGITS_BYTES, FP8_LOGITS_BYTES, LEAST_ROWS, HEAD_TILES = 300 * 2**20, 512 * 2**20, 1024, 8
SAVED: dict[Policy, tuple[str, ...]] = {
    "keep": ("x", "qkv", "q_rows", "out", "lse", "h", "gate_up"),
    "recompute_mlp": ("x", "qkv", "q_rows", "out", "lse", "h"),
    "recompute": ("x",),
    "offload": (),
}


# In a trained layer's backward gradients are made, or added to what is there, or to what comes over
# from the host when it begins.
SumsAre = Literal["made", "there", "brought"]


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
    exchanged: bool = False  # gradients go over several processes
    hooked: bool = False  # somebody wants to see each gradient before it is added to a sum

    @property
    def adds(self) -> bool:
        """Whether the GEMM that makes a matrix's gradient adds it to the sum (`model/sums.py`)."""
        return self.steps > 1 and not self.exchanged and not self.hooked


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
    s: Shape, b: Batch, policy: Policy, fp8: bool, trains: bool, last: bool = False,
    sums: SumsAre = "made", width: int | None = None,
) -> int:  # fmt: skip
    """Most bytes alive in a block's backward beside what it kept and the gradient dy given to it.

    Of a trained layer, that includes its weights' new gradients, of `width` bytes each; see
    `block.py` for the order.
    """
    live, size, w = _Live(), tensor_bytes(s, b, last), s.packed_shapes()
    each = b.element if width is None else width
    of = {name: each * math.prod(shape) for name, shape in w.items()}
    dw = of if sums == "made" else dict.fromkeys(w, 0)
    if trains and sums == "brought":
        live.add(brought=sum(of.values()))
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
    cap = FP8_LOGITS_BYTES if fp8 else LOGITS_BYTES
    chunk = min(r, max(LEAST_ROWS, cap // (e * s.vocabulary)))
    live = _Live()
    live.add(picked=rows, targets=8 * t, rows=8 * r, normed=rows, dn=rows)
    if trains:
        live.add(sum=4 * table)
    live.add(logits=chunk * s.vocabulary * e)
    if fp8:
        tile = math.ceil(s.vocabulary / HEAD_TILES)
        live.add(tile=tile * s.hidden * e, product=chunk * s.hidden * 8)
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
