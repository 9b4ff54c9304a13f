"""NF4 on the GPU: bit-equal to the definition, to the CPU and to bitsandbytes' own kernel."""

import pytest
import torch

from tests.gpu import common
from tests.gpu.common import DEVICE, DTYPES, GPU, MAIN_DTYPE, randn

nf4 = pytest.importorskip("xplus_kernels.nf4", reason="needs xplus_kernels.nf4")
pytestmark = [*GPU, pytest.mark.usefixtures("poisoned")]
SHAPES = [(1, 64), (3, 64), (64, 3), (130, 320), (96, 5120)]
SHAPES += [] if common.REHEARSAL else [(6144, 4096), (34_816, 5120)]
TABLE = (  # QLoRA, appendix E
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


def weight(shape, device=DEVICE):
    """Every code, and block scales over six decades."""
    numel = shape[0] * shape[1]
    codes = (torch.arange(numel // 2) * 7919 % 256).to(torch.uint8)
    generator = torch.Generator().manual_seed(0)
    absmax = 10.0 ** (-6 * torch.rand(numel // 64, generator=generator))
    return nf4.Nf4Weight(codes.to(device), absmax.to(device), shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_bits_are_those_of_the_definition_and_of_the_cpu(shape, dtype):
    w = weight(shape)
    codes, absmax = w.codes.clone(), w.absmax.clone()
    out = torch.empty(shape, dtype=dtype, device=DEVICE)
    assert nf4.dequantize_nf4(w, out=out) is out
    table = torch.tensor(TABLE, device=DEVICE)
    values = table[torch.stack((codes >> 4, codes & 15), 1).view(-1).long()]
    expected = (values.view(-1, 64) * absmax[:, None]).view(shape).to(dtype)
    assert torch.equal(out, expected)
    if not common.backend.INTERPRET:  # which would run the same on either
        cpu = torch.empty(shape, dtype=dtype)
        assert torch.equal(out.cpu(), nf4.dequantize_nf4(weight(shape, "cpu"), out=cpu))
    assert torch.equal(w.codes, codes) and torch.equal(w.absmax, absmax)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_are_those_of_bitsandbytes(dtype):
    functional = pytest.importorskip("bitsandbytes.functional", reason="needs bitsandbytes")
    w = randn(320, 192, dtype=dtype)
    codes, state = functional.quantize_4bit(
        w, blocksize=64, quant_type="nf4", compress_statistics=False
    )
    theirs = functional.dequantize_4bit(codes, state)
    mine = nf4.Nf4Weight.from_bitsandbytes(codes, state)
    out = torch.empty(w.shape, dtype=dtype, device=DEVICE)
    assert torch.equal(nf4.dequantize_nf4(mine, out=out), theirs)
    again = nf4.quantize_nf4(w)
    assert torch.equal(again.codes, mine.codes) and torch.equal(again.absmax, mine.absmax)


def test_more_weights_than_an_int32_counts():
    """More than 2^31 weights in one tensor: no model has it, and no offset may wrap."""
    shape = (96, 64) if common.REHEARSAL else (2**31 // 4096 + 64, 4096)
    common.need_memory(16)
    n = shape[0] * shape[1]
    codes = torch.full((n // 2,), 0xF0, dtype=torch.uint8, device=DEVICE)  # 1, -1 by turns
    absmax = torch.ones(n // 64, device=DEVICE)
    absmax[-1] = 3.0
    out = torch.empty(shape, dtype=MAIN_DTYPE, device=DEVICE)
    nf4.dequantize_nf4(nf4.Nf4Weight(codes, absmax, shape), out=out)
    flat = out.view(-1, 64)
    pair = torch.tensor([1.0, -1.0], dtype=MAIN_DTYPE, device=DEVICE).repeat(32)
    assert torch.equal(flat[-1], 3 * pair)
    assert all((part == pair).all() for part in flat[:-1].split(2**20))


def test_waits_for_nothing():
    w, out = weight((130, 320)), torch.empty(130, 320, dtype=MAIN_DTYPE, device=DEVICE)
    common.waits_for_nothing(lambda: nf4.dequantize_nf4(w, out=out))
