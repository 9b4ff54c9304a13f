"""NF4: the table, the layout and the rounding; against bitsandbytes where it is installed."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from xplus_kernels import backend
from xplus_kernels.nf4 import (
    NF4,
    Nf4Weight,
    dequantize_nf4,
    dequantize_nf4_ref,
    quantize_nf4,
)
from xplus_kernels.weight_blocks import BLOCK

pytestmark = pytest.mark.skipif(
    backend.INTERPRET, reason="tests the references: run without TRITON_INTERPRET=1"
)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def nearest(weight: Tensor) -> Nf4Weight:
    """The quantizer, written anew: the nearest entry of the table, in blocks of 64."""
    blocks = weight.double().view(-1, BLOCK)
    absmax = blocks.abs().amax(1).float()
    distance = (blocks / absmax[:, None].double())[..., None] - torch.tensor(NF4).double()
    codes = distance.abs().argmin(-1).view(-1, 2)
    packed = codes[:, 0] * 16 + codes[:, 1]  # the first weight in the high half
    return Nf4Weight(packed.to(torch.uint8), absmax, (weight.shape[0], weight.shape[1]))


def read(weight: Nf4Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    return dequantize_nf4(weight, out=torch.full(weight.shape, torch.nan, dtype=dtype))


@pytest.mark.parametrize("shape", [(1, 64), (3, 320), (130, 96), (2, 17408)])
def test_reads_back_the_nearest_entry(shape: tuple[int, int]) -> None:
    w = randn(*shape)
    back = read(nearest(w))
    # No entry is farther than half the widest gap of the table, 1 - 0.6962 (at its low end)
    limit = w.view(-1, BLOCK).abs().amax(1, keepdim=True) * (1 - 0.6961928) / 2
    assert ((back - w).view(-1, BLOCK).abs() <= limit * 1.000001).all()
    assert (back - w).norm() < 0.1 * w.norm()  # normal weights: 9 %
    assert ((back == w).view(-1, BLOCK).sum(1) >= 1).all()  # the largest of a block is exact


@pytest.mark.parametrize("dtype", DTYPES)
def test_product_in_fp32_rounded_once(dtype: torch.dtype) -> None:
    weight = nearest(randn(96, 320))
    codes = torch.stack((weight.codes >> 4, weight.codes & 15), 1).view(-1, BLOCK).long()
    product = torch.tensor(NF4)[codes] * weight.absmax[:, None]
    assert torch.equal(read(weight, dtype), product.view(96, 320).to(dtype))
    table_first = torch.tensor(NF4).to(torch.bfloat16)[codes] * weight.absmax[:, None]
    assert not torch.equal(read(weight, dtype), table_first.view(96, 320).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (3, 320), (96, 320), (2, 5120), (3, 17408)])
def test_bitsandbytes_reads_the_same(shape: tuple[int, int], dtype: torch.dtype) -> None:
    bnb = pytest.importorskip("bitsandbytes.functional", reason="needs bitsandbytes")
    w = randn(*shape).to(dtype)
    codes, state = bnb.quantize_4bit(w, blocksize=BLOCK, quant_type="nf4")
    weight = Nf4Weight.from_bitsandbytes(codes, state)
    assert torch.equal(read(weight, dtype), bnb.dequantize_4bit(codes, state))
    ours = quantize_nf4(w)
    assert torch.equal(ours.codes, weight.codes) and torch.equal(ours.absmax, weight.absmax)
    assert (nearest(w).codes == weight.codes).float().mean() > 0.999  # but for ties


def test_bitsandbytes_blocks_run_across_rows() -> None:
    """K = 96: as its generic code and its CUDA kernel read them.

    Its AVX512 code (0.50) starts new blocks at every row, though its quantizer does not.
    """
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    w = randn(130, 96)
    q = quantize_nf4(w)
    table = torch.tensor(NF4)
    theirs = _dequantize_4bit_compute(q.codes, q.absmax, table, BLOCK, q.shape, torch.float32)
    assert torch.equal(read(q), theirs) and (read(q) - w).norm() < 0.1 * w.norm()


def test_bitsandbytes_table() -> None:
    bnb = pytest.importorskip("bitsandbytes.functional", reason="needs bitsandbytes")
    assert bnb.get_4bit_type("nf4", device="cpu").tolist() == torch.tensor(NF4).tolist()


def test_storage_of_other_dtypes() -> None:
    """`quant_storage`, which FSDP wants in the weights' dtype, holds the same bytes."""
    bnb = pytest.importorskip("bitsandbytes.functional", reason="needs bitsandbytes")
    w, options = randn(16, 64), {"blocksize": BLOCK, "quant_type": "nf4"}
    codes, state = bnb.quantize_4bit(w, quant_storage=torch.bfloat16, **options)
    assert torch.equal(Nf4Weight.from_bitsandbytes(codes, state).codes, quantize_nf4(w).codes)


def state(**changes: Any) -> Any:
    options = {"quant_type": "nf4", "blocksize": 64, "nested": False, "shape": (2, 64)}
    return SimpleNamespace(**{**options, "absmax": torch.ones(2), **changes})


@pytest.mark.parametrize(
    "changes",
    [{"nested": True}, {"blocksize": 128}, {"quant_type": "fp4"}, {"shape": (128,)}],
)
def test_other_states_are_refused(changes: dict[str, Any]) -> None:
    codes = torch.zeros(64, 1, dtype=torch.uint8)
    assert Nf4Weight.from_bitsandbytes(codes, state()).shape == (2, 64)
    with pytest.raises(ValueError, match="^quant_state: .*allowed: "):
        Nf4Weight.from_bitsandbytes(codes, state(**changes))


def test_double_quantization_of_bitsandbytes_is_refused() -> None:
    bnb = pytest.importorskip("bitsandbytes.functional", reason="needs bitsandbytes")
    made = bnb.quantize_4bit(
        randn(256, 64), blocksize=64, quant_type="nf4", compress_statistics=True
    )
    with pytest.raises(ValueError, match="nested True; allowed: 'nf4', 64, False"):
        Nf4Weight.from_bitsandbytes(*made)


def test_without_bitsandbytes_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(ImportError, match="pip install bitsandbytes$"):
        quantize_nf4(randn(1, 64))


def test_bad_shapes_are_named() -> None:
    codes, absmax = torch.zeros(64, dtype=torch.uint8), torch.ones(2)
    with pytest.raises(ValueError, match=r"^codes: shape \[64\].*\[4, 64\] has \[128\]"):
        Nf4Weight(codes, absmax, (4, 64))
    with pytest.raises(ValueError, match=r"^shape: \[3, 65\]; allowed: .* a multiple of 64"):
        Nf4Weight(codes, absmax, (3, 65))


def test_reference_reads_every_byte() -> None:
    weight = Nf4Weight(torch.arange(256).to(torch.uint8), torch.ones(8), (8, 64))
    out = dequantize_nf4_ref(weight, out=torch.empty(8, 64)).view(256, 2)
    table = torch.tensor(NF4)
    assert torch.equal(out[:, 0], table.repeat_interleave(16))
    assert torch.equal(out[:, 1], table.repeat(16))
