"""SwiGLU on the GPU: values, strides, bits, and more than 2^31 elements."""

import sys

import pytest
import torch

import xplus_kernels as ops
from tests.gpu import common
from tests.gpu.common import AWKWARD, DTYPES, GPU, MAIN_DTYPE, check, gradients_of, randn, sized

pytestmark = [*GPU, pytest.mark.usefixtures("poisoned")]
MODULE = sys.modules["xplus_kernels.swiglu"]  # in the package its name is the function


def check_all(t, f, dtype):
    x, dy = (3 * randn(t, 2 * f)).to(dtype), randn(t, f, dtype=dtype, seed=1)
    check(ops.swiglu, MODULE.swiglu_ref, x)
    check(ops.swiglu_backward, MODULE.swiglu_backward_ref, dy, x)


@sized()
def test_values(dtype, size, t):
    check_all(t, size.ffn, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", AWKWARD)
def test_values_of_awkward_widths(shape, dtype):
    check_all(*shape, dtype)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float32])
def test_rounds_silu_before_multiplying(dtype):
    x = (3 * randn(64, 640)).to(dtype)
    y, theirs = ops.swiglu(x), MODULE.swiglu_ref(x)
    gate, up = x.float().chunk(2, -1)
    late = (torch.nn.functional.silu(gate) * up).to(dtype)
    assert (y != theirs).float().mean() < 1e-3 < (late != theirs).float().mean()


@pytest.mark.parametrize("dtype", DTYPES)
def test_saturated_gates_stay_finite(dtype):
    gate = torch.tensor([-1e4, -100.0, -88.0, 0.0, 88.0, 1e4], device=common.DEVICE)
    x = torch.cat((gate, torch.ones_like(gate)))[None].to(dtype)
    check(ops.swiglu, MODULE.swiglu_ref, x)
    check(ops.swiglu_backward, MODULE.swiglu_backward_ref, torch.ones_like(x[:, :6]), x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype):
    """A slice of wider rows, every second row, three axes, a transpose; gradients likewise."""
    base = randn(6, 400, dtype=dtype)
    inputs = [base[:, 100:292], base[::2, :192], base.unflatten(1, (2, 200))[:, :, :192]]
    inputs.append(randn(192, 5, dtype=dtype).T)
    for x in inputs:
        check(ops.swiglu, MODULE.swiglu_ref, x)
        for dy in gradients_of(randn(*x.shape[:-1], 96, dtype=dtype, seed=2)):
            check(ops.swiglu_backward, MODULE.swiglu_backward_ref, dy, x)


def test_no_rows():
    x = randn(0, 192, dtype=MAIN_DTYPE)
    assert ops.swiglu(x).shape == (0, 96)
    assert ops.swiglu_backward(x[:, :96], x).shape == (0, 192)


def test_more_elements_than_an_int32_counts():
    """T * 2F = 2.2e9: the rows at the start, about the 2^31st element, and at the end."""
    t, f = (90, 48) if common.REHEARSAL else (90_000, 12_288)
    dtype = MAIN_DTYPE
    assert common.REHEARSAL or t * 2 * f > 2**31
    common.need_memory(24)
    x = torch.empty(t, 2 * f, dtype=dtype, device=common.DEVICE)
    x.view(-1, 32).copy_(3 * randn(32))  # a pattern of 32 columns, then rows of their own
    dy = randn(f, dtype=dtype).expand(t, f)  # of stride 0: only x and the results are large
    border = 2**31 // (2 * f) if t * 2 * f > 2**31 else t // 2
    parts = [slice(0, 64), slice(border - 32, border + 32), slice(t - 64, t)]
    for seed, part in enumerate(parts):
        x[part] = (3 * randn(x[part].shape[0], 2 * f, seed=seed)).to(dtype)
    made = ops.swiglu(x), ops.swiglu_backward(dy, x)
    for part in parts:
        rows = x[part].clone()
        references = (
            (MODULE.swiglu_ref, (rows,)),
            (MODULE.swiglu_backward_ref, (dy[part], rows)),
        )
        for y, (reference, tensors) in zip(made, references, strict=True):
            common.assert_close(y[part], reference(*tensors), reference(*map(common.wide, tensors)))
    for y in made:  # NaN where nothing was stored
        assert all(chunk.isfinite().all() for chunk in y.split(10_000))


def test_waits_for_nothing():
    x = randn(130, 640, dtype=MAIN_DTYPE)
    common.waits_for_nothing(lambda: ops.swiglu(x), lambda: ops.swiglu_backward(x[:, :320], x))
