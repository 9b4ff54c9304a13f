"""AdamW's placements on the GPU: the same bits though streams race, bounded memory, no waiting."""

import contextlib
import itertools

import pytest
import torch

from tests.gpu import common
from tests.gpu.common import DEVICE, GPU, REHEARSAL
from xplus_fast.model.layout import UpdateLayout
from xplus_fast.training import host_state
from xplus_fast.training.optimizer import AdamW

pytestmark = GPU
KINDS = [(32, True), (8, True), (32, False), (8, False)]  # bits, master
PLACEMENTS = [
    dict(gradients=g, states=s) for g, s in itertools.product(("device", "host"), repeat=2)
]
SHAPES = [(100, 64), (130,), (300, 17)] if REHEARSAL else [(5120, 8704), (5120,), (17408, 1024)]


def parameters():
    made = []
    for i, shape in enumerate(SHAPES):
        p = torch.randn(*shape, generator=torch.Generator().manual_seed(i)) * 0.02
        made.append(torch.nn.Parameter(p.to(DEVICE, torch.bfloat16)))
    return made


def backward(ps, seed):
    """Gradients whose memory is taken again as soon as it is free, as in a model's backward."""
    generator = common.generator(seed)
    for p in ps:
        gradient = torch.randn(p.shape, generator=generator, device=DEVICE, dtype=p.dtype)
        (p * gradient).sum().backward()


def one_step(optimizer, ps, seed):
    for i in range(3):
        backward(ps, 10 * seed + i)
    norm = optimizer.grad_norm()
    optimizer.gradient_scale = (1.0 / (norm + 1e-6)).clamp(max=1.0)
    optimizer.step()
    optimizer.zero_grad()
    return norm


RACES = ["as it is", "transfers late", "transfers at once, updates late"]


@pytest.fixture(params=RACES[:1] if REHEARSAL else RACES)
def race(request, monkeypatch):
    """Whoever does not wait for another meets what the other has not yet written."""
    if REHEARSAL:
        monkeypatch.setattr(host_state, "CHUNK", 4096)
        return
    if request.param == "transfers late":
        working = host_state.Lane.working

        @contextlib.contextmanager
        def late(lane):
            with working(lane):
                torch.cuda._sleep(5_000_000)  # cycles: about 3 ms
                yield

        monkeypatch.setattr(host_state.Lane, "working", late)
    elif request.param != "as it is":
        from xplus_fast.training import optimizer

        update = optimizer.adamw_update

        def slow(*args, **options):
            torch.cuda._sleep(5_000_000)
            update(*args, **options)

        monkeypatch.setattr(optimizer, "adamw_update", slow)


@pytest.mark.parametrize("bits, master", KINDS)
def test_placements_change_no_bit(bits, master, race):
    results = []
    for places in PLACEMENTS:
        ps = parameters()
        optimizer = AdamW(ps, lr=1e-3, bits=bits, master=master, **places)
        norms = [one_step(optimizer, ps, seed) for seed in range(4)]
        optimizer.synchronize()
        states = [t.cpu() for p in ps for t in optimizer.state[p].values()]
        results.append([*torch.stack(norms).cpu(), *[p.detach().cpu() for p in ps], *states])
        assert all(t.is_pinned() or REHEARSAL for t in _on_host(optimizer))
    for places, other in zip(PLACEMENTS[1:], results[1:], strict=True):
        for ours, theirs in zip(other, results[0], strict=True):
            assert torch.equal(ours, theirs), places


def _on_host(optimizer):
    states = optimizer.state.values()
    found = [t for s in states for k, t in s.items() if k != "step" and not t.is_cuda]
    sums = optimizer._host_gradients._sums.values() if optimizer._host_gradients else ()
    return found + [s.host for s in sums]


def test_the_norm_is_exact():
    ps = parameters()
    optimizer = AdamW(ps)
    backward(ps, 1)
    truth = torch.stack([p.grad.double().norm() for p in ps]).norm()
    torch.testing.assert_close(optimizer.grad_norm().double(), truth, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits, master", KINDS)
def test_a_step_takes_its_slots_and_gives_them_back(bits, master):
    ps = parameters()
    places = PLACEMENTS[-1]
    optimizer = AdamW(ps, bits=bits, master=master, **places)
    backward(ps, 0)
    largest = max(p.numel() for p in ps)
    slots = host_state.slot_bytes(largest, UpdateLayout(bits=bits, master=master, **places))
    taken = common.extra_memory(optimizer.step)
    assert slots <= taken <= slots + common.MIB


@pytest.mark.skipif(REHEARSAL, reason="needs CUDA: what a backward allocates")
def test_gradients_on_their_way_take_little():
    """Eight parameters' gradients: four have to have left when the backward is over."""
    ps = [torch.nn.Parameter(torch.ones(4096, 4096, device=DEVICE)) for _ in range(8)]
    one = ps[0].nbytes
    optimizer = AdamW(ps, gradients="host")

    def backward_of_all():
        sum(p.sum() for p in ps).backward()

    # two on their way, one being made, and the piece it is added to
    assert common.extra_memory(backward_of_all) <= 4 * one + common.MIB
    assert optimizer.grad_norm().item() == pytest.approx(2 * (8 * 4096**2) ** 0.5, rel=1e-6)


@pytest.mark.parametrize("places", PLACEMENTS)
def test_waits_for_nothing(places):
    ps = parameters()
    optimizer = AdamW(ps, **places)
    one_step(optimizer, ps, 0)  # makes states, and sums on the host
    common.waits_for_nothing(lambda: one_step(optimizer, ps, 1))
