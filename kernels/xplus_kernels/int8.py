"""INT8 weights: 8-bit codes times a scale for each block of 64 weights.

w = code * scale in fp32, rounded once to the dtype of `out`; scale = absmax / 127 of the block
(Dettmers et al. 2022, arXiv 2110.02861, block-wise quantization; here with evenly spaced codes).
A normal weight is off by 0.6 %, where e4m3's 3 bits make it 2.6 % at any scale.
Bytes a weight into bf16, ours = the minimum: 1 (code) + 4/64 (scale) read, 2 written.
Nothing is kept for the backward: dX dequantizes again, into the same buffer.
"""

# mypy: disallow-incomplete-defs=False
# (of a kernel's arguments, only the compile-time ones have a type)

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xplus_kernels.backend import jit, tl, triton
from xplus_kernels.rms_norm import on_triton
from xplus_kernels.weight_blocks import (
    BLOCK,
    check_blocks,
    check_out,
    check_parts,
    check_weight,
    dequantize_cases,
)

LARGEST = 127  # codes are symmetric: -127 to 127
FLOOR = 1e-12  # of a block's absmax: a block of zeros divides by no zero


@dataclass(frozen=True)
class Int8Weight:
    """A weight [N, K] in INT8, its blocks of 64 running along the rows of the flattened weight.

    codes: int8 [N, K], contiguous, N*K a multiple of 64. scale: fp32 [N*K/64].

    Raises TypeError or ValueError, naming the field, where they do not fit together.
    """

    codes: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        check_blocks("codes", self.codes.shape)
        check_parts(
            self.shape,
            codes=(self.codes, torch.int8, self.shape),
            scale=(self.scale, torch.float32, (self.codes.numel() // BLOCK,)),
        )

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]


def quantize_int8(weight: Tensor) -> Int8Weight:
    """Quantize weight [N, K] (bf16, fp16, fp32; N*K a multiple of 64), to the nearest code.

    Raises TypeError or ValueError on another weight.
    """
    check_weight(weight)
    blocks = weight.detach().contiguous().view(-1, BLOCK).float()
    absmax = blocks.abs().amax(1).clamp_(min=FLOOR)
    # by a tensor: PyTorch divides by a number on the CPU, and multiplies by 1 / number on CUDA
    scale = absmax / torch.full_like(absmax, LARGEST)
    # absmax / (absmax / 127) may round to above 127
    codes = (blocks / scale[:, None]).round_().clamp_(-LARGEST, LARGEST)
    return Int8Weight(codes.to(torch.int8).view(weight.shape), scale)


def dequantize_int8_ref(weight: Int8Weight, *, out: Tensor) -> Tensor:
    blocks = weight.codes.view(-1, BLOCK).float()
    return out.copy_((blocks * weight.scale[:, None]).view(weight.shape))


@jit
def _dequantize_int8_kernel(
    codes_ptr, scale_ptr, out_ptr, blocks, BLOCKS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """codes int8 [blocks, 64], scale fp32 [blocks] -> out [blocks, 64]; BLOCKS a program."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)  # [BLOCKS]
    m = block < blocks
    o = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]  # [BLOCKS, 64]
    b = tl.load(codes_ptr + o, m[:, None], 0).to(tl.float32)
    w = b * tl.load(scale_ptr + block, m, 0.0)[:, None]
    tl.store(out_ptr + o, w.to(out_ptr.dtype.element_ty), m[:, None])


TILE = {"BLOCKS": 64, "num_warps": 4}  # 32 weights a thread: 2 x 128 bits read, 4 x 128 written


def dequantize_int8(weight: Int8Weight, *, out: Tensor) -> Tensor:
    """Write the weight into out [N, K] (bf16, fp16 or fp32, contiguous) and return it.

    Raises TypeError or ValueError, naming the argument, where out is of another dtype, shape,
    layout or device.
    """
    check_out(out, weight.shape, weight.codes.device)
    if not on_triton(out):
        return dequantize_int8_ref(weight, out=out)
    blocks = len(weight.scale)
    grid = (triton.cdiv(blocks, TILE["BLOCKS"]),)
    _dequantize_int8_kernel[grid](weight.codes, weight.scale, out, blocks, BLOCK=BLOCK, **TILE)
    return out


def aot_cases() -> list[Any]:
    """The launches."""
    types = {"codes_ptr": "*i8", "scale_ptr": "*fp32", "blocks": "i32"}
    constants = {"BLOCKS": TILE["BLOCKS"], "BLOCK": BLOCK}
    return dequantize_cases(
        _dequantize_int8_kernel, "dequantize_int8", types, constants, TILE["num_warps"]
    )
