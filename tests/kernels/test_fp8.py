"""FP8 rows on the references: values, the fused ops against the unfused, what is not finite."""

import pytest
import torch

import xplus_kernels as ops
from xplus_kernels.fp8 import (
    AMAX_FLOOR,
    FP8,
    FP8_MAX,
    Fp8Rows,
    dequantize_fp8,
    quantize_fp8,
    require_fp8,
    transpose_fp8,
)
from xplus_kernels.norm_fp8 import add_rms_norm_fp8, rms_norm_fp8
from xplus_kernels.swiglu_fp8 import swiglu_backward_fp8, swiglu_fp8

EPS = 1e-6
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
ALL_CODES = torch.arange(256, dtype=torch.uint8)


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def read(rows):
    """In fp64, exactly."""
    return rows.data.double() * rows.scale.double()[:, None]


def same(mine, theirs):
    """Bit for bit, NaN included."""
    assert torch.equal(mine.data.view(torch.uint8), theirs.data.view(torch.uint8))
    assert torch.equal(mine.scale.view(torch.int32), theirs.scale.view(torch.int32))


def nearest_e4m3(x):
    """Rounded to nearest even on e4m3's grid, in fp64: steps of 2^-3 of a power, of 2^-9 below."""
    exponent = torch.frexp(x).exponent - 1
    step = torch.ldexp(torch.ones_like(x), exponent.clamp(min=-6) - 3)
    return (x / step).round() * step


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1, 96), (3, 320), (130, 96), (2, 17408), (2, 3, 7), (4, 1)])
def test_values(shape, dtype):
    x = 5 * randn(*shape, dtype=dtype)
    q = quantize_fp8(x)
    flat = x.reshape(-1, shape[-1])
    assert q.data.shape == flat.shape and q.data.dtype == FP8 and q.data.is_contiguous()
    amax = flat.double().abs().amax(-1)
    assert torch.equal(q.scale, (amax / FP8_MAX).float())
    # fp32 knows which of two neighbours is nearer, but for a few that lie halfway
    scaled = flat.double() / q.scale.double()[:, None]
    exact = nearest_e4m3(scaled)
    assert (q.data.double() != exact).double().mean() < 1e-3
    assert ((q.data.double() - scaled).abs() <= scaled.abs() * 2**-4 * 1.00001 + 2**-10).all()
    assert torch.equal(q.data.double().abs().amax(-1), torch.full_like(amax, FP8_MAX))


@pytest.mark.parametrize("dtype", FLOATS)
def test_round_trip(dtype):
    """Half a step: 2^-4 of a value at most; 2.7 % of the norm on normal numbers."""
    x = randn(64, 512, dtype=dtype)
    q = quantize_fp8(x)
    out = dequantize_fp8(q, out=torch.full((64, 512), torch.nan, dtype=dtype))
    assert torch.equal(out, read(q).to(dtype))
    error = (out.double() - x.double()).norm() / x.double().norm()
    assert 0.02 < error < 0.03
    again = quantize_fp8(out)  # a grid point stays: but for the rounding of out to dtype
    if dtype == torch.float32:
        assert torch.equal(again.data.float(), q.data.float())


def test_column_scale():
    x, c = randn(5, 96), randn(96, seed=1).abs() + 0.1
    same(quantize_fp8(x, column_scale=c), quantize_fp8(x * c))
    # In fp32: rounded to bf16 before, some would come to lie elsewhere
    x = x.bfloat16()
    same(quantize_fp8(x, column_scale=c), quantize_fp8(x.float() * c))
    late = quantize_fp8((x.float() * c).bfloat16())
    assert not torch.equal(quantize_fp8(x, column_scale=c).data.float(), late.data.float())
    powers = torch.ldexp(torch.ones(96), torch.arange(96) % 5 - 2)
    folded = quantize_fp8(x / powers, column_scale=powers)
    same(folded, quantize_fp8(x))
    strided = randn(96, 2, seed=1)[:, 0]
    same(quantize_fp8(x, column_scale=strided), quantize_fp8(x.float() * strided))


def test_zero_rows_and_tiny_ones():
    x = torch.zeros(3, 96)
    x[1] = 1e-20
    x[2, 5] = 1e-38
    q = quantize_fp8(x)
    assert torch.equal(q.scale, torch.full((3,), AMAX_FLOOR) / FP8_MAX)
    assert torch.equal(q.data.float(), torch.zeros(3, 96))


def test_an_outlier_costs_its_own_row_only():
    x = randn(3, 96)
    x[1, 7] = 1e4
    q, plain = quantize_fp8(x), quantize_fp8(randn(3, 96))
    for row in (0, 2):
        assert torch.equal(q.data[row].float(), plain.data[row].float())
    assert abs(read(q)[1, 7].item() - 1e4) < 1e-2
    # below half the least e4m3, 2^-10, the others vanish, and none errs by more
    others = torch.arange(96) != 7
    error = (read(q)[1] - x[1])[others].abs()
    assert (error <= x[1, others].abs() * 2**-4 + 2**-10 * q.scale[1] * 1.001).all()


def test_the_largest_and_the_scale_of_fp32():
    x = torch.tensor([[3.4e38, -3.4e38, 1e37], [1e-11, -2e-11, 0.0]])
    q = quantize_fp8(x)
    assert torch.equal(q.data.float()[0, :2], torch.tensor([FP8_MAX, -FP8_MAX]))
    assert ((read(q) - x.double()).abs() <= 2**-4 * x.double().abs() * 1.001).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", FLOATS)
def test_what_is_not_finite_spoils_its_row_and_no_other(bad, dtype):
    x = randn(3, 96, dtype=dtype)
    clean = quantize_fp8(x)
    x[1, 40] = bad
    q = quantize_fp8(x)
    assert not q.scale[1].isfinite()
    out = dequantize_fp8(q, out=torch.zeros(3, 96))
    assert out[1].isnan().all() and out[0].isfinite().all()
    for row in (0, 2):
        assert torch.equal(q.data[row].float(), clean.data[row].float())
    w = torch.ones(96, dtype=dtype)
    assert read(rms_norm_fp8(x, w, eps=EPS))[1].isnan().all()
    assert read(swiglu_fp8(x))[1].isnan().all()


def test_strides():
    base = randn(6, 200)
    views = [base[:, 100:196], base[::2, :96], base.unflatten(1, (2, 100))[:, :, :96]]
    views += [randn(96, 5).T, torch.ones(()).expand(4, 96), base[:1, :96].expand(3, 96)]
    for x in views:
        before = x.clone()
        same(quantize_fp8(x), quantize_fp8(x.contiguous()))
        assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1, 96), (3, 320), (130, 96), (2, 5120), (2, 3, 7)])
def test_the_fused_norms_are_the_two_ops(shape, dtype):
    x, r = 3 * randn(*shape, dtype=dtype), randn(*shape, dtype=dtype, seed=1)
    w = 1 + 0.3 * randn(shape[-1], dtype=dtype, seed=2)
    same(rms_norm_fp8(x, w, eps=EPS), quantize_fp8(ops.rms_norm(x, w, eps=EPS)))
    summed, rows = add_rms_norm_fp8(x, r, w, eps=EPS)
    expected, normed = ops.add_rms_norm(x, r, w, eps=EPS)
    assert torch.equal(summed, expected)
    same(rows, quantize_fp8(normed))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1, 96), (3, 320), (130, 96), (2, 17408), (2, 3, 7)])
def test_the_fused_swiglu_is_the_two_ops(shape, dtype):
    *lead, f = shape
    x, dy = 3 * randn(*lead, 2 * f, dtype=dtype), randn(*shape, dtype=dtype, seed=1)
    same(swiglu_fp8(x), quantize_fp8(ops.swiglu(x)))
    c = randn(2 * f, seed=2).abs() + 0.1
    rows = swiglu_backward_fp8(dy, x, column_scale=c)
    wide = ops.swiglu_backward(dy.float(), x.float())  # not rounded between
    same(rows, quantize_fp8(wide, column_scale=c))
    truth = (ops.swiglu_backward(dy.double(), x.double()) * c).reshape(-1, 2 * f)
    half_a_step = truth.abs() * 2**-4 + 2**-10 * rows.scale[:, None]
    assert ((read(rows) - truth).abs() <= 1.001 * half_a_step + 1e-5 * truth.abs().amax()).all()


def test_transpose():
    codes = ALL_CODES.repeat(3, 1)[:, :200].contiguous().view(FP8)
    for w in (codes, codes[:, 3:150], codes[::2], codes.T, codes[:1].expand(4, 200)):
        out = transpose_fp8(w)
        assert out.shape == (w.shape[1], w.shape[0]) and out.is_contiguous()
        assert torch.equal(out.view(torch.uint8), w.view(torch.uint8).T)
    given = torch.empty(200, 3, dtype=FP8)
    assert transpose_fp8(codes, out=given) is given
    assert torch.equal(given.view(torch.uint8), codes.view(torch.uint8).T)
    assert transpose_fp8(codes[:0]).shape == (200, 0)


def test_no_rows():
    x = torch.zeros(0, 96)
    q = quantize_fp8(x)
    assert q.data.shape == (0, 96) and q.scale.shape == (0,)
    assert dequantize_fp8(q, out=torch.empty(0, 96)).shape == (0, 96)
    assert rms_norm_fp8(x, torch.ones(96), eps=EPS).data.shape == (0, 96)
    assert swiglu_fp8(x).data.shape == (0, 48)


def test_cards_without_fp8_are_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(ValueError, match=r"^cuda:1: NVIDIA A100 has capability 8.0; FP8 needs 8.9"):
        require_fp8(torch.device("cuda", 1))
    require_fp8(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    require_fp8(torch.device("cuda", 1))


def test_bad_input_is_named():
    x, c = randn(3, 96), torch.ones(96)
    q = quantize_fp8(x)
    with pytest.raises(TypeError, match="^x: dtype torch.int32; allowed: bfloat16"):
        quantize_fp8(x.int())
    with pytest.raises(ValueError, match=r"^x: shape \[\]"):
        quantize_fp8(torch.tensor(1.0))
    with pytest.raises(ValueError, match="^x: .* 65537 columns, allowed: up to 65536"):
        quantize_fp8(torch.zeros(1, 65537))
    with pytest.raises(TypeError, match="^column_scale: dtype torch.bfloat16"):
        quantize_fp8(x, column_scale=c.bfloat16())
    with pytest.raises(ValueError, match=r"^column_scale: shape \[1, 96\]; .* must be \[96\]"):
        quantize_fp8(x, column_scale=c[None])
    with pytest.raises(ValueError, match="^column_scale: on meta; x is on cpu"):
        quantize_fp8(x, column_scale=c.to("meta"))
    with pytest.raises(TypeError, match="^w: dtype torch.float32"):
        transpose_fp8(x)
    with pytest.raises(ValueError, match=r"^w: shape \[96\]; allowed: \[N, K\]"):
        transpose_fp8(q.data[0])
    with pytest.raises(ValueError, match=r"^out: shape \[3, 96\]; .* must be \[96, 3\]"):
        transpose_fp8(q.data, out=q.data)
    with pytest.raises(TypeError, match="^out: dtype torch.uint8"):
        transpose_fp8(q.data, out=torch.empty(96, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"^out: strides \(1, 96\); it must be contiguous"):
        transpose_fp8(q.data, out=torch.empty(3, 96, dtype=FP8).T)
    with pytest.raises(TypeError, match="^out: dtype torch.float64; allowed: bfloat16"):
        dequantize_fp8(q, out=x.double())
    with pytest.raises(ValueError, match=r"^out: shape \[3, 95\]; .* must be \[3, 96\]"):
        dequantize_fp8(q, out=x[:, 1:])
    with pytest.raises(TypeError, match="^rows.data: dtype torch.float32"):
        dequantize_fp8(Fp8Rows(x, q.scale), out=x)
    with pytest.raises(TypeError, match="^rows.scale: dtype torch.float64"):
        dequantize_fp8(Fp8Rows(q.data, q.scale.double()), out=x)
    with pytest.raises(ValueError, match=r"^rows: data \[3, 96\], scale \[2\]"):
        dequantize_fp8(Fp8Rows(q.data, q.scale[1:]), out=x)
    with pytest.raises(ValueError, match=r"^rows: strides \(1, 3\)"):
        dequantize_fp8(Fp8Rows(transpose_fp8(q.data).T, q.scale), out=x)
    with pytest.raises(ValueError, match=r"^weight: shape \[95\]"):
        rms_norm_fp8(x, c[1:], eps=EPS)
    with pytest.raises(TypeError, match="^residual: dtype torch.float16"):
        add_rms_norm_fp8(x, x.half(), c, eps=EPS)
    with pytest.raises(ValueError, match=r"^gate_up: shape \[3, 95\]; its last axis must be even"):
        swiglu_fp8(x[:, 1:])
    with pytest.raises(ValueError, match=r"^dy: shape \[3, 96\]; .* must be \[3, 48\]"):
        swiglu_backward_fp8(x, x, column_scale=c)
    with pytest.raises(ValueError, match=r"^column_scale: shape \[48\]; .* must be \[96\]"):
        swiglu_backward_fp8(x[:, :48], x, column_scale=c[:48])
