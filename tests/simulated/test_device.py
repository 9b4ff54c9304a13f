"""The simulated device itself: what it finds in small programs, right and wrong ones."""

import gc

import pytest
import torch
from torch.utils._device import _device_constructors

from tests.simulated.clocks import DEVICE
from tests.simulated.device import Fault, SimulatedDevice
from xplus_fast.model.host_memory import zeros_on_host


@pytest.fixture
def sim():
    with SimulatedDevice() as device:
        yield device


def side_copy(order: str) -> torch.Tensor:
    """x is made on the main stream, doubled on another, and read on the main one again."""
    side, x = torch.cuda.Stream(), torch.ones(8, device=DEVICE)
    if order != "nothing before":
        side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        x.mul_(2)
        if order != "nothing after":
            done = side.record_event()
    x.add_(1)
    if order != "nothing after":
        torch.cuda.current_stream().wait_event(done)
    return x + 1


def test_streams_in_order(sim):
    side, x = torch.cuda.Stream(), torch.ones(8, device=DEVICE)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        x.mul_(2)
    torch.cuda.current_stream().wait_event(side.record_event())
    assert (x + 1).tolist() == [3.0] * 8 and not sim.found


@pytest.mark.parametrize("order", ["nothing before", "nothing after", "too late"])
def test_a_race(order, sim):
    with pytest.raises(Fault, match="mul_|add_"):
        side_copy(order)


def test_parts_of_one_tensor_are_apart(sim):
    side, x = torch.cuda.Stream(), torch.empty(8, device=DEVICE)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        x[:4].fill_(1)
    x[4:].fill_(2)
    with pytest.raises(Fault, match="fill_ on the main stream .* is not after fill_ on stream 1"):
        x[3:].fill_(3)


def test_two_readers_are_no_race(sim):
    side, x = torch.cuda.Stream(), torch.ones(8, device=DEVICE)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        x.sum()
    x.sum()
    assert not sim.found


@pytest.mark.parametrize("how", ["nothing", "record_stream", "an event"])
def test_memory_that_is_given_back_too_early(how, sim):
    """The next one on the main stream gets it, while the side stream reads."""
    side, x = torch.cuda.Stream(), torch.ones(8, device=DEVICE)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        x.sum()
    if how == "record_stream":
        x.record_stream(side)
    del x
    if how == "an event":
        torch.cuda.current_stream().wait_event(side.record_event())
    if how == "nothing":
        with pytest.raises(Fault, match="sum, which may still use this memory"):
            torch.ones(3, device=DEVICE)
    else:
        torch.ones(3, device=DEVICE)


def test_memory_whose_last_owner_may_not_be_done(sim):
    """It is the main stream's, and the side stream fills it at once."""
    torch.ones(8, device=DEVICE)
    side, made = torch.cuda.Stream(), torch.empty(8, device=DEVICE)
    with torch.cuda.stream(side), pytest.raises(Fault, match="whoever had this memory"):
        made.fill_(1)


@pytest.mark.parametrize("waits", [True, False])
def test_the_host_reads_what_is_on_its_way(waits, sim):
    pinned = zeros_on_host((8,), torch.float32, DEVICE)
    x = torch.ones(8, device=DEVICE)
    pinned.copy_(x, non_blocking=True)
    assert not sim.waits
    if waits:
        torch.cuda.current_stream().synchronize()
        assert pinned.numpy().sum() == 8 and sum(sim.waits.values()) == 1
    else:
        with pytest.raises(Fault, match="numpy on the host"):
            pinned.numpy()


def test_the_host_writes_what_is_on_its_way(sim):
    pinned = zeros_on_host((8,), torch.float32, DEVICE)
    x = torch.empty(8, device=DEVICE)
    x.copy_(pinned, non_blocking=True)
    with pytest.raises(Fault, match="fill_ on the host"):
        pinned.fill_(1)


def test_pinned_memory_that_is_let_go_too_early():
    with SimulatedDevice(strict=False) as sim:
        pinned = torch.empty(8)
        sim.register(pinned.data_ptr(), 32, 1)
        pinned.copy_(torch.ones(8, device=DEVICE), non_blocking=True)
        sim.unregister(pinned.data_ptr())
    assert ["may use host memory that is let go" in text for text in sim.found] == [True]


def test_torchs_own_pinned_memory_may_go_at_once(sim):
    x = torch.arange(5).pin_memory().to(DEVICE, non_blocking=True)
    y = x.to("cpu", non_blocking=True)
    with pytest.raises(Fault, match="numpy on the host"):
        y.numpy()
    assert not sim.waits


def test_tensors_of_host_and_device(sim):
    x = torch.ones(8, device=DEVICE)
    with pytest.raises(Fault, match=r"add: \(8,\) of the host"):
        x + torch.ones(8)
    assert (x + torch.tensor(1.0)).device == DEVICE  # a number
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()


ASKS = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "a condition": lambda x: bool((x > 0).any()),
    "nonzero": lambda x: x.nonzero(),
    "a mask": lambda x: x[x > 0],
    "to the host": lambda x: x.cpu(),
    "a list": lambda x: x.add_(torch.tensor([1.0], device=DEVICE)),
    "repeats": lambda x: x.repeat_interleave(x.long()),
}


@pytest.mark.parametrize("way", ASKS)
def test_waits_are_counted_by_place(way, sim):
    x = torch.ones(8, device=DEVICE)
    assert not sim.waits
    ASKS[way](x)
    ((where, times),) = sim.waits.items()
    assert times == 1 and where.startswith("a test: ")


def test_what_waits_for_nothing(sim):
    x = torch.arange(8, device=DEVICE)
    x[x.flip(0)].repeat_interleave(x, output_size=28).float().norm()
    torch.zeros(3, device=DEVICE).to(torch.bfloat16)
    assert not sim.waits


def test_bytes(sim):
    x = torch.ones(1000, device=DEVICE)
    y = x[:10]
    del x
    assert torch.cuda.memory_allocated() == 4096
    del y
    gc.collect()
    torch.empty(0, device=DEVICE)
    assert torch.cuda.memory_allocated() == 0 and torch.cuda.max_memory_allocated() == 4096


def test_an_allocation_fails(sim):
    sim.fail_at = 2
    torch.ones(3, device=DEVICE)
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        torch.ones(3, device=DEVICE)
    assert torch.ones(3, device=DEVICE).tolist() == [1.0] * 3
    assert torch.cuda.memory_allocated() == 0


def test_nothing_is_left_of_it():
    before = torch.Tensor.to, torch.cuda.is_available(), torch.tensor
    _device_constructors.cache_clear()
    with SimulatedDevice():
        assert torch.cuda.is_available() and torch.ones(2, device="cuda").is_cuda
        with torch.device("meta"):
            torch.ones(2)
    assert before == (torch.Tensor.to, torch.cuda.is_available(), torch.tensor)
    assert torch.ones(2).device.type == "cpu"
    with torch.device("meta"):
        assert torch.tensor(1.0).is_meta
