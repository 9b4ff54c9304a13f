"""Gradients of attention over short sequences, see short_attention.py.

Three passes over q and dout: dq, by tiles of queries, which also makes delta, the sum of
dout * out; dk and dv of the keys' own sequences, by tiles of keys; and those of the prefixes, whose
many queries are cut into chunks that are added up in order. No atomics: the same bits every time.
"""

# mypy: disallow-incomplete-defs=False
# (of a kernel's arguments, only the compile-time ones have a type)

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xplus_kernels.backend import jit, tl, triton
from xplus_kernels.intervals import Sees, short_attention_backward_ref
from xplus_kernels.short_attention import (
    LOG2E,
    SIZES,
    TILES,
    cases_of,
    check_attention,
    intervals_of,
    rows_of,
    score_keys,
    strides_of,
    takes_short,
)


@jit
def _dq_of_keys(
    q, dout, lse, delta, begin, end, k_ptr, v_ptr, k_row, v_row, scale, dq,
    D: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """dq [ROWS, D], not yet times the scale, goes on over keys begin to end of each row."""
    stop = tl.max(end)
    for j in range(tl.min(begin), stop, KEYS):
        k, v, s, seen = score_keys(
            q, begin, end, j, stop, k_ptr, v_ptr, k_row, v_row, scale, D, KEYS
        )
        p = tl.where(seen, tl.exp2(s - lse[:, None]), 0.0)
        ds = p * (tl.dot(dout, tl.trans(v)) - delta[:, None])
        dq += tl.dot(ds.to(k.dtype), k)
    return dq


@jit(do_not_specialize=SIZES)
def _short_attention_dq_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, delta_ptr, dq_ptr, sees_ptr, prefix_ptr,
    T, scale, q_row, q_head, k_row, k_head, v_row, v_head,
    N: tl.constexpr, K: tl.constexpr, D: tl.constexpr, PREFIXED: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """dq [T, N, D], and delta [N, T], the sum of dout * out, for the kernels after it."""
    G: tl.constexpr = N // K
    kv = tl.program_id(1)
    _, row, head, m = rows_of(tl.program_id(0) * ROWS, T * G, kv, G, ROWS)
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
    tl.store(
        dq_ptr + at, (dq * (scale / 1.4426950408889634)).to(dq_ptr.dtype.element_ty), m[:, None]
    )


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
    first = tl.minimum(first, stop)  # of keys that nobody asks it is NOBODY, too large for * G
    for r in range(first * G, stop * G, ROWS):
        i, row, head, m = rows_of(r, stop * G, kv, G, ROWS)
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


@jit(do_not_specialize=SIZES)
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


@jit(do_not_specialize=SIZES)
def _short_attention_prefix_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, chunks_ptr, asked_ptr,
    T, C, scale, q_row, q_head, k_row, k_head, v_row, v_head,
    N: tl.constexpr, K: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """dk, dv [rows, K, D] fp32: from a chunk's row on, a prefix's, of one chunk of the queries."""
    chunk = tl.program_id(0) % C
    kv = tl.program_id(1)
    begin_k = tl.load(chunks_ptr + 5 * chunk)
    end_k = tl.load(chunks_ptr + 5 * chunk + 1)
    first = tl.load(chunks_ptr + 5 * chunk + 2)
    stop = tl.load(chunks_ptr + 5 * chunk + 3)
    at_row = tl.load(chunks_ptr + 5 * chunk + 4)
    place = (tl.program_id(0) // C) * KEYS + tl.arange(0, KEYS)
    key = begin_k + place
    stop = tl.where(tl.min(key) < end_k, stop, first)  # a tile past a short prefix
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
    at = ((at_row + place).to(tl.int64)[:, None] * K + kv) * D + d
    tl.store(dk_ptr + at, dk * (scale / 1.4426950408889634), m[:, None])
    tl.store(dv_ptr + at, dv, m[:, None])


@jit(do_not_specialize=SIZES)
def _short_attention_sum_kernel(
    part_dk_ptr, part_dv_ptr, dk_ptr, dv_ptr, chunks_ptr, of_ptr, prefixes,
    K: tl.constexpr, D: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """dk, dv of the prefixes' rows: what their chunks add up to, in order."""
    prefix = tl.program_id(0) % prefixes
    kv = tl.program_id(1)
    first = tl.load(of_ptr + prefix)
    stop = tl.load(of_ptr + prefix + 1)
    begin_k = tl.load(chunks_ptr + 5 * first)
    end_k = tl.load(chunks_ptr + 5 * first + 1)
    place = (tl.program_id(0) // prefixes) * KEYS + tl.arange(0, KEYS)
    m = (begin_k + place < end_k)[:, None]
    d = tl.arange(0, D)[None, :]
    dk = tl.zeros([KEYS, D], tl.float32)
    dv = tl.zeros([KEYS, D], tl.float32)
    for chunk in range(first, stop):
        at_row = tl.load(chunks_ptr + 5 * chunk + 4)
        at = ((at_row + place).to(tl.int64)[:, None] * K + kv) * D + d
        dk += tl.load(part_dk_ptr + at, m, 0.0)
        dv += tl.load(part_dv_ptr + at, m, 0.0)
    at = ((begin_k + place).to(tl.int64)[:, None] * K + kv) * D + d
    tl.store(dk_ptr + at, dk.to(dk_ptr.dtype.element_ty), m)
    tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), m)


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
    check_attention(q, k, v, sees)
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
    strides, scale = strides_of(q, k, v), scale * LOG2E
    tiles = TILES["dq"]
    _short_attention_dq_kernel[(triton.cdiv(t * (n // heads), tiles["ROWS"]), heads)](
        dout, q, k, v, out, lse, delta, dq, *intervals_of(sees), t, scale, *strides,
        PREFIXED=sees.prefixes is not None, **sizes, **tiles,
    )  # fmt: skip
    begin = 0
    if p := sees.prefixes:
        begin, chunks, prefixes = p.keys, len(p.chunks), len(p.of) - 1
        parts = torch.empty((2, p.rows, heads, d), dtype=torch.float32, device=q.device)
        tiles = TILES["prefix"]
        _short_attention_prefix_kernel[(chunks * triton.cdiv(p.longest, tiles["KEYS"]), heads)](
            dout, q, k, v, lse, delta, *parts, p.chunks, sees.queries, t, chunks, scale,
            *strides, **sizes, **tiles,
        )  # fmt: skip
        tiles = TILES["sum"]
        _short_attention_sum_kernel[(prefixes * triton.cdiv(p.longest, tiles["KEYS"]), heads)](
            *parts, dk, dv, p.chunks, p.of, prefixes, K=heads, D=d, **tiles
        )
    if keys > begin:
        tiles = TILES["dkv"]
        _short_attention_dkv_kernel[(triton.cdiv(keys - begin, tiles["KEYS"]), heads)](
            dout, q, k, v, lse, delta, dk, dv, sees.queries, t, begin, keys, scale, *strides,
            **sizes, **tiles,
        )  # fmt: skip
    return dq, dk, dv


def aot_cases() -> list[Any]:
    """The launches at the heads of Qwen3 0.6B, 8B and 14B."""
    return cases_of(
        {
            "dq": _short_attention_dq_kernel, "dkv": _short_attention_dkv_kernel,
            "prefix": _short_attention_prefix_kernel, "sum": _short_attention_sum_kernel,
        }
    )  # fmt: skip
