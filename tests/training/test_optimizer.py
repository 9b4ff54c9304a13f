"""AdamW in every layout: one result wherever its memory lies, exact norms, exact resumption."""

import gc
import itertools
import re
from pathlib import Path

import pytest
import torch
from transformers.trainer_callback import PrinterCallback, TrainerCallback

from tests.tiny import tiny_model
from tests.training.test_trainer import arguments, losses, pad, sentences
from xplus_fast import XPlusTrainer
from xplus_fast.errors import UserError
from xplus_fast.model.layout import UpdateLayout
from xplus_fast.training import host_state
from xplus_fast.training.optimizer import AdamW

KINDS = [  # dtype, bits, master
    (torch.float32, 32, True),
    (torch.float32, 8, True),
    (torch.bfloat16, 32, True),
    (torch.bfloat16, 8, True),
    (torch.bfloat16, 32, False),
    (torch.bfloat16, 8, False),
]
PLACES = ("device", "host")
PLACEMENTS = list(itertools.product(PLACES, PLACES))


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Several pieces to a tensor, the last one short, as real sizes have."""
    monkeypatch.setattr(host_state, "CHUNK", 4096)


def fit(folder, layout, *, dtype=torch.float32, resume=None, callbacks=(), model=None, **changes):
    options = dict(max_steps=5, gradient_accumulation_steps=3, max_grad_norm=0.05)
    trainer = XPlusTrainer(
        model or tiny_model().to(dtype), arguments(folder, **{**options, **changes}), layers="2",
        update=layout, train_dataset=sentences(n=30, most=12), data_collator=pad,
        callbacks=list(callbacks),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume)
    return trainer


def norms(trainer):
    return [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line]


def assert_same(ours, theirs):
    assert losses(ours) == losses(theirs)[-len(losses(ours)) :]
    for name, value in theirs.model.state_dict().items():
        assert torch.equal(ours.model.state_dict()[name], value), name
    for p, q in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        mine, other = (t.optimizer.optimizer.state.get(x, {}) for t, x in ((ours, p), (theirs, q)))
        assert mine.keys() == other.keys()
        for key, value in other.items():
            assert torch.equal(mine[key], value), key


@pytest.mark.parametrize("dtype, bits, master", KINDS)
def test_placements_change_no_bit(dtype, bits, master, tmp_path):
    class Look(TrainerCallback):
        seen = 0

        def on_pre_optimizer_step(self, *_, model, **__):
            self.seen += sum(p.grad is not None for p in model.parameters())

    runs = []
    for gradients, states in PLACEMENTS:
        layout = UpdateLayout(gradients=gradients, states=states, bits=bits, master=master)
        look = Look()
        runs.append(fit(tmp_path, layout, dtype=dtype, callbacks=[look]))
        assert (look.seen == 0) == (gradients == "host")
    first = runs[0]
    assert len(losses(first)) == 5 and min(norms(first)) > 0.05  # clipping had something to do
    weight = first.model.model.layers[2].mlp.down_proj.weight
    assert not torch.equal(weight, tiny_model().to(dtype).model.layers[2].mlp.down_proj.weight)
    for run in runs[1:]:
        assert norms(run) == norms(first)
        assert_same(run, first)


@pytest.mark.parametrize("dtype, bits, master", KINDS)
def test_resuming_is_exact_and_may_change_the_placement(dtype, bits, master, tmp_path):
    kind = dict(bits=bits, master=master)
    there = UpdateLayout(gradients="host", states="host", **kind)
    here = UpdateLayout(**kind)
    first = fit(tmp_path, there, dtype=dtype, save_strategy="steps", save_steps=2, seed=7)
    for layout in (there, here):
        again = fit(
            tmp_path / "again", layout, dtype=dtype, resume=tmp_path / "checkpoint-2", seed=7
        )
        assert len(losses(again)) == 5  # with the two of the checkpoint's history
        assert_same(again, first)


def test_resuming_with_other_states_is_refused(tmp_path):
    fit(tmp_path, UpdateLayout(), max_steps=1, save_strategy="steps", save_steps=1)
    with pytest.raises(UserError, match="checkpoint-1: its optimizer has 32-bit.*asks for 8-bit"):
        fit(tmp_path, UpdateLayout(bits=8), resume=True)
    with pytest.raises(UserError, match="with an fp32 master.*without an fp32 master"):
        fit(tmp_path, UpdateLayout(master=False), resume=True)


def test_a_norm_that_is_not_finite_leaves_the_weights(tmp_path):
    for dtype, bits, master in KINDS[::3]:
        for gradients, states in PLACEMENTS:
            model = tiny_model().to(dtype)
            with torch.no_grad():
                model.model.layers[4].mlp.down_proj.weight[0, 0] = float("inf")
            before = {k: v.clone() for k, v in model.state_dict().items() if "layers.2" in k}
            layout = UpdateLayout(gradients, states, bits, master)
            with pytest.raises(UserError, match="step 1: the gradient norm is nan"):
                fit(tmp_path, layout, model=model)
            for key, value in model.state_dict().items():
                assert "layers.2" not in key or torch.equal(value, before[key]), key


class Breaks(TrainerCallback):
    """A frozen weight that is no number from the second step on."""

    def on_step_begin(self, args, state, control, model, optimizer, **_):
        self.optimizer, self.ended = optimizer.optimizer, state.global_step
        if state.global_step == 1:
            with torch.no_grad():
                model.model.layers[4].mlp.down_proj.weight[0, 0] = torch.inf

    def on_step_end(self, args, state, control, **_):
        self.ended = state.global_step


@pytest.mark.parametrize("clip", [0.05, 0])
@pytest.mark.parametrize("dtype, bits, master", KINDS)
def test_a_step_that_broke_is_no_step(dtype, bits, master, clip, tmp_path):
    """It is enqueued before its norm is read: neither weights, nor states, nor their step."""
    for gradients, states in PLACEMENTS:
        layout = UpdateLayout(gradients, states, bits, master)
        options = dict(dtype=dtype, max_grad_norm=clip, lr_scheduler_type="constant")
        good = fit(tmp_path, layout, max_steps=1, **options)
        breaks, model = Breaks(), tiny_model().to(dtype)
        with pytest.raises(UserError, match="step 2: the gradient norm is nan"):
            fit(tmp_path, layout, model=model, max_steps=2, callbacks=[breaks], **options)
        assert breaks.ended == 1  # nobody took it for a step
        breaks.optimizer.synchronize()
        mine = breaks.optimizer.state
        theirs = good.optimizer.optimizer.state
        assert len(mine) == len(theirs) > 5
        for (p, state), (q, other) in zip(mine.items(), theirs.items(), strict=True):
            assert torch.equal(p, q) and state["step"] == 1 and state.keys() == other.keys()
            assert all(torch.equal(value, other[key]) for key, value in state.items())


@pytest.mark.parametrize("gradients", PLACES)
def test_without_clipping_the_norm_is_logged(gradients, tmp_path):
    plain = fit(tmp_path, UpdateLayout(gradients=gradients), max_grad_norm=0, max_steps=1)
    clipped = fit(tmp_path, UpdateLayout(gradients=gradients), max_steps=1)
    assert norms(plain) == norms(clipped) and norms(plain)[0] > 0.05


@pytest.mark.parametrize("master", [True, False])
def test_eight_bit_states_learn_as_well(master, tmp_path):
    curves = []
    for layout in (UpdateLayout(), UpdateLayout(bits=8, master=master)):
        options = dict(dtype=torch.bfloat16, max_steps=20, gradient_accumulation_steps=1)
        curves.append(losses(fit(tmp_path, layout, max_grad_norm=1.0, **options)))
    assert curves[1] == pytest.approx(curves[0], rel=1e-2)
    assert curves[0] != curves[1] and curves[0][-1] < curves[0][0] - 0.05


def test_a_layout_needs_our_optimizer(tmp_path):
    layout = UpdateLayout(states="host")
    with pytest.raises(UserError, match="states='host'.*optim=sgd"):
        XPlusTrainer(tiny_model(), arguments(tmp_path, optim="sgd"), update=layout)
    own = (AdamW, {"lr": 1e-3})
    with pytest.raises(UserError, match="one of its own"):
        XPlusTrainer(tiny_model(), arguments(tmp_path), update=layout, optimizer_cls_and_kwargs=own)


# The optimizer alone


def parameter(n=9000, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.nn.Parameter((0.02 * torch.randn(n, generator=g)).to(dtype))


def noise(p, seed):
    return torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)).to(p.dtype)


def back(p, gradient):
    """A backward pass that gives p this gradient."""
    (p * gradient).sum().backward()


@pytest.mark.parametrize("places", PLACEMENTS)
def test_fp32_is_torchs_adamw_and_its_clipping(places):
    ours, theirs = ([parameter(), parameter(33, seed=1)] for _ in range(2))
    mine = AdamW(ours, lr=1e-2, weight_decay=0.1, gradients=places[0], states=places[1])
    other = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1)
    for step in range(6):
        for p, q in zip(ours, theirs, strict=True):
            back(p, noise(p, step))
            back(q, noise(q, step))
        norm = torch.nn.utils.clip_grad_norm_(theirs, 5.0)
        assert mine.grad_norm().item() == pytest.approx(norm.item(), rel=1e-5) and norm > 5
        mine.gradient_scale = 5.0 / (norm + 1e-6)
        mine.step()
        other.step()
        for optimizer in (mine, other):
            optimizer.zero_grad()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_a_scale_serves_one_step():
    scaled, plain = parameter(), parameter()
    for p in (scaled, plain):
        optimizer = AdamW([p], lr=1e-2, weight_decay=0.0)
        for step, scale in enumerate((0.25, 1.0)):
            gradient = noise(p, step) * (1.0 if p is scaled else scale)
            p.grad = gradient.clone()
            if p is scaled and step == 0:
                optimizer.gradient_scale = torch.tensor(scale)
            optimizer.step()
            assert torch.equal(p.grad, gradient)  # never written
    assert torch.equal(scaled, plain)


def test_stochastic_rounding_moves_what_rounding_would_leave():
    p, other = (torch.nn.Parameter(torch.full((8192,), 0.02).bfloat16()) for _ in range(2))
    start = p.detach().float().mean()
    optimizer = AdamW([p, other], lr=1e-5, weight_decay=0.0, master=False, seed=11)
    for _ in range(5):
        p.grad, other.grad = torch.ones_like(p), torch.ones_like(p)
        optimizer.step()
    assert p.unique().numel() > 1  # 1e-5 is an eleventh of the spacing
    assert (p.float().mean() - start).item() == pytest.approx(-5e-5, rel=0.15)
    pieces = [*p.detach().split(4096), *other.detach().split(4096)]
    for a, b in itertools.combinations(pieces, 2):
        assert not torch.equal(a, b)  # each has a random stream of its own


def test_the_seed_names_the_rounding():
    results = []
    for seed in (1, 1, 2):
        p = parameter(dtype=torch.bfloat16)
        optimizer = AdamW([p], lr=1e-5, master=False, seed=seed)
        p.grad = noise(p, 5)
        optimizer.step()
        results.append(p.detach())
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("gradients", PLACES)
def test_the_norm_is_exact(gradients, dtype):
    ps = [parameter(n, dtype) for n in (130, 9000, 2**22)]
    unused = parameter(7)
    optimizer = AdamW([unused, *ps], gradients=gradients)
    assert optimizer.grad_norm() == 0
    truth = torch.zeros((), dtype=torch.float64)
    for i, p in enumerate(ps):
        back(p, noise(p, i))
        truth += noise(p, i).double().square().sum()
    assert optimizer.grad_norm().item() == pytest.approx(truth.sqrt().item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_on_the_host_are_those_of_the_device(dtype):
    there, here = parameter(dtype=dtype), parameter(dtype=dtype)
    optimizer = AdamW([there], gradients="host")
    for step in range(2):
        for i in range(4):
            for p in (there, here):
                back(p, noise(p, 10 * step + i))
        assert there.grad is None
        assert torch.equal(optimizer._host_gradients.get(there), here.grad)
        optimizer.zero_grad()
        here.grad = None
        assert optimizer._host_gradients.get(there) is None and optimizer.grad_norm() == 0
    before = there.detach().clone()
    optimizer.step()
    assert torch.equal(there, before)  # nothing to step on


def test_an_optimizer_that_is_gone_takes_no_gradients():
    p = parameter()
    optimizer = AdamW([p], gradients="host")
    del optimizer
    gc.collect()
    back(p, noise(p, 0))
    assert torch.equal(p.grad, noise(p, 0))


def test_states_that_find_no_room_are_made_once_the_cache_is_given_back(monkeypatch):
    """Nothing has changed by then, and what was made before is not made again."""
    ours, theirs = ([parameter(), parameter()] for _ in range(2))
    plain, short = (AdamW(params, lr=1e-2) for params in (theirs, ours))
    made, given_back = [], []
    zeros = short._zeros

    def rarely(p, shape, dtype):
        made.append(p)
        if len(made) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return zeros(p, shape, dtype)

    monkeypatch.setattr(short, "_zeros", rarely)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given_back.append(len(made)))
    for optimizer, params in ((plain, theirs), (short, ours)):
        for step in range(2):
            for p in params:
                p.grad = noise(p, step)
            optimizer.step()
    assert given_back == [3] and len(made) == 5  # two a parameter, and the one that found no room
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def flags_of(address):
    """What the kernel keeps of the memory there, in two letters each; see proc(5), VmFlags."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
            first, end = (int(x, 16) for x in found.groups())
            inside = first <= address < end
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError("no such memory")


def test_no_room_on_the_host_is_one_line(monkeypatch):
    freed = []

    class Full:
        answer = 2

        def cudaHostRegister(self, address, size, flags):
            return self.answer

        def cudaHostUnregister(self, address):
            assert waited == [gpu]  # copies of it may have been on their way
            freed.append(address)

    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "cudart", Full)
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    gpu = torch.device("cuda", 0)
    with pytest.raises(UserError, match="host memory: 36,000 bytes more cannot be pinned"):
        host_state.zeros_on_host((9, 1000), torch.float32, gpu)
    assert not freed
    Full.answer = 0
    tensor = host_state.zeros_on_host((9, 1000), torch.float32, gpu)
    row, address = tensor[3], tensor.data_ptr()
    assert tensor.shape == (9, 1000) and not tensor.any()
    assert "dc" in flags_of(address)  # a process that is forked does not get it
    del tensor
    gc.collect()
    assert not freed  # the row still looks at it
    del row
    gc.collect()
    assert freed == [address]

    def full(*_):
        raise UserError("host memory: full")

    monkeypatch.setattr(host_state, "zeros_on_host", full)
    p = parameter()
    optimizer = AdamW([p], gradients="host")
    with pytest.raises(UserError, match="full"):
        back(p, noise(p, 0))
    del optimizer


@pytest.mark.parametrize("dtype, bits, master", KINDS)
@pytest.mark.parametrize("places", PLACEMENTS[1:])
def test_slots_are_as_large_as_planned(dtype, bits, master, places, monkeypatch):
    sizes = set()
    carve = host_state._carve
    monkeypatch.setattr(
        host_state, "_carve", lambda slot, like: sizes.add(slot.nbytes) or carve(slot, like)
    )
    gradients, states = places
    layout = UpdateLayout(gradients, states, bits, master)
    for n in (130, 9000):
        p = parameter(n, dtype)
        optimizer = AdamW([p], gradients=gradients, states=states, bits=bits, master=master)
        back(p, noise(p, 0))
        optimizer.step()
        planned = host_state.slot_bytes(n, layout, width=p.itemsize)
        assert planned == 2 * sizes.pop() and not sizes
    assert host_state.slot_bytes(9000, UpdateLayout(), width=2) == 0


def test_a_state_dict_keeps_masters_and_takes_the_placement():
    p = parameter(dtype=torch.bfloat16)
    first = AdamW([p], lr=1e-5)
    p.grad = noise(p, 0)
    first.step()
    saved = {k: v for k, v in first.state[p].items()}
    second = AdamW([p], states="host")
    second.load_state_dict(first.state_dict())
    for key, value in saved.items():
        assert second.state[p][key].dtype == value.dtype and second.state[p][key] is not value
        assert torch.equal(second.state[p][key], value), key
    assert second.param_groups[0]["lr"] == 1e-5
    with pytest.raises(UserError, match="state_dict: its optimizer has 32-bit states"):
        AdamW([p], bits=8).load_state_dict(first.state_dict())


def test_a_grad_scaler_unscales_and_skips():
    p, q = parameter(), parameter()
    optimizer, plain = AdamW([p], lr=1e-2), AdamW([q], lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step, bad in enumerate((False, True, False)):
        gradient = noise(p, step)
        if bad:
            gradient[3] = float("inf")
        scaler.scale((p * gradient).sum()).backward()
        scaler.unscale_(optimizer)
        norm = optimizer.grad_norm()
        optimizer.gradient_scale = (2.0 / (norm + 1e-6)).clamp(max=1.0)
        before = p.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(p, before) == bad
        optimizer.zero_grad()
        if not bad:
            q.grad = gradient
            plain.gradient_scale = (2.0 / (plain.grad_norm() + 1e-6)).clamp(max=1.0)
            plain.step()
    assert torch.equal(p, q)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"bits": 16}, "bits: 16; allowed: 32, 8"),
        ({"states": "disk"}, "states: 'disk' is not a placement; allowed: device, host"),
        ({"gradients": "cpu"}, "gradients: 'cpu' is not a placement"),
        ({"seed": -1}, "seed: -1; allowed: 0 to"),
        ({"dtype": torch.float16, "master": False}, "master: float16 parameters need one"),
        ({"dtype": torch.float64, "bits": 8}, "bits: float64 parameters have no 8-bit states"),
    ],
)
def test_bad_options_are_refused(change, message):
    p = parameter(dtype=change.pop("dtype", torch.float32))
    with pytest.raises(UserError, match=message):
        AdamW([p], **change)


def test_bad_parameters_are_refused():
    turned = torch.nn.Parameter(torch.zeros(3, 4).t())
    with pytest.raises(UserError, match=r"shape \(4, 3\) is not contiguous"):
        AdamW([turned])
    with pytest.raises(UserError, match="requires no gradient"):
        AdamW([parameter().requires_grad_(False)], gradients="host")
