"""The Triton code that makes and reads FP8 rows, interpreted on a CPU.

The interpreter casts fp32 to e4m3 wrongly where the mantissa carries (and NaN to 384): here
PyTorch's cast takes its place, so that the rest can be held to every bit.
"""

import pytest
import torch

import xplus_kernels as ops
from tests.kernels.interpreter.common import INTERPRETED, randn
from xplus_kernels import backend
from xplus_kernels.fp8 import (
    FP8,
    Fp8Rows,
    dequantize_fp8,
    dequantize_fp8_ref,
    quantize_fp8,
    quantize_fp8_ref,
    transpose_fp8,
)
from xplus_kernels.norm_fp8 import (
    add_rms_norm_fp8,
    add_rms_norm_fp8_ref,
    rms_norm_fp8,
    rms_norm_fp8_ref,
)
from xplus_kernels.swiglu_fp8 import (
    swiglu_backward_fp8,
    swiglu_backward_fp8_ref,
    swiglu_fp8,
    swiglu_fp8_ref,
)

pytestmark = [INTERPRETED, pytest.mark.usefixtures("poisoned", "cast_as_pytorch_does")]
EPS = 1e-6
DTYPES = [torch.float32, torch.float16]
# A scale against the reference's: a sum's order and exp's last bit; one rounding of the row
SCALE = {torch.float32: 2e-6, torch.float16: 2**-10}


@pytest.fixture
def cast_as_pytorch_does(monkeypatch):
    if not backend.INTERPRET:
        return
    from triton.runtime import interpreter

    wrong = interpreter._convert_float

    def convert(array, source, target, rounding):
        if (source.name, target.name) != ("fp32", "fp8e4nv"):
            return wrong(array, source, target, rounding)
        return torch.from_numpy(array.copy()).to(FP8).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", convert)


def same(mine, theirs):
    """Bit for bit, NaN included."""
    assert mine.data.shape == theirs.data.shape and mine.data.dtype == FP8
    assert torch.equal(mine.data.view(torch.uint8), theirs.data.view(torch.uint8))
    assert torch.equal(mine.scale.view(torch.int32), theirs.scale.view(torch.int32))


def near(mine, reference, dtype):
    """Scales but for a rounding; values by a step of e4m3 at most, and few of them."""
    assert mine.data.shape == reference.data.shape
    assert ((mine.scale / reference.scale - 1).abs() <= SCALE[dtype]).all()
    a, b = mine.data.double(), reference.data.double()
    assert (a - b).abs().le(2**-3 * a.abs().maximum(b.abs()) + 2**-9).all()
    share = 1e-2 if dtype == torch.float16 else 1e-3
    assert (a != b).double().sum() <= 1 + share * a.numel()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 96), (3, 320), (130, 96), (2, 5120), (1, 17408), (2, 3, 7), (5, 1), (1, 24576)]
)
def test_quantize(shape, dtype):
    x = 3 * randn(*shape, dtype=dtype)
    before = x.clone()
    mine = quantize_fp8(x)
    same(mine, quantize_fp8_ref(x))
    same(mine, quantize_fp8(x))
    c = randn(shape[-1], seed=1).abs() + 0.1
    same(quantize_fp8(x, column_scale=c), quantize_fp8_ref(x, c))
    strided = randn(shape[-1], 2, seed=1)[:, 0]
    same(quantize_fp8(x, column_scale=strided), quantize_fp8_ref(x, strided))
    assert torch.equal(x, before)


def test_quantize_reads_any_strides():
    base, c = randn(6, 200), randn(96, seed=1)
    views = [base[:, 100:196], base[::2, :96], base.unflatten(1, (2, 100))[:, :, :96]]
    views += [randn(96, 5).T, torch.ones(()).expand(4, 96), base[:1, :96].expand(3, 96)]
    for x in views:
        same(quantize_fp8(x), quantize_fp8_ref(x))
        same(quantize_fp8(x, column_scale=c), quantize_fp8_ref(x, c))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow")
def test_rows_of_zeros_outliers_and_what_is_not_finite():
    x = randn(7, 320)
    x[1], x[2, 5], x[3] = 0, 1e6, 1e-20
    x[4, 300], x[5, 7], x[6, 0] = torch.nan, torch.inf, -torch.inf
    q = quantize_fp8(x)
    same(Fp8Rows(q.data[:4], q.scale[:4]), quantize_fp8_ref(x[:4]))
    assert q.scale[4].isnan() and q.scale[5:].isinf().all()
    out = dequantize_fp8(q, out=torch.zeros(7, 320))
    assert out[4:].isnan().all() and out[:4].isfinite().all()
    for rows in (rms_norm_fp8(x, torch.ones(320), eps=EPS), swiglu_fp8(x)):
        assert (rows.data.float() * rows.scale[:, None])[4:].isnan().all()
        assert rows.scale[:4].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 96), (3, 320), (130, 96), (2, 5120), (2, 3, 7)])
def test_norms(shape, dtype):
    x, r = 3 * randn(*shape, dtype=dtype), randn(*shape, dtype=dtype, seed=1)
    w = 1 + 0.3 * randn(shape[-1], dtype=dtype, seed=2)
    rows = rms_norm_fp8(x, w, eps=EPS)
    same(rows, quantize_fp8(ops.rms_norm(x, w, eps=EPS)))
    near(rows, rms_norm_fp8_ref(x, w, eps=EPS), dtype)
    before = x.clone(), r.clone()
    summed, rows = add_rms_norm_fp8(x, r, w, eps=EPS)
    expected, normed = ops.add_rms_norm(x, r, w, eps=EPS)
    assert torch.equal(summed, expected) and summed.shape == x.shape
    same(rows, quantize_fp8(normed))
    near(rows, add_rms_norm_fp8_ref(x, r, w, eps=EPS)[1], dtype)
    assert torch.equal(x, before[0]) and torch.equal(r, before[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 96), (3, 320), (130, 96), (2, 5120), (1, 17408), (2, 3, 7)])
def test_swiglu(shape, dtype):
    *lead, f = shape
    x, dy = 3 * randn(*lead, 2 * f, dtype=dtype), randn(*shape, dtype=dtype, seed=1)
    rows = swiglu_fp8(x)
    same(rows, quantize_fp8(ops.swiglu(x)))
    near(rows, swiglu_fp8_ref(x), dtype)
    c = randn(2 * f, seed=2).abs() + 0.1
    rows = swiglu_backward_fp8(dy, x, column_scale=c)
    near(rows, swiglu_backward_fp8_ref(dy, x, column_scale=c), torch.float32)
    wide = ops.swiglu_backward(dy.float(), x.float())  # not rounded between
    same(rows, quantize_fp8(wide, column_scale=c))


def test_fused_ops_read_any_strides():
    base, w = randn(6, 400), randn(192, seed=1)
    inputs = [base[:, 100:292], base[::2, :192], base.unflatten(1, (2, 200))[:, :, :192]]
    inputs.append(randn(192, 5).T)
    c = randn(192, 2, seed=3)[:, 1]
    for x in inputs:
        plain = x.contiguous()
        same(rms_norm_fp8(x, w, eps=EPS), rms_norm_fp8(plain, w, eps=EPS))
        r = torch.ones(()).expand(x.shape)
        mine = add_rms_norm_fp8(x, r, w, eps=EPS)
        theirs = add_rms_norm_fp8(plain, r.contiguous(), w, eps=EPS)
        assert torch.equal(mine[0], theirs[0])
        same(mine[1], theirs[1])
        same(swiglu_fp8(x), swiglu_fp8(plain))
        dy = randn(*x.shape[:-1], 96, seed=2)
        for grad in (dy, torch.ones(()).expand(dy.shape), dy[..., :1].expand(dy.shape)):
            mine = swiglu_backward_fp8(grad, x, column_scale=c)
            theirs = swiglu_backward_fp8(grad.contiguous(), plain, column_scale=c.contiguous())
            same(mine, theirs)


@pytest.mark.parametrize("shape", [(1, 96), (130, 320), (3, 5120), (257, 65), (16, 16)])
def test_transpose(shape):
    n, k = shape
    codes = (torch.arange(n * k) * 37 % 256).to(torch.uint8).reshape(n, k).view(FP8)
    for w in (codes, codes[:, k // 3 :], codes[::2], codes.T, codes[:1].expand(4, k)):
        out = transpose_fp8(w)
        assert out.shape == (w.shape[1], w.shape[0]) and out.is_contiguous()
        assert torch.equal(out.view(torch.uint8), w.view(torch.uint8).T)
    given = torch.empty(k, n, dtype=FP8)
    assert transpose_fp8(codes, out=given) is given
    assert torch.equal(given.view(torch.uint8), codes.view(torch.uint8).T)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [256, 96, 5120, 1])
def test_dequantize_decodes_every_code(width, dtype):
    codes = (torch.arange(3 * width) * 11 % 256).to(torch.uint8).reshape(3, width)
    rows = Fp8Rows(codes.view(FP8), torch.tensor([1.0, 0.01, 3e-4]))
    out = torch.full((3, width), 777.0, dtype=dtype)
    assert dequantize_fp8(rows, out=out) is out
    expected = dequantize_fp8_ref(rows, torch.zeros(3, width, dtype=dtype))
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(), expected.nan_to_num())
