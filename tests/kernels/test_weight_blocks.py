"""What INT8 and NF4 share: whole blocks, parts that fit together, a buffer to be unpacked into."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from xplus_kernels import backend
from xplus_kernels.int8 import Int8Weight, dequantize_int8, quantize_int8
from xplus_kernels.nf4 import Nf4Weight, dequantize_nf4, quantize_nf4

pytestmark = pytest.mark.skipif(
    backend.INTERPRET, reason="tests the references: run without TRITON_INTERPRET=1"
)


def nf4_weight(codes: Tensor, absmax: Tensor) -> Nf4Weight:
    return Nf4Weight(codes, absmax, (2, 64))


# Of a weight [2, 64]: how it is made, its codes, the name of its scales
PARTS = {
    "int8": (Int8Weight, torch.ones(2, 64, dtype=torch.int8), "scale"),
    "nf4": (nf4_weight, torch.zeros(64, dtype=torch.uint8), "absmax"),
}
DEQUANTIZE: dict[str, Callable[..., Tensor]] = {"int8": dequantize_int8, "nf4": dequantize_nf4}
QUANTIZE: dict[str, Callable[[Tensor], Any]] = {"int8": quantize_int8, "nf4": quantize_nf4}
BOTH = pytest.mark.parametrize("form", PARTS)


def weight(form: str) -> Any:
    make, codes, _ = PARTS[form]
    return make(codes, torch.ones(2))


@BOTH
@pytest.mark.parametrize("shape", [(3, 65), (5, 32), (64,), (2, 2, 64), (0, 64)])
def test_shapes_without_whole_blocks_are_refused(form: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="^weight: .* a multiple of 64"):
        QUANTIZE[form](torch.zeros(shape))


@BOTH
def test_a_weight_of_another_dtype_is_refused(form: str) -> None:
    with pytest.raises(TypeError, match="^weight: dtype torch.float64; allowed: bfloat16, "):
        QUANTIZE[form](torch.zeros(2, 64, dtype=torch.float64))


@BOTH
def test_parts_that_do_not_fit_are_named(form: str) -> None:
    make, codes, name = PARTS[form]
    scales = torch.ones(2)
    with pytest.raises(TypeError, match=f"^codes: dtype torch.int32; allowed: {codes.dtype}"):
        make(codes.int(), scales)
    with pytest.raises(TypeError, match=f"^{name}: dtype torch.bfloat16"):
        make(codes, scales.bfloat16())
    with pytest.raises(ValueError, match=rf"^{name}: shape \[1\].*\[2, 64\] has \[2\], contig"):
        make(codes, scales[:1])
    with pytest.raises(ValueError, match=f"^{name}: shape .*strides .0.; .*contiguous"):
        make(codes, scales[:1].expand(2))
    moved = torch.zeros(codes.numel() + 3, dtype=codes.dtype)[3:].view(codes.shape)
    with pytest.raises(ValueError, match=r"^codes: at byte 3; allowed: 16 \* n"):
        make(moved, scales)
    with pytest.raises(ValueError, match=f"^{name}: on cpu; codes is on meta"):
        make(codes.to("meta"), scales)


@BOTH
def test_a_buffer_that_does_not_fit_is_named(form: str) -> None:
    read, packed = DEQUANTIZE[form], weight(form)
    with pytest.raises(TypeError, match="^out: dtype torch.float64"):
        read(packed, out=torch.empty(2, 64, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"^out: shape \[64, 2\].*needs \[2, 64\]"):
        read(packed, out=torch.empty(64, 2))
    with pytest.raises(ValueError, match=r"^out: .*strides \[1, 2\].*contiguous"):
        read(packed, out=torch.empty(64, 2).T)
    with pytest.raises(ValueError, match="^out: on meta; the weight is on cpu"):
        read(packed, out=torch.empty(2, 64, device="meta"))


@BOTH
def test_out_is_written_whole_and_returned(form: str) -> None:
    out = torch.full((2, 64), torch.nan)
    assert DEQUANTIZE[form](weight(form), out=out) is out
    assert (out == {"int8": 1, "nf4": -1}[form]).all()
