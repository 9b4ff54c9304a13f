"""Frozen linears on the GPU: each format against the matmul of its dequantized weight."""

import pytest
import torch

from tests.gpu import common
from tests.gpu.common import DEVICE, GPU, MAIN_DTYPE, UNIT, difference, gradients_of, randn

fl = pytest.importorskip("xplus_kernels.frozen_linear", reason="needs xplus_kernels.frozen_linear")
fp8 = pytest.importorskip("xplus_kernels.fp8", reason="needs xplus_kernels.fp8")
int8 = pytest.importorskip("xplus_kernels.int8", reason="needs xplus_kernels.int8")
nf4 = pytest.importorskip("xplus_kernels.nf4", reason="needs xplus_kernels.nf4")
pytestmark = [*GPU, pytest.mark.usefixtures("poisoned")]
FORMATS = ["bf16", "int8", "fp8", "fp8 transposed", "nf4"]
# FP8 GEMMs make bf16 only; on the CPU the reference makes what x is.
DTYPE = MAIN_DTYPE
# No multiple of 16 among them but one: GEMMs pad, and must not read or write beyond.
TOKENS = (1, 17, 32) if common.REHEARSAL else (1, 17, 130, 4097)


def shapes():
    """N, K of a block's four linears."""
    for name, s in common.SIZES.items():
        heads = s.heads * s.head_dim
        packed = heads + 2 * s.kv_heads * s.head_dim
        yield from (
            pytest.param((packed, s.hidden), id=f"{name}-qkv"),
            pytest.param((s.hidden, heads), id=f"{name}-o"),
            pytest.param((2 * s.ffn, s.hidden), id=f"{name}-gate_up"),
            pytest.param((s.hidden, s.ffn), id=f"{name}-down"),
        )


def need(name):
    if not name.startswith("fp8"):
        return
    common.need_fp8()
    if common.backend.INTERPRET:
        pytest.skip("needs hardware: the interpreter rounds fp32 to fp8 wrongly")


def frozen(name, shape, seed=1):
    """A weight in this format, and its value in fp32; rows of very different size."""
    n, k = shape
    w = randn(n, k, seed=seed) * k**-0.5
    w *= 10.0 ** (torch.arange(n, device=DEVICE) % 3 - 1)[:, None]
    if name == "bf16":
        weight = fl.Bf16Weight(w.to(DTYPE))
        return weight, weight.data.float()
    if name == "int8":
        weight = int8.quantize_int8(w)
        dense = torch.empty(shape, dtype=DTYPE, device=DEVICE)
        return weight, int8.dequantize_int8(weight, out=dense).float()
    if name == "nf4":
        codes = torch.randint(0, 256, (n * k // 2,), device=DEVICE).to(torch.uint8)
        weight = nf4.Nf4Weight(codes, w.view(-1, 64).abs().amax(1), shape)
        # what is multiplied is the weight in x's dtype
        dense = torch.empty(shape, dtype=DTYPE, device=DEVICE)
        return weight, nf4.dequantize_nf4(weight, out=dense).float()
    rows = fp8.quantize_fp8(w)
    transposed = fp8.transpose_fp8(rows.data) if name == "fp8 transposed" else None
    return fl.Fp8Weight(rows, transposed), rows.data.float() * rows.scale[:, None]


def scratch(weight, backward):
    size = fl.scratch_bytes(weight, dtype=DTYPE, backward=backward)
    return torch.empty(size, dtype=torch.uint8, device=DEVICE) if size else None


def value(rows):
    """Of Fp8Rows, in fp64."""
    return rows.data.double() * rows.scale.double()[:, None]


def assert_product(made, truth, name, depth):
    """Within a rounding of fp64's product of the same operands, as PyTorch's own matmul is.

    FP8 GEMMs of Hopper keep about 14 bits of a sum and cut the rest, every 32 products.
    """
    assert made.shape == truth.shape and made.dtype == DTYPE
    bound = UNIT[DTYPE] if DTYPE != torch.float32 else 2e-6
    if name.startswith("fp8") and not common.REHEARSAL:
        bound += depth / 32 * 2**-14
    assert difference(made, truth) <= bound


@pytest.mark.parametrize("size", common.SIZES.values(), ids=common.SIZES)
@pytest.mark.parametrize("name", FORMATS)
def test_rows_of_qkv(name, size):
    """Queries, and keys and values, of one weight: views of it, a kept transpose's too."""
    need(name)
    heads, packed = (n * size.head_dim for n in (size.heads, size.heads + 2 * size.kv_heads))
    weight, _ = frozen(name, (packed, size.hidden))
    t = TOKENS[-2]
    x = randn(t, size.hidden, dtype=DTYPE)
    whole = fl.frozen_linear(x, weight, scratch=scratch(weight, False))
    for start, end in ((0, heads), (heads, packed)):
        part = fl.frozen_rows(weight, start, end)
        assert type(part) is type(weight)
        little = 2 * UNIT[DTYPE]  # another tile of a GEMM may sum in another order
        y = fl.frozen_linear(x, part, scratch=scratch(weight, False))
        assert difference(y, whole[:, start:end]) <= little
        dy = randn(t, end - start, dtype=DTYPE, seed=2)
        padded = torch.zeros(t, packed, dtype=DTYPE, device=DEVICE)
        padded[:, start:end] = dy
        dx = fl.frozen_linear_dx(dy, part, scratch=scratch(weight, True))
        truth = fl.frozen_linear_dx(padded, weight, scratch=scratch(weight, True))
        assert dx.shape == truth.shape
        assert difference(dx, truth) <= little + (packed / 32 * 2**-14 if "fp8" in name else 0)


@pytest.mark.parametrize("shape", list(shapes()))
@pytest.mark.parametrize("name", FORMATS)
def test_both_ways(name, shape):
    need(name)
    n, k = shape
    weight, dense = frozen(name, shape)
    dense = dense.double()
    for t in TOKENS:
        x, dy = randn(t, k, dtype=DTYPE, seed=2), randn(t, n, dtype=DTYPE, seed=3)
        before = x.clone(), dy.clone()
        there, back = scratch(weight, False), scratch(weight, True)
        y = fl.frozen_linear(x, weight, scratch=there)
        dx = fl.frozen_linear_dx(dy, weight, scratch=back)
        assert torch.equal(fl.frozen_linear(x, weight, scratch=there), y)
        assert torch.equal(fl.frozen_linear_dx(dy, weight, scratch=back), dx)
        assert torch.equal(x, before[0]) and torch.equal(dy, before[1])
        if not name.startswith("fp8"):
            assert_product(y, x.double() @ dense.T, name, k)
            assert_product(dx, dy.double() @ dense, name, n)
            continue
        rows = fp8.quantize_fp8(x)
        folded = fp8.quantize_fp8(dy, column_scale=weight.rows.scale)
        assert_product(y, value(rows) @ dense.T, name, k)
        assert_product(dx, value(folded) @ weight.rows.data.double(), name, n)
        assert torch.equal(fl.frozen_linear(rows, weight, dtype=DTYPE, scratch=there), y)
        assert torch.equal(fl.frozen_linear_dx(folded, weight, dtype=DTYPE, scratch=back), dx)
        # and against what was never quantized: e4m3 keeps 4 bits, twice
        assert difference(y, x.double() @ dense.T) < 0.06
        assert difference(dx, dy.double() @ dense) < 0.06


@pytest.mark.parametrize("name", ["fp8", "fp8 transposed"])
def test_small_whole_numbers_are_exact_in_fp8(name):
    """-1, 0, 1 times -1, 0, 1: no rounding anywhere, so that one misplaced row or scale shows."""
    need(name)
    t, n, k = 17, 48, 64
    generator = common.generator(0)

    def whole(*shape):
        made = torch.randint(-1, 2, shape, generator=generator, device=DEVICE).to(DTYPE)
        made[:, 0] = 1  # amax of every row
        return made

    # rows' sizes are powers of two: their scales are exact and all different
    sizes = 2.0 ** (torch.arange(n, device=DEVICE) % 7 - 3)
    w = whole(n, k).float() * sizes[:, None]
    rows = fp8.quantize_fp8(w)
    kept = fp8.transpose_fp8(rows.data) if name == "fp8 transposed" else None
    weight = fl.Fp8Weight(rows, kept)
    x = whole(t, k)
    y = fl.frozen_linear(x, weight, scratch=scratch(weight, False))
    assert torch.equal(y.double(), x.double() @ w.double().T)
    dy = (whole(t, n).float() / sizes).to(DTYPE)  # times the weight's scales: one size again
    dx = fl.frozen_linear_dx(dy, weight, scratch=scratch(weight, True))
    assert torch.equal(dx.double(), dy.double() @ w.double())


@pytest.mark.parametrize("name", FORMATS)
def test_axes_and_strides(name):
    need(name)
    weight, dense = frozen(name, (96, 64))
    there, back = scratch(weight, False), scratch(weight, True)
    x, dy = randn(17, 64, dtype=DTYPE, seed=2), randn(17, 96, dtype=DTYPE, seed=3)
    y = fl.frozen_linear(x[None], weight, scratch=there)
    assert y.shape == (1, 17, 96)
    # leading axes and strides may choose another GEMM: near, not equal
    assert difference(y[0], fl.frozen_linear(x, weight, scratch=there)) < 2 * UNIT[DTYPE]
    for op, given, buffer in (
        (fl.frozen_linear, x, there),
        (fl.frozen_linear_dx, dy, back),
    ):
        for view in gradients_of(given):
            mine = op(view, weight, scratch=buffer)
            same = op(view.contiguous(), weight, scratch=buffer)
            assert difference(mine, same) < 2 * UNIT[DTYPE]


def test_nf4_and_fp8_say_what_scratch_they_need():
    weight, _ = frozen("nf4", (96, 64))
    x = randn(3, 64, dtype=DTYPE)
    with pytest.raises(ValueError, match="scratch"):
        fl.frozen_linear(x, weight)
    with pytest.raises(ValueError, match="scratch"):
        fl.frozen_linear(x, weight, scratch=torch.empty(96 * 64 - 1, dtype=DTYPE, device=DEVICE))


@pytest.mark.parametrize("name", FORMATS)
def test_waits_for_nothing(name):
    need(name)
    weight, _ = frozen(name, (96, 64))
    there, back = scratch(weight, False), scratch(weight, True)
    x, dy = randn(17, 64, dtype=DTYPE), randn(17, 96, dtype=DTYPE)
    common.waits_for_nothing(
        lambda: fl.frozen_linear(x, weight, scratch=there),
        lambda: fl.frozen_linear_dx(dy, weight, scratch=back),
    )


@pytest.mark.parametrize("name", ["fp8 transposed", "int8", "nf4"])
def test_no_memory_beside_the_result_and_the_quantized_rows(name):
    need(name)
    n, k = (96, 64) if common.REHEARSAL else (12_288, 4096)
    t = 17 if common.REHEARSAL else 4096
    weight, dense = frozen(name, (n, k))
    del dense
    buffer, x = scratch(weight, False), randn(t, k, dtype=DTYPE)
    used = common.extra_memory(lambda: fl.frozen_linear(x, weight, scratch=buffer))
    quantized = t * (k + 4) if name.startswith("fp8") else 0
    assert used <= t * n * 2 + quantized + common.MIB
