"""The Triton code of SwiGLU, interpreted on a CPU, against the reference and its fp64 truth."""

import sys

import pytest
import torch

import xplus_kernels as ops
from tests.kernels.interpreter.common import INTERPRETED, ROUNDING, check, randn

pytestmark = [INTERPRETED, pytest.mark.usefixtures("poisoned")]
MODULE = sys.modules["xplus_kernels.swiglu"]  # in the package its name is the function


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("size", [(1, 96), (3, 320), (130, 96), (2, 3072), (1, 17408), (3, 1)])
def test_swiglu(size, dtype):
    t, f = size
    x, dy = 3 * randn(t, 2 * f, dtype=dtype), randn(t, f, dtype=dtype, seed=1)
    check(ops.swiglu, MODULE.swiglu_ref, x)
    check(ops.swiglu_backward, MODULE.swiglu_backward_ref, dy, x)


def test_rounds_silu_before_multiplying():
    x = 3 * randn(64, 640, dtype=torch.float16)
    y, theirs = ops.swiglu(x), MODULE.swiglu_ref(x)
    gate, up = x.float().chunk(2, -1)
    late = (torch.nn.functional.silu(gate) * up).half()
    assert (y != theirs).float().mean() < 1e-3 < (late != theirs).float().mean()


def test_saturated_gates_stay_finite():
    gate = torch.tensor([-1e4, -100.0, -88.0, 0.0, 88.0, 1e4])
    x = torch.cat((gate, torch.ones(6)))[None]
    check(ops.swiglu, MODULE.swiglu_ref, x)
    check(ops.swiglu_backward, MODULE.swiglu_backward_ref, torch.ones(1, 6), x)


def test_strides():
    """A slice of wider rows, every second row, three axes, a transpose; gradients likewise."""
    base = randn(6, 400)
    inputs = [base[:, 100:292], base[::2, :192], base.unflatten(1, (2, 200))[:, :, :192]]
    inputs.append(randn(192, 5).T)
    for x in inputs:
        check(ops.swiglu, MODULE.swiglu_ref, x)
        dy = randn(*x.shape[:-1], 96, seed=2)
        gradients = [dy, torch.ones(()).expand(dy.shape), dy[..., :1].expand(dy.shape)]
        for grad in (*gradients, randn(*dy.shape, 2)[..., 0]):
            check(ops.swiglu_backward, MODULE.swiglu_backward_ref, grad, x)


def test_no_rows():
    x = torch.zeros(0, 192)
    assert ops.swiglu(x).shape == (0, 96)
    assert ops.swiglu_backward(x[:, :96], x).shape == (0, 192)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"^gate_up: shape \[3, 5\]; its last axis must be even"):
        ops.swiglu(randn(3, 5))
    with pytest.raises(TypeError, match="^gate_up: dtype torch.int32"):
        ops.swiglu(torch.zeros(3, 4, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"^dy: shape \[3, 3\]; .* must be \[3, 2\]"):
        ops.swiglu_backward(randn(3, 3), randn(3, 4))
