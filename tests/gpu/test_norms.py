"""rms_norm and add_rms_norm on the GPU: values, strides, bits."""

import functools
import sys

import pytest
import torch

import xplus_kernels as ops
from tests.gpu import common
from tests.gpu.common import AWKWARD, DTYPES, GPU, MAIN_DTYPE, check, gradients_of, randn, sized

pytestmark = [*GPU, pytest.mark.usefixtures("poisoned")]
MODULE = sys.modules["xplus_kernels.rms_norm"]  # in the package its name is the function
EPS = 1e-6
check_norm = functools.partial(check, eps=EPS)


def weight(width, dtype):
    return (1 + 0.3 * randn(width, seed=1)).to(dtype)


def check_all(t, width, dtype):
    x, w = randn(t, width, dtype=dtype), weight(width, dtype)
    residual, dy, ds = (randn(t, width, dtype=dtype, seed=s) for s in (2, 3, 4))
    check_norm(ops.rms_norm, MODULE.rms_norm_ref, x, w)
    summed, _ = check_norm(ops.add_rms_norm, MODULE.add_rms_norm_ref, x, residual, w)
    assert torch.equal(summed, x + residual)
    backward = ops.rms_norm_backward, MODULE.rms_norm_backward_ref
    add_backward = ops.add_rms_norm_backward, MODULE.add_rms_norm_backward_ref
    for need_dw in (False, True):
        check_norm(*backward, dy, x, w, need_dw=need_dw)
        for grad in (ds, None):
            check_norm(*add_backward, grad, dy, x, w, need_dw=need_dw)


@sized()
def test_values(dtype, size, t):
    check_all(t, size.hidden, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", AWKWARD)
def test_values_of_awkward_widths(shape, dtype):
    check_all(*shape, dtype)


@pytest.mark.parametrize("name", common.SIZES)
def test_frozen_and_trained_give_the_same_dx(name):
    width = common.SIZES[name].hidden
    x, w = randn(common.FEW, width, dtype=MAIN_DTYPE), weight(width, MAIN_DTYPE)
    dx = [ops.rms_norm_backward(x, x, w, eps=EPS, need_dw=need)[0] for need in (False, True)]
    assert common.difference(*dx) < common.LITTLE[MAIN_DTYPE]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("need_dw", [False, True])
def test_strides(need_dw, dtype):
    """A slice of wider rows, heads inside a packed row, every second row, a transpose."""
    base, w = randn(6, 200, dtype=dtype), weight(96, dtype)
    inputs = [base[:, 100:196], base.unflatten(1, (2, 100))[:, :, :96], base[::2, :96]]
    inputs.append(randn(96, 5, dtype=dtype).T)
    for x in inputs:
        dy = randn(*x.shape, dtype=dtype, seed=2)
        check_norm(ops.rms_norm, MODULE.rms_norm_ref, x, w)
        check_norm(ops.add_rms_norm, MODULE.add_rms_norm_ref, x, gradients_of(dy)[2], w)
        for grad in gradients_of(dy):
            check_norm(
                ops.rms_norm_backward, MODULE.rms_norm_backward_ref, grad, x, w, need_dw=need_dw
            )
            check_norm(
                ops.add_rms_norm_backward, MODULE.add_rms_norm_backward_ref, grad, dy, x, w,
                need_dw=need_dw,
            )  # fmt: skip


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float32])
def test_rounds_the_normed_row_before_the_weight(dtype):
    """Equal to Hugging Face's norm in nearly every bit: a sum's order may move a few."""
    x, w = randn(64, 5120, dtype=dtype), weight(5120, dtype)
    y, theirs = ops.rms_norm(x, w, eps=EPS), MODULE.rms_norm_ref(x, w, eps=EPS)
    late = (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, True) + EPS) * w.float()).to(dtype)
    assert (y != theirs).float().mean() < 1e-3 < (late != theirs).float().mean()


def test_no_rows():
    x, w = randn(0, 96, dtype=MAIN_DTYPE), weight(96, MAIN_DTYPE)
    assert ops.rms_norm(x, w, eps=EPS).shape == (0, 96)
    dx, dw = ops.rms_norm_backward(x, x, w, eps=EPS, need_dw=True)
    assert dx.shape == (0, 96) and not dw.any()


def test_waits_for_nothing():
    x, w = randn(130, 320, dtype=MAIN_DTYPE), weight(320, MAIN_DTYPE)
    common.waits_for_nothing(
        lambda: ops.rms_norm(x, w, eps=EPS),
        lambda: ops.add_rms_norm(x, x, w, eps=EPS),
        lambda: ops.rms_norm_backward(x, x, w, eps=EPS, need_dw=True),
        lambda: ops.add_rms_norm_backward(x, x, x, w, eps=EPS, need_dw=False),
    )


def test_tensors_of_two_devices_are_named():
    if common.IR:
        pytest.skip("needs tensors of two devices: under ttsem all say that they are on the GPU")
    x, w = randn(3, 96), randn(96)
    with pytest.raises(ValueError, match=f"^weight: on meta; x is on {common.DEVICE}"):
        ops.rms_norm(x, w.to("meta"), eps=EPS)
