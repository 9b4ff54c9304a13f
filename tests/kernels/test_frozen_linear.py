"""Frozen linears against fp64 truth in all formats, and what the FP8 GEMM is handed.

No GPU: `torch._scaled_mm` is stood in for, behind the checks that PyTorch makes of its arguments.
"""

import sys
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from tests.tiny import difference
from xplus_kernels import backend
from xplus_kernels.fp8 import FP8, Fp8Rows, quantize_fp8, transpose_fp8
from xplus_kernels.frozen_linear import (
    Bf16Weight,
    Fp8Weight,
    FrozenWeight,
    WeightRows,
    frozen_linear,
    frozen_linear_dx,
    multiplies_in_fp8,
    scratch_bytes,
)
from xplus_kernels.int8 import quantize_int8
from xplus_kernels.nf4 import NF4, Nf4Weight

pytestmark = pytest.mark.skipif(
    backend.INTERPRET, reason="tests the references: run without TRITON_INTERPRET=1"
)
MODULE = sys.modules["xplus_kernels.frozen_linear"]  # in the package its name is the function
# What a result may err more than PyTorch's own matmul in its dtype: one rounding
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
FORMATS = ("bf16", "int8", "fp8", "nf4")
SHAPES = [(1, 32, 96), (3, 320, 96), (130, 96, 320), (3, 64, 5120), (2, 32, 17408)]  # T, N, K


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make(kind: str, n: int, k: int, dtype: torch.dtype = torch.float32, seed: int = 9) -> Any:
    """A weight of that format and what it reads as, in fp64."""
    w = randn(n, k, seed=seed) * 0.02
    if kind == "bf16":
        return Bf16Weight(w.to(dtype)), w.to(dtype).double()
    if kind == "fp8":
        rows = quantize_fp8(w)
        return Fp8Weight(rows), read(rows)
    if kind == "int8":
        quantized = quantize_int8(w)
        wide = quantized.codes.view(-1, 64).float() * quantized.scale[:, None]
        return quantized, wide.view(n, k).to(dtype).double()
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (n * k // 2,), generator=g, dtype=torch.uint8)
    absmax = torch.rand(n * k // 64, generator=g) * 0.05
    halves = torch.stack((codes >> 4, codes & 15), 1).view(-1, 64).long()
    dense = (torch.tensor(NF4)[halves] * absmax[:, None]).view(n, k).to(dtype)
    return Nf4Weight(codes, absmax, (n, k)), dense.double()


def read(rows: Fp8Rows) -> Tensor:
    return rows.data.double() * rows.scale.double()[:, None]


def scratch_for(weight: FrozenWeight | WeightRows, dtype: torch.dtype, backward: bool) -> Tensor:
    """No larger than asked for, and full of bytes that are NaN in every dtype."""
    size = scratch_bytes(weight, dtype=dtype, backward=backward)
    return torch.full((size,), 0xFF, dtype=torch.uint8)


def run(
    x: Any, weight: FrozenWeight | WeightRows, *, backward: bool = False, **options: Any
) -> Tensor:
    op = frozen_linear_dx if backward else frozen_linear
    dtype = torch.bfloat16 if isinstance(x, Fp8Rows) else x.dtype
    return op(x, weight, scratch=scratch_for(weight, dtype, backward), **options)


def operand(x: Tensor, weight: FrozenWeight, backward: bool) -> Tensor:
    """x as the GEMM sees it, in fp64: quantized where the weight is FP8."""
    if not isinstance(weight, Fp8Weight):
        return x.double().reshape(-1, x.shape[-1])
    scale = weight.rows.scale
    return read(quantize_fp8(x, column_scale=scale)) / scale if backward else read(quantize_fp8(x))


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "dx"])
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("size", SHAPES)
def test_against_fp64(
    size: tuple[int, int, int], kind: str, dtype: torch.dtype, backward: bool
) -> None:
    t, n, k = size
    weight, dense = make(kind, n, k, dtype)
    x = randn(t, n if backward else k, dtype=dtype)
    w = dense if backward else dense.T
    truth = operand(x, weight, backward) @ w
    y, before = run(x, weight, backward=backward), x.clone()
    assert y.shape == truth.shape and y.dtype == dtype and torch.equal(x, before)
    # fp8's products are exact in fp32, whatever x's dtype: one rounding, and the sums
    if kind == "fp8":
        assert difference(y, truth) <= ROUNDING[dtype] + 1e-6
    else:
        own = difference(x @ w.to(dtype), truth)
        assert difference(y, truth) <= 1.1 * own + ROUNDING[dtype]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "dx"])
@pytest.mark.parametrize("kind", FORMATS)
def test_strides_and_leading_axes(kind: str, backward: bool) -> None:
    weight, _ = make(kind, 96, 320)
    width = 96 if backward else 320
    wide = randn(6, width + 64)
    inputs = [wide[:, 32 : width + 32], wide[::2, :width], randn(width, 5).T]
    inputs += [torch.ones(()).expand(4, width), wide[:, :1].expand(6, width), wide[:0, :width]]
    for x in inputs:
        y = run(x, weight, backward=backward)
        assert torch.allclose(y, run(x.contiguous(), weight, backward=backward), atol=1e-6)
    x = randn(2, 3, width)
    y = run(x, weight, backward=backward)
    assert y.shape == (2, 3, 320 if backward else 96)
    flat = run(x.view(6, width), weight, backward=backward)
    assert torch.allclose(y.view(6, -1), flat, atol=1e-6)
    assert run(x[0, 0], weight, backward=backward).shape == y.shape[2:]


@pytest.mark.parametrize("kind", FORMATS)
def test_dx_is_the_adjoint(kind: str) -> None:
    """<dy, f(x)> = <dx(dy), x>, fp8 but for quantizing: against the inner product's own spread."""
    weight, dense = make(kind, 320, 640)
    x, dy = randn(64, 640), randn(64, 320, seed=1)
    y, dx = run(x, weight), run(dy, weight, backward=True)
    spread = dy.norm() * (x.double() @ dense.T).norm() / 320**0.5
    allowed = 0.05 if kind == "fp8" else 1e-5
    assert abs((dy * y).sum() - (dx * x).sum()) <= allowed * spread
    # ... and where the two agree by construction, not only on average
    dx = run(y, weight, backward=True)
    assert abs((y * y).sum() - (dx * x).sum()) <= (0.02 if kind == "fp8" else 1e-5) * (y * y).sum()


def test_fp8_error_against_the_unquantized_truth() -> None:
    """e4m3 rounds by 2.6 % rms; two operands: 3.7 %. Every row, however rows differ in size."""
    t, n, k = 64, 320, 640
    sizes = torch.logspace(-4, 4, t)[:, None]
    w = randn(n, k, seed=1) * torch.logspace(-3, 0, n)[:, None]
    x, dy = randn(t, k, seed=2) * sizes, randn(t, n, seed=3) * sizes
    weight = Fp8Weight(quantize_fp8(w))
    for got, truth in (
        (run(x, weight), x.double() @ w.double().T),
        (run(dy, weight, backward=True), dy.double() @ w.double()),
    ):
        error = (got - truth).norm(dim=1) / truth.norm(dim=1)
        # A few of W's rows are much of dX: its errors average less
        assert 0.03 < error.mean() < 0.045 and error.max() < 0.08
    # One scale for the whole of x loses the small rows altogether
    scale = x.abs().max() / 448
    tensorwise = (x / scale).to(FP8).double() * scale @ read(weight.rows).T
    truth = x.double() @ w.double().T
    assert ((tensorwise - truth).norm(dim=1) / truth.norm(dim=1)).max() > 0.5


def test_column_scale_is_folded_in() -> None:
    """Rows of W times powers of two, dy divided by them: the same dX, bit for bit."""
    w, dy = randn(96, 320), randn(5, 96, seed=1)
    powers = torch.exp2(torch.arange(96) % 13 - 6.0)
    plain, scaled = Fp8Weight(quantize_fp8(w)), Fp8Weight(quantize_fp8(w * powers[:, None]))
    assert torch.equal(plain.rows.data.view(torch.uint8), scaled.rows.data.view(torch.uint8))
    dx = run(dy, plain, backward=True)
    assert torch.equal(run(dy / powers, scaled, backward=True), dx)
    assert not torch.equal(run(dy, scaled, backward=True), dx)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16, torch.float32])
def test_quantized_input(dtype: torch.dtype | None) -> None:
    weight, _ = make("fp8", 96, 320)
    made, out = dtype or torch.bfloat16, {"dtype": dtype}
    x, dy = randn(3, 320), randn(3, 96, seed=1)
    y = frozen_linear(quantize_fp8(x), weight, **out)
    dx = frozen_linear_dx(quantize_fp8(dy, column_scale=weight.rows.scale), weight, **out)
    assert y.dtype == dx.dtype == made
    assert torch.equal(y, run(x, weight).to(made))
    assert torch.equal(dx, run(dy, weight, backward=True).to(made))


@pytest.mark.parametrize("kind", FORMATS)
def test_results_have_no_graph(kind: str) -> None:
    weight, _ = make(kind, 96, 320)
    assert not run(randn(2, 320).requires_grad_(), weight).requires_grad
    assert not run(randn(2, 96).requires_grad_(), weight, backward=True).requires_grad


# The FP8 GEMM


def scaled_mm(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, **options: Any) -> Tensor:
    """What `torch._scaled_mm` computes from row-wise scales, behind the checks it makes."""
    # PyTorch's own, on tensors without memory: layouts, multiples of 16, shapes of the scales
    bare = [
        torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
        for t in (a, b, scale_a, scale_b)
    ]
    torch.ops.aten._scaled_mm.default(*bare, **options)
    # Those of its CUDA code (ScaledBlas.cpp, RowwiseScaledMM.cu)
    assert a.dtype == b.dtype == FP8
    assert a.stride(1) == 1 and a.stride(0) >= a.shape[1]
    assert b.stride(0) == 1 and b.stride(1) >= b.shape[0]
    assert b.shape[0] % 16 == 0 and b.shape[1] % 16 == 0
    assert scale_a.dtype == scale_b.dtype == torch.float32
    assert scale_a.shape == (a.shape[0], 1) and scale_a.stride(0) == 1
    assert scale_b.shape == (1, b.shape[1]) and scale_b.stride(1) == 1
    assert scale_a.is_contiguous() and scale_b.is_contiguous() and scale_b.t().is_contiguous()
    assert all(t.data_ptr() % 16 == 0 for t in (a, b))
    assert options == {"out_dtype": torch.bfloat16, "use_fast_accum": True}
    y = (a.float() @ b.float()) * scale_a * scale_b
    return y.to(torch.bfloat16)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, ...]]:
    """A card with an FP8 GEMM; the tensors that it was handed."""
    made: list[tuple[Tensor, ...]] = []

    def record(a: Tensor, b: Tensor, *, scale_a: Tensor, scale_b: Tensor, **options: Any) -> Tensor:
        made.append((a, b, scale_a, scale_b))
        return scaled_mm(a, b, scale_a, scale_b, **options)

    monkeypatch.setattr(torch, "_scaled_mm", record)
    on_path(monkeypatch, "gemm")
    return made


def on_path(
    monkeypatch: pytest.MonkeyPatch, path: Literal["gemm", "dequantize", "reference"]
) -> None:
    monkeypatch.setattr(MODULE, "_fp8_path", lambda device: path)


@pytest.mark.parametrize("t", [0, 1, 3, 130])
def test_gemm_gets_what_it_wants(
    t: int, calls: list[tuple[Tensor, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """T is free; the numbers are the reference's, in both directions, quantized before or here."""
    weight, _ = make("fp8", 96, 320)
    kept = Fp8Weight(weight.rows, transpose_fp8(weight.rows.data))
    x, dy = randn(t, 320, dtype=torch.bfloat16), randn(t, 96, dtype=torch.bfloat16, seed=1)
    scratch = torch.full((96 * 320,), 0xFF, dtype=torch.uint8)
    y = frozen_linear(x, weight)
    dx = frozen_linear_dx(dy, weight, scratch=scratch)
    again = frozen_linear_dx(dy.view(1, t, 96), kept)
    forward, backward, without = calls
    assert forward[1].data_ptr() == weight.rows.data.data_ptr()  # no copy of the weight
    assert backward[1].data_ptr() == scratch.data_ptr()
    assert kept.transposed is not None and without[1].data_ptr() == kept.transposed.data_ptr()
    assert backward[3].data_ptr() == without[3].data_ptr()  # the ones are made once
    assert (backward[3] == 1).all() and backward[3].shape == (1, 320)
    rows = quantize_fp8(dy, column_scale=weight.rows.scale)
    assert torch.equal(frozen_linear(quantize_fp8(x), weight), y)
    assert torch.equal(frozen_linear_dx(rows, kept), dx)
    on_path(monkeypatch, "reference")
    # Sums of another order may round to the neighbouring bf16
    assert torch.allclose(frozen_linear(x, weight), y, rtol=2**-7, atol=1e-6)
    assert torch.allclose(frozen_linear_dx(dy, weight), dx, rtol=2**-7, atol=1e-6)
    assert torch.equal(again[0], dx) and again.shape == (1, t, 320)


def test_a_wrong_layout_is_caught() -> None:
    """The stand-in refuses what CUDA would: a row-major b, an expanded scale, odd sizes."""
    a, b = torch.zeros(3, 32, dtype=FP8), torch.zeros(48, 32, dtype=FP8)
    row, column = torch.ones(3, 1), torch.ones(1, 48)
    options = {"out_dtype": torch.bfloat16, "use_fast_accum": True}
    assert scaled_mm(a, b.t(), row, column, **options).shape == (3, 48)
    wrong = [
        (a, b.t().contiguous(), row, column),
        (a, b.t(), row, torch.ones(1, 1).expand(1, 48)),
        (a, b.t(), row.view(3), column),
        (a, b[:40].t(), row, column[:, :40]),
    ]
    for arguments in wrong:
        with pytest.raises((RuntimeError, AssertionError)):
            scaled_mm(*arguments, **options)


def test_gemm_makes_bf16(calls: list[tuple[Tensor, ...]]) -> None:
    weight, _ = make("fp8", 96, 320)
    with pytest.raises(TypeError, match="^x: dtype torch.float32; .*allowed: bfloat16"):
        frozen_linear(randn(3, 320), weight)
    with pytest.raises(TypeError, match="^dtype: torch.float16; .*allowed: bfloat16"):
        frozen_linear_dx(quantize_fp8(randn(3, 96)), weight, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"^scratch: None; .* needs 30720 elements of .*e4m3fn"):
        frozen_linear_dx(randn(3, 96, dtype=torch.bfloat16), weight)
    assert not calls


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "dx"])
def test_card_without_fp8_gemm(backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight is dequantized into scratch, x stays as it is."""
    on_path(monkeypatch, "dequantize")
    monkeypatch.setattr(MODULE, "quantize_fp8", None)
    weight, dense = make("fp8", 96, 320)
    x = randn(3, 96 if backward else 320, dtype=torch.bfloat16)
    w = dense.bfloat16()
    assert torch.equal(run(x, weight, backward=backward), x @ (w if backward else w.T))
    with pytest.raises(ValueError, match="^d?[xy]: Fp8Rows; cpu has no FP8 GEMM: pass a Tensor"):
        run(quantize_fp8(x), weight, backward=backward)
    with pytest.raises(ValueError, match="^scratch: None"):
        (frozen_linear_dx if backward else frozen_linear)(x, weight)


def test_path_by_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing asks for more of a card than its capability."""
    cuda, fp8_path = torch.device("cuda"), MODULE._fp8_path.__wrapped__  # behind its cache
    paths = {(8, 0): "dequantize", (8, 6): "dequantize", (8, 9): "gemm", (9, 0): "gemm"}
    for capability, path in {**paths, (10, 0): "gemm", (12, 0): "gemm"}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert fp8_path(cuda) == path
    assert fp8_path(torch.device("cpu")) == "reference"
    made = {kind: make(kind, 96, 320)[0] for kind in FORMATS}
    for path in ("reference", "gemm", "dequantize"):
        on_path(monkeypatch, path)
        taken = [kind for kind in FORMATS if multiplies_in_fp8(made[kind])]
        assert taken == ([] if path == "dequantize" else ["fp8"])


# Scratch


def test_scratch_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    size = 96 * 320

    def ask(weight: FrozenWeight) -> tuple[int, int]:
        return tuple(  # type: ignore[return-value]
            scratch_bytes(weight, dtype=torch.bfloat16, backward=b) for b in (False, True)
        )

    fp8 = make("fp8", 96, 320)[0]
    kept = Fp8Weight(fp8.rows, transpose_fp8(fp8.rows.data))
    assert ask(make("bf16", 96, 320)[0]) == (0, 0)
    assert ask(make("int8", 96, 320)[0]) == (2 * size, 2 * size)
    assert ask(make("nf4", 96, 320)[0]) == (2 * size, 2 * size)
    assert ask(fp8) == ask(kept) == (0, 0)
    on_path(monkeypatch, "gemm")
    assert ask(fp8) == (0, size) and ask(kept) == (0, 0)
    on_path(monkeypatch, "dequantize")
    assert ask(fp8) == ask(kept) == (2 * size, 2 * size)


def test_scratch() -> None:
    """One larger buffer of any dtype serves; its tail stays; what is unfit is refused."""
    weight, dense = make("nf4", 96, 320)
    x = randn(3, 320)
    for dtype in (torch.float32, torch.bfloat16, torch.uint8):
        buffer = torch.zeros(2 * 4 * 96 * 320 // dtype.itemsize, dtype=dtype)
        y = frozen_linear(x, weight, scratch=buffer)
        assert torch.equal(y, x @ dense.float().T) and (buffer[len(buffer) // 2 :] == 0).all()
    enough = torch.zeros(96 * 320)
    assert torch.equal(frozen_linear(x, weight, scratch=enough.view(320, 96)), y)
    with pytest.raises(ValueError, match="^scratch: None; this weight needs 30720 elements"):
        frozen_linear(x, weight)
    with pytest.raises(ValueError, match="^scratch: 122876 bytes .*; needed: .* 122880 bytes"):
        frozen_linear(x, weight, scratch=enough[1:])
    with pytest.raises(ValueError, match="^scratch: .*multiple of 16 bytes"):
        frozen_linear(x, weight, scratch=torch.zeros(96 * 320 + 1)[1:])
    with pytest.raises(ValueError, match="^scratch: .*must be contiguous"):
        frozen_linear(x, weight, scratch=torch.zeros(96 * 320, 2)[:, 0])
    with pytest.raises(ValueError, match="^scratch: .* on meta; needed: .* on cpu"):
        frozen_linear(x, weight, scratch=enough.to("meta"))


def test_bad_input_is_named() -> None:
    weights = {kind: make(kind, 96, 320)[0] for kind in FORMATS}
    for weight in weights.values():
        with pytest.raises(ValueError, match=r"^x: shape \[3, 96\]; .*\[96, 320\] .*\[..., 320\]"):
            frozen_linear(randn(3, 96), weight)
        with pytest.raises(ValueError, match=r"^dy: shape \[3, 320\]; .* needs \[..., 96\]"):
            frozen_linear_dx(randn(3, 320), weight)
        with pytest.raises(TypeError, match="^x: dtype torch.int32"):
            frozen_linear(torch.zeros(3, 320, dtype=torch.int32), weight)
        with pytest.raises(ValueError, match="^x: on meta; the weight is on cpu"):
            frozen_linear(torch.zeros(3, 320, device="meta"), weight)
        with pytest.raises(TypeError, match="^dtype: torch.float16; x has torch.float32"):
            frozen_linear(randn(3, 320), weight, dtype=torch.float16)
    for kind in ("bf16", "int8", "nf4"):
        with pytest.raises(TypeError, match="^x: Fp8Rows; a .*Weight takes a Tensor"):
            frozen_linear(quantize_fp8(randn(3, 320)), weights[kind])
    with pytest.raises(TypeError, match="^x: dtype torch.bfloat16; .* allowed: float32"):
        frozen_linear(randn(3, 320, dtype=torch.bfloat16), weights["bf16"])
    with pytest.raises(TypeError, match="^dy: dtype torch.float64; .* allowed: bfloat16, float16"):
        frozen_linear_dx(randn(3, 96).double(), weights["nf4"])
    with pytest.raises(ValueError, match=r"^data: shape \[2, 3, 4\]; allowed: \[N, K\]"):
        Bf16Weight(randn(2, 3, 4))
    for n, k in ((96, 312), (100, 320), (0, 320)):
        rows = Fp8Rows(torch.zeros(n, k, dtype=FP8), torch.ones(n))
        with pytest.raises(ValueError, match=rf"^rows: a weight of \[{n}, {k}\]; .* of 16"):
            Fp8Weight(rows)
    rows = weights["fp8"].rows
    with pytest.raises(TypeError, match="^transposed: dtype torch.float32"):
        Fp8Weight(rows, randn(320, 96))
    with pytest.raises(ValueError, match=r"^transposed: .* must be \[320, 96\], contiguous"):
        Fp8Weight(rows, rows.data.t())
    wide = torch.zeros(320, 128, dtype=FP8)
    assert Fp8Weight(rows, wide[:, 16:112]).transposed is not None
    with pytest.raises(ValueError, match="^transposed: at byte 8; allowed: 16"):
        Fp8Weight(rows, wide[:, 8:104])
    with pytest.raises(ValueError, match=r"^transposed: .* strides \[104, 1\]"):
        Fp8Weight(rows, torch.zeros(320, 104, dtype=FP8)[:, :96])
