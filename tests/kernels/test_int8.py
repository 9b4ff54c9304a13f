"""INT8: the layout and the rounding, against a quantizer and a reader written anew in fp64."""

import pytest
import torch
from torch import Tensor

from xplus_kernels import backend
from xplus_kernels.int8 import (
    Int8Weight,
    dequantize_int8,
    dequantize_int8_ref,
    quantize_int8,
)
from xplus_kernels.weight_blocks import BLOCK

pytestmark = pytest.mark.skipif(
    backend.INTERPRET, reason="tests the references: run without TRITON_INTERPRET=1"
)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def read(weight: Int8Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    return dequantize_int8(weight, out=torch.full(weight.shape, torch.nan, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (3, 320), (130, 96), (2, 5120), (3, 17408)])
def test_reads_back_the_nearest_code(shape: tuple[int, int], dtype: torch.dtype) -> None:
    w = randn(*shape).to(dtype)
    blocks = w.double().view(-1, BLOCK)
    step = blocks.abs().amax(1, keepdim=True) / 127
    back = read(quantize_int8(w)).double().view(-1, BLOCK)
    assert ((back - blocks).abs() <= step * (0.5 + 1e-5)).all()  # no other code is nearer


def test_normal_weights_are_off_by_six_thousandths() -> None:
    w = randn(256, 4096)
    error = (read(quantize_int8(w)) - w).norm() / w.norm()
    assert 0.005 < error < 0.007


@pytest.mark.parametrize("dtype", DTYPES)
def test_product_in_fp32_rounded_once(dtype: torch.dtype) -> None:
    weight = quantize_int8(randn(96, 320))
    product = weight.codes.view(-1, BLOCK).float() * weight.scale[:, None]
    assert torch.equal(read(weight, dtype), product.view(96, 320).to(dtype))


def test_every_code_and_blocks_of_nothing() -> None:
    codes = torch.arange(-127, 129).clamp(max=127).to(torch.int8).view(4, 64)
    weight = Int8Weight(codes, torch.tensor([1.0, 0.5, 2.0, 1e-30]))
    scale = torch.tensor([1.0, 0.5, 2.0, 1e-30])[:, None]
    assert torch.equal(dequantize_int8_ref(weight, out=torch.empty(4, 64)), codes * scale)
    zeros = quantize_int8(torch.zeros(2, 64))
    assert not read(zeros).any() and not zeros.scale.isnan().any()
    ends = torch.tensor([3.0, -3.0]).repeat(64).view(2, 64)  # absmax itself comes back
    assert torch.allclose(read(quantize_int8(ends)), ends, rtol=1e-6)


def test_what_it_was_given_stays_as_it_was() -> None:
    w = randn(6, 64)
    before = w.clone()
    strided = torch.empty(64, 6).copy_(w.T).T  # not contiguous
    a, b = quantize_int8(w), quantize_int8(strided)
    assert torch.equal(a.codes, b.codes) and torch.equal(a.scale, b.scale)
    assert torch.equal(w, before)


def test_bad_shapes_are_named() -> None:
    codes, scale = torch.zeros(2, 64, dtype=torch.int8), torch.ones(2)
    with pytest.raises(ValueError, match="^codes: shape .* contiguous"):
        Int8Weight(codes[:, :32].expand(2, 32).repeat(1, 4)[:, ::2], scale)
    with pytest.raises(ValueError, match=r"^codes: \[3, 65\]; allowed: .* a multiple of 64"):
        Int8Weight(torch.zeros(3, 65, dtype=torch.int8), scale)
