"""Attention of packs of short sequences, where a flash kernel mostly moves what it does not need.

A query row sees an interval of keys, its own sequence's, and may see a second one, a prefix that
many sequences share; the softmax runs over both. Rows are cut into tiles whatever sequence they are
of, all G = N / K query heads of a key/value head under one another, so that k and v are read for
the group at once, no tile is half empty, and nothing depends on the longest sequence. Kept for the
backward: q, k, v, out, lse. It adds nothing up in an order of its own: the same bits every time.

bf16 bytes a token, ours = the minimum but for what a tile reads again: forward 4ND + 4KD + 4N;
backward, three passes (dq; dk and dv; those of the prefixes), 14ND + 12KD, where 8ND + 8KD would
do. Measured on an H200, 8B's heads, 12,858 tokens of translation pairs with 4 prefixes: 0.153 and
0.635 ms, where PyTorch's flash kernels and a merge take 0.466 and 1.628.
"""

# mypy: disallow-incomplete-defs=False
# (of a kernel's arguments, only the compile-time ones have a type)

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xplus_kernels.backend import INTERPRET, jit, tl, triton
from xplus_kernels.intervals import Sees, short_attention_ref
from xplus_kernels.rms_norm import on_triton

# Tokens of the sequence that a token is in, on average: on an H200 at 512 these kernels take 0.91
# of the time of PyTorch's flash kernels, forward and backward, at 128 0.60, at 1024 1.15.
SHORT = 512
DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (16, 32, 64, 128)
LOG2E = 1.4426950408889634
# Arguments that are another number in every batch: no kernel is compiled for what divides by 16
SIZES = ("T", "C", "begin_k", "end_k", "prefixes")
CHUNK = 256  # query rows whose share of a prefix's dk and dv is added up in one go, at least
# Of each kernel: query rows and keys of a tile, warps, stages. Without spills from sm_80 to sm_120.
TILES = {
    "fwd": {"ROWS": 64, "KEYS": 16, "num_warps": 4, "num_stages": 3},
    "dq": {"ROWS": 64, "KEYS": 16, "num_warps": 4, "num_stages": 2},
    "dkv": {"ROWS": 32, "KEYS": 32, "num_warps": 4, "num_stages": 1},
    "prefix": {"ROWS": 64, "KEYS": 16, "num_warps": 4, "num_stages": 2},
    "sum": {"KEYS": 16, "num_warps": 4, "num_stages": 1},
}


def wants_sees(device: torch.device, length: float) -> bool:
    """Whether a pack on a device is for `short_attention`.

    length: of the sequence that a token is in, on average; or the longest, where no more is known.
    """
    return length <= SHORT and (device.type == "cuda" or INTERPRET)


def takes_short(q: Tensor) -> bool:
    """Whether `short_attention` has kernels for queries like q."""
    known = q.dtype in DTYPES or INTERPRET and q.dtype != torch.float64
    return on_triton(q) and known and q.shape[-1] in HEAD_DIMS


@jit
def score_keys(
    q, begin, end, j, stop, k_ptr, v_ptr, k_row, v_row, scale, D: tl.constexpr, KEYS: tl.constexpr
):  # fmt: skip
    """Keys j to j + KEYS, before `stop`: k, v [KEYS, D], scores [ROWS, KEYS], and which a row sees.

    A row sees keys begin to end.
    """
    d = tl.arange(0, D)[None, :]
    key = j + tl.arange(0, KEYS)
    m = (key < stop)[:, None]
    k = tl.load(k_ptr + key.to(tl.int64)[:, None] * k_row + d, m, 0.0)
    v = tl.load(v_ptr + key.to(tl.int64)[:, None] * v_row + d, m, 0.0)
    s = tl.dot(q, tl.trans(k)) * scale
    return k, v, s, (key[None, :] >= begin[:, None]) & (key[None, :] < end[:, None])


@jit
def _weigh_keys(
    q, begin, end, k_ptr, v_ptr, k_row, v_row, scale, acc, total, top,
    D: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A softmax goes on over keys begin to end of each row: acc [ROWS, D], total and top [ROWS]."""
    stop = tl.max(end)
    for j in range(tl.min(begin), stop, KEYS):
        _, v, s, seen = score_keys(
            q, begin, end, j, stop, k_ptr, v_ptr, k_row, v_row, scale, D, KEYS
        )
        s = tl.where(seen, s, float("-inf"))
        best = tl.maximum(top, tl.max(s, 1))
        at = tl.where(best == float("-inf"), 0.0, best)  # a row that sees no key yet
        p = tl.exp2(s - at[:, None])
        shrink = tl.exp2(top - at)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v)
        top = best
    return acc, total, top


@jit
def rows_of(first, stop, kv, G: tl.constexpr, ROWS: tl.constexpr):
    """Query rows from `first` on, a row for each of the G heads of a key/value head: token, and
    as int64 token and head, and whether they are there."""
    r = first + tl.arange(0, ROWS)
    i = r // G
    return i, i.to(tl.int64), (kv * G + r % G).to(tl.int64), r < stop


@jit(do_not_specialize=SIZES)
def _short_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, sees_ptr, prefix_ptr, T, scale,
    q_row, q_head, k_row, k_head, v_row, v_head,
    N: tl.constexpr, K: tl.constexpr, D: tl.constexpr, PREFIXED: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """out [T, N, D] and lse [N, T]; a program for ROWS rows of a key/value head's queries."""
    G: tl.constexpr = N // K
    kv = tl.program_id(1)
    _, row, head, m = rows_of(tl.program_id(0) * ROWS, T * G, kv, G, ROWS)
    d = tl.arange(0, D)[None, :]
    q = tl.load(q_ptr + (row * q_row + head * q_head)[:, None] + d, m[:, None], 0.0)
    acc = tl.zeros([ROWS, D], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    k_ptr += kv.to(tl.int64) * k_head
    v_ptr += kv.to(tl.int64) * v_head
    if PREFIXED:
        begin = tl.load(prefix_ptr + row, m, 2**30)
        end = tl.load(prefix_ptr + T + row, m, 0)
        acc, total, top = _weigh_keys(
            q, begin, end, k_ptr, v_ptr, k_row, v_row, scale, acc, total, top, D, KEYS
        )
    begin = tl.load(sees_ptr + row, m, 2**30)
    end = tl.load(sees_ptr + T + row, m, 0)
    acc, total, top = _weigh_keys(
        q, begin, end, k_ptr, v_ptr, k_row, v_row, scale, acc, total, top, D, KEYS
    )
    there = tl.where(total == 0.0, 1.0, total)
    out = acc / there[:, None]
    lse = tl.where(total == 0.0, float("-inf"), (top + tl.log2(there)) * 0.6931471805599453)
    tl.store(
        out_ptr + ((row * N + head) * D)[:, None] + d, out.to(out_ptr.dtype.element_ty), m[:, None]
    )
    tl.store(lse_ptr + head * T + row, lse, m)


def short_attention(
    q: Tensor, k: Tensor, v: Tensor, sees: Sees, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of every query row to the key rows that it sees.

    Args:
        q: [Tq, N, D], inner stride 1.
        k, v: [Tk, K, D] like q, K a divisor of N.
        sees: which rows see which.
        scale: multiplies the scores.

    Returns:
        out [Tq, N, D] like q, contiguous, and lse [N, Tq] fp32 (fp64 for fp64): the natural
        logarithm of the sum over exp(scale * q k.T).

    Raises:
        ValueError, TypeError: shapes, dtypes or strides other than these.
    """
    check_attention(q, k, v, sees)
    if not takes_short(q):
        return short_attention_ref(q, k, v, sees, scale=scale)
    (t, n, d), heads = q.shape, k.shape[1]
    out = torch.empty((t, n, d), dtype=q.dtype, device=q.device)
    lse = torch.empty((n, t), dtype=torch.float32, device=q.device)
    tiles = TILES["fwd"]
    _short_attention_fwd_kernel[(triton.cdiv(t * (n // heads), tiles["ROWS"]), heads)](
        q, k, v, out, lse, *intervals_of(sees), t, scale * LOG2E, *strides_of(q, k, v),
        N=n, K=heads, D=d, PREFIXED=sees.prefixes is not None, **tiles,
    )  # fmt: skip
    return out, lse


def intervals_of(sees: Sees) -> tuple[Tensor, Tensor]:
    return sees.keys, sees.keys if sees.prefixes is None else sees.prefixes.sees


def strides_of(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, ...]:
    return tuple(x.stride(i) for x in (q, k, v) for i in (0, 1))


def check_attention(q: Tensor, k: Tensor, v: Tensor, sees: Sees) -> None:
    if q.dim() != 3 or k.dim() != 3 or 0 in k.shape[1:] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q, k: {list(q.shape)}, {list(k.shape)}; allowed: [Tq, N, D], [Tk, K, D], K | N"
        )
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype or x.device != q.device:
            raise TypeError(f"{name}: {x.dtype} on {x.device}; q: {q.dtype} on {q.device}")
    if v.shape != k.shape or k.shape[2] != q.shape[2]:
        raise ValueError(f"k, v: {list(k.shape)}, {list(v.shape)}; q: {list(q.shape)}")
    if any(x.stride(-1) != 1 for x in (q, k, v)):
        raise ValueError("q, k, v: the inner stride must be 1")
    if sees.keys.shape != (2, len(q)) or sees.queries.shape != (2, len(k)):
        raise ValueError(f"sees: of {sees.keys.shape[1]} queries and {sees.queries.shape[1]} keys")


def aot_cases() -> list[Any]:
    """The launches at the heads of Qwen3 0.6B, 8B and 14B."""
    return cases_of({"fwd": _short_attention_fwd_kernel})


def cases_of(kernels: dict[str, Any]) -> list[Any]:
    """Of kernels by the names of their tiles."""
    from dataclasses import replace

    from xplus_kernels.aot import AotCase

    tensors = ("dout_ptr", "q_ptr", "k_ptr", "v_ptr", "out_ptr", "dq_ptr", "dk_ptr", "dv_ptr")
    floats = ("lse_ptr", "delta_ptr", "part_dk_ptr", "part_dv_ptr")
    tables = ("sees_ptr", "prefix_ptr", "asked_ptr", "chunks_ptr", "of_ptr")
    strides = ("q_row", "q_head", "k_row", "k_head", "v_row", "v_head")
    types = {
        **dict.fromkeys(tensors, "*bf16"), **dict.fromkeys(floats, "*fp32"),
        **dict.fromkeys(tables, "*i32"), **dict.fromkeys(strides, "i32"), "scale": "fp32",
        **dict.fromkeys(SIZES, "i32"),
    }  # fmt: skip
    wide = {"dk_ptr": "*fp32", "dv_ptr": "*fp32"}  # of the prefixes' chunks
    cases = []
    kinds = [
        ("0.6B", 16, True),
        ("8B", 32, True),
        ("14B", 40, True),
        ("8B, no prefixes", 32, False),
    ]
    for size, n, prefixed in kinds:
        for name, kernel in kernels.items():
            constants = {"N": n, "K": 8, "D": 128, "PREFIXED": prefixed, **TILES[name]}
            given = kernel.arg_names
            if not prefixed and "PREFIXED" not in given:  # the same as of 8B
                continue
            own = types | wide if name == "prefix" else types
            cases.append(
                AotCase(
                    kernel,
                    f"short_attention {name} {size}",
                    {a: own[a] for a in given if a in own},
                    {a: constants[a] for a in given if a in constants},
                    num_warps=TILES[name]["num_warps"],
                    num_stages=TILES[name]["num_stages"],
                    aligned=tuple(a for a in given if a in (*tensors, *floats, *strides)),
                )
            )
    halves = [
        replace(
            c, name=f"{c.name} fp16",
            signature={k: "*fp16" if t == "*bf16" else t for k, t in c.signature.items()},
        )
        for c in cases
    ]  # fmt: skip
    return cases + halves
