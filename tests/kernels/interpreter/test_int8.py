"""The Triton code of INT8, interpreted: bit-equal to its reference, in fp32 and fp16."""

import pytest
import torch

from tests.kernels.interpreter.common import INTERPRETED, poison
from xplus_kernels.int8 import Int8Weight, dequantize_int8, dequantize_int8_ref
from xplus_kernels.weight_blocks import BLOCK

pytestmark = INTERPRETED


def random_weight(n: int, k: int, seed: int = 0) -> Int8Weight:
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (n, k), generator=g, dtype=torch.int8)
    return Int8Weight(codes, torch.rand(n * k // BLOCK, generator=g))


# A block, blocks across rows, a tail of the last program, more than one program
@pytest.mark.parametrize("shape", [(1, 64), (3, 64), (130, 96), (96, 320), (64, 65), (3, 5120)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_equals_its_reference(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = random_weight(*shape)
    codes, scale = weight.codes.clone(), weight.scale.clone()
    out = poison(torch.empty(shape, dtype=dtype))
    assert dequantize_int8(weight, out=out) is out
    assert torch.equal(out, dequantize_int8_ref(weight, out=torch.empty_like(out)))
    assert torch.equal(weight.codes, codes) and torch.equal(weight.scale, scale)


def test_every_code_and_nothing_beyond() -> None:
    """out is the middle of a buffer whose rest stays as it was."""
    codes = torch.arange(-128, 128).to(torch.int8).view(4, 64)
    weight = Int8Weight(codes, torch.arange(1.0, 5.0))
    buffer = torch.full((1024,), -7.5)
    out = dequantize_int8(weight, out=buffer[256:512].view(4, 64))
    assert torch.equal(out, codes * torch.arange(1.0, 5.0)[:, None])
    assert (buffer[:256] == -7.5).all() and (buffer[512:] == -7.5).all()
