"""Attention of packs of short sequences, where a flash kernel mostly moves what it does not need.

A query row sees an interval of keys, its own sequence's, and may see a second one, a prefix that
many sequences share; the softmax runs over both. Rows are cut into tiles whatever sequence they are
of, all G = N / K query heads of a key/value head under one another, so that k and v are read for
the group at once, no tile is half empty, and nothing depends on the longest sequence. Kept for the
backward: q, k, v, out, lse. It adds nothing up in an order of its own: the same bits every time.

bf16 bytes a token, ours = the minimum but for what a tile reads again: forward 4ND + 4KD + 4N;
backward, three passes (dq; dk and dv; those of the prefixes), 14ND + 12KD, where 8ND + 8KD would do
and PyTorch's flash kernels move about 30ND.
"""

# mypy: disallow-incomplete-defs=False
# (of a kernel's arguments, only the compile-time ones have a type)

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xplus_kernels.backend import INTERPRET, jit, tl, triton
from xplus_kernels.numerics import widen
from xplus_kernels.rms_norm import on_triton

SHORT = 1024  # tokens of the longest sequence; flash kernels are better at longer ones
DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (16, 32, 64, 128)
LOG2E = 1.4426950408889634
CHUNK = 256  # query rows whose share of a prefix's dk and dv is added up in one go, at least
# Of each kernel: query rows and keys of a tile, warps, stages. Without spills from sm_80 to sm_120.
TILES = {
    "fwd": {"ROWS": 64, "KEYS": 32, "num_warps": 4, "num_stages": 2},
    "dq": {"ROWS": 32, "KEYS": 32, "num_warps": 4, "num_stages": 1},
    "dkv": {"ROWS": 32, "KEYS": 32, "num_warps": 4, "num_stages": 1},
    "prefix": {"ROWS": 32, "KEYS": 32, "num_warps": 4, "num_stages": 1},
    "sum": {"KEYS": 16, "num_warps": 4, "num_stages": 1},
}
NOBODY = 2**30  # begin of an empty interval, past every row


@dataclass(frozen=True)
class Prefixes:
    """What many sequences share, G prefixes: rows of k and v before all others.

    A prefix's own queries, if it has any, stand before those of its sequences.
    """

    sees: Tensor  # [2, Tq] int32, key rows begin and end; NOBODY, 0 for a row that sees none
    chunks: Tensor  # [C, 4] int32: begin and end of a prefix's key rows, of query rows that see it
    of: Tensor  # [G + 1] int32: prefix g has chunks of[g] to of[g + 1]
    longest: int  # rows of a prefix
    keys: int  # rows of all prefixes


@dataclass(frozen=True)
class Sees:
    """Which query rows see which key rows."""

    keys: Tensor  # [2, Tq] int32: begin and end of the keys that a query sees
    queries: Tensor  # [2, Tk] int32: begin and end of the queries that see a key; NOBODY, 0: none
    prefixes: Prefixes | None = None


def sees_causally(cu_seqlens: Tensor, cu_seqlens_k: Tensor, queries: int, keys: int) -> Sees:
    """Of sequences that attend to themselves: bounds [S + 1] int32, rows of q and of k in all.

    The mask is aligned to the end of a sequence's keys, as in `varlen_attention`. Waits for nothing.
    """
    device, count = cu_seqlens.device, len(cu_seqlens) - 1
    of = torch.arange(count, device=device)
    of_q = of.repeat_interleave(cu_seqlens.diff(), output_size=queries)
    of_k = of.repeat_interleave(cu_seqlens_k.diff(), output_size=keys)
    ahead = (cu_seqlens_k - cu_seqlens)[1:]  # a sequence's last query sees its last key
    row = torch.arange(max(queries, keys), dtype=torch.int32, device=device)
    seen = torch.stack((cu_seqlens_k[of_q], ahead[of_q] + row[:queries] + 1))
    first = torch.maximum(cu_seqlens[of_k], row[:keys] - ahead[of_k])
    end = cu_seqlens[of_k + 1]
    none = first >= end
    asked = torch.stack((first.masked_fill(none, NOBODY), end.masked_fill(none, 0)))
    return Sees(seen.int(), asked.int())


def wants_sees(device: torch.device, longest: int) -> bool:
    """Whether a pack on a device, whose longest sequence is known, is for `short_attention`."""
    return longest <= SHORT and (device.type == "cuda" or INTERPRET)


def takes_short(q: Tensor) -> bool:
    """Whether `short_attention` has kernels for queries like q."""
    known = q.dtype in DTYPES or INTERPRET and q.dtype != torch.float64
    return on_triton(q) and known and q.shape[-1] in HEAD_DIMS


def _visible(sees: Sees, keys: int) -> Tensor:
    """[Tq, Tk] bool."""
    row = torch.arange(keys, device=sees.keys.device)
    both = [sees.keys] + ([sees.prefixes.sees] if sees.prefixes else [])
    found = [(begin[:, None] <= row) & (row < end[:, None]) for begin, end in both]
    return torch.stack(found).any(0)


def _scores(q: Tensor, k: Tensor, sees: Sees, scale: float) -> Tensor:
    """[N, Tq, Tk]."""
    heads = widen(k).repeat_interleave(q.shape[1] // k.shape[1], 1)
    s = torch.einsum("qnd,knd->nqk", widen(q), heads) * scale
    return s.masked_fill(~_visible(sees, len(k)), -torch.inf)


def short_attention_ref(
    q: Tensor, k: Tensor, v: Tensor, sees: Sees, *, scale: float
) -> tuple[Tensor, Tensor]:
    s = _scores(q, k, sees, scale)
    lse = s.logsumexp(-1)
    p = (s - lse[..., None]).exp()
    values = widen(v).repeat_interleave(q.shape[1] // k.shape[1], 1)
    return torch.einsum("nqk,knd->qnd", p, values).to(q.dtype), lse


def short_attention_backward_ref(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, sees: Sees, *,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    groups = q.shape[1] // k.shape[1]
    p = (_scores(q, k, sees, scale) - lse[..., None]).exp()
    dout, wide_q = widen(dout), widen(q)
    dp = torch.einsum("qnd,knd->nqk", dout, widen(v).repeat_interleave(groups, 1))
    ds = p * (dp - (dout * widen(out)).sum(-1).T[..., None]) * scale
    dq = torch.einsum("nqk,knd->qnd", ds, widen(k).repeat_interleave(groups, 1))
    dk, dv = (
        torch.einsum("nqk,qnd->knd", a, b).unflatten(1, (-1, groups)).sum(2)
        for a, b in ((ds, wide_q), (p, dout))
    )
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


@jit
def _weigh_keys(
    q, begin, end, k_ptr, v_ptr, k_row, v_row, scale, acc, total, top,
    D: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A softmax goes on over keys begin to end of each row: acc [ROWS, D], total and top [ROWS]."""
    c = tl.arange(0, KEYS)
    d = tl.arange(0, D)[None, :]
    stop = tl.max(end)
    for j in range(tl.min(begin), stop, KEYS):
        key = j + c
        m = (key < stop)[:, None]
        k = tl.load(k_ptr + key.to(tl.int64)[:, None] * k_row + d, m, 0.0)
        v = tl.load(v_ptr + key.to(tl.int64)[:, None] * v_row + d, m, 0.0)
        s = tl.dot(q, tl.trans(k)) * scale
        seen = (key[None, :] >= begin[:, None]) & (key[None, :] < end[:, None])
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
def _rows_of(
    first, stop, G: tl.constexpr, ROWS: tl.constexpr
):
    """Query rows from `first` on, a row for each of G heads: token, head in the group, is there."""
    r = first + tl.arange(0, ROWS)
    return r // G, r % G, r < stop


@jit
def _short_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, sees_ptr, prefix_ptr, T, scale,
    q_row, q_head, k_row, k_head, v_row, v_head,
    N: tl.constexpr, K: tl.constexpr, D: tl.constexpr, PREFIXED: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """out [T, N, D] and lse [N, T]; a program for ROWS rows of a key/value head's queries."""
    G: tl.constexpr = N // K
    kv = tl.program_id(1)
    i, g, m = _rows_of(tl.program_id(0) * ROWS, T * G, G, ROWS)
    row = i.to(tl.int64)
    head = (kv * G + g).to(tl.int64)
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


@jit
def _dq_of_keys(
    q, dout, lse, delta, begin, end, k_ptr, v_ptr, k_row, v_row, scale, dq,
    D: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """dq [ROWS, D], not yet times the scale, goes on over keys begin to end of each row."""
    c = tl.arange(0, KEYS)
    d = tl.arange(0, D)[None, :]
    stop = tl.max(end)
    for j in range(tl.min(begin), stop, KEYS):
        key = j + c
        m = (key < stop)[:, None]
        k = tl.load(k_ptr + key.to(tl.int64)[:, None] * k_row + d, m, 0.0)
        v = tl.load(v_ptr + key.to(tl.int64)[:, None] * v_row + d, m, 0.0)
        s = tl.dot(q, tl.trans(k)) * scale
        seen = (key[None, :] >= begin[:, None]) & (key[None, :] < end[:, None])
        p = tl.where(seen, tl.exp2(s - lse[:, None]), 0.0)
        ds = p * (tl.dot(dout, tl.trans(v)) - delta[:, None])
        dq += tl.dot(ds.to(k.dtype), k)
    return dq


@jit
def _short_attention_dq_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, delta_ptr, dq_ptr, sees_ptr, prefix_ptr,
    T, scale, q_row, q_head, k_row, k_head, v_row, v_head,
    N: tl.constexpr, K: tl.constexpr, D: tl.constexpr, PREFIXED: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """dq [T, N, D], and delta [N, T], the sum of dout * out, for the kernels after it."""
    G: tl.constexpr = N // K
    kv = tl.program_id(1)
    i, g, m = _rows_of(tl.program_id(0) * ROWS, T * G, G, ROWS)
    row = i.to(tl.int64)
    head = (kv * G + g).to(tl.int64)
    d = tl.arange(0, D)[None, :]
    at = ((row * N + head) * D)[:, None] + d
    dout = tl.load(dout_ptr + at, m[:, None], 0.0)
    out = tl.load(out_ptr + at, m[:, None], 0.0)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + head * T + row, delta, m)
    q = tl.load(q_ptr + (row * q_row + head * q_head)[:, None] + d, m[:, None], 0.0)
    lse = tl.load(lse_ptr + head * T + row, m, 0.0) * 1.4426950408889634
    dq = tl.zeros([ROWS, D], tl.float32)
    k_ptr += kv.to(tl.int64) * k_head
    v_ptr += kv.to(tl.int64) * v_head
    if PREFIXED:
        begin = tl.load(prefix_ptr + row, m, 2**30)
        end = tl.load(prefix_ptr + T + row, m, 0)
        dq = _dq_of_keys(
            q, dout, lse, delta, begin, end, k_ptr, v_ptr, k_row, v_row, scale, dq, D, KEYS
        )
    begin = tl.load(sees_ptr + row, m, 2**30)
    end = tl.load(sees_ptr + T + row, m, 0)
    dq = _dq_of_keys(
        q, dout, lse, delta, begin, end, k_ptr, v_ptr, k_row, v_row, scale, dq, D, KEYS
    )
    tl.store(dq_ptr + at, (dq * (scale / 1.4426950408889634)).to(dq_ptr.dtype.element_ty), m[:, None])


@jit
def _of_queries(
    k, v, begin, end, first, stop, dout_ptr, q_ptr, lse_ptr, delta_ptr, kv, T, scale,
    q_row, q_head, N: tl.constexpr, D: tl.constexpr, G: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """dk, not yet times the scale, and dv [KEYS, D], of queries first to stop.

    Key c is seen by queries begin[c] to end[c] alone.
    """
    dk = tl.zeros([KEYS, D], tl.float32)
    dv = tl.zeros([KEYS, D], tl.float32)
    d = tl.arange(0, D)[None, :]
    for r in range(first * G, stop * G, ROWS):
        i, g, m = _rows_of(r, stop * G, G, ROWS)
        row = i.to(tl.int64)
        head = (kv * G + g).to(tl.int64)
        q = tl.load(q_ptr + (row * q_row + head * q_head)[:, None] + d, m[:, None], 0.0)
        dout = tl.load(dout_ptr + ((row * N + head) * D)[:, None] + d, m[:, None], 0.0)
        lse = tl.load(lse_ptr + head * T + row, m, 0.0) * 1.4426950408889634
        delta = tl.load(delta_ptr + head * T + row, m, 0.0)
        s = tl.dot(q, tl.trans(k)) * scale
        seen = (i[:, None] >= begin[None, :]) & (i[:, None] < end[None, :]) & m[:, None]
        p = tl.where(seen, tl.exp2(s - lse[:, None]), 0.0)
        dv += tl.dot(tl.trans(p.to(dout.dtype)), dout)
        ds = p * (tl.dot(dout, tl.trans(v)) - delta[:, None])
        dk += tl.dot(tl.trans(ds.to(q.dtype)), q)
    return dk, dv


@jit
def _short_attention_dkv_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, asked_ptr,
    T, begin_k, end_k, scale, q_row, q_head, k_row, k_head, v_row, v_head,
    N: tl.constexpr, K: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """dk, dv [end_k, K, D] from row begin_k on, of the keys' own sequences."""
    kv = tl.program_id(1)
    key = begin_k + tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    m = key < end_k
    row = key.to(tl.int64)[:, None]
    d = tl.arange(0, D)[None, :]
    k = tl.load(k_ptr + row * k_row + kv.to(tl.int64) * k_head + d, m[:, None], 0.0)
    v = tl.load(v_ptr + row * v_row + kv.to(tl.int64) * v_head + d, m[:, None], 0.0)
    begin = tl.load(asked_ptr + key, m, 2**30)
    end = tl.load(asked_ptr + end_k + key, m, 0)
    dk, dv = _of_queries(
        k, v, begin, end, tl.min(begin), tl.max(end), dout_ptr, q_ptr, lse_ptr, delta_ptr, kv, T,
        scale, q_row, q_head, N, D, N // K, ROWS, KEYS,
    )  # fmt: skip
    at = (row * K + kv) * D + d
    dk *= scale / 1.4426950408889634
    tl.store(dk_ptr + at, dk.to(dk_ptr.dtype.element_ty), m[:, None])
    tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), m[:, None])


@jit
def _short_attention_prefix_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, chunks_ptr, asked_ptr,
    T, C, longest, scale, q_row, q_head, k_row, k_head, v_row, v_head,
    N: tl.constexpr, K: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """dk, dv [C, K, longest, D] fp32 of a prefix, of one chunk of the queries."""
    chunk = tl.program_id(0) % C
    kv = tl.program_id(1)
    begin_k = tl.load(chunks_ptr + 4 * chunk)
    end_k = tl.load(chunks_ptr + 4 * chunk + 1)
    first = tl.load(chunks_ptr + 4 * chunk + 2)
    stop = tl.load(chunks_ptr + 4 * chunk + 3)
    place = (tl.program_id(0) // C) * KEYS + tl.arange(0, KEYS)
    key = begin_k + place
    m = key < end_k
    row = key.to(tl.int64)[:, None]
    d = tl.arange(0, D)[None, :]
    k = tl.load(k_ptr + row * k_row + kv.to(tl.int64) * k_head + d, m[:, None], 0.0)
    v = tl.load(v_ptr + row * v_row + kv.to(tl.int64) * v_head + d, m[:, None], 0.0)
    # of its own queries a prefix is causal; those of its sequences come after them, and see it all
    begin = tl.load(asked_ptr + key, m, 2**30)
    begin = tl.where(begin == 2**30, tl.where(m, 0, begin), begin)
    dk, dv = _of_queries(
        k, v, begin, tl.where(m, stop, 0), first, stop, dout_ptr, q_ptr, lse_ptr, delta_ptr, kv, T,
        scale, q_row, q_head, N, D, N // K, ROWS, KEYS,
    )  # fmt: skip
    at = ((chunk * K + kv).to(tl.int64) * longest + place[:, None]) * D + d
    tl.store(dk_ptr + at, dk * (scale / 1.4426950408889634), m[:, None])
    tl.store(dv_ptr + at, dv, m[:, None])


@jit
def _short_attention_sum_kernel(
    part_dk_ptr, part_dv_ptr, dk_ptr, dv_ptr, chunks_ptr, of_ptr, longest, prefixes,
    K: tl.constexpr, D: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """dk, dv of the prefixes' rows: what their chunks add up to, in order."""
    prefix = tl.program_id(0) % prefixes
    kv = tl.program_id(1)
    first = tl.load(of_ptr + prefix)
    stop = tl.load(of_ptr + prefix + 1)
    begin_k = tl.load(chunks_ptr + 4 * first)
    end_k = tl.load(chunks_ptr + 4 * first + 1)
    place = (tl.program_id(0) // prefixes) * KEYS + tl.arange(0, KEYS)
    m = (begin_k + place < end_k)[:, None]
    d = tl.arange(0, D)[None, :]
    dk = tl.zeros([KEYS, D], tl.float32)
    dv = tl.zeros([KEYS, D], tl.float32)
    for chunk in range(first, stop):
        at = ((chunk * K + kv).to(tl.int64) * longest + place[:, None]) * D + d
        dk += tl.load(part_dk_ptr + at, m, 0.0)
        dv += tl.load(part_dv_ptr + at, m, 0.0)
    at = ((begin_k + place).to(tl.int64)[:, None] * K + kv) * D + d
    tl.store(dk_ptr + at, dk.to(dk_ptr.dtype.element_ty), m)
    tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), m)


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
    _check(q, k, v, sees)
    if not takes_short(q):
        return short_attention_ref(q, k, v, sees, scale=scale)
    (t, n, d), heads = q.shape, k.shape[1]
    out = torch.empty((t, n, d), dtype=q.dtype, device=q.device)
    lse = torch.empty((n, t), dtype=torch.float32, device=q.device)
    tiles = TILES["fwd"]
    _short_attention_fwd_kernel[(triton.cdiv(t * (n // heads), tiles["ROWS"]), heads)](
        q, k, v, out, lse, *_intervals(sees), t, scale * LOG2E, *_strides(q, k, v),
        N=n, K=heads, D=d, PREFIXED=sees.prefixes is not None, **tiles,
    )  # fmt: skip
    return out, lse


def short_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, sees: Sees, *,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of `short_attention`: dq [Tq, N, D], dk and dv [Tk, K, D], contiguous.

    Args:
        dout: [Tq, N, D], any strides.
        q, k, v, sees, scale: the forward's; out, lse: its results.

    Raises:
        ValueError, TypeError: as `short_attention`.
    """
    _check(q, k, v, sees)
    for name, x in (("dout", dout), ("out", out)):
        if x.shape != q.shape or x.dtype != q.dtype:
            raise ValueError(f"{name}: {list(x.shape)} {x.dtype}; q has {list(q.shape)} {q.dtype}")
    if not takes_short(q):
        return short_attention_backward_ref(dout, q, k, v, out, lse, sees, scale=scale)
    (t, n, d), (keys, heads) = q.shape, k.shape[:2]
    dout, out, lse = dout.contiguous(), out.contiguous(), lse.contiguous()
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty((n, t), dtype=torch.float32, device=q.device)
    sizes = {"N": n, "K": heads, "D": d}
    strides, scale = _strides(q, k, v), scale * LOG2E
    tiles = TILES["dq"]
    _short_attention_dq_kernel[(triton.cdiv(t * (n // heads), tiles["ROWS"]), heads)](
        dout, q, k, v, out, lse, delta, dq, *_intervals(sees), t, scale, *strides,
        PREFIXED=sees.prefixes is not None, **sizes, **tiles,
    )  # fmt: skip
    begin = 0
    if p := sees.prefixes:
        begin, chunks, prefixes = p.keys, len(p.chunks), len(p.of) - 1
        parts = torch.empty((2, chunks, heads, p.longest, d), dtype=torch.float32, device=q.device)
        tiles = TILES["prefix"]
        _short_attention_prefix_kernel[(chunks * triton.cdiv(p.longest, tiles["KEYS"]), heads)](
            dout, q, k, v, lse, delta, *parts, p.chunks, sees.queries, t, chunks, p.longest, scale,
            *strides, **sizes, **tiles,
        )  # fmt: skip
        tiles = TILES["sum"]
        _short_attention_sum_kernel[(prefixes * triton.cdiv(p.longest, tiles["KEYS"]), heads)](
            *parts, dk, dv, p.chunks, p.of, p.longest, prefixes, K=heads, D=d, **tiles
        )
    if keys > begin:
        tiles = TILES["dkv"]
        _short_attention_dkv_kernel[(triton.cdiv(keys - begin, tiles["KEYS"]), heads)](
            dout, q, k, v, lse, delta, dk, dv, sees.queries, t, begin, keys, scale, *strides,
            **sizes, **tiles,
        )  # fmt: skip
    return dq, dk, dv


def _intervals(sees: Sees) -> tuple[Tensor, Tensor]:
    return sees.keys, sees.keys if sees.prefixes is None else sees.prefixes.sees


def _strides(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, ...]:
    return tuple(x.stride(i) for x in (q, k, v) for i in (0, 1))


def _check(q: Tensor, k: Tensor, v: Tensor, sees: Sees) -> None:
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
    from dataclasses import replace

    from xplus_kernels.aot import AotCase

    tensors = ("dout_ptr", "q_ptr", "k_ptr", "v_ptr", "out_ptr", "dq_ptr", "dk_ptr", "dv_ptr")
    floats = ("lse_ptr", "delta_ptr", "part_dk_ptr", "part_dv_ptr")
    tables = ("sees_ptr", "prefix_ptr", "asked_ptr", "chunks_ptr", "of_ptr")
    strides = ("q_row", "q_head", "k_row", "k_head", "v_row", "v_head")
    types = {
        **dict.fromkeys(tensors, "*bf16"), **dict.fromkeys(floats, "*fp32"),
        **dict.fromkeys(tables, "*i32"), **dict.fromkeys(strides, "i32"), "scale": "fp32",
        **dict.fromkeys(("T", "C", "longest", "begin_k", "end_k", "prefixes"), "i32"),
    }  # fmt: skip
    wide = {"dk_ptr": "*fp32", "dv_ptr": "*fp32"}  # of the prefixes' chunks
    kernels = {
        "fwd": _short_attention_fwd_kernel, "dq": _short_attention_dq_kernel,
        "dkv": _short_attention_dkv_kernel, "prefix": _short_attention_prefix_kernel,
        "sum": _short_attention_sum_kernel,
    }  # fmt: skip
    cases = []
    for size, n in (("0.6B", 16), ("8B", 32), ("14B", 40)):
        for name, kernel in kernels.items():
            constants = {"N": n, "K": 8, "D": 128, "PREFIXED": True, **TILES[name]}
            given = kernel.arg_names
            cases.append(
                AotCase(
                    kernel,
                    f"short_attention {name} {size}",
                    {a: wide[a] if name == "prefix" and a in wide else types[a] for a in given if a in types},
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
