"""A linear layer that is never trained: y = x @ W.T and dX = dy @ W, for W [N, K] in four formats.

| format | bytes a weight | forward | dX | scratch, elements |
|---|---|---|---|---|
| bf16 | 2 | cuBLAS | cuBLAS | none |
| fp8 | 1 (2 with the transpose kept) | FP8 GEMM | FP8 GEMM | dX: N*K e4m3, or transpose kept |
| fp8, cards below 8.9 | 1 | dequantize, cuBLAS | the same | both: N*K of x's dtype |
| int8 | 1.06 | dequantize, cuBLAS | the same | both: N*K of x's dtype |
| nf4 | 0.56 | dequantize, cuBLAS | the same | both: N*K of x's dtype |

FP8: rows of x and of W have a scale each, which the GEMM multiplies in after its sums. W's scales
lie on dX's contraction axis, where no GEMM can apply them: dy takes them before it is quantized,
dX = quantize(dy * scale) @ data, so one copy of W with one set of scales serves both directions.
FP8 GEMMs before Blackwell read both operands along the contraction axis: dX wants W transposed.

The scratch is the caller's: one buffer serves all layers in turn, since nothing of it outlives a
call. Nothing is kept for the backward, and autograd records nothing: the result has no history.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Literal

import torch
from torch import Tensor

from xplus_kernels.fp8 import (
    FP8,
    Fp8Rows,
    check_fp8_rows,
    dequantize_fp8,
    quantize_fp8,
    transpose_fp8,
)
from xplus_kernels.int8 import Int8Weight, dequantize_int8
from xplus_kernels.nf4 import Nf4Weight, dequantize_nf4
from xplus_kernels.rms_norm import check_rows
from xplus_kernels.weight_blocks import BLOCK, DTYPES

# `torch._scaled_mm`: "must be divisible by 16", for both sizes of a weight; T is free
# (aten/src/ATen/native/cuda/ScaledBlas.cpp).
MULTIPLE = 16


@dataclass(frozen=True)
class Bf16Weight:
    """A weight [N, K] as it is: bf16, or whatever dtype x has (fp16, fp32, fp64)."""

    data: Tensor

    def __post_init__(self) -> None:
        check_rows("data", self.data)
        if self.data.dim() != 2:
            raise ValueError(f"data: shape {list(self.data.shape)}; allowed: [N, K]")

    @property
    def shape(self) -> tuple[int, int]:
        return self.data.shape[0], self.data.shape[1]


@dataclass(frozen=True)
class Fp8Weight:
    """A weight [N, K] in e4m3, a scale for each output channel: `quantize_fp8(weight)`.

    transposed: rows.data transposed [K, N] (`transpose_fp8`, or columns of what it made), where dX
    shall not transpose into scratch at every call. Raises TypeError or ValueError, naming the
    field, where they do not fit together or N or K is no multiple of 16.
    """

    rows: Fp8Rows
    transposed: Tensor | None = None

    def __post_init__(self) -> None:
        check_fp8_rows("rows", self.rows)
        n, k = self.shape
        if n % MULTIPLE or k % MULTIPLE or not n * k:
            raise ValueError(f"rows: a weight of [{n}, {k}]; FP8 needs multiples of {MULTIPLE}")
        t = self.transposed
        if t is None:
            return
        if t.dtype != FP8:
            raise TypeError(f"transposed: dtype {t.dtype}; allowed: {FP8}")
        row, inner = t.stride() if t.dim() == 2 else (0, 0)
        if t.shape != (k, n) or inner != 1 or row < n or row % MULTIPLE:
            raise ValueError(
                f"transposed: shape {list(t.shape)}, strides {list(t.stride())}; with rows of "
                f"[{n}, {k}] it must be [{k}, {n}], contiguous or a slice of columns"
            )
        if t.storage_offset() % MULTIPLE:  # the GEMM reads 128 bits at once
            raise ValueError(f"transposed: at byte {t.storage_offset()}; allowed: {MULTIPLE} * n")
        if t.device != self.rows.data.device:
            raise ValueError(f"transposed: on {t.device}; rows is on {self.rows.data.device}")

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.data.shape[0], self.rows.data.shape[1]


FrozenWeight = Bf16Weight | Fp8Weight | Int8Weight | Nf4Weight


@dataclass(frozen=True)
class WeightRows:
    """Rows start to end of a weight whose format cannot be cut there (`frozen_rows`).

    Its products are the whole weight's: all outputs, of which its own are taken, and dy among
    zeros.
    """

    whole: FrozenWeight
    start: int
    end: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.end - self.start, self.whole.shape[1]


def frozen_rows(
    weight: FrozenWeight | WeightRows, start: int, end: int
) -> FrozenWeight | WeightRows:
    """Rows start to end, past the last, of a weight [N, K]: a weight [end - start, K], no copy.

    Views of what the weight holds; where its blocks of 64 along the flattened rows, or FP8's
    multiples of 16, are cut, `WeightRows`. Raises ValueError where 0 <= start < end <= N does not
    hold.
    """
    n, k = weight.shape
    if not 0 <= start < end <= n:
        raise ValueError(f"start, end: {start}, {end}; allowed: 0 <= start < end <= {n}")
    if isinstance(weight, WeightRows):
        return frozen_rows(weight.whole, weight.start + start, weight.start + end)
    if isinstance(weight, Bf16Weight):
        return Bf16Weight(weight.data[start:end])
    if isinstance(weight, Fp8Weight):
        if start % MULTIPLE or end % MULTIPLE:
            return WeightRows(weight, start, end)
        data, scale = weight.rows
        t = None if weight.transposed is None else weight.transposed[:, start:end]
        return Fp8Weight(Fp8Rows(data[start:end], scale[start:end]), t)
    if start * k % BLOCK or end * k % BLOCK:
        return WeightRows(weight, start, end)
    blocks = slice(start * k // BLOCK, end * k // BLOCK)
    if isinstance(weight, Int8Weight):
        return Int8Weight(weight.codes[start:end], weight.scale[blocks])
    codes = weight.codes[start * k // 2 : end * k // 2]
    return Nf4Weight(codes, weight.absmax[blocks], (end - start, k))


def fp8_matmul_ref(
    a: Fp8Rows, b: Tensor, column_scale: Tensor | None, *, dtype: torch.dtype
) -> Tensor:
    """What the FP8 GEMM computes, but for the order of its sums: b [C, O] e4m3 -> [T, O]."""
    y = (a.data.float() @ b.float()) * a.scale[:, None]
    return (y if column_scale is None else y * column_scale).to(dtype)


def fp8_matmul(a: Fp8Rows, b: Tensor, column_scale: Tensor | None, *, dtype: torch.dtype) -> Tensor:
    """a [T, C], b [C, O] e4m3, column-major, column_scale [O] or None for ones -> [T, O]."""
    if _fp8_path(a.data.device) == "reference":
        return fp8_matmul_ref(a, b, column_scale, dtype=dtype)
    ones = column_scale is None
    scale_b = _ones(b.shape[1], b.device) if ones else column_scale[None]  # type: ignore[index]
    return torch._scaled_mm(
        a.data,
        b,
        scale_a=a.scale[:, None],  # [T, 1]
        scale_b=scale_b,  # [1, O]
        out_dtype=dtype,
        use_fast_accum=True,  # sums in the tensor core: exact enough for e4m3, and the fast path
    )


@lru_cache(maxsize=32)
def _ones(width: int, device: torch.device) -> Tensor:
    """[1, width] fp32, made once: row-wise scales must lie in memory, an expanded 1 is refused."""
    return torch.ones((1, width), device=device)


@lru_cache
def _fp8_path(device: torch.device) -> Literal["gemm", "dequantize", "reference"]:
    """How FP8 weights are multiplied there."""
    if device.type != "cuda":
        return "reference"
    return "gemm" if torch.cuda.get_device_capability(device) >= (8, 9) else "dequantize"


def multiplies_in_fp8(weight: FrozenWeight | WeightRows) -> bool:
    """Whether its products take Fp8Rows, so that a kernel before them had better make these."""
    return isinstance(weight, Fp8Weight) and _fp8_path(weight.rows.data.device) != "dequantize"


def scratch_bytes(
    weight: FrozenWeight | WeightRows,
    *,
    dtype: torch.dtype,
    backward: bool,
    device: torch.device | None = None,
) -> int:
    """Bytes of scratch that `frozen_linear` (or `frozen_linear_dx`, backward) asks for.

    dtype: of x or dy. device: where it will run, by default where the weight is now.
    """
    if isinstance(weight, WeightRows):
        return scratch_bytes(weight.whole, dtype=dtype, backward=backward, device=device)
    if isinstance(weight, Bf16Weight):
        return 0
    if isinstance(weight, Int8Weight | Nf4Weight):
        return prod(weight.shape) * dtype.itemsize
    path = _fp8_path(device or weight.rows.data.device)
    if path == "dequantize":
        return prod(weight.shape) * dtype.itemsize
    transposes = path == "gemm" and backward and weight.transposed is None
    return prod(weight.shape) if transposes else 0


def linear(x: Tensor, w: Tensor, add: Tensor | None = None) -> Tensor:
    """x [..., K] @ w.T [K, N] + add, [N] or [..., N], by the GEMM itself.

    For every dense weight, wherever it lies, so that where it lies changes no bit. Before torch
    2.14 a sum with as much as the product itself begins with a copy of it.
    """
    if add is None or add.dim() == 1:
        return torch.nn.functional.linear(x, w, add)
    flat = torch.addmm(add.reshape(-1, w.shape[0]), x.reshape(-1, w.shape[1]), w.T)
    return flat.view(*x.shape[:-1], w.shape[0])


@torch.no_grad()
def frozen_linear(
    x: Tensor | Fp8Rows,
    weight: FrozenWeight | WeightRows,
    *,
    add: Tensor | None = None,
    dtype: torch.dtype | None = None,
    scratch: Tensor | None = None,
) -> Tensor:
    """x @ W.T + add.

    x: [..., K] in a dtype of the weight (bf16: its own; int8 and nf4: bf16, fp16, fp32; fp8: bf16
    on a GPU), or Fp8Rows [T, K] with an Fp8Weight, on a card with FP8. add: a bias [N] or what has
    the result's shape, in its dtype; not written. dtype: of the result where x is Fp8Rows, by
    default bf16; a Tensor's result has its own. scratch: contiguous, of any dtype,
    at least `scratch_bytes(...)` long; overwritten. Returns [..., N], without a graph.

    Raises TypeError or ValueError, naming the argument, where they do not fit together.
    """
    if isinstance(weight, WeightRows):
        y = frozen_linear(x, weight.whole, dtype=dtype, scratch=scratch)
        y = y[..., weight.start : weight.end].contiguous()
        return y if add is None else y.add_(add)
    n, k = weight.shape
    made = _check_input("x", x, weight, k, dtype)
    if isinstance(weight, Fp8Weight) and multiplies_in_fp8(weight):
        rows = x if isinstance(x, Fp8Rows) else quantize_fp8(x)
        y = fp8_matmul(rows, weight.rows.data.t(), weight.rows.scale, dtype=made)
        y = y if isinstance(x, Fp8Rows) else y.view(*x.shape[:-1], n)
        return y if add is None else y.add_(add)
    assert isinstance(x, Tensor)
    return linear(x, _dense(weight, x.dtype, scratch), add)


@torch.no_grad()
def frozen_linear_dx(
    dy: Tensor | Fp8Rows,
    weight: FrozenWeight | WeightRows,
    *,
    dtype: torch.dtype | None = None,
    scratch: Tensor | None = None,
) -> Tensor:
    """dy @ W: the gradient of `frozen_linear`'s x. dy [..., N] -> [..., K].

    Fp8Rows as dy must have taken the weight's scales: `quantize_fp8(dy, column_scale=
    weight.rows.scale)`, as a Tensor does here. The rest is as in `frozen_linear`.
    """
    n, k = weight.shape
    if isinstance(weight, WeightRows):
        if isinstance(dy, Fp8Rows):
            raise TypeError("dy: Fp8Rows; a WeightRows takes a Tensor")
        if dy.shape[-1] != n:
            raise ValueError(f"dy: shape {list(dy.shape)}; a weight of [{n}, {k}] needs [..., {n}]")
        padded = dy.new_zeros(*dy.shape[:-1], weight.whole.shape[0])
        padded[..., weight.start : weight.end] = dy
        return frozen_linear_dx(padded, weight.whole, dtype=dtype, scratch=scratch)
    made = _check_input("dy", dy, weight, n, dtype)
    if isinstance(weight, Fp8Weight) and multiplies_in_fp8(weight):
        rows = dy
        if not isinstance(rows, Fp8Rows):
            rows = quantize_fp8(rows, column_scale=weight.rows.scale)
        dx = fp8_matmul(rows, _dx_operand(weight, scratch), None, dtype=made)
        return dx if isinstance(dy, Fp8Rows) else dx.view(*dy.shape[:-1], k)
    assert isinstance(dy, Tensor)
    return dy @ _dense(weight, dy.dtype, scratch)


def _dense(weight: FrozenWeight, dtype: torch.dtype, scratch: Tensor | None) -> Tensor:
    """The weight [N, K] in `dtype`: as it is, or written into scratch."""
    if isinstance(weight, Bf16Weight):
        return weight.data
    device = weight.rows.data.device if isinstance(weight, Fp8Weight) else weight.codes.device
    out = _take(scratch, weight.shape, dtype, device)
    if isinstance(weight, Fp8Weight):
        return dequantize_fp8(weight.rows, out=out)
    if isinstance(weight, Int8Weight):
        return dequantize_int8(weight, out=out)
    return dequantize_nf4(weight, out=out)


def _dx_operand(weight: Fp8Weight, scratch: Tensor | None) -> Tensor:
    """The weight's data [N, K] as dX's GEMM wants it: column-major, so K-major in memory."""
    data = weight.rows.data
    if weight.transposed is not None:
        return weight.transposed.t()
    if _fp8_path(data.device) == "reference":  # reads any layout
        return data
    n, k = weight.shape
    return transpose_fp8(data, out=_take(scratch, (k, n), FP8, data.device)).t()


def _take(
    scratch: Tensor | None, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The head of scratch as [shape] of dtype."""
    size = prod(shape) * dtype.itemsize
    need = f"{prod(shape)} elements of {dtype}, {size} bytes, on {device}"
    if scratch is None:
        raise ValueError(f"scratch: None; this weight needs {need}")
    if scratch.nbytes < size or scratch.device != device:
        raise ValueError(f"scratch: {scratch.nbytes} bytes on {scratch.device}; needed: {need}")
    if not scratch.is_contiguous() or scratch.data_ptr() % 16:
        raise ValueError(
            f"scratch: strides {scratch.stride()}, at byte {scratch.data_ptr() % 16} of 16; it "
            "must be contiguous and begin at a multiple of 16 bytes"
        )
    return scratch.view(-1).view(torch.uint8)[:size].view(dtype).view(shape)


def _check_input(
    name: str, x: Tensor | Fp8Rows, weight: FrozenWeight, width: int, dtype: torch.dtype | None
) -> torch.dtype:
    """Whether x [..., width] and the weight go together; the dtype of the result."""
    if isinstance(x, Fp8Rows):
        if not isinstance(weight, Fp8Weight):
            raise TypeError(f"{name}: Fp8Rows; a {type(weight).__name__} takes a Tensor")
        check_fp8_rows(name, x)
        shape, device, made = x.data.shape, x.data.device, dtype or torch.bfloat16
    else:
        check_rows(name, x)
        if dtype not in (None, x.dtype):
            raise TypeError(f"dtype: {dtype}; {name} has {x.dtype}, and so will the result")
        shape, device, made = x.shape, x.device, x.dtype
    allowed: tuple[torch.dtype, ...]
    if isinstance(weight, Bf16Weight):
        home, allowed = weight.data.device, (weight.data.dtype,)
    elif isinstance(weight, Int8Weight | Nf4Weight):
        home, allowed = weight.codes.device, DTYPES
    else:
        home, allowed = weight.rows.data.device, DTYPES
        path = _fp8_path(home)
        if path == "gemm":  # row-wise scales: other output types are not for every card
            allowed = (torch.bfloat16,)
        elif path == "dequantize" and isinstance(x, Fp8Rows):
            raise ValueError(f"{name}: Fp8Rows; {home} has no FP8 GEMM: pass a Tensor")
    if shape[-1] != width:
        n, k = weight.shape
        raise ValueError(
            f"{name}: shape {list(shape)}; a weight of [{n}, {k}] needs [..., {width}]"
        )
    if made not in allowed:
        names = ", ".join(str(a).removeprefix("torch.") for a in allowed)
        what = f"dtype: {made}" if isinstance(x, Fp8Rows) else f"{name}: dtype {made}"
        raise TypeError(f"{what}; with this {type(weight).__name__} allowed: {names}")
    if device != home:
        raise ValueError(f"{name}: on {device}; the weight is on {home}")
    return made
