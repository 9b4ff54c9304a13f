"""The Triton code of the norms, interpreted on a CPU, against the references."""

import functools
import sys

import pytest
import torch

import xplus_kernels as ops
from tests.kernels.interpreter.common import INTERPRETED, ROUNDING, check, randn

pytestmark = [INTERPRETED, pytest.mark.usefixtures("poisoned")]
MODULE = sys.modules["xplus_kernels.rms_norm"]  # in the package its name is the function
EPS = 1e-6
check_norm = functools.partial(check, eps=EPS)
SIZES = [(1, 96), (3, 320), (130, 96), (3, 5120), (17, 1024), (2, 7), (5, 2)]


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("size", SIZES)
def test_rms_norm(size, dtype):
    x, w = randn(*size, dtype=dtype), 1 + 0.3 * randn(size[1], dtype=dtype, seed=1)
    check_norm(ops.rms_norm, MODULE.rms_norm_ref, x, w)
    dy = randn(*size, dtype=dtype, seed=2)
    for need_dw in (False, True):
        check_norm(ops.rms_norm_backward, MODULE.rms_norm_backward_ref, dy, x, w, need_dw=need_dw)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("size", SIZES)
def test_add_rms_norm(size, dtype):
    x, r = randn(*size, dtype=dtype), randn(*size, dtype=dtype, seed=3)
    w = 1 + 0.3 * randn(size[1], dtype=dtype, seed=1)
    check_norm(ops.add_rms_norm, MODULE.add_rms_norm_ref, x, r, w)
    assert torch.equal(ops.add_rms_norm(x, r, w, eps=EPS)[0], x + r)
    dy, ds = (randn(*size, dtype=dtype, seed=s) for s in (2, 4))
    for grad, need_dw in ((ds, False), (ds, True), (None, False), (None, True)):
        check_norm(
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
        check_norm(ops.rms_norm, MODULE.rms_norm_ref, x, w)
        check_norm(ops.add_rms_norm, MODULE.add_rms_norm_ref, x, gradients[1], w)
        for grad in gradients:
            check_norm(
                ops.rms_norm_backward, MODULE.rms_norm_backward_ref, grad, x, w, need_dw=need_dw
            )
            check_norm(
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
