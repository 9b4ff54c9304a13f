"""SwiGLU whose output leaves as FP8 rows, and its backward whose gradient does.

`swiglu_fp8` gives the bits of `quantize_fp8(swiglu(gate_up))`: y is rounded to its dtype before
the amax. `swiglu_backward_fp8` rounds once, at the cast to FP8: d(gate_up) * column_scale stays
in fp32 between. A scale per output channel of the frozen gate_up weight lies on the axis over
which dX contracts; folded in here, the one FP8 weight and its scales serve both directions.

| bytes an element of y, bf16 in | ours = minimum | two ops | read | written |
|---|---|---|---|---|
| swiglu_fp8 | 4 + 1 | 9 | gate, up | data |
| swiglu_backward_fp8 | 2 + 4 + 2 | 16 | dy, gate, up | data of both gradients |

A program holds a whole row: its amax comes before its first store, and no input is read twice
(column_scale, the same for all rows, stays in the L2 cache). Kept for the backward: gate_up.
"""

# mypy: disallow-incomplete-defs=False
# (of a kernel's arguments, only the compile-time ones have a type)

from __future__ import annotations

from typing import Any

from torch import Tensor

from xplus_kernels.backend import jit, tl
from xplus_kernels.fp8 import (
    AOT_SIZES,
    Fp8Rows,
    amax_bits,
    check_column_scale,
    check_width,
    empty_rows,
    quantize_fp8_ref,
    require_fp8,
    row_tiles,
    scale_of,
    to_fp8,
)
from xplus_kernels.numerics import widen
from xplus_kernels.rms_norm import as_rows, check_like, on_triton
from xplus_kernels.swiglu import (
    _half,
    load_gate_up,
    silu_mul,
    swiglu_backward_ref,
    swiglu_gradients,
    swiglu_ref,
)


def swiglu_fp8_ref(gate_up: Tensor) -> Fp8Rows:
    return quantize_fp8_ref(swiglu_ref(gate_up))


def swiglu_backward_fp8_ref(dy: Tensor, gate_up: Tensor, *, column_scale: Tensor) -> Fp8Rows:
    return quantize_fp8_ref(swiglu_backward_ref(widen(dy), widen(gate_up)), column_scale)


@jit
def _silu_mul(x_ptr, cols, x_col, m, F: tl.constexpr):
    """y of swiglu.py's forward, fp32 holding what x's dtype can."""
    gate, up = load_gate_up(x_ptr, cols, x_col, m, F)
    return silu_mul(gate, up, x_ptr.dtype.element_ty).to(tl.float32)


@jit
def _swiglu_fp8_kernel(
    x_ptr, q_ptr, s_ptr, x_row, x_col, F: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr
):  # fmt: skip
    """x [T, 2F] -> q [T, F] e4m3, s [T]; a row a program."""
    fp8 = q_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)[:, None]  # [1, 1]
    x_ptr += row * x_row
    a = tl.max_contiguous(tl.arange(0, MAIN)[None, :], (1, 8))  # by 8: see fp8.py
    y_a = _silu_mul(x_ptr, a, x_col, a < F, F)
    bits = amax_bits(y_a)  # of one row: a scalar
    if REST:
        b = tl.max_contiguous(MAIN + tl.arange(0, REST)[None, :], (1, 8))
        y_b = _silu_mul(x_ptr, b, x_col, b < F, F)
        bits = tl.maximum(bits, amax_bits(y_b))
    scale = scale_of(bits)
    tl.store(s_ptr + row, scale)
    inverse = tl.div_rn(1.0, scale)
    tl.store(q_ptr + row * F + a, to_fp8(y_a, inverse, fp8))
    if REST:
        tl.store(q_ptr + row * F + b, to_fp8(y_b, inverse, fp8), b < F)


@jit
def _scaled_gradients(dy_ptr, x_ptr, c_ptr, cols, dy_col, x_col, c_col, m, F: tl.constexpr):
    """d(gate) and d(up) of swiglu.py's backward, times their columns' scales, fp32."""
    gate, up = load_gate_up(x_ptr, cols, x_col, m, F)
    dy = tl.load(dy_ptr + cols * dy_col, m, 0.0).to(tl.float32)
    dgate, dup = swiglu_gradients(dy, gate, up)
    dgate *= tl.load(c_ptr + cols * c_col, m, 0.0)
    return dgate, dup * tl.load(c_ptr + (F + cols) * c_col, m, 0.0)


@jit
def _swiglu_backward_fp8_kernel(
    dy_ptr, x_ptr, c_ptr, q_ptr, s_ptr, dy_row, dy_col, x_row, x_col, c_col,
    F: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """dy [T, F], x [T, 2F], c [2F] -> q [T, 2F] e4m3, s [T]; a row a program."""
    fp8 = q_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)[:, None]  # [1, 1]
    dy_ptr += row * dy_row
    x_ptr += row * x_row
    a = tl.max_contiguous(tl.arange(0, MAIN)[None, :], (1, 8))
    dgate_a, dup_a = _scaled_gradients(
        dy_ptr, x_ptr, c_ptr, a, dy_col, x_col, c_col, a < F, F
    )  # fmt: skip
    bits = tl.maximum(amax_bits(dgate_a), amax_bits(dup_a))  # of one row: a scalar
    if REST:
        b = tl.max_contiguous(MAIN + tl.arange(0, REST)[None, :], (1, 8))
        dgate_b, dup_b = _scaled_gradients(
            dy_ptr, x_ptr, c_ptr, b, dy_col, x_col, c_col, b < F, F
        )  # fmt: skip
        bits = tl.maximum(bits, tl.maximum(amax_bits(dgate_b), amax_bits(dup_b)))
    scale = scale_of(bits)
    tl.store(s_ptr + row, scale)
    inverse = tl.div_rn(1.0, scale)
    q_ptr += row * (2 * F)
    tl.store(q_ptr + a, to_fp8(dgate_a, inverse, fp8))
    tl.store(q_ptr + F + a, to_fp8(dup_a, inverse, fp8))
    if REST:
        tl.store(q_ptr + b, to_fp8(dgate_b, inverse, fp8), b < F)
        tl.store(q_ptr + F + b, to_fp8(dup_b, inverse, fp8), b < F)


def _row_tile(f: int) -> dict[str, int]:
    """A row of F columns: its tiles, and warps. 24 or 34 columns a thread at 8B and 14B: two
    programs or more share an SM's registers in the forward, one of them fills it in the backward.
    """
    tiles = row_tiles(f)
    warps = 4 if tiles["MAIN"] + tiles["REST"] <= 4096 else 16
    return {"MAIN": tiles["MAIN"], "REST": tiles["REST"], "num_warps": warps}


def swiglu_fp8(gate_up: Tensor) -> Fp8Rows:
    """`quantize_fp8(swiglu(gate_up))`, bit for bit. gate_up [..., 2F], gate first -> [T, F], [T].

    Any strides; leading axes are flattened. Raises TypeError or ValueError, naming the argument,
    as `swiglu` does, where F > 65536, and where gate_up is on a card without FP8.
    """
    f = _half(gate_up)
    check_width("gate_up", gate_up, f)
    require_fp8(gate_up.device)
    if not on_triton(gate_up):
        return swiglu_fp8_ref(gate_up)
    x = as_rows(gate_up)
    made = empty_rows(len(x), f, x.device)
    _swiglu_fp8_kernel[(len(x),)](x, *made, *x.stride(), F=f, **_row_tile(f))
    return made


def swiglu_backward_fp8(dy: Tensor, gate_up: Tensor, *, column_scale: Tensor) -> Fp8Rows:
    """Gradient of `swiglu` times column_scale, as FP8 rows: d(gate_up) [T, 2F], scale [T].

    dy [..., F], gate_up [..., 2F], any strides, 0 included; column_scale [2F] fp32, the row
    scales of the frozen gate_up weight. One rounding, to FP8. Raises as `swiglu_fp8` does, and
    where dy or column_scale does not match gate_up.
    """
    f = _half(gate_up)
    check_width("gate_up", gate_up, 2 * f)
    check_like("dy", dy, "gate_up", gate_up, (*gate_up.shape[:-1], f))
    check_column_scale(column_scale, "gate_up", gate_up, 2 * f)
    require_fp8(gate_up.device)
    if not on_triton(gate_up):
        return swiglu_backward_fp8_ref(dy, gate_up, column_scale=column_scale)
    x, dy = as_rows(gate_up), as_rows(dy)
    made = empty_rows(len(x), 2 * f, x.device)
    _swiglu_backward_fp8_kernel[(len(x),)](
        dy, x, column_scale, *made, *dy.stride(), *x.stride(), *column_scale.stride(),
        F=f, **_row_tile(f),
    )  # fmt: skip
    return made


def aot_cases() -> list[Any]:
    """The launches at F of Qwen3 0.6B, 8B and 14B, contiguous."""
    from xplus_kernels.aot import AotCase, in_all_dtypes

    cases = []
    for size, (*_, f) in AOT_SIZES.items():
        for backward in (False, True):
            tile = _row_tile(f)
            types = {"x_ptr": "*bf16", "q_ptr": "*fp8e4nv", "s_ptr": "*fp32"}
            rows: tuple[str, ...] = ("x_row",)
            columns = {"x_col": 1}
            if backward:
                types |= {"dy_ptr": "*bf16", "c_ptr": "*fp32"}
                rows, columns = ("dy_row", "x_row"), {"dy_col": 1, "x_col": 1, "c_col": 1}
            cases.append(
                AotCase(
                    _swiglu_backward_fp8_kernel if backward else _swiglu_fp8_kernel,
                    f"swiglu_{'backward_' if backward else ''}fp8 {size}",
                    {**types, **dict.fromkeys(rows, "i32")},
                    {**columns, "F": f, "MAIN": tile["MAIN"], "REST": tile["REST"]},
                    num_warps=tile["num_warps"],
                    least=89,
                    aligned=(*types, *rows),
                )
            )
    return in_all_dtypes(cases)
