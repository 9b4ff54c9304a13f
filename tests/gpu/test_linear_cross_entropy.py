"""The loss head on the GPU: values, gradients, memory, and more than 2^31 logits."""

import sys

import pytest
import torch
from torch import nn

import xplus_kernels as ops
from tests.gpu import common
from tests.gpu.common import DEVICE, DTYPES, GPU, LITTLE, MAIN_DTYPE, UNIT, VOCABULARY, randn, sized

pytestmark = [*GPU, pytest.mark.usefixtures("poisoned")]
HEAD = sys.modules["xplus_kernels.linear_cross_entropy"]  # in the package its name is the function


def inputs(rows, hidden, vocabulary, dtype, *, ignored=True):
    """x, a head whose logits have a spread of 2, targets with every third row ignored."""
    x = randn(rows, hidden, dtype=dtype)
    weight = (randn(vocabulary, hidden, seed=1) * (2 * hidden**-0.5)).to(dtype)
    targets = torch.arange(rows, device=DEVICE) * 7919 % vocabulary
    targets[:1] = vocabulary - 1
    if ignored:
        targets[1::3] = -100
    return x, weight, targets


def plain(x, weight, targets, divisor):
    """Loss, dx, dW of PyTorch: logits in x's dtype, the cross-entropy in fp32 or wider."""
    leaf, head = x.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    logits = leaf @ head.T
    logits = logits if logits.dtype == torch.float64 else logits.float()
    loss = nn.functional.cross_entropy(logits, targets, reduction="sum") / divisor
    loss.backward()
    return loss.detach(), leaf.grad, head.grad


def assert_errs_no_more(made, theirs, truth):
    loss, dx, dw = made
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    # one number: a logit of it that falls on the other side of a rounding is most of the error
    off = (loss.double() - truth[0]).abs()
    rounding = max(UNIT[dx.dtype], 2**-20)
    assert off <= 1.1 * (theirs[0].double() - truth[0]).abs() + rounding * truth[0].abs()
    common.assert_close(dx, theirs[1], truth[1])
    if dw is not None:
        common.assert_close(dw, theirs[2], truth[2])


@sized()
def test_values(dtype, size, t):
    common.need_memory(40)  # the truth: logits, their gradient and the head in fp64
    x, weight, targets = inputs(t, size.hidden, VOCABULARY, dtype)
    divisor = max(int((targets != -100).sum()), 1)
    before = x.clone(), weight.clone(), targets.clone()
    made = ops.linear_cross_entropy(x, weight, targets, divisor=divisor)
    losses = torch.full((t,), float("nan"), device=x.device)
    again = ops.linear_cross_entropy(x, weight, targets, divisor=divisor, losses=losses)
    assert torch.allclose(losses.sum() / divisor, made[0]) and not losses[1::3].any()
    assert made[2] is None
    assert all(torch.equal(a, b) for a, b in zip(made[:2], again[:2], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, (x, weight, targets), strict=True))
    del again, before
    truth = ops.linear_cross_entropy(x.double(), weight.double(), targets, divisor=divisor)
    assert_errs_no_more(made, plain(x, weight, targets, divisor), truth)
    assert not made[1][1::3].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 96, 17), (3, 320, 128), (130, 96, 5003), (70, 64, 9000)])
def test_a_trained_head_at_awkward_sizes(shape, dtype):
    x, weight, targets = inputs(*shape, dtype)
    made = ops.linear_cross_entropy(x, weight, targets, divisor=7.5, need_dw=True)
    truth = plain(x.double(), weight.double(), targets, 7.5)
    assert_errs_no_more(made, plain(x, weight, targets, 7.5), truth)
    only = ops.linear_cross_entropy(x, weight, targets, divisor=7.5, need_dx=False)
    assert torch.equal(only[0], made[0]) and only[1] is None and only[2] is None


def test_a_trained_head_of_the_0_6b_model():
    size = common.SIZES["0.6B"]
    common.need_memory(20)
    x, weight, targets = inputs(common.TOKENS[-1], size.hidden, VOCABULARY, MAIN_DTYPE)
    made = ops.linear_cross_entropy(x, weight, targets, divisor=100, need_dw=True)
    truth = ops.linear_cross_entropy(
        x.double(), weight.double(), targets, divisor=100, need_dw=True
    )
    assert_errs_no_more(made, plain(x, weight, targets, 100), truth)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks_make_no_difference(chunk, monkeypatch):
    x, weight, targets = inputs(130, 32, 300, torch.float32)
    whole = ops.linear_cross_entropy(x, weight, targets, divisor=87, need_dw=True)
    monkeypatch.setattr(HEAD, "LEAST_ROWS", chunk)
    cut = ops.linear_cross_entropy(x, weight, targets, divisor=87, need_dw=True, logits_bytes=1)
    for ours, theirs in zip(cut, whole, strict=True):
        assert common.difference(ours, theirs) < 1e-5


def test_strided_rows_targets_and_a_divisor_on_the_device():
    x = randn(6, 5, 32)[:, 2]
    weight = randn(32, 300, seed=1).T
    targets = torch.tensor([4, 299], device=DEVICE).repeat(6)[::2]
    divisor = torch.tensor(6, device=DEVICE)
    for rows in (x, randn(32).expand(6, 32)):
        before = rows.clone()
        loss, dx, _ = ops.linear_cross_entropy(rows, weight, targets, divisor=divisor)
        truth = plain(rows.double(), weight.double(), targets, 6)
        assert common.difference(loss, truth[0]) < 1e-5
        assert common.difference(dx, truth[1]) < 1e-5
        assert torch.equal(rows, before)


@pytest.mark.parametrize("rows", [0, 5])
def test_nothing_supervised(rows):
    weight = randn(17, 8, dtype=MAIN_DTYPE)
    targets = torch.full((rows,), -100, device=DEVICE)
    x = randn(rows, 8, dtype=MAIN_DTYPE)
    loss, dx, dw = ops.linear_cross_entropy(x, weight, targets, divisor=0, need_dw=True)
    assert loss == 0 and dx.shape == (rows, 8) and not dx.any() and not dw.any()


def test_target_out_of_range_makes_the_loss_nan():
    if common.DEVICE == "cpu" and not common.backend.INTERPRET:
        pytest.skip("needs the kernel: the reference asks the CPU for the row, which raises")
    x, weight = randn(2, 8), randn(17, 8, seed=1)
    for target in (17, -1):
        targets = torch.tensor([3, target], device=DEVICE)
        assert ops.linear_cross_entropy(x, weight, targets, divisor=2)[0].isnan()


def test_waits_for_nothing():
    x, weight, targets = inputs(130, 64, 1000, MAIN_DTYPE)
    on_device = torch.tensor(87, device=DEVICE)
    for divisor in (87.0, on_device):
        common.waits_for_nothing(
            lambda d=divisor: ops.linear_cross_entropy(x, weight, targets, divisor=d, need_dw=True)
        )


def test_8192_rows_need_less_than_400_mib():
    size = common.SIZES["8B"]
    rows = 19 if common.REHEARSAL else 8192
    x, weight, targets = inputs(rows, size.hidden, VOCABULARY, MAIN_DTYPE, ignored=False)
    call = lambda: ops.linear_cross_entropy(x, weight, targets, divisor=rows)  # noqa: E731
    assert common.extra_memory(call) < 400 * common.MIB


LONG = 34 if common.REHEARSAL else 16_384


@pytest.mark.parametrize("cap", [HEAD.LOGITS_BYTES, 6 * common.GIB], ids=["as it is", "6 GiB"])
def test_more_logits_than_an_int32_counts(cap):
    """16 384 rows are 2.5e9 logits: in chunks, then as one."""
    common.need_memory(4 + 2 * cap / common.GIB)
    hidden, dtype = 256, MAIN_DTYPE
    x, weight, targets = inputs(LONG, hidden, VOCABULARY, dtype)
    element = x.element_size()
    chunks = len(HEAD.row_chunks(LONG, VOCABULARY, element, cap))
    if not common.REHEARSAL:
        assert LONG * VOCABULARY > 2**31
        assert (chunks == 1) == (cap == 6 * common.GIB)
    loss, dx, _ = ops.linear_cross_entropy(x, weight, targets, divisor=LONG, logits_bytes=cap)
    assert dx.isfinite().all()
    total = 0.0
    border = 2**31 // VOCABULARY if not common.REHEARSAL else LONG // 2
    checked = [slice(0, 64), slice(border - 16, border + 16), slice(LONG - 64, LONG)]
    for part in checked:
        truth = plain(x[part].double(), weight.double(), targets[part], LONG)
        theirs = plain(x[part], weight, targets[part], LONG)
        common.assert_close(dx[part], theirs[1], truth[1])
    for start in range(0, LONG, 1024):
        part = slice(start, start + 1024)
        total += plain(x[part], weight, targets[part], 1)[0].item()
    # a mean over thousands of rows: what falls on the other side of a rounding evens out
    assert abs(loss.item() - total / LONG) <= 0.1 * UNIT[dtype] * total / LONG + LITTLE[dtype]
