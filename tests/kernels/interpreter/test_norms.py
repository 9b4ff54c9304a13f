"""The Triton code of the norms, interpreted on a CPU, against the references.

fp32: the reference's numbers but for the order of a sum. fp16: no further from the fp32 truth
than the reference in fp16, by a tenth and one rounding.
"""

import sys

import pytest
import torch

import xplus_kernels as ops
from tests.tiny import difference
from xplus_kernels import backend

pytestmark = pytest.mark.skipif(
    not backend.INTERPRET, reason="needs Triton and TRITON_INTERPRET=1 before Python starts"
)
MODULE = sys.modules["xplus_kernels.rms_norm"]  # in the package its name is the function
EPS = 1e-6
SIZES = [(1, 96), (3, 320), (130, 96), (3, 5120), (17, 1024), (2, 7), (5, 2)]
DTYPES = [torch.float32, torch.float16]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Whatever a kernel does not store stays NaN."""
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, make=make, **k: make(*a, **k).fill_(torch.nan))


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(mine, reference, truth):
    """`reference` is in mine's dtype; `truth` is the reference on the same inputs in fp64."""
    assert mine.shape == truth.shape and mine.dtype == reference.dtype
    rounding = {torch.float32: 2e-6, torch.float16: 2**-11}[mine.dtype]
    assert difference(mine, truth) <= 1.1 * difference(reference, truth) + rounding


def check(op, reference, *tensors, **options):
    """Outputs of op against the reference, inputs unchanged, and the same bits a second time."""
    before = [t if t is None else t.clone() for t in tensors]
    mine = op(*tensors, eps=EPS, **options)
    again = op(*tensors, eps=EPS, **options)
    theirs = reference(*tensors, eps=EPS, **options)
    truth = reference(*(t if t is None else t.double() for t in tensors), eps=EPS, **options)
    outputs = [x if isinstance(x, tuple) else (x,) for x in (mine, again, theirs, truth)]
    for m, a, r, t in zip(*outputs, strict=True):
        if t is None:
            assert m is None and a is None
        else:
            assert torch.equal(m, a)
            assert_close(m, r, t)
    for t, b in zip(tensors, before, strict=True):
        assert t is None or torch.equal(t, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_rms_norm(size, dtype):
    x, w = randn(*size, dtype=dtype), 1 + 0.3 * randn(size[1], dtype=dtype, seed=1)
    check(ops.rms_norm, MODULE.rms_norm_ref, x, w)
    dy = randn(*size, dtype=dtype, seed=2)
    for need_dw in (False, True):
        check(ops.rms_norm_backward, MODULE.rms_norm_backward_ref, dy, x, w, need_dw=need_dw)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_add_rms_norm(size, dtype):
    x, r = randn(*size, dtype=dtype), randn(*size, dtype=dtype, seed=3)
    w = 1 + 0.3 * randn(size[1], dtype=dtype, seed=1)
    check(ops.add_rms_norm, MODULE.add_rms_norm_ref, x, r, w)
    assert torch.equal(ops.add_rms_norm(x, r, w, eps=EPS)[0], x + r)
    dy, ds = (randn(*size, dtype=dtype, seed=s) for s in (2, 4))
    for grad, need_dw in ((ds, False), (ds, True), (None, False), (None, True)):
        check(
            ops.add_rms_norm_backward, MODULE.add_rms_norm_backward_ref, grad, dy, x, w,
            need_dw=need_dw,
        )  # fmt: skip


def test_rounds_the_normed_row_before_the_weight():
    """Equal to Hugging Face's fp16 norm in nearly every bit: a sum's order may move a few."""
    x, w = randn(64, 320, dtype=torch.float16), randn(320, dtype=torch.float16, seed=1)
    y, theirs = ops.rms_norm(x, w, eps=EPS), MODULE.rms_norm_ref(x, w, eps=EPS)
    late = (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, True) + EPS) * w.float()).half()
    assert (y != theirs).float().mean() < 1e-3 < (late != theirs).float().mean()


@pytest.mark.parametrize("need_dw", [False, True])
def test_strides(need_dw):
    """A slice of wider rows, heads inside a packed row, every second row, a transpose."""
    base, w = randn(6, 200), randn(96, seed=1)
    inputs = [base[:, 100:196], base.unflatten(1, (2, 100))[:, :, :96], base[::2, :96]]
    inputs.append(randn(96, 5).T)
    for x in inputs:
        dy = randn(*x.shape, seed=2)
        gradients = [dy, torch.ones(()).expand(x.shape), dy[..., :1].expand(x.shape)]
        gradients += [dy[:1].expand(x.shape), randn(*x.shape, 2)[..., 0]]
        check(ops.rms_norm, MODULE.rms_norm_ref, x, w)
        check(ops.add_rms_norm, MODULE.add_rms_norm_ref, x, gradients[1], w)
        for grad in gradients:
            check(ops.rms_norm_backward, MODULE.rms_norm_backward_ref, grad, x, w, need_dw=need_dw)
            check(
                ops.add_rms_norm_backward, MODULE.add_rms_norm_backward_ref, grad, dy, x, w,
                need_dw=need_dw,
            )  # fmt: skip


def test_a_frozen_backward_makes_no_partial_sums(monkeypatch):
    made = []
    make = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: made.append(a[0]) or make(*a, **k))
    x = randn(3, 96)
    ops.rms_norm_backward(x, x, x[0], eps=EPS, need_dw=False)
    assert made == [(3, 96)]


def test_no_rows():
    x, w = torch.zeros(0, 96), randn(96)
    assert ops.rms_norm(x, w, eps=EPS).shape == (0, 96)
    dx, dw = ops.rms_norm_backward(x, x, w, eps=EPS, need_dw=True)
    assert dx.shape == (0, 96) and torch.equal(dw, torch.zeros(96))


def test_bad_input_is_named():
    x, w = randn(3, 96), randn(96)
    with pytest.raises(TypeError, match="^x: dtype torch.int64; allowed: bfloat16"):
        ops.rms_norm(x.long(), w, eps=EPS)
    with pytest.raises(ValueError, match=r"^weight: shape \[95\]; .* must be \[96\]"):
        ops.rms_norm(x, w[1:], eps=EPS)
    with pytest.raises(TypeError, match="^weight: dtype torch.float16; x has torch.float32"):
        ops.rms_norm(x, w.half(), eps=EPS)
    with pytest.raises(ValueError, match=r"^dy: shape \[2, 96\]"):
        ops.rms_norm_backward(x[1:], x, w, eps=EPS, need_dw=False)
    with pytest.raises(ValueError, match="^residual: on meta; x is on cpu"):
        ops.add_rms_norm(x, x.to("meta"), w, eps=EPS)
    with pytest.raises(ValueError, match=r"^dsummed: shape \[3, 1\]"):
        ops.add_rms_norm_backward(x[:, :1], x, x, w, eps=EPS, need_dw=False)
