"""The gradient of a linear layer's weight, dW = dy.T @ x, summed over micro-batches by the GEMM.

A product of its own and an addition read and write dW three times more (6 bytes a weight in bf16).
The GEMM sums in fp32; whether it rounds the product before it adds what was there is cuBLAS's
choice (CUDA 13.0 on an H200 did, at sizes of 8B). In fp32 a sum of products in bf16 hardly rounds.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor

from xplus_kernels.backend import INTERPRET, use_triton

NARROW = {torch.bfloat16: "bf16", torch.float16: "fp16"}
PIECE = 2**24  # elements of a product that waits to be added: no second dW is ever there


def weight_gradient_ref(dy: Tensor, x: Tensor, out: Tensor, *, add: bool) -> Tensor:
    """`weight_gradient` by products of out's own dtype."""
    dy, x = dy.to(out.dtype), x.to(out.dtype)
    return torch.addmm(out, dy.T, x, out=out) if add else torch.mm(dy.T, x, out=out)


@torch.no_grad()
def weight_gradient(dy: Tensor, x: Tensor, out: Tensor, *, add: bool) -> Tensor:
    """dy.T @ x in out, or added to it.

    Args:
        dy: [T, N]; x: [T, K]; of one dtype, any strides.
        out: [N, K], which is written; of their dtype, or fp32 where theirs is bf16 or fp16.
        add: whether it holds a sum to be added to; else what it holds is not read.

    Returns:
        out.

    Raises:
        TypeError: dtypes that do not go together.
    """
    narrow = x.dtype in NARROW
    if dy.dtype != x.dtype or out.dtype not in (x.dtype, *[torch.float32] * narrow):
        raise TypeError(f"dy is {dy.dtype}, x {x.dtype}, out {out.dtype}")
    if not narrow or not use_triton(x) or INTERPRET:
        return weight_gradient_ref(dy, x, out, add=add)
    with _whole_sums(x.dtype):
        if out.dtype == x.dtype:
            return weight_gradient_ref(dy, x, out, add=add)
        if not add:
            return torch.mm(dy.T, x, out_dtype=out.dtype, out=out)
        if not _adds_to_wide():
            rows = max(1, PIECE // max(1, out.shape[1]))
            for part, of in zip(out.split(rows), dy.split(rows, 1), strict=True):
                part.add_(torch.mm(of.T, x, out_dtype=out.dtype))
            return out
        return torch.addmm(out, dy.T, x, out_dtype=out.dtype, out=out)


@lru_cache
def _adds_to_wide() -> bool:
    """Whether `addmm` adds a bf16 product to an fp32 sum: torch 2.15 does, earlier ones may not."""
    return tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 15)


@contextmanager
def _whole_sums(dtype: torch.dtype) -> Iterator[None]:
    """Within it cuBLAS adds the parts of a product up in fp32, too, where it makes several."""
    flags, name = torch.backends.cuda.matmul, f"allow_{NARROW[dtype]}_reduced_precision_reduction"
    if not getattr(flags, name):
        yield
        return
    setattr(flags, name, False)
    try:
        yield
    finally:
        setattr(flags, name, True)
