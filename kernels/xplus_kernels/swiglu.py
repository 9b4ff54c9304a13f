"""SwiGLU: y = silu(gate) * up on the packed output of the gate_up GEMM (Shazeer 2020, 2002.05202).

Rounds silu(gate) to the input's dtype before multiplying, as Hugging Face does. The backward
rounds once, at the end: d(gate) = dy * up * (sig + silu - silu * sig), d(up) = dy * silu.
bf16 bytes per element of y, ours = the minimum: forward 6 (gate, up; y), backward 10 (dy, gate,
up; both gradients). Kept for the backward: gate_up.
"""

# mypy: disallow-incomplete-defs=False
# (of a kernel's arguments, only the compile-time ones have a type)

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xplus_kernels.backend import jit, tl, triton
from xplus_kernels.numerics import widen
from xplus_kernels.rms_norm import as_rows, check_like, check_rows, on_triton


def swiglu_ref(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def swiglu_backward_ref(dy: Tensor, gate_up: Tensor) -> Tensor:
    gate, up = widen(gate_up).chunk(2, -1)
    dy = widen(dy)
    d = torch.empty(gate_up.shape, dtype=gate.dtype, device=gate.device)
    dgate, dup = d.chunk(2, -1)
    torch.ops.aten.silu_backward(dy * up, gate, grad_input=dgate)
    torch.mul(dy, torch.nn.functional.silu(gate), out=dup)
    return d.to(gate_up.dtype)


@jit
def load_gate_up(x_ptr, cols, x_col, m, F: tl.constexpr):
    """gate and up of some columns of a row that begins at x_ptr, fp32."""
    gate = tl.load(x_ptr + cols * x_col, m, 0.0).to(tl.float32)
    up = tl.load(x_ptr + (F + cols) * x_col, m, 0.0).to(tl.float32)
    return gate, up


@jit
def silu_mul(gate, up, dtype: tl.constexpr):
    """silu(gate) * up, rounded to dtype after silu and at the end."""
    silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    return (silu * up).to(dtype)


@jit
def swiglu_gradients(dy, gate, up):
    """d(gate) and d(up), fp32."""
    sig = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * sig
    return dy * up * (sig + silu - silu * sig), dy * silu


@jit
def _columns(F: tl.constexpr, BLOCK: tl.constexpr):
    """What a program works on: its row, columns, and which of these are there."""
    pid = tl.program_id(0).to(tl.int64)
    cols = (pid % tl.cdiv(F, BLOCK)) * BLOCK + tl.arange(0, BLOCK)
    return pid // tl.cdiv(F, BLOCK), cols, cols < F


@jit
def _swiglu_fwd_kernel(
    x_ptr, y_ptr, x_row, x_col, F: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """x [T, 2F] -> y [T, F]; a program for each BLOCK columns of a row."""
    row, cols, m = _columns(F, BLOCK)
    gate, up = load_gate_up(x_ptr + row * x_row, cols, x_col, m, F)
    tl.store(y_ptr + row * F + cols, silu_mul(gate, up, y_ptr.dtype.element_ty), m)


@jit
def _swiglu_bwd_kernel(
    dy_ptr, x_ptr, dx_ptr, dy_row, dy_col, x_row, x_col, F: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """dy [T, F], x [T, 2F] -> dx [T, 2F]; a program for each BLOCK columns of a row of dy."""
    row, cols, m = _columns(F, BLOCK)
    gate, up = load_gate_up(x_ptr + row * x_row, cols, x_col, m, F)
    dy = tl.load(dy_ptr + row * dy_row + cols * dy_col, m, 0.0).to(tl.float32)
    dgate, dup = swiglu_gradients(dy, gate, up)
    dtype = dx_ptr.dtype.element_ty
    dgate_ptr = dx_ptr + row * (2 * F) + cols
    tl.store(dgate_ptr, dgate.to(dtype), m)
    tl.store(dgate_ptr + F, dup.to(dtype), m)


def _tile(f: int) -> dict[str, int]:
    """Columns a program and its warps: 8 elements, one load of 128 bits of bf16, a thread.

    1024 divides the F of every Qwen3 (12288 and 17408 among them); 256 the rest, nearly.
    """
    block = 1024 if f % 1024 == 0 else 256
    return {"BLOCK": block, "num_warps": block // 256}


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up. gate_up [..., 2F], gate first -> [..., F] in its dtype.

    Raises TypeError where gate_up is not floating point, ValueError where its width is odd.
    """
    f = _half(gate_up)
    if not on_triton(gate_up):
        return swiglu_ref(gate_up)
    x, tile = as_rows(gate_up), _tile(f)
    y = torch.empty((*gate_up.shape[:-1], f), dtype=gate_up.dtype, device=gate_up.device)
    _swiglu_fwd_kernel[(len(x) * triton.cdiv(f, tile["BLOCK"]),)](x, y, *x.stride(), F=f, **tile)
    return y


def swiglu_backward(dy: Tensor, gate_up: Tensor) -> Tensor:
    """Gradient of `swiglu`. dy [..., F], gate_up [..., 2F] -> d(gate_up) [..., 2F].

    Any strides, 0 included. Raises as `swiglu` does, and where dy does not match gate_up.
    """
    f = _half(gate_up)
    check_like("dy", dy, "gate_up", gate_up, (*gate_up.shape[:-1], f))
    if not on_triton(gate_up):
        return swiglu_backward_ref(dy, gate_up)
    x, dy, tile = as_rows(gate_up), as_rows(dy), _tile(f)
    dx = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    _swiglu_bwd_kernel[(len(x) * triton.cdiv(f, tile["BLOCK"]),)](
        dy, x, dx, *dy.stride(), *x.stride(), F=f, **tile
    )
    return dx


def _half(gate_up: Tensor) -> int:
    check_rows("gate_up", gate_up)
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up: shape {list(gate_up.shape)}; its last axis must be even, 2F")
    return gate_up.shape[-1] // 2


def aot_cases() -> list[Any]:
    """The launches at F of Qwen3 0.6B, 8B and 14B, contiguous."""
    from xplus_kernels.aot import AotCase, in_all_dtypes

    cases = []
    for size, f in (("0.6B", 3072), ("8B", 12288), ("14B", 17408)):
        tile = _tile(f)
        for kernel, way, pointers, strides in (
            (_swiglu_fwd_kernel, "forward", ("x_ptr", "y_ptr"), ("x",)),
            (_swiglu_bwd_kernel, "backward", ("dy_ptr", "x_ptr", "dx_ptr"), ("dy", "x")),
        ):
            rows = tuple(f"{s}_row" for s in strides)
            cases.append(
                AotCase(
                    kernel,
                    f"swiglu {way} {size}",
                    {**dict.fromkeys(pointers, "*bf16"), **dict.fromkeys(rows, "i32")},
                    {**{f"{s}_col": 1 for s in strides}, "F": f, "BLOCK": tile["BLOCK"]},
                    num_warps=tile["num_warps"],
                    aligned=(*pointers, *rows),
                )
            )
    return in_all_dtypes(cases)
