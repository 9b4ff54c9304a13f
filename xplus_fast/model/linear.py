"""A block's products with a weight, whatever the weight is: a tensor, or frozen in a format.

Where the weight multiplies in FP8, the kernel that makes the other operand also quantizes it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

import xplus_kernels as ops
from xplus_kernels import Fp8Rows, Fp8Weight, FrozenWeight, WeightRows

Weight = Tensor | FrozenWeight | WeightRows


@dataclass(frozen=True)
class Products:
    """Products in the dtype of a block's activations.

    scratch: where frozen weights of a narrow format are unpacked or transposed, one at a time.
    """

    dtype: torch.dtype
    scratch: Tensor | None

    def linear(self, x: Tensor | Fp8Rows, w: Weight, add: Tensor | None = None) -> Tensor:
        """x [T, in] -> x @ w.T + add [T, out]; add: a bias [out], or a residual [T, out]."""
        if isinstance(w, Tensor):
            assert isinstance(x, Tensor)
            return ops.linear(x, w, add)
        return ops.frozen_linear(x, w, add=add, dtype=self.dtype, scratch=self.scratch)

    def dx(self, dy: Tensor | Fp8Rows, w: Weight) -> Tensor:
        """dy [T, out] -> dy @ w [T, in], the gradient of `linear`'s input."""
        if isinstance(w, Tensor):
            assert isinstance(dy, Tensor)
            return dy @ w
        return ops.frozen_linear_dx(dy, w, dtype=self.dtype, scratch=self.scratch)


def rms_norm_into(x: Tensor, norm: Tensor, w: Weight, *, eps: float) -> Tensor | Fp8Rows:
    """rms_norm(x) as `linear` with w takes it."""
    if not isinstance(w, Tensor) and ops.multiplies_in_fp8(w):
        return ops.rms_norm_fp8(x, norm, eps=eps)
    return ops.rms_norm(x, norm, eps=eps)


def swiglu_into(gate_up: Tensor, w: Weight) -> Tensor | Fp8Rows:
    """swiglu(gate_up) as `linear` with w takes it."""
    if not isinstance(w, Tensor) and ops.multiplies_in_fp8(w):
        return ops.swiglu_fp8(gate_up)
    return ops.swiglu(gate_up)


def swiglu_backward_into(dy: Tensor, gate_up: Tensor, w: Weight) -> Tensor | Fp8Rows:
    """Gradient of swiglu as `dx` with w takes it."""
    if isinstance(w, Fp8Weight) and ops.multiplies_in_fp8(w):
        return ops.swiglu_backward_fp8(dy, gate_up, column_scale=w.rows.scale)
    return ops.swiglu_backward(dy, gate_up)


def output_rows(w: Weight, a: int, b: int) -> Weight:
    """The part of a weight [out, in], or of a bias [out], that makes outputs a to b."""
    return w[a:b] if isinstance(w, Tensor) else ops.frozen_rows(w, a, b)


def take_rows(x: Tensor | Fp8Rows, rows: Tensor) -> Tensor | Fp8Rows:
    """Some rows [R] int64 of what `linear` takes."""
    return x[rows] if isinstance(x, Tensor) else Fp8Rows(x.data[rows], x.scale[rows])
