"""INT8 on the GPU: bit-equal to the definition and to the CPU."""

import pytest
import torch

from tests.gpu import common
from tests.gpu.common import DEVICE, DTYPES, GPU, MAIN_DTYPE, randn

int8 = pytest.importorskip("xplus_kernels.int8", reason="needs xplus_kernels.int8")
pytestmark = [*GPU, pytest.mark.usefixtures("poisoned")]
SHAPES = [(1, 64), (3, 64), (64, 3), (130, 320), (96, 5120)]
SHAPES += [] if common.REHEARSAL else [(6144, 4096), (34_816, 5120)]


def weight(shape, device=DEVICE):
    """Every code, and block scales over six decades."""
    numel = shape[0] * shape[1]
    codes = (torch.arange(numel) * 7919 % 255 - 127).to(torch.int8).view(shape)
    generator = torch.Generator().manual_seed(0)
    scale = 10.0 ** (-6 * torch.rand(numel // 64, generator=generator))
    return int8.Int8Weight(codes.to(device), scale.to(device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_bits_are_those_of_the_definition_and_of_the_cpu(shape, dtype):
    w = weight(shape)
    codes, scale = w.codes.clone(), w.scale.clone()
    out = torch.empty(shape, dtype=dtype, device=DEVICE)
    assert int8.dequantize_int8(w, out=out) is out
    expected = (codes.view(-1, 64).float() * scale[:, None]).view(shape).to(dtype)
    assert torch.equal(out, expected)
    if not common.backend.INTERPRET:  # which would run the same on either
        cpu = torch.empty(shape, dtype=dtype)
        assert torch.equal(out.cpu(), int8.dequantize_int8(weight(shape, "cpu"), out=cpu))
    assert torch.equal(w.codes, codes) and torch.equal(w.scale, scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantized_here_as_on_the_cpu(dtype):
    w = randn(320, 192, dtype=dtype)
    here, there = int8.quantize_int8(w), int8.quantize_int8(w.cpu())
    assert torch.equal(here.scale.cpu(), there.scale)
    assert torch.equal(here.codes.cpu(), there.codes)


def test_more_weights_than_an_int32_counts():
    """More than 2^31 weights in one tensor: no model has it, and no offset may wrap."""
    shape = (96, 64) if common.REHEARSAL else (2**31 // 4096 + 64, 4096)
    common.need_memory(16)
    codes = torch.ones(shape, dtype=torch.int8, device=DEVICE)
    scale = torch.ones(shape[0] * shape[1] // 64, device=DEVICE)
    scale[-1] = 3.0
    out = torch.empty(shape, dtype=MAIN_DTYPE, device=DEVICE)
    int8.dequantize_int8(int8.Int8Weight(codes, scale), out=out)
    flat = out.view(-1, 64)
    assert (flat[-1] == 3).all()
    assert all((part == 1).all() for part in flat[:-1].split(2**20))


def test_waits_for_nothing():
    w, out = weight((130, 320)), torch.empty(130, 320, dtype=MAIN_DTYPE, device=DEVICE)
    common.waits_for_nothing(lambda: int8.dequantize_int8(w, out=out))
