"""Codes of 8 bits for optimizer states, in blocks of 256 with a scale each.

Codes times the block's absmax (Dettmers and others 2022, arXiv 2110.02861), in the dynamic maps of
bitsandbytes, signed or unsigned: seven decades below the absmax, each with twice the codes of the
one below it. A code is the nearest of the map's values, the lower of two equally near.
"""

# mypy: disallow-incomplete-defs=False
# (of a kernel's arguments, only the compile-time ones have a type)

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from xplus_kernels.backend import jit, tl

QUANTUM = 256  # elements to a block
LEAST_ABSMAX = 2.0**-126  # below, 1 / absmax overflows: the block counts as zero


@lru_cache
def code_tables(device: torch.device) -> Tensor:
    """[4, 256] fp32: signed and unsigned map, then where each code of either starts.

    A code's start is the least fp32 number at which the code below is no longer as near.
    """
    maps = torch.stack([_make_map(signed=True), _make_map(signed=False)])
    low, high = maps[:, :-1], maps[:, 1:]
    # Bisection over the bits of |x|, which order as the numbers do: `near` is the side of zero.
    # No two values straddle zero, and at equal distance the code below is taken.
    sign = torch.where(low < 0, -1.0, 1.0)
    near, far = (f(low.abs(), high.abs()).view(torch.int32) for f in (torch.minimum, torch.maximum))
    for _ in range(32):
        middle = near + (far - near) // 2
        x = sign * middle.view(torch.float32)
        is_far = ((high - x).abs() < (x - low).abs()) == (sign > 0)
        near, far = torch.where(is_far, near, middle), torch.where(is_far, middle, far)
    starts = sign * torch.where(sign > 0, far, near).view(torch.float32)
    first = torch.full((2, 1), -math.inf)
    return torch.cat([maps, torch.cat([first, starts], 1)]).to(device)


def _make_map(*, signed: bool) -> Tensor:
    """Seven decades below 1, each cut into twice the equal cells of the one below it."""
    positive = [torch.ones(1)]
    for i in range(7):
        cells = 2**i if signed else 2 ** (i + 1)
        edges = torch.linspace(0.1, 1, cells + 1, dtype=torch.float32)
        positive.append((edges[:-1] + edges[1:]) / 2.0 * 10.0 ** (i - 6))
    values = torch.cat(positive)
    parts = [values, torch.zeros(1)] + ([-values[1:]] if signed else [])
    return torch.cat(parts).sort().values


def dynamic_map(*, signed: bool, device: torch.device | str = "cpu") -> Tensor:
    """[256] fp32, rising: the value of each code. Signed holds exp_avg, unsigned exp_avg_sq."""
    return code_tables(torch.device(device))[0 if signed else 1].clone()


def quantize_blockwise(x: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """x, fp32 -> codes uint8 like x, absmax [ceil(n / 256)] fp32."""
    n = x.numel()
    blocks = torch.nn.functional.pad(x.reshape(-1), (0, -n % QUANTUM)).view(-1, QUANTUM)
    absmax = blocks.abs().amax(1)
    inverse = torch.where(absmax >= LEAST_ABSMAX, 1 / absmax, 0)
    starts = code_tables(x.device)[2 if signed else 3]
    codes = torch.searchsorted(starts[1:], blocks * inverse[:, None], right=True)
    return codes.to(torch.uint8).view(-1)[:n].view(x.shape), absmax


def dequantize_blockwise(codes: Tensor, absmax: Tensor, *, signed: bool) -> Tensor:
    """Codes uint8 and their blocks' absmax -> fp32."""
    values = code_tables(codes.device)[0 if signed else 1][codes.reshape(-1).long()]
    scales = absmax.repeat_interleave(QUANTUM)[: values.numel()]
    return (values * scales).view(codes.shape)


@jit
def quantize_codes(x, starts_ptr, SIGNED: tl.constexpr):
    """x [BLOCKS, 256] fp32 -> codes uint8, absmax [BLOCKS]."""
    absmax = tl.max(tl.abs(x), axis=1)
    # correctly rounded, as the codes are to be those of the reference
    inverse = tl.where(absmax >= 1.1754943508222875e-38, tl.div_rn(1.0, absmax), 0.0)
    x = x * inverse[:, None]
    # Where in the map, to half a code: linear within a decade, and each decade's line serves a
    # little beyond its ends too. Then one look at where the nearest code starts is exact.
    size = tl.abs(x)
    size = tl.where(size <= 1.0, size, 1.0)  # NaN too: what indexes must be in range
    slope = tl.full(x.shape, 1e6 / 0.9, dtype=tl.float32)  # codes per unit
    cells = tl.full(x.shape, 1.0, dtype=tl.float32)  # codes in the decade
    for i in tl.static_range(6):
        above = size >= 10.0 ** (i - 6)
        slope = tl.where(above, 0.2 ** (i + 1) * (1e6 / 0.9), slope)
        cells = tl.where(above, 2.0 ** (i + 1), cells)
    nearest = size * slope + cells * (8.0 / 9.0)
    if SIGNED:
        rank = (nearest + 0.5).to(tl.int32)  # 1 .. 128, zero being code 127
        rank = tl.where(x < 0, 128 - rank, 127 + rank)
    else:
        rank = (2.0 * nearest - 0.5).to(tl.int32)  # 1 .. 255
    start = tl.load(starts_ptr + rank)
    return (rank - (x < start).to(tl.int32)).to(tl.uint8), absmax
