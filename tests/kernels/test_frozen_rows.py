"""Rows of a frozen weight: views of what the whole holds, products that are parts of its own."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.test_frozen_linear import (
    FORMATS,
    make,
    on_path,
    randn,
    run,
    scaled_mm,
)  # fmt: skip
from tests.tiny import difference
from xplus_kernels import backend
from xplus_kernels.fp8 import Fp8Rows, dequantize_fp8, quantize_fp8, transpose_fp8
from xplus_kernels.frozen_linear import (
    Bf16Weight,
    Fp8Weight,
    FrozenWeight,
    WeightRows,
    frozen_linear,
    frozen_linear_dx,
    frozen_rows,
    multiplies_in_fp8,
    scratch_bytes,
)
from xplus_kernels.int8 import dequantize_int8
from xplus_kernels.nf4 import Nf4Weight, dequantize_nf4

pytestmark = pytest.mark.skipif(
    backend.INTERPRET, reason="tests the references: run without TRITON_INTERPRET=1"
)


def dense_of(weight: FrozenWeight) -> Tensor:
    out = torch.empty(weight.shape, dtype=torch.bfloat16)
    if isinstance(weight, Bf16Weight):
        return weight.data
    if isinstance(weight, Fp8Weight):
        return dequantize_fp8(weight.rows, out=out)
    if isinstance(weight, Nf4Weight):
        return dequantize_nf4(weight, out=out)
    return dequantize_int8(weight, out=out)


@pytest.mark.parametrize("rows", [(0, 32), (32, 96), (16, 80), (0, 96)])
@pytest.mark.parametrize("kind", FORMATS)
def test_rows_are_views_of_what_the_whole_holds(kind: str, rows: tuple[int, int]) -> None:
    weight, _ = make(kind, 96, 320, torch.bfloat16)
    part = frozen_rows(weight, *rows)
    assert type(part) is type(weight) and part.shape == (rows[1] - rows[0], 320)
    assert torch.equal(dense_of(part), dense_of(weight)[slice(*rows)])
    for mine, whole in zip(
        *([x for x in vars(w).values() if isinstance(x, Tensor | Fp8Rows)] for w in (part, weight)),
        strict=True,
    ):
        if isinstance(mine, Tensor):
            mine, whole = [mine], [whole]
        for m, w in zip(mine, whole, strict=True):  # no copy
            assert m.untyped_storage().data_ptr() == w.untyped_storage().data_ptr()


@pytest.mark.parametrize("size", [(96, 320, 16, 80), (48, 80, 8, 11), (32, 48, 3, 4)])
@pytest.mark.parametrize("kind", FORMATS)
def test_products_of_rows_are_parts_of_the_wholes(kind: str, size: tuple[int, ...]) -> None:
    """Where its blocks are cut, too: 8 * 80 is a multiple of 64, 11 * 80 and 3 * 48 are none."""
    n, k, start, end = size
    weight, dense = make(kind, n, k)
    part = frozen_rows(weight, start, end)
    assert isinstance(part, WeightRows) == (kind != "bf16" and end % 16 != 0)
    x, dy = randn(5, k), randn(2, 5, end - start, seed=1)
    y, whole = run(x, part), run(x, weight)
    assert torch.equal(run(x, frozen_rows(frozen_rows(weight, 1, n), start - 1, end - 1)), y)
    assert y.is_contiguous() and difference(y, whole[:, start:end]) < 1e-6
    dx = run(dy, part, backward=True)
    padded = torch.zeros(2, 5, n)
    padded[..., start:end] = dy
    assert difference(dx, run(padded, weight, backward=True)) < 1e-6
    if kind != "fp8":  # which quantizes x
        assert difference(dx, dy.double() @ dense[start:end]) < 1e-6
    for strange in (x[:1].expand(5, k), torch.cat((x, x), 1)[:, :k]):
        assert difference(run(strange, part), run(strange, weight)[:, start:end]) < 1e-6


@pytest.mark.parametrize("path", ["gemm", "dequantize", "reference"])
def test_rows_of_fp8_on_every_card(path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kept transpose goes along as a view; without it the slice is what is transposed."""
    monkeypatch.setattr(
        torch,
        "_scaled_mm",
        lambda a, b, *, scale_a, scale_b, **o: scaled_mm(a, b, scale_a, scale_b, **o),
    )
    on_path(monkeypatch, path)
    weight, _ = make("fp8", 96, 320)
    kept = Fp8Weight(weight.rows, transpose_fp8(weight.rows.data))
    x, dy = randn(5, 320, dtype=torch.bfloat16), randn(5, 48, dtype=torch.bfloat16, seed=1)
    for of in (weight, kept):
        part = frozen_rows(of, 32, 80)
        assert isinstance(part, Fp8Weight) and (part.transposed is None) == (of is weight)
        assert scratch_bytes(part, dtype=torch.bfloat16, backward=True) <= scratch_bytes(
            of, dtype=torch.bfloat16, backward=True
        )
        assert torch.equal(run(x, part), run(x, of)[:, 32:80])
        padded = torch.zeros(5, 96, dtype=torch.bfloat16)
        padded[:, 32:80] = dy
        assert difference(run(dy, part, backward=True), run(padded, of, backward=True)) < 2**-8
        cut = frozen_rows(of, 30, 78)
        assert isinstance(cut, WeightRows) and not multiplies_in_fp8(cut)
        assert torch.equal(run(x, cut), run(x, of)[:, 30:78])
        padded = padded.roll(-2, 1)
        assert torch.equal(run(dy, cut, backward=True), run(padded, of, backward=True))


def test_rows_that_are_not_there_are_named() -> None:
    weight, _ = make("nf4", 32, 48)
    for start, end in ((-1, 4), (4, 4), (5, 4), (0, 33)):
        with pytest.raises(ValueError, match=f"^start, end: {start}, {end}; allowed: 0 <= start"):
            frozen_rows(weight, start, end)
    cut = frozen_rows(weight, 3, 5)
    with pytest.raises(ValueError, match=r"^dy: shape \[3, 32\]; a weight of \[2, 48\] needs"):
        frozen_linear_dx(randn(3, 32), cut)
    with pytest.raises(TypeError, match="^dy: Fp8Rows; a WeightRows takes a Tensor"):
        frozen_linear_dx(quantize_fp8(randn(3, 2)), cut)
    with pytest.raises(ValueError, match=r"^x: shape \[3, 32\]"):
        frozen_linear(randn(3, 32), cut)
