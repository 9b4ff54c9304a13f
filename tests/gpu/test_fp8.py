"""FP8 on the GPU: the CPU's bits, and the fused kernels the bits of the unfused ones."""

import math

import pytest
import torch

import xplus_kernels as ops
from tests.gpu import common
from tests.gpu.common import AWKWARD, DEVICE, DTYPES, GPU, MAIN_DTYPE, gradients_of, randn, sized

fp8 = pytest.importorskip("xplus_kernels.fp8", reason="needs xplus_kernels.fp8")
pytestmark = [*GPU, pytest.mark.usefixtures("poisoned", "fp8_card")]
EPS = 1e-6
SPECIAL = (math.nan, math.inf, -math.inf)


@pytest.fixture
def fp8_card():
    common.need_fp8()
    if common.backend.INTERPRET:
        pytest.skip("needs hardware: the interpreter rounds fp32 to fp8 wrongly")


def module(name):
    return pytest.importorskip(f"xplus_kernels.{name}", reason=f"needs xplus_kernels.{name}")


def spread(t, width, dtype, seed=0):
    """Rows of very different size, one of zeros, one with an outlier."""
    x = randn(t, width, seed=seed) * 10.0 ** (torch.arange(t, device=DEVICE) % 5 - 2)[:, None]
    x[t // 2, 0] = 1000.0
    x[t // 3] = 0 if t > 2 else x[t // 3]
    return x.to(dtype)


def assert_same_bits(mine, theirs):
    assert torch.equal(mine.scale.isnan(), theirs.scale.isnan())
    assert torch.equal(mine.scale.nan_to_num(0), theirs.scale.nan_to_num(0))
    assert mine.data.dtype == fp8.FP8 and mine.data.is_contiguous()
    assert torch.equal(codes_of(mine), codes_of(theirs))


def codes_of(rows):
    """Its bytes; a NaN is a NaN, whatever its sign."""
    codes = rows.data.view(torch.uint8)
    return codes.masked_fill((codes & 0x7F) == 0x7F, 0x7F)


def assert_nearest(rows, x):
    """Each row's scale is its amax / 448; each number within half a step of e4m3."""
    assert rows.data.shape == x.shape and rows.scale.shape == x.shape[:1]
    x = x.double()
    scale = x.abs().amax(1).clamp(min=1e-12) / 448
    torch.testing.assert_close(rows.scale.double(), scale, rtol=1e-6, atol=0)
    back = rows.data.double() * rows.scale.double()[:, None]
    half_step = torch.maximum(x.abs() * 2.0**-4, rows.scale.double()[:, None] * 2.0**-10)
    assert ((back - x).abs() <= half_step * (1 + 1e-5)).all()


def assert_nearest_rows(mine, theirs):
    """Scales but for a last bit; codes but for some that it tips over, to their neighbour."""
    torch.testing.assert_close(mine.scale, theirs.scale, rtol=1e-6, atol=0)
    a, b = (codes_of(x).int() for x in (mine, theirs))
    off = (a - b).abs()
    assert off.max() <= 1 and (off > 0).float().mean() < 1e-3


def on_cpu(rows):
    return fp8.Fp8Rows(rows.data.cpu(), rows.scale.cpu())


def check_quantize(x, column=None):
    before = x.clone()
    made = fp8.quantize_fp8(x, column_scale=column)
    assert_same_bits(fp8.quantize_fp8(x, column_scale=column), made)
    flat = x.reshape(-1, x.shape[-1])
    assert_nearest(made, flat.float() * (1 if column is None else column))
    reference = fp8.quantize_fp8_ref(x.cpu(), None if column is None else column.cpu())
    assert_same_bits(on_cpu(made), reference)
    assert torch.equal(x, before)


@sized()
def test_quantize_of_a_block_s_rows(dtype, size, t):
    attention = size.heads * size.head_dim
    packed = attention + 2 * size.kv_heads * size.head_dim
    for width in (size.hidden, attention, packed, size.ffn):
        check_quantize(spread(t, width, dtype))
    check_quantize(spread(t, packed, dtype), randn(packed, seed=1).abs() + 0.1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", AWKWARD)
def test_quantize_awkward_widths(shape, dtype):
    check_quantize(spread(*shape, dtype))
    check_quantize(spread(*shape, dtype), randn(shape[1], seed=1).abs() + 0.1)


def test_quantize_the_widest_gradient():
    """d(gate_up) of the 14B model, 2F = 34 816 columns."""
    size = common.SIZES["14B"]
    check_quantize(spread(5, 2 * size.ffn, MAIN_DTYPE), randn(2 * size.ffn, seed=1).abs() + 0.1)


def test_quantize_any_strides():
    x = randn(130, 320, dtype=MAIN_DTYPE)
    for view in (*gradients_of(x), x[:, 100:196], x[::2], x.T, x.unflatten(1, (2, 160))):
        check_quantize(view)
    wide_column = randn(640, seed=1).abs()[::2]
    check_quantize(x, wide_column)


@pytest.mark.parametrize("bad", SPECIAL)
def test_a_row_that_overflowed_stays_seen(bad):
    x = randn(3, 320)
    x[1, 7] = bad
    made = fp8.quantize_fp8(x)
    back = fp8.dequantize_fp8(made, out=torch.empty_like(x))
    assert back[1].isnan().all() and back[[0, 2]].isfinite().all()
    assert_same_bits(on_cpu(made), fp8.quantize_fp8_ref(x.cpu()))


@pytest.mark.parametrize("out", DTYPES)
@pytest.mark.parametrize("shape", [(3, 17), (130, 96), (5, 5120), (1, 17408)])
def test_dequantize_every_code(shape, out):
    codes = torch.arange(math.prod(shape), device=DEVICE).to(torch.uint8).view(shape)
    rows = fp8.Fp8Rows(codes.view(fp8.FP8), randn(shape[0], seed=1).abs() * 1e-2)
    made = fp8.dequantize_fp8(rows, out=torch.empty(shape, dtype=out, device=DEVICE))
    expected = (rows.data.float() * rows.scale[:, None]).to(out)
    assert torch.equal(made.isnan(), (codes & 0x7F) == 0x7F)
    assert torch.equal(made.nan_to_num(0), expected.nan_to_num(0))


@pytest.mark.parametrize("shape", [(1, 1), (3, 130), (320, 96), (5120, 1024), (4096, 17408)])
def test_transpose(shape):
    shape = tuple(min(s, 200) for s in shape) if common.REHEARSAL else shape
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, device=DEVICE)
    for w in (codes.view(fp8.FP8), codes.view(fp8.FP8)[:, : shape[1] // 2 + 1]):
        expected = w.view(torch.uint8).T
        assert torch.equal(fp8.transpose_fp8(w).view(torch.uint8), expected)
        out = torch.empty(w.T.shape, dtype=fp8.FP8, device=DEVICE)
        assert fp8.transpose_fp8(w, out=out) is out
        assert torch.equal(out.view(torch.uint8), expected) and out.is_contiguous()


def check_norms(t, width, dtype):
    norm = module("norm_fp8")
    x, residual = spread(t, width, dtype), spread(t, width, dtype, seed=2)
    w = (1 + 0.3 * randn(width, seed=1)).to(dtype)
    before = x.clone(), residual.clone()
    # in fp32 the two ops add up a row's squares in another order
    same = assert_nearest_rows if dtype == torch.float32 else assert_same_bits
    fused, normed = norm.rms_norm_fp8(x, w, eps=EPS), ops.rms_norm(x, w, eps=EPS)
    same(fused, fp8.quantize_fp8(normed))
    summed, rows = norm.add_rms_norm_fp8(x, residual, w, eps=EPS)
    plain_sum, normed = ops.add_rms_norm(x, residual, w, eps=EPS)
    assert torch.equal(summed, plain_sum)
    same(rows, fp8.quantize_fp8(normed))
    assert torch.equal(x, before[0]) and torch.equal(residual, before[1])


@sized()
def test_norms_fused_equal_unfused(dtype, size, t):
    check_norms(t, size.hidden, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", AWKWARD)
def test_norms_of_awkward_widths_fused_equal_unfused(shape, dtype):
    check_norms(*shape, dtype)


def check_swiglu(t, f, dtype):
    fused, x, dy = module("swiglu_fp8"), spread(t, 2 * f, dtype), randn(t, f, dtype=dtype, seed=1)
    x = x.clamp(-30, 30)
    column = randn(2 * f, seed=2).abs() + 0.1
    before = x.clone(), dy.clone()
    assert_same_bits(fused.swiglu_fp8(x), fp8.quantize_fp8(ops.swiglu(x)))
    made = fused.swiglu_backward_fp8(dy, x, column_scale=column)
    assert_same_bits(made, fused.swiglu_backward_fp8(dy, x, column_scale=column))
    # not rounded to dtype in between: the gradient in fp32, quantized
    plain = fp8.quantize_fp8(ops.swiglu_backward(dy.float(), x.float()), column_scale=column)
    torch.testing.assert_close(made.scale, plain.scale, rtol=1e-5, atol=0)
    mine, theirs = made.data.float(), plain.data.float()
    off = (mine != theirs).double().mean()
    assert off < 1e-3, off  # exp and fused multiply-adds: at a border a number falls either way
    assert ((mine - theirs).abs() <= theirs.abs() * 2.0**-3 * 1.01 + 2.0**-9).all()
    assert torch.equal(x, before[0]) and torch.equal(dy, before[1])


@sized()
def test_swiglu_fused_equals_unfused(dtype, size, t):
    check_swiglu(t, size.ffn, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", AWKWARD)
def test_swiglu_of_awkward_widths_fused_equals_unfused(shape, dtype):
    check_swiglu(*shape, dtype)


def test_swiglu_gradients_of_any_strides():
    fused, x = module("swiglu_fp8"), randn(130, 640, dtype=MAIN_DTYPE)
    column = randn(640, seed=2).abs() + 0.1
    for dy in gradients_of(randn(130, 320, dtype=MAIN_DTYPE, seed=1)):
        made = fused.swiglu_backward_fp8(dy, x, column_scale=column)
        same = fused.swiglu_backward_fp8(dy.contiguous(), x, column_scale=column)
        assert_same_bits(made, same)


def test_this_card_has_fp8():
    assert fp8.require_fp8(torch.device(DEVICE)) is None


def test_waits_for_nothing():
    norm, fused = module("norm_fp8"), module("swiglu_fp8")
    x, w = randn(130, 640, dtype=MAIN_DTYPE), randn(640, dtype=MAIN_DTYPE)
    column, out = randn(640).abs(), torch.empty_like(x)
    rows = fp8.quantize_fp8(x)
    common.waits_for_nothing(
        lambda: fp8.quantize_fp8(x, column_scale=column),
        lambda: fp8.transpose_fp8(rows.data),
        lambda: fp8.dequantize_fp8(rows, out=out),
        lambda: norm.rms_norm_fp8(x, w, eps=EPS),
        lambda: norm.add_rms_norm_fp8(x, x, w, eps=EPS),
        lambda: fused.swiglu_fp8(x),
        lambda: fused.swiglu_backward_fp8(x[:, :320], x, column_scale=column),
    )
