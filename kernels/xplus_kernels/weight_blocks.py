"""What INT8 and NF4 weights share: blocks of 64 codes with a scale each, running along the rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

BLOCK = 64  # weights that share a scale
DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # to quantize from, to unpack into


def check_parts(shape: Sequence[int], **parts: tuple[Tensor, torch.dtype, tuple[int, ...]]) -> None:
    """See that the parts of a weight of `shape`, `codes` and its scales, are as they must be.

    parts: a tensor, and the dtype and shape that it must have; contiguous, and on one device.
    Raises TypeError or ValueError, naming the part, where one is not.
    """
    for name, (t, dtype, wanted) in parts.items():
        if t.dtype != dtype:
            raise TypeError(f"{name}: dtype {t.dtype}; allowed: {dtype}")
        if t.shape != wanted or not t.is_contiguous():
            raise ValueError(
                f"{name}: shape {list(t.shape)}, strides {list(t.stride())}; a weight of "
                f"{list(shape)} has {list(wanted)}, contiguous"
            )
    codes, *_ = parts["codes"]
    if codes.storage_offset() % 16:  # of bytes; the kernels read 128 bits at once
        raise ValueError(f"codes: at byte {codes.storage_offset()}; allowed: 16 * n")
    for name, (t, *_) in parts.items():
        if t.device != codes.device:
            raise ValueError(f"{name}: on {t.device}; codes is on {codes.device}")


def check_blocks(name: str, shape: Sequence[int]) -> None:
    """See that a weight of that shape has whole blocks."""
    if len(shape) != 2 or shape[0] * shape[1] % BLOCK or not shape[0] * shape[1]:
        raise ValueError(
            f"{name}: {list(shape)}; allowed: [N, K] with N * K > 0 a multiple of {BLOCK}"
        )


def check_weight(weight: Tensor) -> None:
    """See that a weight can be quantized."""
    if weight.dtype not in DTYPES:
        raise TypeError(f"weight: dtype {weight.dtype}; allowed: bfloat16, float16, float32")
    check_blocks("weight", weight.shape)


def check_out(out: Tensor, shape: tuple[int, int], device: torch.device) -> None:
    """See that a weight of that shape, there, can be written into out."""
    if out.dtype not in DTYPES:
        raise TypeError(f"out: dtype {out.dtype}; allowed: bfloat16, float16, float32")
    if out.shape != shape or not out.is_contiguous():
        raise ValueError(
            f"out: shape {list(out.shape)}, strides {list(out.stride())}; the weight needs "
            f"{list(shape)}, contiguous"
        )
    if out.device != device:
        raise ValueError(f"out: on {out.device}; the weight is on {device}")


def dequantize_cases(
    kernel: Any, name: str, types: dict[str, str], constants: dict[str, Any], warps: int
) -> list[Any]:
    """AOT cases into bf16, fp16 and fp32: the launch is the same for all shapes."""
    from xplus_kernels.aot import AotCase

    return [
        AotCase(
            kernel,
            f"{name} {out}",
            {**types, "out_ptr": f"*{out}"},
            constants,
            num_warps=warps,
            aligned=(*types, "out_ptr"),
        )
        for out in ("bf16", "fp16", "fp32")
    ]
