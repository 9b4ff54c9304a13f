"""NF4 weights: 4-bit codes of a fixed table, times the absmax of each block of 64 weights.

Dettmers et al. 2023, QLoRA, arXiv 2305.14314. w = NF4[code] * absmax in fp32, rounded once to the
dtype of `out`: bit-equal to bitsandbytes' `dequantize_4bit`, whose layout of codes this is.
Bytes a weight into bf16, ours = the minimum: 0.5 (code) + 4/64 (absmax) read, 2 written.
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

# Quantiles of the normal distribution, scaled to [-1, 1] (QLoRA, appendix E), as fp32
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class Nf4Weight:
    """A weight [N, K] in NF4, its blocks of 64 running along the rows of the flattened weight.

    codes: uint8 [N*K/2], two a byte, the first weight in the high half.
    absmax: fp32 [N*K/64]. shape: (N, K), N*K a multiple of 64.

    Raises TypeError or ValueError, naming the field, where they do not fit together.
    """

    codes: Tensor
    absmax: Tensor
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        check_blocks("shape", self.shape)
        n, k = self.shape
        check_parts(
            self.shape,
            codes=(self.codes, torch.uint8, (n * k // 2,)),
            absmax=(self.absmax, torch.float32, (n * k // BLOCK,)),
        )

    @staticmethod
    def from_bitsandbytes(codes: Tensor, quant_state: Any) -> Nf4Weight:
        """What bitsandbytes' `quantize_4bit` returned (its codes of any `quant_storage`).

        Raises ValueError where it is not NF4, not in blocks of 64, double-quantized or no matrix.
        """
        found = (quant_state.quant_type, quant_state.blocksize, bool(quant_state.nested))
        if found != ("nf4", BLOCK, False):
            raise ValueError(
                f"quant_state: quant_type {found[0]!r}, blocksize {found[1]}, nested {found[2]}; "
                f"allowed: 'nf4', {BLOCK}, False (compress_statistics=False)"
            )
        shape = tuple(quant_state.shape)
        if len(shape) != 2:
            raise ValueError(f"quant_state: shape {list(shape)}; allowed: [N, K]")
        return Nf4Weight(codes.reshape(-1).view(torch.uint8), quant_state.absmax, shape)


def quantize_nf4(weight: Tensor) -> Nf4Weight:
    """Quantize weight [N, K] (bf16, fp16, fp32; N*K a multiple of 64) by bitsandbytes.

    Raises ImportError where bitsandbytes is missing, TypeError or ValueError on another weight.
    """
    check_weight(weight)
    try:
        from bitsandbytes.functional import quantize_4bit
    except ImportError as e:
        raise ImportError("NF4 is quantized by bitsandbytes: pip install bitsandbytes") from e
    return Nf4Weight.from_bitsandbytes(
        *quantize_4bit(
            weight.detach().contiguous(),
            blocksize=BLOCK,
            quant_type="nf4",
            compress_statistics=False,
        )
    )


def dequantize_nf4_ref(weight: Nf4Weight, *, out: Tensor) -> Tensor:
    table = torch.tensor(NF4, device=out.device)
    pairs = torch.cartesian_prod(table, table)  # [256, 2]: the two weights of each byte
    blocks = pairs[weight.codes.int()].view(-1, BLOCK)
    return out.copy_((blocks * weight.absmax[:, None]).view(weight.shape))


@jit
def _dequantize_nf4_kernel(
    codes_ptr, absmax_ptr, out_ptr, words, WORDS: tl.constexpr, NF4: tl.constexpr
):  # fmt: skip
    """codes [words] int32, absmax fp32 [words / 8] -> out [words, 8]; WORDS of them a program."""
    # The gather looks up in shared memory, where 16 entries have no bank conflicts: 8 instructions
    # a weight (sm_90), where a tree of selects makes 17, more than the memory would wait for.
    entry = tl.arange(0, 16)
    table = tl.zeros((16,), tl.float32)
    for i in tl.static_range(16):
        table = tl.where(entry == i, NF4[i], table)
    word = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)  # [WORDS]
    m = word < words
    b = tl.load(codes_ptr + word, m, 0)
    absmax = tl.load(absmax_ptr + word // 8, m, 0.0)
    # The low byte is the first, and in a byte the high half: weight i is at bit 4 * (i ^ 1)
    i = tl.arange(0, 8)[None, :]
    code = (b[:, None] >> (4 * (i ^ 1))) & 15  # [WORDS, 8]
    w = tl.gather(table, tl.reshape(code, (WORDS * 8,)), 0)
    w = tl.reshape(w, (WORDS, 8)) * absmax[:, None]
    tl.store(out_ptr + word[:, None] * 8 + i, w.to(out_ptr.dtype.element_ty), m[:, None])


TILE = {"WORDS": 512, "num_warps": 4}  # 4 words a thread: 128 bits read, 4 x 128 of bf16 written


def dequantize_nf4(weight: Nf4Weight, *, out: Tensor) -> Tensor:
    """Write the weight into out [N, K] (bf16, fp16 or fp32, contiguous) and return it.

    Raises TypeError or ValueError, naming the argument, where out is of another dtype, shape,
    layout or device.
    """
    check_out(out, weight.shape, weight.codes.device)
    if not on_triton(out):
        return dequantize_nf4_ref(weight, out=out)
    words = weight.codes.view(torch.int32)
    grid = (triton.cdiv(len(words), TILE["WORDS"]),)
    _dequantize_nf4_kernel[grid](words, weight.absmax, out, len(words), NF4=NF4, **TILE)
    return out


def aot_cases() -> list[Any]:
    """The launches."""
    types = {"codes_ptr": "*i32", "absmax_ptr": "*fp32", "words": "i32"}
    constants = {"WORDS": TILE["WORDS"], "NF4": NF4}
    return dequantize_cases(
        _dequantize_nf4_kernel, "dequantize_nf4", types, constants, TILE["num_warps"]
    )
