"""The Triton kernel of adamw_update, interpreted, against its reference, bit for bit."""

import math

import pytest
import torch

from xplus_kernels import adamw as A
from xplus_kernels import blockwise as B
from xplus_kernels.backend import INTERPRET

pytestmark = [
    pytest.mark.skipif(not INTERPRET, reason="needs TRITON_INTERPRET=1 and Triton"),
    pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value"),
]

OPTIONS = dict(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tensors(n, dtype, *, eight_bit, master):
    param = randn(n, dtype=dtype)
    made = {"param": param, "master": param.float() if master else None}
    kind = torch.uint8 if eight_bit else torch.float32
    made |= {k: torch.zeros(n, dtype=kind) for k in ("exp_avg", "exp_avg_sq")}
    if eight_bit:
        made |= {k: torch.zeros(-(-n // 256)) for k in ("exp_avg_absmax", "exp_avg_sq_absmax")}
    return made


def run(made, grad, step, **more):
    made = dict(made)
    first = [made.pop("param"), grad, made.pop("exp_avg"), made.pop("exp_avg_sq")]
    A.adamw_update(*first, step=step, seed=99, parameter=5, **made, **more, **OPTIONS)


def on_both(n, dtype, grads, monkeypatch, *, eight_bit, master, **more):
    """The tensors after the kernel's steps and after the reference's."""
    kernel = tensors(n, dtype, eight_bit=eight_bit, master=master)
    reference = tensors(n, dtype, eight_bit=eight_bit, master=master)
    for step, grad in enumerate(grads, 1):
        run(kernel, grad, step, **more)
        with monkeypatch.context() as patch:
            patch.setattr(A, "use_triton", lambda x: False)
            run(reference, grad, step, **more)
    return kernel, reference


def assert_same(kernel, reference):
    for name, ours in kernel.items():
        if ours is None:
            continue
        theirs = reference[name]
        assert torch.equal(ours.isnan(), theirs.isnan()), name
        # NumPy has no fused multiply-add; an ulp may come of its square root and division
        ours, theirs = ours.double().nan_to_num(0), theirs.double().nan_to_num(0)
        if name in ("exp_avg_absmax", "exp_avg_sq_absmax") or ours.numel() == 0:
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
        else:
            # a parameter comes out of a difference
            atol = 1e-8 if name in ("param", "master") else 0
            off = (ours - theirs).abs() > 1e-6 * theirs.abs() + atol
            assert off.double().mean() <= 1e-3, (name, int(off.sum()))


@pytest.mark.parametrize("n", [1, 3, 130, 2048, 5123])
@pytest.mark.parametrize(
    "dtype, eight_bit, master",
    [
        (torch.float32, False, False),
        (torch.float32, True, False),
        (torch.float16, False, True),
        (torch.float16, True, True),
        (torch.bfloat16, True, False),
        (torch.bfloat16, False, False),
    ],
)
def test_equals_reference(n, dtype, eight_bit, master, monkeypatch):
    narrow = torch.float32 if dtype == torch.float32 else torch.float16
    grads = [randn(n, seed=s, dtype=narrow) * 10.0 ** (-2 * s) for s in (1, 2, 3)]
    scale = torch.tensor(0.5) if n % 2 else None
    assert_same(
        *on_both(n, dtype, grads, monkeypatch, eight_bit=eight_bit, master=master, grad_scale=scale)
    )


def test_codes_are_exact_over_all_decades(monkeypatch):
    # beta1 = 0 makes m the gradient itself: 40 blocks of numbers over 12 decades, both signs,
    # and every number at which a code starts, with its neighbours
    n = 256 * 48
    generator = torch.Generator().manual_seed(2)
    grad = randn(n, seed=1) * 10 ** -(12 * torch.rand(n, generator=generator))
    starts = B.code_tables(torch.device("cpu"))[2:, 1:].reshape(-1)
    for i, toward in enumerate((-9.0, 9.0, None)):
        near = starts if toward is None else torch.nextafter(starts, torch.tensor(toward))
        for j, part in enumerate(near.split(255)):
            at = 256 * (2 * i + j)
            grad[at : at + 255], grad[at + 255] = part, 1.0
    monkeypatch.setitem(OPTIONS, "beta1", 0.0)
    kernel, _ = on_both(n, torch.float32, [grad], monkeypatch, eight_bit=True, master=False)
    codes, absmax = B.quantize_blockwise(grad, signed=True)
    assert torch.equal(kernel["exp_avg"], codes)
    assert torch.equal(kernel["exp_avg_absmax"], absmax)
    monkeypatch.setitem(OPTIONS, "beta2", 0.0)  # v = g^2 over 24 decades
    kernel, _ = on_both(n, torch.float32, [grad], monkeypatch, eight_bit=True, master=False)
    codes, absmax = B.quantize_blockwise(grad * grad, signed=False)
    assert torch.equal(kernel["exp_avg_sq"], codes)
    assert torch.equal(kernel["exp_avg_sq_absmax"], absmax)


def test_unsigned_codes_are_exact_where_they_start(monkeypatch):
    starts = B.code_tables(torch.device("cpu"))[3, 1:]
    x = torch.cat([starts, torch.nextafter(starts, torch.tensor(0.0)), torch.ones(2)])
    blocks = torch.cat([x[:255], torch.ones(1), x[255:510], torch.ones(1)])
    codes, absmax = B.quantize_blockwise(blocks, signed=False)
    # v = beta2 v + ..: with g = 0 and beta2 = 1 - tiny v stays what it was, so that codes that
    # the kernel reads and writes back must be the same
    state = tensors(512, torch.float32, eight_bit=True, master=False)
    state["exp_avg_sq"], state["exp_avg_sq_absmax"] = codes.clone(), absmax.clone()
    monkeypatch.setitem(OPTIONS, "beta2", 1 - 1e-12)
    run(state, torch.zeros(512), 1)
    assert torch.equal(state["exp_avg_sq"], codes)


def test_random_bits_are_the_references(monkeypatch):
    # lr = 0 and a parameter that is no bf16 number does not exist: take the bits from an update
    # that moves each parameter by a third of its spacing
    n = 4096 + 9
    monkeypatch.setitem(OPTIONS, "weight_decay", 1e-3 / OPTIONS["lr"] / 1.5)
    grads = [torch.zeros(n)] * 2
    kernel, reference = on_both(n, torch.bfloat16, grads, monkeypatch, eight_bit=True, master=False)
    assert torch.equal(kernel["param"], reference["param"])
    moved = kernel["param"] != randn(n, dtype=torch.bfloat16)
    assert 0.1 < moved.double().mean() < 0.9


def test_strided_gradient_is_read_and_not_written(monkeypatch):
    for grad in (randn(()).expand(300), randn(300, 2)[:, 1]):
        before = grad.clone()
        assert_same(
            *on_both(300, torch.float32, [grad], monkeypatch, eight_bit=False, master=False)
        )
        assert torch.equal(grad, before)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradient_that_is_no_number_shows_in_the_parameter(bad, monkeypatch):
    grad = randn(600)
    grad[5] = bad
    kernel, reference = on_both(
        600, torch.bfloat16, [grad], monkeypatch, eight_bit=True, master=False
    )
    assert kernel["param"][5].isnan() and reference["param"][5].isnan()
    assert torch.equal(kernel["param"][256:], reference["param"][256:])
    assert kernel["param"][256:].isfinite().all()


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("eight_bit, master", [(False, True), (True, True), (True, False)])
def test_a_scale_that_is_not_finite_changes_nothing(eight_bit, master, scale):
    dtype = torch.float16 if master else torch.float32
    made = tensors(5123, dtype, eight_bit=eight_bit, master=master)
    run(made, randn(5123, dtype=dtype), 1)
    before = {k: t if t is None else t.clone() for k, t in made.items()}
    run(made, randn(5123, dtype=dtype), 2, grad_scale=torch.tensor(scale))
    assert all(t is None or torch.equal(t, before[k]) for k, t in made.items())
