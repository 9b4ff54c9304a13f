"""adamw_update's reference against torch.optim.AdamW, bitsandbytes and Philox's own vectors."""

import math

import pytest
import torch

from tests.tiny import difference
from xplus_kernels import adamw as A
from xplus_kernels import blockwise as B

OPTIONS = dict(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def spread(n, seed=0):
    """Numbers over many decades, a zero among them."""
    x = randn(n, seed=seed) * 10 ** -(9 * torch.rand(n, generator=torch.Generator().manual_seed(1)))
    x[n // 2] = 0
    return x


def states(param, *, eight_bit):
    if not eight_bit:
        wide = torch.float64 if param.dtype == torch.float64 else torch.float32
        return {"exp_avg": torch.zeros(param.shape, dtype=wide)} | {
            "exp_avg_sq": torch.zeros(param.shape, dtype=wide)
        }
    blocks = -(-param.numel() // 256)
    return {
        "exp_avg": torch.zeros(param.shape, dtype=torch.uint8),
        "exp_avg_sq": torch.zeros(param.shape, dtype=torch.uint8),
        "exp_avg_absmax": torch.zeros(blocks),
        "exp_avg_sq_absmax": torch.zeros(blocks),
    }


def reference_adamw(param):
    options = dict(betas=(0.9, 0.999), lr=1e-3, eps=1e-8, weight_decay=0.1, foreach=False)
    return torch.optim.AdamW([param], **options)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("shape", [(1,), (3, 130), (257,)])
def test_equals_torch_adamw(dtype, tolerance, shape):
    truth = torch.nn.Parameter(randn(*shape, dtype=dtype))
    param, state = truth.detach().clone(), states(truth, eight_bit=False)
    optimizer = reference_adamw(truth)
    for step in range(1, 6):
        truth.grad = randn(*shape, seed=step, dtype=dtype)
        optimizer.step()
        A.adamw_update(param, truth.grad, step=step, **state, **OPTIONS)
    for ours, theirs in (
        (param - randn(*shape, dtype=dtype), truth.detach() - randn(*shape, dtype=dtype)),
        (state["exp_avg"], optimizer.state[truth]["exp_avg"]),
        (state["exp_avg_sq"], optimizer.state[truth]["exp_avg_sq"]),
    ):
        # the whole change is a thousandth of the parameter, and errs by the parameter's rounding
        assert difference(ours, theirs) < tolerance * 300


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_master_takes_the_update_and_the_parameter_is_its_rounding(dtype):
    param = randn(300, dtype=dtype)
    truth, master = torch.nn.Parameter(param.float()), param.float()
    state, optimizer = states(param, eight_bit=False), reference_adamw(truth)
    for step in (1, 2, 3):
        grad = randn(300, seed=step, dtype=dtype)
        truth.grad = grad.float() * 0.25
        optimizer.step()
        A.adamw_update(
            param, grad, step=step, master=master, grad_scale=torch.tensor(0.25), **state, **OPTIONS
        )
    assert difference(master, truth.detach()) < 1e-6
    assert torch.equal(param, master.to(dtype))


def test_maps_and_codes_are_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional", reason="needs bitsandbytes")
    for signed in (True, False):
        values = functional.create_dynamic_map(signed)
        assert torch.equal(B.dynamic_map(signed=signed), values)
        x = spread(256 * 500 + 3)
        x = x if signed else x.abs()
        codes, absmax = B.quantize_blockwise(x, signed=signed)
        # fp64 input takes bitsandbytes' nearest value in PyTorch; its compiled CPU path looks up
        # a coarser table and is a few codes off near zero
        theirs = torch.ops.bitsandbytes.quantize_blockwise(x.double(), values.clone(), 256)
        assert torch.equal(codes, theirs[0]) and torch.equal(absmax, theirs[1])
        ours = B.dequantize_blockwise(codes, absmax, signed=signed)
        assert torch.equal(
            ours,
            functional.dequantize_blockwise(codes, absmax=absmax, code=values, blocksize=256),
        )


@pytest.mark.parametrize("signed", [True, False])
def test_code_starts_where_the_value_above_is_nearer(signed):
    values = B.dynamic_map(signed=signed)
    starts = B.code_tables(values.device)[2 if signed else 3]
    below = torch.nextafter(starts[1:], torch.tensor(-2.0))
    for x, is_upper in ((starts[1:], True), (below, False)):
        assert (((values[1:] - x).abs() < (x - values[:-1]).abs()) == is_upper).all()
    codes, absmax = B.quantize_blockwise(values, signed=signed)  # its own values come back
    assert torch.equal(codes.long(), torch.arange(256)) and absmax == 1


@pytest.mark.parametrize("x", [0.0, 1e-45, 1e-39])
def test_block_of_nothing_quantizes_to_zero(x):
    for signed in (True, False):
        codes, absmax = B.quantize_blockwise(torch.full((5,), x), signed=signed)
        assert (B.dequantize_blockwise(codes, absmax, signed=signed) == 0).all()


@pytest.mark.parametrize("n", [1, 255, 256, 257, 5000])
def test_eight_bit_states_are_the_quantized_states_of_an_exact_step(n):
    param, state = randn(n), states(randn(n), eight_bit=True)
    for step in (1, 2, 3):
        m = B.dequantize_blockwise(state["exp_avg"], state["exp_avg_absmax"], signed=True)
        v = B.dequantize_blockwise(state["exp_avg_sq"], state["exp_avg_sq_absmax"], signed=False)
        exact, grad = param.clone(), randn(n, seed=step)
        A.adamw_update(exact, grad, m, v, step=step, **OPTIONS)
        A.adamw_update(param, grad, step=step, **state, **OPTIONS)
        assert torch.equal(param, exact)
        for name, x, signed in (("exp_avg", m, True), ("exp_avg_sq", v, False)):
            codes, absmax = B.quantize_blockwise(x, signed=signed)
            assert torch.equal(state[name], codes)
            assert torch.equal(state[f"{name}_absmax"], absmax)


def test_eight_bit_steps_stay_by_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional", reason="needs bitsandbytes")
    n, steps = 5000, 20
    start = randn(n)
    ours, theirs, exact = start.clone(), start.clone(), start.clone()
    state, other = states(start, eight_bit=True), states(start, eight_bit=True)
    plain = states(start, eight_bit=False)
    maps = [functional.create_dynamic_map(signed) for signed in (True, False)]
    for step in range(1, steps + 1):
        grad = randn(n, seed=step) + 0.5
        A.adamw_update(ours, grad, step=step, **state, **OPTIONS)
        A.adamw_update(exact, grad, step=step, **plain, **OPTIONS)
        functional.optimizer_update_8bit_blockwise(
            "adam", grad, theirs, other["exp_avg"], other["exp_avg_sq"], 0.9, 0.999, 0.0, 0.0,
            1e-8, step, 1e-3, *maps, other["exp_avg_absmax"], other["exp_avg_sq_absmax"], 0.1,
        )  # fmt: skip
        # The first step has no quantized state yet; later ones differ by bitsandbytes' coarser
        # quantizer on a CPU, and no more than it differs from unquantized states.
        if step == 1:
            assert difference(ours - start, theirs - start) < 1e-4
    off = difference(theirs - start, exact - start)
    assert difference(ours - start, theirs - start) < 1.5 * off < 0.1
    assert difference(ours - start, exact - start) < off


def test_philox_equals_the_published_vectors():
    # Random123's known answers for philox4x32-10
    ones = 0xFFFFFFFF
    for counter, key, answer in (
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones,) * 4, ones << 32 | ones, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0 << 32 | 0xA4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ):
        assert A.philox(counter, key) == answer
        words = A.philox(tuple(torch.tensor([c]) for c in counter), key)
        assert tuple(int(word) for word in words) == answer


def test_stochastic_rounding_is_unbiased():
    # Fractions of a bf16 step, both signs; the mean over many draws errs by its standard error.
    draws = 1 << 14
    fractions = torch.tensor([0.0, 2**-10, 0.1, 0.5, 0.9, 1 - 2**-10])
    for base in (1.0, -1.0, 3e-5, -200.0):
        step = abs(base) * 2.0 ** -(7 + math.log2(abs(base)) % 1)  # spacing of bf16 at base
        for fraction in fractions.tolist():
            start = torch.tensor(base).bfloat16().float()
            x = start + math.copysign(step, base) * fraction
            rounded = A.round_stochastic_ref(x.repeat(draws), 12345).float()
            mean = ((rounded.double() - start) / math.copysign(step, base)).mean()
            real = float((x.double() - start) / math.copysign(step, base))
            assert abs(mean - real) < 5 * math.sqrt(real * (1 - real) / draws) + 1e-12
            assert rounded.unique().numel() == (1 if real == 0 else 2)


def test_stochastic_rounding_keeps_what_is_no_number():
    x = torch.tensor([math.inf, -math.inf, math.nan, 0.0])
    x = torch.cat([x, torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)])
    rounded = A.round_stochastic_ref(x.repeat(50), 7).float()
    assert torch.equal(rounded.nan_to_num(3e9), x.repeat(50).bfloat16().float().nan_to_num(3e9))


def run_stochastic(*, seed=3, parameter=0, first=1, last=6, resumed=None):
    param = randn(515, dtype=torch.bfloat16) if resumed is None else resumed[0].clone()
    state = (
        states(param, eight_bit=True)
        if resumed is None
        else {k: t.clone() for k, t in resumed[1].items()}
    )
    for step in range(first, last):
        grad = randn(515, seed=step, dtype=torch.bfloat16)
        A.adamw_update(param, grad, step=step, seed=seed, parameter=parameter, **state, **OPTIONS)
    return param, state


def test_resumed_run_is_bit_identical_and_streams_differ():
    param, state = run_stochastic()
    again, same = run_stochastic(first=4, resumed=run_stochastic(last=4))
    assert torch.equal(again, param) and all(torch.equal(same[k], state[k]) for k in state)
    assert not torch.equal(run_stochastic(seed=4)[0], param)
    assert not torch.equal(run_stochastic(parameter=1)[0], param)
    keys = {A._stream_key(s, t, p) for s in (0, 1, 2**63) for t in (1, 2, 2**33) for p in (0, 7)}
    assert len(keys) == 18 and all(key % 2 and 2**62 < key < 2**63 for key in keys)


def test_small_steps_add_up_without_a_master():
    # Plain bf16 would lose every one of them: 1 has its lower neighbour 2^-8 = 3.9e-3 away.
    param = torch.ones(4096, dtype=torch.bfloat16)
    state = states(param, eight_bit=True)
    for step in range(1, 51):
        A.adamw_update(
            param, torch.ones_like(param), step=step, seed=0, **state,
            **{**OPTIONS, "lr": 1e-4, "weight_decay": 0.0},
        )  # fmt: skip
    assert abs(float(param.float().mean()) - (1 - 50 * 1e-4)) < 2e-4


def test_gradient_of_any_strides_is_read_and_not_written():
    for grad in (randn(()).expand(6, 5), randn(5, 6).T):
        before, plain = grad.clone(), randn(6, 5)
        results = []
        for g in (grad, before):
            param = plain.clone()
            A.adamw_update(param, g, step=1, **states(param, eight_bit=False), **OPTIONS)
            results.append(param)
        assert torch.equal(*results) and torch.equal(grad, before)


def test_nothing_to_update():
    empty = torch.empty(0)
    kept = states(empty, eight_bit=True)
    A.adamw_update(empty, empty, step=1, **kept, **OPTIONS)
    assert all(t.numel() == 0 for t in (empty, kept["exp_avg"], kept["exp_avg_sq"]))


@pytest.mark.parametrize(
    "change, error",
    [
        ({"param": torch.ones(4, dtype=torch.int64)}, "param is torch.int64"),
        ({"param": torch.ones(4, dtype=torch.bfloat16)}, "needs a master, or a seed"),
        ({"param": torch.ones(4, dtype=torch.float16)}, "needs a master"),
        ({"grad": torch.ones(5)}, r"grad has shape \(5,\); it must be \(4,\)"),
        ({"exp_avg": torch.ones(4, dtype=torch.bfloat16)}, "exp_avg is torch.bfloat16"),
        ({"exp_avg": torch.ones(8)[::2]}, "exp_avg has strides"),
        ({"exp_avg": torch.ones(4, dtype=torch.uint8)}, "exp_avg_sq is torch.float32"),
        ({"exp_avg_absmax": torch.ones(1)}, "exp_avg_absmax is not for"),
        ({"master": torch.ones(4)}, "master is not for"),
        ({"grad_scale": torch.ones(1)}, "grad_scale has shape"),
        ({"step": 0}, "step is 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_bad_input_is_told(change, error):
    param = torch.ones(4)
    good = {"param": param, "grad": param, "step": 1, **states(param, eight_bit=False)}
    arguments = {**good, **change, **OPTIONS}
    tensors = [arguments.pop(k) for k in ("param", "grad", "exp_avg", "exp_avg_sq")]
    with pytest.raises((TypeError, ValueError), match=error):
        A.adamw_update(*tensors, **arguments)
