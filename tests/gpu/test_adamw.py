"""adamw_update on the GPU against its reference on the CPU."""

import math

import pytest
import torch

from tests.gpu import common
from tests.gpu.common import DEVICE, GPU
from xplus_kernels import adamw as A
from xplus_kernels import blockwise as B

pytestmark = GPU
OPTIONS = dict(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)
KINDS = [  # dtype, 8-bit states, master
    (torch.float32, False, False),
    (torch.float32, True, False),
    (torch.float16, False, True),
    (torch.bfloat16, False, True),
    (torch.bfloat16, True, True),
    (torch.bfloat16, False, False),
    (torch.bfloat16, True, False),
]
NUMBERS = [1, 3, 130, 5123, 5120 if common.REHEARSAL else 5120 * 1024 + 77]


def randn(*shape, seed=0, dtype=torch.float32):
    """The same numbers for either device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tensors(n, dtype, *, eight_bit, master, device):
    param = randn(n, dtype=dtype)
    made = {"param": param, "master": param.float() if master else None}
    kind = torch.uint8 if eight_bit else torch.float32
    made |= {k: torch.zeros(n, dtype=kind) for k in ("exp_avg", "exp_avg_sq")}
    if eight_bit:
        made |= {k: torch.zeros(-(-n // 256)) for k in ("exp_avg_absmax", "exp_avg_sq_absmax")}
    return {k: t if t is None else t.to(device) for k, t in made.items()}


def run(made, grad, step, *, seed=99, parameter=5, grad_scale=None, **options):
    rest = dict(made)
    first = [rest.pop("param"), grad, rest.pop("exp_avg"), rest.pop("exp_avg_sq")]
    rest |= {"seed": seed, "parameter": parameter, "grad_scale": grad_scale}
    A.adamw_update(*first, step=step, **rest, **{**OPTIONS, **options})


def run_reference(*args, **options):
    """`run` in PyTorch, where the kernels are interpreted too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(A, "use_triton", lambda x: False)
        run(*args, **options)


def assert_same(kernel, reference):
    """Equal but for an ulp here and there: the compiler joins multiplications and additions."""
    for name, ours in kernel.items():
        if ours is None:
            continue
        ours, theirs = ours.cpu().double(), reference[name].double()
        assert torch.equal(ours.isnan(), theirs.isnan()), name
        ours, theirs = ours.nan_to_num(0), theirs.nan_to_num(0)
        if name.endswith("absmax"):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
            continue
        # a parameter comes out of a difference; a code or a bf16 number that lies at a border may
        # fall to its other side, one in a thousand
        atol = {"param": 1e-7, "master": 1e-7, "exp_avg": 1e-9}.get(name, 0)
        off = (ours - theirs).abs() > 2e-6 * theirs.abs() + atol
        assert off.double().mean() <= 1e-3, (name, int(off.sum()))


@pytest.mark.parametrize("n", NUMBERS)
@pytest.mark.parametrize("dtype, eight_bit, master", KINDS)
def test_equals_the_reference_on_the_cpu(n, dtype, eight_bit, master):
    if common.backend.INTERPRET and dtype == torch.bfloat16 and master:
        pytest.skip("needs hardware: the interpreter truncates fp32 to bf16")
    kind = dict(eight_bit=eight_bit, master=master)
    kernel = tensors(n, dtype, device=DEVICE, **kind)
    reference = tensors(n, dtype, device="cpu", **kind)
    scale = torch.tensor(0.5) if n % 2 else None
    for step in (1, 2, 3):
        grad = (randn(n, seed=step) * 10.0 ** (-2 * step)).to(dtype)
        before = grad.to(DEVICE)
        kept = before.clone()
        run(kernel, before, step, grad_scale=None if scale is None else scale.to(DEVICE))
        assert torch.equal(before, kept)
        run_reference(reference, grad, step, grad_scale=scale)
    assert_same(kernel, reference)


def test_codes_are_exact_over_all_decades():
    """beta1 = 0 makes m the gradient: 12 decades, and every number at which a code starts."""
    n = 256 * 48
    generator = torch.Generator().manual_seed(2)
    grad = randn(n, seed=1) * 10 ** -(12 * torch.rand(n, generator=generator))
    starts = B.code_tables(torch.device("cpu"))[2:, 1:].reshape(-1)
    for i, toward in enumerate((-9.0, 9.0, None)):
        near = starts if toward is None else torch.nextafter(starts, torch.tensor(toward))
        for j, part in enumerate(near.split(255)):
            at = 256 * (2 * i + j)
            grad[at : at + 255], grad[at + 255] = part, 1.0
    kernel = tensors(n, torch.float32, eight_bit=True, master=False, device=DEVICE)
    run(kernel, grad.to(DEVICE), 1, beta1=0.0, beta2=0.0)
    for state, x, signed in (("exp_avg", grad, True), ("exp_avg_sq", grad * grad, False)):
        codes, absmax = B.quantize_blockwise(x, signed=signed)
        assert torch.equal(kernel[state].cpu(), codes), state
        assert torch.equal(kernel[f"{state}_absmax"].cpu(), absmax), state


def rounded(n, *, device=DEVICE, start=None, decay=2.0**-9, **which):
    """A bf16 parameter after a step that multiplies it by 1 - decay, exact in fp32, and rounds."""
    made = tensors(n, torch.bfloat16, eight_bit=True, master=False, device=device)
    if start is not None:
        made["param"].fill_(start)
    update = run if device == DEVICE else run_reference
    update(made, torch.zeros(n, device=device), 1, lr=2.0**-10, weight_decay=decay * 2**10, **which)
    return made["param"]


def test_random_bits_are_those_of_the_cpu():
    n = 4096 * 9 + 5
    made = rounded(n)
    assert torch.equal(made.cpu(), rounded(n, device=torch.device("cpu")))
    moved = made.cpu() != randn(n, dtype=torch.bfloat16)
    assert 0.1 < moved.double().mean() < 0.9


def test_the_same_seed_gives_the_same_bits_and_another_gives_others():
    n = 1 << (12 if common.REHEARSAL else 22)
    first = rounded(n)
    assert torch.equal(first, rounded(n))
    for other in (dict(seed=98), dict(parameter=6)):
        assert not torch.equal(first, rounded(n, **other))


@pytest.mark.parametrize("decay", [2.0**-10, 2.0**-9, 3 * 2.0**-10])
def test_rounding_is_unbiased(decay):
    """1 becomes 1 - 2^-8, its lower neighbour, with probability decay / 2^-8."""
    n = 1 << (14 if common.REHEARSAL else 24)
    made = rounded(n, start=1.0, decay=decay)
    assert set(made.unique().tolist()) == {1.0, 1 - 2.0**-8}
    probability = decay * 2**8
    off = (made < 1).double().mean().item() - probability
    assert abs(off) < 5 * math.sqrt(probability * (1 - probability) / n)


def steps(first, last, made):
    for step in range(first, last):
        run(made, randn(5123, seed=step, dtype=torch.bfloat16).to(DEVICE), step)
    return made


@pytest.mark.parametrize("eight_bit", [False, True])
def test_a_resumed_run_is_bit_identical(eight_bit):
    kind = dict(eight_bit=eight_bit, master=False, device=DEVICE)
    whole = steps(1, 7, tensors(5123, torch.bfloat16, **kind))
    half = steps(1, 4, tensors(5123, torch.bfloat16, **kind))
    resumed = steps(4, 7, {k: t if t is None else t.cpu().to(DEVICE) for k, t in half.items()})
    assert all(t is None or torch.equal(t, resumed[k]) for k, t in whole.items())


def test_a_gradient_of_any_strides_is_read_and_not_written():
    kind = dict(eight_bit=False, master=False)
    for base, view in (
        (randn(()), lambda base: base.expand(300)),
        (randn(300, 2), lambda base: base[:, 1]),
    ):
        kernel = tensors(300, torch.float32, device=DEVICE, **kind)
        reference = tensors(300, torch.float32, device="cpu", **kind)
        grad = view(base.to(DEVICE))
        run(kernel, grad, 1)
        run_reference(reference, view(base), 1)
        assert_same(kernel, reference)
        assert torch.equal(grad.cpu(), view(base))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_no_number_shows_in_the_parameter(bad):
    grad = randn(600)
    grad[5] = bad
    kernel = tensors(600, torch.bfloat16, eight_bit=True, master=False, device=DEVICE)
    run(kernel, grad.to(DEVICE), 1)
    assert kernel["param"][5].isnan() and kernel["param"][256:].isfinite().all()


def test_more_elements_than_an_int32_counts():
    n = 5000 if common.REHEARSAL else 2**31 + 2**20
    common.need_memory(16)
    made = {"param": torch.ones(n, dtype=torch.bfloat16, device=DEVICE), "master": None}
    made |= {k: torch.zeros(n, dtype=torch.uint8, device=DEVICE) for k in ("exp_avg", "exp_avg_sq")}
    for name in ("exp_avg_absmax", "exp_avg_sq_absmax"):
        made[name] = torch.zeros(-(-n // 256), device=DEVICE)
    grad = torch.zeros(n, dtype=torch.bfloat16, device=DEVICE)
    run(made, grad, 1, lr=2.0**-10, weight_decay=2.0)
    ends = made["param"][:4096], made["param"][-4096:]
    for end in ends:
        assert 0.4 < (end < 1).float().mean() < 0.6
    assert common.REHEARSAL or not torch.equal(*ends)  # another counter: other bits


def test_waits_for_nothing():
    made = tensors(5123, torch.bfloat16, eight_bit=True, master=False, device=DEVICE)
    plain = tensors(5123, torch.bfloat16, eight_bit=False, master=True, device=DEVICE)
    grad, scale = randn(5123).to(DEVICE), common.scalar(0.5, torch.float32)
    common.waits_for_nothing(
        lambda: run(made, grad, 1, grad_scale=scale), lambda: run(plain, grad, 1)
    )


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype, eight_bit, master", KINDS)
def test_a_scale_that_is_not_finite_changes_nothing(dtype, eight_bit, master, scale):
    made = tensors(5123, dtype, eight_bit=eight_bit, master=master, device=DEVICE)
    grad = randn(5123, dtype=dtype).to(DEVICE)
    run(made, grad, 1)
    before = {k: t if t is None else t.clone() for k, t in made.items()}
    run(made, grad, 2, grad_scale=torch.tensor(scale, device=DEVICE))
    assert all(t is None or torch.equal(t, before[k]) for k, t in made.items())
