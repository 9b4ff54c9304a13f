"""The Triton code of NF4, interpreted on a CPU, against its reference, bit for bit.

Into fp32 and fp16: the interpreter truncates where bf16 is rounded.
"""

import pytest
import torch

from tests.kernels.interpreter.common import INTERPRETED, poison
from xplus_kernels.nf4 import Nf4Weight, dequantize_nf4, dequantize_nf4_ref
from xplus_kernels.weight_blocks import BLOCK

pytestmark = INTERPRETED


def random_weight(n: int, k: int, seed: int = 0) -> Nf4Weight:
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (n * k // 2,), generator=g, dtype=torch.uint8)
    return Nf4Weight(codes, torch.rand(n * k // BLOCK, generator=g), (n, k))


# A block, blocks across rows, a tail of the last program, more than one program
@pytest.mark.parametrize("shape", [(1, 64), (3, 64), (130, 96), (96, 320), (64, 65), (3, 5120)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_equals_its_reference(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = random_weight(*shape)
    codes, absmax = weight.codes.clone(), weight.absmax.clone()
    out = poison(torch.empty(shape, dtype=dtype))
    assert dequantize_nf4(weight, out=out) is out
    assert torch.equal(out, dequantize_nf4_ref(weight, out=torch.empty_like(out)))
    assert torch.equal(weight.codes, codes) and torch.equal(weight.absmax, absmax)


def test_every_byte_and_nothing_beyond() -> None:
    """All 256 bytes; out is the middle of a buffer whose rest stays as it was."""
    weight = Nf4Weight(torch.arange(256).to(torch.uint8), torch.arange(1.0, 9.0), (8, 64))
    buffer = torch.full((2048,), -7.0)
    out = dequantize_nf4(weight, out=buffer[512:1024].view(8, 64))
    assert torch.equal(out, dequantize_nf4_ref(weight, out=torch.empty(8, 64)))
    assert (buffer[:512] == -7.0).all() and (buffer[1024:] == -7.0).all()


def test_codes_inside_a_buffer() -> None:
    """As streamed weights lie: codes at a multiple of 16 bytes, absmax behind them."""
    weight = random_weight(6, 320)
    buffer = torch.zeros(4096, dtype=torch.uint8)
    codes = buffer[48 : 48 + len(weight.codes)].copy_(weight.codes)
    moved = Nf4Weight(codes, weight.absmax, weight.shape)
    out, again = torch.empty(6, 320), torch.empty(6, 320)
    assert torch.equal(dequantize_nf4(moved, out=out), dequantize_nf4(weight, out=again))
