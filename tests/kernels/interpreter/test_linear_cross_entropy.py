"""The Triton kernel of linear_cross_entropy, interpreted, against its reference and fp64."""

import importlib

import pytest
import torch
from torch import nn

import xplus_kernels as ops
from tests.tiny import difference
from xplus_kernels.backend import INTERPRET

pytestmark = pytest.mark.skipif(not INTERPRET, reason="needs TRITON_INTERPRET=1 and Triton")

HEAD = importlib.import_module("xplus_kernels.linear_cross_entropy")  # in ops it is the function


def randn(*shape, seed=0, dtype=torch.float32, scale=1.0):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x * scale).to(dtype)


def targets_of(rows, vocabulary, *, ignored=True):
    targets = torch.arange(rows) * 7919 % vocabulary
    targets[0] = vocabulary - 1
    if ignored:
        targets[1::3] = -100
    return targets


@pytest.fixture
def poisoned(monkeypatch):
    """What torch.empty hands out is NaN: every element has to be written."""
    empty = torch.empty

    def nan(*args, **options):
        made = empty(*args, **options)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", nan)


@pytest.mark.parametrize("rows, hidden", [(1, 96), (3, 5120), (130, 320)])
@pytest.mark.parametrize("vocabulary", [17, 128, 5003, 9000])
def test_equals_reference_in_fp32(rows, hidden, vocabulary, poisoned):
    x = randn(rows, hidden)
    w = randn(vocabulary, hidden, seed=1, scale=4 * hidden**-0.5)
    targets = targets_of(rows, vocabulary)
    options = dict(divisor=7.5, need_dw=vocabulary < 1000, logits_bytes=1)
    loss, dx, dw = ops.linear_cross_entropy(x, w, targets, **options)
    truth = ops.linear_cross_entropy(x.double(), w.double(), targets, **options)
    assert loss.dtype == torch.float32
    assert difference(loss, truth[0]) < 1e-5
    assert difference(dx, truth[1]) < 1e-5
    assert (dw is None and truth[2] is None) or difference(dw, truth[2]) < 1e-5
    assert (dx[1::3] == 0).all()
    losses = torch.full((rows,), float("nan"))
    again = ops.linear_cross_entropy(x, w, targets, losses=losses, **options)
    assert torch.equal(again[0], loss) and torch.equal(again[1], dx)
    each = torch.nn.functional.cross_entropy(x @ w.T, targets, reduction="none")
    assert torch.allclose(losses, each, atol=1e-4) and (losses[1::3] == 0).all()


@pytest.mark.parametrize("rows", [1, 3, 130])
def test_errs_in_fp16_no_more_than_pytorch(rows, poisoned):
    x = randn(rows, 96, dtype=torch.float16)
    w = randn(1111, 96, seed=1, dtype=torch.float16, scale=0.4)
    targets = targets_of(rows, 1111, ignored=False)
    leaf, head = x.clone().requires_grad_(), w.clone().requires_grad_()
    theirs = nn.functional.cross_entropy((leaf @ head.T).float(), targets)
    theirs.backward()
    truth = ops.linear_cross_entropy(x.double(), w.double(), targets, divisor=rows, need_dw=True)
    loss, dx, dw = ops.linear_cross_entropy(x, w, targets, divisor=rows, need_dw=True)
    assert difference(loss, truth[0]) <= 1.1 * difference(theirs, truth[0]) + 1e-6
    assert difference(dx, truth[1]) <= 1.1 * difference(leaf.grad, truth[1]) + 2**-12
    assert difference(dw, truth[2]) <= 1.1 * difference(head.grad, truth[2]) + 2**-12


@pytest.mark.parametrize("chunk", [1, 4, 64, 100])
def test_chunks_make_no_difference(chunk, monkeypatch, poisoned):
    x, w, targets = randn(130, 32), randn(300, 32, seed=1), targets_of(130, 300)
    whole = ops.linear_cross_entropy(x, w, targets, divisor=87, need_dw=True)
    monkeypatch.setattr(HEAD, "LEAST_ROWS", chunk)
    cut = ops.linear_cross_entropy(x, w, targets, divisor=87, need_dw=True, logits_bytes=1)
    for ours, theirs in zip(cut, whole, strict=True):
        assert difference(ours, theirs) < 1e-6
    only = ops.linear_cross_entropy(x, w, targets, divisor=87, need_dx=False)
    assert torch.equal(only[0], whole[0]) and only[1] is None and only[2] is None


def test_strided_inputs_and_a_divisor_on_the_device(poisoned):
    x = randn(6, 5, 32)[:, 2]  # rows apart
    w = randn(32, 300, seed=1).T  # [300, 32], column-major
    targets = torch.tensor([4, 299]).repeat(6)[::2]
    for rows in (x, randn(32).expand(6, 32)):
        before = rows.clone()
        loss, dx, _ = ops.linear_cross_entropy(rows, w, targets, divisor=torch.tensor(6))
        truth = ops.linear_cross_entropy(rows.double(), w.double(), targets, divisor=6)
        assert difference(loss, truth[0]) < 1e-6 and difference(dx, truth[1]) < 1e-5
        assert torch.equal(rows, before)


def test_nothing_supervised(poisoned):
    w = randn(17, 8)
    for rows in (0, 5):
        loss, dx, dw = ops.linear_cross_entropy(
            randn(rows, 8), w, torch.full((rows,), -100), divisor=0, need_dw=True
        )
        assert loss == 0 and dx.shape == (rows, 8) and (dx == 0).all() and (dw == 0).all()


def test_large_and_infinite_logits():
    x = torch.eye(4)
    w = torch.tensor([[300.0, -300, 0, 1], [299, -300, 0, 2], [-3e4, 300, 0, 3]])
    w = torch.cat([w, torch.full((2, 4), -1e30)])
    targets = torch.tensor([0, 1, 2, 3])
    loss, dx, _ = ops.linear_cross_entropy(x, w, targets, divisor=1)
    truth = ops.linear_cross_entropy(x.double(), w.double(), targets, divisor=1)
    assert difference(loss, truth[0]) < 1e-6
    assert difference(dx, truth[1]) < 1e-5


def test_target_out_of_range_makes_the_loss_nan():
    x, w = randn(2, 8), randn(17, 8, seed=1)
    for target in (17, -1):
        assert ops.linear_cross_entropy(x, w, torch.tensor([3, target]), divisor=2)[0].isnan()


def test_chunks_are_full_tiles_within_the_cap():
    for rows in (0, 1, 1023, 1024, 1025, 1700, 8192, 14_977, 32_768, 100_001):
        # of Qwen3's vocabulary in bf16 and fp32, SmolLM2's, and one beyond all caps
        for vocabulary, size, most in (
            (151_936, 2, 1024), (151_936, 4, 1024), (49_152, 2, 3200), (10**7, 4, 1024)
        ):  # fmt: skip
            chunks = HEAD.row_chunks(rows, vocabulary, size, HEAD.LOGITS_BYTES)
            lengths = [b - a for a, b in chunks]
            assert [x for chunk in chunks for x in chunk[:1]] == [*range(0, rows, most)]
            assert lengths[:-1] == [most] * (len(chunks) - 1) and sum(lengths) == rows
            assert most == 1024 or most * vocabulary * size <= HEAD.LOGITS_BYTES


@pytest.mark.parametrize(
    "change, error",
    [
        ({"x": torch.ones(2, 8, dtype=torch.int64)}, "x is torch.int64"),
        ({"x": torch.ones(8)}, r"x has shape \(8,\)"),
        ({"weight": torch.ones(17, 9)}, r"weight has shape \(17, 9\); it must be \[V, 8\]"),
        ({"weight": torch.ones(17, 8).half()}, "weight is torch.float16"),
        ({"targets": torch.zeros(2, dtype=torch.int32)}, "targets is torch.int32"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, r"targets has shape \(3,\)"),
        ({"divisor": torch.ones(2)}, "divisor has shape"),
        ({"logits_bytes": 0}, "logits_bytes is 0"),
    ],
)
def test_bad_input_is_told(change, error):
    good = {"x": torch.ones(2, 8), "weight": torch.ones(17, 8), "divisor": 1.0}
    good["targets"] = torch.zeros(2, dtype=torch.int64)
    with pytest.raises((TypeError, ValueError), match=error):
        ops.linear_cross_entropy(**{**good, **change})


def test_an_fp8_head_equals_the_same_head_unpacked(poisoned, monkeypatch):
    """In eight pieces, the last one shorter, over several chunks of rows."""
    monkeypatch.setattr(HEAD, "LEAST_ROWS", 16)
    x, w = randn(37, 96), randn(1003, 96, seed=1, scale=0.4)
    head, targets = ops.quantize_fp8(w), targets_of(37, 1003)
    dense = ops.dequantize_fp8(head, out=torch.empty(1003, 96))
    options = dict(divisor=7.5, logits_bytes=1)
    loss, dx, _ = ops.linear_cross_entropy(x, head, targets, **options)
    truth = ops.linear_cross_entropy(x.double(), dense.double(), targets, **options)
    assert difference(loss, truth[0]) < 1e-5
    assert difference(dx, truth[1]) < 1e-5
    assert (dx[1::3] == 0).all()
