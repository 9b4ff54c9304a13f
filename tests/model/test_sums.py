"""Gradients summed over micro-batches by the GEMMs that make them."""

import copy

import pytest
import torch

from tests.tiny import difference, gradients, packed_batch, select, stock_loss, tiny_model
from xplus_fast.model.prepare import prepare_model
from xplus_fast.model.sums import Sums, gradient_dtype, summed
from xplus_fast.training.memory_log import _gradient_bytes
from xplus_fast.training.optimizer import AdamW
from xplus_kernels import weight_gradient

LAYERS = [1, 5]  # the last one has rows of its own
LENGTHS = [[30, 5, 17], [21, 40], [3, 1, 9, 25]]


def model_of(dtype=torch.float32):
    return prepare_model(tiny_model().to(dtype), LAYERS)


def run(model, batches, sums=None):
    for batch in batches:
        with summed(model.model.layers, sums):
            model(**batch).loss.backward()


def batches_of(number=3):
    return [packed_batch(LENGTHS[i % 3], seed=i) for i in range(number)]


def matrices(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad and p.dim() == 2}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("wide", [False, True])
def test_one_rounding_at_each_sum(dtype, wide):
    """An eighth of a rounding more than the exact sum of the very same numbers, rounded; in fp32,
    which the products are summed in, what 70 of them leave."""
    to = torch.float32 if wide and dtype.itemsize == 2 else dtype
    g = torch.Generator().manual_seed(0)
    dy = torch.randn(70, 24, generator=g).to(dtype)
    x = torch.randn(40, 70, generator=g).to(dtype).T  # any strides
    before = torch.randn(24, 40, generator=g).to(to)
    out = torch.full((24, 40), torch.nan, dtype=to)
    truth = dy.double().T @ x.double()

    def most(exact):
        once = difference(exact.to(to), exact)
        return 1.125 * once if to.itemsize == 2 else 1.5 * torch.finfo(to).eps

    assert weight_gradient(dy, x, out, add=False) is out
    assert difference(out, truth) < most(truth)
    out.copy_(before)
    weight_gradient(dy, x, out, add=True)
    total = truth + before.double()
    assert difference(out, total) < most(total)
    if to.itemsize == 2:  # a product that is rounded before it is added is further off
        assert difference(before + (dy.T @ x).to(to), total) > 1.1 * most(total)
    rows = torch.zeros(0, 24, dtype=dtype), torch.zeros(0, 40, dtype=dtype)
    assert torch.equal(weight_gradient(*rows, before.clone(), add=True), before)
    assert not weight_gradient(*rows, out, add=False).any()


def test_dtypes_that_do_not_go_together():
    x = torch.zeros(3, 4)
    with pytest.raises(TypeError, match=r"dy is torch.float32, x torch.float32, out .*bfloat16"):
        weight_gradient(x, x, torch.zeros(4, 4, dtype=torch.bfloat16), add=False)


@pytest.mark.parametrize("number", [16])
def test_sixteen_micro_batches_round_like_one(number):
    """In bf16, against the sum in fp64 of each micro-batch's unrounded gradients."""
    batches = batches_of(number)
    exact, found = {}, {}
    for batch in batches:
        model = model_of(torch.bfloat16)
        AdamW([p for p in model.parameters() if p.requires_grad], sums=32)
        run(model, [batch])
        for name, p in matrices(model).items():
            assert p.grad.dtype == torch.float32
            exact[name] = exact.get(name, 0) + p.grad.double()
    for sums in (16, 32):
        model = model_of(torch.bfloat16)
        optimizer = AdamW([p for p in model.parameters() if p.requires_grad], sums=sums)
        run(model, batches, optimizer.sums)
        found[sums] = {n: difference(p.grad, exact[n]) for n, p in matrices(model).items()}
    old = model_of(torch.bfloat16)
    run(old, batches)
    found["old"] = {n: difference(p.grad, exact[n]) for n, p in matrices(old).items()}
    for name, truth in exact.items():
        once = difference(truth.to(torch.bfloat16), truth)
        assert found[32][name] < 0.01 * once, name
        assert once < found[16][name] < found["old"][name], name


@pytest.mark.parametrize("gradients_on", ["device", "host"])
def test_sums_are_stocks(gradients_on):
    batches = batches_of()
    stock = select(tiny_model(), LAYERS)
    for lengths, batch in zip(LENGTHS, batches, strict=True):
        stock_loss(stock, batch, lengths).backward()
    model = model_of()
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], gradients=gradients_on)
    run(model, batches, optimizer.sums)
    if gradients_on == "host":
        for p in model.parameters():
            p.grad = optimizer._host_gradients.get(p)
    ours, theirs = gradients(model), gradients(stock)
    assert ours.keys() == theirs.keys()
    for name, truth in theirs.items():
        assert difference(ours[name], truth) < 2e-5, name


@pytest.mark.parametrize("sums", [16, 32])
def test_where_they_are_summed_changes_no_bit(sums):
    found = []
    for where in ("device", "host"):
        model = model_of(torch.bfloat16)
        optimizer = AdamW(
            [p for p in model.parameters() if p.requires_grad], gradients=where, sums=sums
        )
        for step in range(2):  # the second begins anew
            run(model, batches_of(3 + step), optimizer.sums)
            if step == 0:
                optimizer.zero_grad()
        found.append([optimizer._gradient(p).clone() for p in model.parameters()
                      if p.requires_grad])  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert {g.dtype for g in found[0]} == {torch.float32 if sums == 32 else torch.bfloat16}


def test_the_sum_is_added_to_where_it_is():
    model = model_of()
    run(model, batches_of(1), Sums())
    places = {n: p.grad.data_ptr() for n, p in matrices(model).items()}
    held = {n: p.grad for n, p in matrices(model).items()}
    run(model, batches_of(1), Sums())
    for name, p in matrices(model).items():
        assert p.grad is held[name] and p.grad.data_ptr() == places[name]


def strange(kind):
    """Ways in which a weight's gradient is not simply added to, and what the others do then."""

    def hook(p, seen):
        p.register_hook(lambda g: seen.append(g.clone()))

    def after(p, seen):
        p.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))

    def none(p, seen):
        p.grad = None

    def other_layout(p, seen):
        p.grad = p.grad.T.contiguous().T

    return {"hook": hook, "after": after, "none": none, "other layout": other_layout}[kind]


@pytest.mark.parametrize("kind", ["hook", "after", "none", "other layout"])
def test_whoever_looks_at_gradients_sees_what_autograd_shows(kind):
    seen = []
    for sums in (None, Sums()):
        model, looked = model_of(), []
        first, second = batches_of(2)
        run(model, [first], sums)
        for p in matrices(model).values():
            strange(kind)(p, looked)
        run(model, [second], sums)
        seen.append((looked, [p.grad for p in matrices(model).values()]))
    for a, b in zip(*(looked + grads for looked, grads in seen), strict=True):
        assert difference(a, b) < 1e-6
    assert len(seen[0][0]) == (8 if kind in ("hook", "after") else 0)


def test_under_autocast_and_outside_of_it_autograd_adds():
    model = model_of()
    batch = batches_of(1)[0]
    for _ in range(2):
        with summed(model.model.layers, Sums()), torch.autocast("cpu", torch.bfloat16):
            model(**batch).loss.backward()
    twin = model_of()
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            twin(**batch).loss.backward()
    for name, g in gradients(twin).items():
        assert torch.equal(gradients(model)[name], g), name
    before = {n: g.clone() for n, g in gradients(model).items()}
    loss = model(**batch).loss  # without `summed`: what asks for gradients gets them
    asked = list(matrices(model).values())
    given = torch.autograd.grad(loss, asked)
    assert all(g.any() for g in given)
    assert all(torch.equal(g, before[n]) for n, g in gradients(model).items())


def test_sums_of_narrow_weights_may_be_wide_and_narrow_again():
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    AdamW([p], sums=32)
    assert gradient_dtype(p) == torch.float32 and _gradient_bytes(p) == 12
    (p * 1.001953125).sum().backward()
    assert p.grad.dtype == torch.float32
    AdamW([p])  # of another stage
    assert gradient_dtype(p) == torch.bfloat16 and p.grad is None
    wide = torch.nn.Parameter(torch.ones(3))
    AdamW([wide], sums=32)
    assert gradient_dtype(wide) == torch.float32
    assert gradient_dtype(copy.deepcopy(p) * 2) == torch.bfloat16
