"""RMSNorm whose output leaves as FP8 rows: `quantize_fp8(rms_norm(x))` in one pass.

The same bits as the two ops: the normed row is rounded to x's dtype (twice, as in rms_norm.py)
before its amax is taken, and sums are in the same order (not in fp32 on a GPU, whose rows
`rms_norm` reads in other pieces). Scales and casts as in fp8.py.

| bytes an element, bf16 in | ours = minimum | two ops | read | written |
|---|---|---|---|---|
| rms_norm_fp8 | 2 + 1 | 7 | x | data |
| add_rms_norm_fp8 | 4 + 2 + 1 | 11 | x, residual | summed, data |

Kept for the backward: x (or the sum) alone; the backward is that of `rms_norm`, since a gradient
passes the rounding to FP8 as if it were not there.
"""

# mypy: disallow-incomplete-defs=False
# (of a kernel's arguments, only the compile-time ones have a type)

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xplus_kernels.backend import jit, tl, triton
from xplus_kernels.fp8 import (
    AOT_SIZES,
    Fp8Rows,
    amax_bits,
    check_width,
    empty_rows,
    quantize_fp8_ref,
    require_fp8,
    row_tiles,
    scale_of,
    to_fp8,
)
from xplus_kernels.rms_norm import (
    add_rms_norm_ref,
    as_rows,
    check_like,
    check_rows,
    normed,
    on_triton,
    rms_norm_ref,
)


def rms_norm_fp8_ref(x: Tensor, weight: Tensor, *, eps: float) -> Fp8Rows:
    return quantize_fp8_ref(rms_norm_ref(x, weight, eps=eps))


def add_rms_norm_fp8_ref(
    x: Tensor, residual: Tensor, weight: Tensor, *, eps: float
) -> tuple[Tensor, Fp8Rows]:
    summed, normed = add_rms_norm_ref(x, residual, weight, eps=eps)
    return summed, quantize_fp8_ref(normed)


@jit(do_not_specialize=("T",))
def _rms_norm_fp8_kernel(
    x_ptr, r_ptr, w_ptr, sum_ptr, q_ptr, scale_ptr, T, x_row, x_col, r_row, r_col,
    H: tl.constexpr, EPS: tl.constexpr, ADD: tl.constexpr,
    ROWS: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """x [T, H], residual r [T, H] where ADD -> sum [T, H] where ADD, q [T, H] e4m3, scale [T].

    `_rms_norm_fwd_kernel` of rms_norm.py, then `_quantize_fp8_kernel` on what it has in registers.
    """
    dtype = x_ptr.dtype.element_ty
    fp8 = q_ptr.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    m = rows < T
    a = tl.max_contiguous(tl.arange(0, MAIN)[None, :], (1, 8))  # by 8: see fp8.py
    x_a = tl.load(x_ptr + rows * x_row + a * x_col, m, 0.0).to(tl.float32)
    w_a = tl.load(w_ptr + a).to(tl.float32)
    if ADD:
        x_a += tl.load(r_ptr + rows * r_row + a * r_col, m, 0.0).to(tl.float32)
        tl.store(sum_ptr + rows * H + a, x_a.to(dtype), m)
        x_a = x_a.to(dtype).to(tl.float32)  # the norm is of the sum as rounded
    if REST:  # all loads before the first sum, which they need not wait for
        b = tl.max_contiguous(MAIN + tl.arange(0, REST)[None, :], (1, 8))
        m_b = m & (b < H)
        x_b = tl.load(x_ptr + rows * x_row + b * x_col, m_b, 0.0).to(tl.float32)
        if ADD:
            x_b += tl.load(r_ptr + rows * r_row + b * r_col, m_b, 0.0).to(tl.float32)
            tl.store(sum_ptr + rows * H + b, x_b.to(dtype), m_b)
            x_b = x_b.to(dtype).to(tl.float32)
    squares = tl.sum(x_a * x_a, 1, keep_dims=True)  # [ROWS, 1]
    if REST:
        squares += tl.sum(x_b * x_b, 1, keep_dims=True)
    rstd = tl.rsqrt(squares / H + EPS)
    y_a = normed(x_a, rstd, w_a, dtype).to(tl.float32)
    bits = amax_bits(y_a)
    if REST:
        # The weight of the rest is loaded late: held over the sum it would spill on sm_120
        w_b = tl.load(w_ptr + b, b < H, 0.0).to(tl.float32)
        y_b = normed(x_b, rstd, w_b, dtype).to(tl.float32)
        bits = tl.maximum(bits, amax_bits(y_b))
    scale = scale_of(bits)
    tl.store(scale_ptr + rows, scale, m)
    inverse = tl.div_rn(1.0, scale)
    tl.store(q_ptr + rows * H + a, to_fp8(y_a, inverse, fp8), m)
    if REST:
        tl.store(q_ptr + rows * H + b, to_fp8(y_b, inverse, fp8), m_b)


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Fp8Rows]:
    width = x.shape[-1]
    tiles = row_tiles(width)
    rows = as_rows(x)
    r = rows if residual is None else as_rows(residual)
    made = empty_rows(len(rows), width, x.device)
    summed = x if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _rms_norm_fp8_kernel[(triton.cdiv(len(rows), tiles["ROWS"]),)](
        rows, r, weight.contiguous(), summed, *made, len(rows), *rows.stride(), *r.stride(),
        H=width, EPS=eps, ADD=residual is not None, **tiles,
    )  # fmt: skip
    return summed, made


def rms_norm_fp8(x: Tensor, weight: Tensor, *, eps: float) -> Fp8Rows:
    """`quantize_fp8(rms_norm(x, weight))`, bit for bit in bf16 and fp16.

    x [..., H], weight [H] -> [T, H], [T].

    Leading axes are flattened. Raises TypeError or ValueError, naming the argument, as `rms_norm`
    does, and where x is on a card without FP8.
    """
    check_rows("x", x)
    check_width("x", x, x.shape[-1])
    check_like("weight", weight, "x", x, x.shape[-1:])
    require_fp8(x.device)
    if not on_triton(x):
        return rms_norm_fp8_ref(x, weight, eps=eps)
    return _launch(x, None, weight, eps)[1]


def add_rms_norm_fp8(
    x: Tensor, residual: Tensor, weight: Tensor, *, eps: float
) -> tuple[Tensor, Fp8Rows]:
    """x, residual [..., H], weight [H] -> x + residual, and its norm as `rms_norm_fp8` gives it.

    The sum has x's shape and dtype; the norm is of the sum as rounded. Raises as `rms_norm_fp8`.
    """
    check_rows("x", x)
    check_width("x", x, x.shape[-1])
    check_like("residual", residual, "x", x, x.shape)
    check_like("weight", weight, "x", x, x.shape[-1:])
    require_fp8(x.device)
    if not on_triton(x):
        return add_rms_norm_fp8_ref(x, residual, weight, eps=eps)
    return _launch(x, residual, weight, eps)


def aot_cases() -> list[Any]:
    """The launches at the hidden sizes of Qwen3 0.6B, 8B and 14B, contiguous."""
    from xplus_kernels.aot import AotCase, in_all_dtypes

    cases = []
    for size, (width, *_) in AOT_SIZES.items():
        tiles = row_tiles(width)
        warps = tiles.pop("num_warps")
        for add in (False, True):
            bf16 = ("x_ptr", "r_ptr", "w_ptr", "sum_ptr")
            types = {**dict.fromkeys(bf16, "*bf16"), "q_ptr": "*fp8e4nv", "scale_ptr": "*fp32"}
            rows = ("x_row", "r_row")
            fixed = {"x_col": 1, "r_col": 1, "H": width, "EPS": 1e-6, "ADD": add}
            cases.append(
                AotCase(
                    _rms_norm_fp8_kernel,
                    f"{'add_' if add else ''}rms_norm_fp8 {size}",
                    {**types, **dict.fromkeys(("T", *rows), "i32")},
                    {**fixed, **tiles},
                    num_warps=warps,
                    least=89,
                    aligned=(*types, *rows),
                )
            )
    return in_all_dtypes(cases)
