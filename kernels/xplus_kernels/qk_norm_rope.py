"""Per-head RMSNorm of q and k, then rotary embedding, from the packed output of the qkv GEMM.

RoPE (Su et al. 2021, arXiv 2104.09864) in Hugging Face's layout: the two halves (a, b) of a head
are the real and imaginary parts; (a cos - b sin, b cos + a sin). The norm's output is rounded to
the input's dtype before the rotation, as Hugging Face rounds it, and the rotation once, after it.
The backward rotates back, then is `rms_norm`'s, and rounds once, at the end. Families without q/k
norms pass None for their weights.

A layer that has queries for some of its rows alone computes these apart from its keys and values:
N or K is then 0, and q, or k and v, are [T, 0, D], as are their gradients.

bf16 bytes: forward 4 an element of q and k (the minimum), v is a view and costs none; backward 6
an element of q and k and 4 of v, which is copied into the packed gradient. cos and sin, fp32
[T, D/2], come on top: 4D bytes a token and 8 heads, 1/8 of what those heads read and write, from
the L2 cache after a token's first heads. Kept for the backward: qkv before the norm.
"""

# mypy: disallow-incomplete-defs=False
# (of a kernel's arguments, only the compile-time ones have a type)

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xplus_kernels.backend import jit, tl, triton
from xplus_kernels.numerics import widen
from xplus_kernels.rms_norm import (
    as_rows,
    check_like,
    check_rows,
    multiprocessors,
    normed,
    on_triton,
    rms_norm_backward_ref,
    rms_norm_ref,
)


def rope_tables(
    positions: Tensor, inv_freq: Tensor, *, scaling: float = 1.0
) -> tuple[Tensor, Tensor]:
    """positions [T] int, inv_freq [D/2] fp32 -> cos, sin [T, D/2] fp32, times `scaling`."""
    angle = positions.to(inv_freq.dtype)[:, None] * inv_freq
    return angle.cos() * scaling, angle.sin() * scaling


def qk_norm_rope_ref(
    qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, cos: Tensor, sin: Tensor, *,
    heads: int, kv_heads: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, v = _split(qkv, heads, kv_heads)
    if q_norm is not None:
        q = rms_norm_ref(q, q_norm, eps=eps)
    if k_norm is not None:
        k = rms_norm_ref(k, k_norm, eps=eps)
    return _rotate(q, cos, sin), _rotate(k, cos, sin), v


def qk_norm_rope_backward_ref(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None,
    cos: Tensor, sin: Tensor, *, eps: float, need_dw: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    dq, dk = _rotate(dq, cos, -sin), _rotate(dk, cos, -sin)  # the inverse rotation
    dqn = dkn = None
    q, k, _ = _split(qkv, dq.shape[1], dk.shape[1])
    if q_norm is not None:
        dq, dqn = rms_norm_backward_ref(dq, q, q_norm, eps=eps, need_dw=need_dw)
    if k_norm is not None:
        dk, dkn = rms_norm_backward_ref(dk, k, k_norm, eps=eps, need_dw=need_dw)
    return torch.cat((dq.flatten(1), dk.flatten(1), dv.flatten(1)), -1), dqn, dkn


def _split(qkv: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    per_head = qkv.unflatten(-1, (heads + 2 * kv_heads, -1))  # [T, N+2K, D]
    q, k, v = per_head.split((heads, kv_heads, kv_heads), 1)
    return q, k, v


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = widen(x)  # [T, heads, D]
    cos, sin = torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None]
    a, b = wide.chunk(2, -1)
    return (wide * cos).addcmul_(torch.cat((b, a), -1), sin).to(x.dtype)


# A program works on TOKENS tokens x GROUP heads x D. GROUP divides N and K, so that a group is all
# q, all k or all v, and no head is padded: 40 + 8 heads are 6 groups of 8. Either may be 0. The
# group runs fastest over the grid: neighbours read one row of qkv and the same cos and sin.
# Tiles are [TOKENS, GROUP, HALF], one for each half of the heads; HALF is D/2 rounded up to a
# power of two.


@jit
def _load_halves(ptr, m, D: tl.constexpr):
    """Both halves of heads, or of a norm's weights, fp32."""
    a = tl.load(ptr, m, 0.0).to(tl.float32)
    b = tl.load(ptr + D // 2, m, 0.0).to(tl.float32)
    return a, b


@jit(do_not_specialize=("T",))
def _qk_norm_rope_fwd_kernel(
    qkv_ptr, qw_ptr, kw_ptr, cos_ptr, sin_ptr, q_ptr, k_ptr, T, qkv_row, cos_row, sin_row,
    N: tl.constexpr, K: tl.constexpr, D: tl.constexpr, EPS: tl.constexpr, NORMED: tl.constexpr,
    TOKENS: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """qkv [T, (N+2K)D], norms [D], cos and sin [T, D/2] -> q [T, N, D], k [T, K, D]."""
    dtype = q_ptr.dtype.element_ty
    pid = tl.program_id(0).to(tl.int64)
    groups: tl.constexpr = (N + K) // GROUP
    group = pid % groups
    t = (pid // groups) * TOKENS + tl.arange(0, TOKENS)[:, None, None]
    head = tl.arange(0, GROUP)[None, :, None]
    d = tl.arange(0, HALF)[None, None, :]
    m = (t < T) & (d < D // 2)  # [TOKENS, 1, HALF]
    is_q = group < N // GROUP

    x_ptr = qkv_ptr + t * qkv_row + (group * GROUP + head) * D + d
    a, b = _load_halves(x_ptr, m, D)
    cos = tl.load(cos_ptr + t * cos_row + d, m, 0.0)  # [TOKENS, 1, HALF]
    sin = tl.load(sin_ptr + t * sin_row + d, m, 0.0)
    if NORMED:
        w_ptr = tl.where(is_q, qw_ptr, kw_ptr) + d
        w_a, w_b = _load_halves(w_ptr, d < D // 2, D)  # [1, 1, HALF]
        squares = tl.sum(a * a, 2, keep_dims=True) + tl.sum(b * b, 2, keep_dims=True)
        rstd = tl.rsqrt(squares / D + EPS)  # [TOKENS, GROUP, 1]
        a = normed(a, rstd, w_a, dtype).to(tl.float32)
        b = normed(b, rstd, w_b, dtype).to(tl.float32)
    y_ptr = tl.where(is_q, q_ptr, k_ptr) + t * tl.where(is_q, N * D, K * D)
    y_ptr += (tl.where(is_q, group, group - N // GROUP) * GROUP + head) * D + d
    tl.store(y_ptr, (a * cos - b * sin).to(dtype), m)
    tl.store(y_ptr + D // 2, (b * cos + a * sin).to(dtype), m)


@jit(do_not_specialize=("T",))
def _qk_norm_rope_bwd_kernel(
    dq_ptr, dk_ptr, dv_ptr, qkv_ptr, qw_ptr, kw_ptr, cos_ptr, sin_ptr, dx_ptr, dw_ptr, T,
    dq_t, dq_head, dk_t, dk_head, dv_t, dv_head, qkv_row, cos_row, sin_row,
    N: tl.constexpr, K: tl.constexpr, D: tl.constexpr, EPS: tl.constexpr, NORMED: tl.constexpr,
    NEED_DW: tl.constexpr, TOKENS: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """dq [T, N, D], dk, dv [T, K, D] -> dx [T, (N+2K)D]; where NEED_DW, dw [programs, D] fp32.

    A program keeps to one group. Frozen, the grid covers all tokens and the loop runs once;
    trained, a few programs a multiprocessor share them, each summing its dw in registers.
    """
    dtype = dx_ptr.dtype.element_ty
    pid = tl.program_id(0).to(tl.int64)
    groups: tl.constexpr = (N + 2 * K) // GROUP
    group = pid % groups
    is_q = group < N // GROUP
    is_k = group < (N + K) // GROUP  # and not q
    first = tl.where(is_q, 0, tl.where(is_k, N, N + K))  # head of qkv where this tensor starts
    dy_ptr = tl.where(is_q, dq_ptr, tl.where(is_k, dk_ptr, dv_ptr))
    dy_t = tl.where(is_q, dq_t, tl.where(is_k, dk_t, dv_t))
    dy_head = tl.where(is_q, dq_head, tl.where(is_k, dk_head, dv_head))
    head = group * GROUP + tl.arange(0, GROUP)[None, :, None]  # of qkv
    d = tl.arange(0, HALF)[None, None, :]
    m_d = d < D // 2
    if NEED_DW:
        dw_a = tl.zeros((TOKENS, GROUP, HALF), tl.float32)
        dw_b = tl.zeros((TOKENS, GROUP, HALF), tl.float32)
    block = pid // groups
    while block * TOKENS < T:  # as in the norm: no range over run-time bounds
        t = block * TOKENS + tl.arange(0, TOKENS)[:, None, None]
        m = (t < T) & m_d  # [TOKENS, 1, HALF]
        d_ptr = dy_ptr + t * dy_t + (head - first) * dy_head + d
        d_a, d_b = _load_halves(d_ptr, m, D)
        if is_k:  # q or k
            cos = tl.load(cos_ptr + t * cos_row + d, m, 0.0)  # [TOKENS, 1, HALF]
            sin = tl.load(sin_ptr + t * sin_row + d, m, 0.0)
            y_a = d_a * cos + d_b * sin  # gradient of the norm's output
            y_b = d_b * cos - d_a * sin
            d_a = y_a
            d_b = y_b
            if NORMED:
                x_ptr = qkv_ptr + t * qkv_row + head * D + d
                a, b = _load_halves(x_ptr, m, D)
                w_ptr = tl.where(is_q, qw_ptr, kw_ptr) + d
                g_a = y_a * tl.load(w_ptr, m_d, 0.0).to(tl.float32)
                g_b = y_b * tl.load(w_ptr + D // 2, m_d, 0.0).to(tl.float32)
                squares = tl.sum(a * a + b * b, 2, keep_dims=True)  # [TOKENS, GROUP, 1]
                gx = tl.sum(g_a * a + g_b * b, 2, keep_dims=True)
                rstd = tl.rsqrt(squares / D + EPS)
                c = rstd * rstd * rstd * (gx / D)
                d_a = g_a * rstd - a * c
                d_b = g_b * rstd - b * c
                if NEED_DW:
                    dw_a += y_a * (a * rstd)
                    dw_b += y_b * (b * rstd)
        o_ptr = dx_ptr + t * ((N + 2 * K) * D) + head * D + d
        tl.store(o_ptr, d_a.to(dtype), m)
        tl.store(o_ptr + D // 2, d_b.to(dtype), m)
        block += tl.num_programs(0) // groups
    if NEED_DW:
        half = tl.arange(0, HALF)
        sum_ptr = dw_ptr + pid * D + half
        tl.store(sum_ptr, tl.sum(tl.sum(dw_a, 0), 0), half < D // 2)
        tl.store(sum_ptr + D // 2, tl.sum(tl.sum(dw_b, 0), 0), half < D // 2)


def _tiles(heads: int, kv_heads: int, d: int, rows: int) -> dict[str, int]:
    """Tile sizes for `rows` tokens x heads a program at D = 128, more of smaller heads."""
    group = 8
    while heads % group or kv_heads % group:
        group //= 2
    half = triton.next_power_of_2(d // 2)
    tokens = max(1, rows * 64 // (half * group))
    return {"TOKENS": tokens, "GROUP": group, "HALF": half, "num_warps": 4}


# With 4 warps a half of a head is read 128 bits a thread: two loads each in the forward, so that it
# has four in flight. The backward has more to hold: measured on an H100 (8B, 12,864 tokens), 8 rows
# of frozen norms take 0.154 ms, 16 take 0.175, 32 0.171; its bytes alone 0.149. Without norms it
# holds no more than the forward (and was not timed): of few heads 8 rows are 64 bits a thread.
FORWARD_ROWS = 32
BACKWARD_ROWS = {(True, False): 8, (True, True): 16, (False, False): 32}  # normed, trained norms


def qk_norm_rope(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    heads: int,
    kv_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Norm and rotate q and k. qkv [T, (N+2K)D] -> q [T, N, D], k, v [T, K, D]; v is a view.

    q_norm, k_norm [D] of qkv's dtype, one for each of q and k that is there, or both None; cos, sin
    [T, D/2] fp32 (`rope_tables`); heads and kv_heads are N and K, one of which may be 0. Raises
    TypeError or ValueError, naming the argument, where one does not match.
    """
    d = _check(qkv, q_norm, k_norm, cos, sin, heads, kv_heads)
    if not on_triton(qkv):
        return qk_norm_rope_ref(
            qkv, q_norm, k_norm, cos, sin, heads=heads, kv_heads=kv_heads, eps=eps
        )
    x, cos, sin, t = as_rows(_inner(qkv)), _inner(cos), _inner(sin), len(qkv)
    q = torch.empty((t, heads, d), dtype=qkv.dtype, device=qkv.device)
    k = torch.empty((t, kv_heads, d), dtype=qkv.dtype, device=qkv.device)
    qw, kw = _norms(q_norm, k_norm, x)
    tiles = _tiles(heads, kv_heads, d, FORWARD_ROWS)
    groups = (heads + kv_heads) // tiles["GROUP"]
    _qk_norm_rope_fwd_kernel[(groups * triton.cdiv(t, tiles["TOKENS"]),)](
        x, qw, kw, cos, sin, q, k, t, x.stride(0), cos.stride(0), sin.stride(0),
        N=heads, K=kv_heads, D=d, EPS=eps, NORMED=_normed(q_norm, k_norm), **tiles,
    )  # fmt: skip
    return q, k, _split(qkv, heads, kv_heads)[2]


def qk_norm_rope_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    eps: float,
    need_dw: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradient of `qk_norm_rope`. dq [T, N, D], dk, dv [T, K, D] -> dqkv, d(q_norm), d(k_norm).

    dqkv [T, (N+2K)D]; each norm's gradient [D] where need_dw and where there is the norm, else
    None. N and K are those of dq and dk, one of which may be 0.
    Any strides, 0 included. Raises as `qk_norm_rope` does.
    """
    for name, grad in (("dq", dq), ("dk", dk)):
        if grad.dim() != 3:
            raise ValueError(f"{name}: shape {list(grad.shape)}; it must be [T, heads, D]")
    heads, kv_heads = dq.shape[1], dk.shape[1]
    d = _check(qkv, q_norm, k_norm, cos, sin, heads, kv_heads)
    for name, grad, n in (("dq", dq, heads), ("dk", dk, kv_heads), ("dv", dv, kv_heads)):
        check_like(name, grad, "qkv", qkv, (len(qkv), n, d))
    if not on_triton(qkv):
        return qk_norm_rope_backward_ref(
            dq, dk, dv, qkv, q_norm, k_norm, cos, sin, eps=eps, need_dw=need_dw
        )
    x, cos, sin, dq, dk, dv = (_inner(tensor) for tensor in (qkv, cos, sin, dq, dk, dv))
    normed = _normed(q_norm, k_norm)
    need_dw = need_dw and normed
    tiles = _tiles(heads, kv_heads, d, BACKWARD_ROWS[normed, need_dw])
    group = tiles["GROUP"]
    groups, blocks = (heads + 2 * kv_heads) // group, triton.cdiv(len(x), tiles["TOKENS"])
    if need_dw:  # as many as reside at once by their registers, 120 a thread at most
        blocks = min(blocks, max(1, 4 * multiprocessors(x.device) // groups))
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    # Partial sums, a row a program: no atomics, so that the same batch gives the same bits
    partial = torch.empty((blocks, groups, d), device=x.device) if need_dw else dx
    _qk_norm_rope_bwd_kernel[(groups * blocks,)](
        dq, dk, dv, x, *_norms(q_norm, k_norm, x), cos, sin, dx, partial, len(x),
        *dq.stride()[:2], *dk.stride()[:2], *dv.stride()[:2],
        x.stride(0), cos.stride(0), sin.stride(0),
        N=heads, K=kv_heads, D=d, EPS=eps, NORMED=normed, NEED_DW=need_dw, **tiles,
    )  # fmt: skip
    if not need_dw:
        return dx, None, None
    parts = partial.split((heads // group, kv_heads // group, kv_heads // group), 1)
    dqn, dkn = (
        None if norm is None else part.sum((0, 1)).to(x.dtype)
        for norm, part in zip((q_norm, k_norm), parts[:2], strict=True)
    )
    return dx, dqn, dkn


def _inner(x: Tensor) -> Tensor:
    """With inner stride 1."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _norms(q_norm: Tensor | None, k_norm: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
    """The norms' weights, or stand-ins that are not read."""
    q_norm, k_norm = (x if norm is None else norm.contiguous() for norm in (q_norm, k_norm))
    return q_norm, k_norm


def _normed(q_norm: Tensor | None, k_norm: Tensor | None) -> bool:
    return q_norm is not None or k_norm is not None


def _check(
    qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, cos: Tensor, sin: Tensor,
    heads: int, kv_heads: int,
) -> int:  # fmt: skip
    """D, once all arguments match."""
    check_rows("qkv", qkv)
    total = heads + 2 * kv_heads
    if qkv.dim() != 2 or heads < 0 or kv_heads < 0 or not total or qkv.shape[1] % (2 * total):
        raise ValueError(
            f"qkv: shape {list(qkv.shape)}; with heads = {heads} and kv_heads = {kv_heads} it must "
            f"be [T, {total} * D], D even"
        )
    t, d = len(qkv), qkv.shape[1] // total
    if heads and kv_heads and (q_norm is None) != (k_norm is None):
        raise ValueError("q_norm, k_norm: one of them is None; both or neither")
    for name, norm, count in (("q_norm", q_norm, heads), ("k_norm", k_norm, kv_heads)):
        if norm is not None:
            check_like(name, norm, "qkv", qkv, (d,))
            if not count:
                raise ValueError(f"{name}: a norm where there are no heads; allowed: None")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape != (t, d // 2) or table.device != qkv.device:
            raise ValueError(
                f"{name}: shape {list(table.shape)} on {table.device}; with qkv of "
                f"{list(qkv.shape)} on {qkv.device} it must be [{t}, {d // 2}] there"
            )
        if table.dtype != (torch.float64 if qkv.dtype == torch.float64 else torch.float32):
            raise TypeError(f"{name}: dtype {table.dtype}; allowed: float32 (float64 with float64)")
    return d


def aot_cases() -> list[Any]:
    """The launches at the heads of Qwen3 0.6B, 8B and 14B (8B's apart, too), and Qwen2.5 7B."""
    from xplus_kernels.aot import AotCase, in_all_dtypes

    cases = []
    sizes = [("0.6B", 16, 8), ("8B", 32, 8), ("14B", 40, 8)]
    sizes += [("8B queries", 32, 0), ("8B keys and values", 0, 8), ("7B, not normed", 28, 4)]
    tables = {"cos_ptr": "*fp32", "sin_ptr": "*fp32"}
    for size, n, k in sizes:
        normed = "not normed" not in size
        fixed = {"N": n, "K": k, "D": 128, "EPS": 1e-6, "NORMED": normed}
        for way in ("forward", "backward frozen", *["backward trained"] * normed):
            forward, need_dw = way == "forward", way == "backward trained"
            tiles = _tiles(n, k, 128, FORWARD_ROWS if forward else BACKWARD_ROWS[normed, need_dw])
            names = "qkv qw kw q k" if forward else "dq dk dv qkv qw kw dx dw"
            pointers = {f"{name}_ptr": "*bf16" for name in names.split()} | tables
            strides: tuple[str, ...] = ("qkv_row", "cos_row", "sin_row")
            if not forward:
                strides += tuple(f"{g}_{of}" for g in ("dq", "dk", "dv") for of in ("t", "head"))
                pointers["dw_ptr"] = "*fp32" if need_dw else "*bf16"
            cases.append(
                AotCase(
                    _qk_norm_rope_fwd_kernel if forward else _qk_norm_rope_bwd_kernel,
                    f"qk_norm_rope {way} {size}",
                    {**pointers, **dict.fromkeys(("T", *strides), "i32")},
                    {**fixed, **({} if forward else {"NEED_DW": need_dw}), **tiles},
                    num_warps=tiles["num_warps"],
                    aligned=(*pointers, *strides),
                )
            )
            del cases[-1].constexprs["num_warps"]
    return in_all_dtypes(cases)
