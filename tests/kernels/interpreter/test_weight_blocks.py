"""The Triton code that unpacks INT8 and NF4, interpreted, against its reference, bit for bit.

Into fp32 and fp16: the interpreter truncates where bf16 is rounded.
"""

from typing import Any

import pytest
import torch

from tests.kernels.interpreter.common import INTERPRETED, poison
from xplus_kernels.int8 import Int8Weight, dequantize_int8, dequantize_int8_ref
from xplus_kernels.nf4 import Nf4Weight, dequantize_nf4, dequantize_nf4_ref
from xplus_kernels.weight_blocks import BLOCK

pytestmark = INTERPRETED
FORMATS: dict[str, Any] = {
    "int8": (dequantize_int8, dequantize_int8_ref),
    "nf4": (dequantize_nf4, dequantize_nf4_ref),
}


def random_weight(form: str, n: int, k: int) -> Int8Weight | Nf4Weight:
    g = torch.Generator().manual_seed(0)
    scales = torch.rand(n * k // BLOCK, generator=g)
    if form == "int8":
        return Int8Weight(torch.randint(-127, 128, (n, k), generator=g, dtype=torch.int8), scales)
    codes = torch.randint(0, 256, (n * k // 2,), generator=g, dtype=torch.uint8)
    return Nf4Weight(codes, scales, (n, k))


# A block, blocks across rows, a tail of the last program, more than one program
@pytest.mark.parametrize("shape", [(1, 64), (3, 64), (130, 96), (96, 320), (64, 65), (3, 5120)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("form", FORMATS)
def test_equals_its_reference(form: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    read, reference = FORMATS[form]
    weight, given = random_weight(form, *shape), random_weight(form, *shape)
    out = poison(torch.empty(shape, dtype=dtype))
    assert read(weight, out=out) is out
    assert torch.equal(out, reference(weight, out=torch.empty_like(out)))
    for name in vars(weight):  # codes and scales are only read
        assert torch.equal(torch.as_tensor(getattr(weight, name)),
                           torch.as_tensor(getattr(given, name)))  # fmt: skip


def test_every_int8_code_and_nothing_beyond() -> None:
    """out is the middle of a buffer whose rest stays as it was."""
    codes = torch.arange(-128, 128).to(torch.int8).view(4, 64)
    weight = Int8Weight(codes, torch.arange(1.0, 5.0))
    buffer = torch.full((1024,), -7.5)
    out = dequantize_int8(weight, out=buffer[256:512].view(4, 64))
    assert torch.equal(out, codes * torch.arange(1.0, 5.0)[:, None])
    assert (buffer[:256] == -7.5).all() and (buffer[512:] == -7.5).all()


def test_every_nf4_byte_and_nothing_beyond() -> None:
    """All 256 bytes; out is the middle of a buffer whose rest stays as it was."""
    weight = Nf4Weight(torch.arange(256).to(torch.uint8), torch.arange(1.0, 9.0), (8, 64))
    buffer = torch.full((2048,), -7.0)
    out = dequantize_nf4(weight, out=buffer[512:1024].view(8, 64))
    assert torch.equal(out, dequantize_nf4_ref(weight, out=torch.empty(8, 64)))
    assert (buffer[:512] == -7.0).all() and (buffer[1024:] == -7.0).all()


def test_nf4_codes_inside_a_buffer() -> None:
    """As streamed weights lie: codes at a multiple of 16 bytes, absmax behind them."""
    weight = random_weight("nf4", 6, 320)
    assert isinstance(weight, Nf4Weight)
    buffer = torch.zeros(4096, dtype=torch.uint8)
    codes = buffer[48 : 48 + len(weight.codes)].copy_(weight.codes)
    moved = Nf4Weight(codes, weight.absmax, weight.shape)
    out, again = torch.empty(6, 320), torch.empty(6, 320)
    assert torch.equal(dequantize_nf4(moved, out=out), dequantize_nf4(weight, out=again))
