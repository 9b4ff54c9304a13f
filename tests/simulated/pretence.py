"""What of torch's Python side has to say "cuda", while a simulated device is there."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._device import _device_constructors

import xplus_kernels  # noqa: F401  (its modules are to be there)
from tests.simulated.clocks import DEVICE, Event, Stream
from tests.simulated.device import CPU, SimulatedDevice, real_device


@contextmanager
def pretend(sim: SimulatedDevice) -> Iterator[None]:
    """Tensors tell their simulated device, `torch.cuda` is the simulation's, and the kernels'
    public functions run their references."""
    _device_constructors()  # torch keeps the list, which is to be of its own functions
    with ExitStack() as patches:
        for owner, changes in (
            (Tensor, _tensor_methods(sim)), (torch, _makers(sim)), (torch.cuda, _cuda(sim)),
        ):  # fmt: skip
            for name, value in changes.items():
                patches.enter_context(mock.patch.object(owner, name, value))
        for owner, name, value in _kernels(sim):
            patches.enter_context(mock.patch.object(owner, name, value))
        forget_cached()
        try:
            yield
        finally:
            forget_cached()


def _kernels(sim: SimulatedDevice) -> Iterator[tuple[Any, str, Any]]:
    """Each reference is a kernel, launched whatever the tensors."""
    for module in _kernel_modules():
        for name, value in list(vars(module).items()):
            if name == "use_triton":
                yield module, name, lambda x: False
            elif name.endswith("_ref") or name == "quantize_nf4":  # which is bitsandbytes'
                yield module, name, partial(sim.launch, value)
            elif name == "_fp8_path":
                yield module, name, lambda device: "reference"
    attention: Any = sys.modules["xplus_kernels.varlen_attention"]
    yield attention, "_choose", lambda *_: attention.REFERENCE


def forget_cached() -> None:
    """What kernels keep of a device is that device's."""
    for module in _kernel_modules():
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()


def _kernel_modules() -> list[Any]:
    return [module for name, module in sys.modules.items() if name.startswith("xplus_kernels")]


def _moved(sim: SimulatedDevice) -> Callable[..., Tensor]:
    """`Tensor.to`."""
    plain = Tensor.to

    def to(t: Tensor, *args: Any, device: Any = None, **options: Any) -> Tensor:
        given = list(args)
        if given and (given[0] is None or isinstance(given[0], (torch.device, str, int))):
            device = given.pop(0)
        elif given and isinstance(given[0], Tensor):
            like = given.pop(0)
            device, options["dtype"] = like.device, like.dtype
        options |= dict(zip(("dtype", "non_blocking", "copy"), given, strict=False))
        if device is None:
            return plain(t, **options)
        device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        if "meta" in (device.type, real_device(t).type):
            return plain(t, CPU if device.type == "cuda" else device, **options)
        if (device.type == "cuda") == sim.shows(t):
            return plain(t, **options) if options else t
        dtype, late = options.get("dtype"), options.get("non_blocking", False)
        return torch.ops.aten._to_copy(t, dtype=dtype, device=device, non_blocking=late)

    return to


def _tensor_methods(sim: SimulatedDevice) -> dict[str, Any]:
    to, tolist, numpy = _moved(sim), Tensor.tolist, Tensor.numpy

    def listed(t: Tensor) -> Any:
        return tolist(to(t, CPU))

    def as_numpy(t: Tensor, *args: Any, **options: Any) -> Any:
        if sim.is_device(t):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        # who has it may write to it at any time from now on
        sim.touch(t, sim.host, sim.host.tick(), True, "numpy")
        return numpy(t, *args, **options)

    def record_stream(t: Tensor, stream: Stream) -> None:
        sim.ordering()
        sim.memory(t).recorded.add(stream.name)

    def pin_memory(t: Tensor, *_: Any) -> Tensor:
        return t if sim.is_pinned(t) else sim.pin(t.clone())

    return {
        "device": property(lambda t: DEVICE if sim.shows(t) else real_device(t)),
        "is_cuda": property(sim.shows),
        "to": to,
        "cpu": lambda t, *_, **__: to(t, CPU),
        "cuda": lambda t, device=None, non_blocking=False, **_: to(t, DEVICE, non_blocking),
        "tolist": listed,
        "numpy": as_numpy,
        "pin_memory": pin_memory,
        "is_pinned": lambda t, *_: sim.is_pinned(t),
        "record_stream": record_stream,
    }


def _makers(sim: SimulatedDevice) -> dict[str, Any]:
    """What makes tensors of Python's values, on the host first."""

    def maker(plain: Any) -> Any:
        def made(data: Any, *args: Any, device: Any = None, **options: Any) -> Tensor:
            if isinstance(data, Tensor) and device is None:
                device = data.device
            t = plain(data, *args, **options)
            return t if device is None else t.to(device)

        return made

    return {name: maker(getattr(torch, name)) for name in ("tensor", "as_tensor")}


def _cuda(sim: SimulatedDevice) -> dict[str, Any]:
    @contextmanager
    def on(stream: Stream | None) -> Iterator[None]:
        before = sim.current
        sim.current = before if stream is None else stream
        try:
            yield
        finally:
            sim.current = before

    def synchronize(device: Any = None) -> None:
        sim.ordering()
        for stream in sim.streams:
            sim.host.learn(stream.clock)
        sim.waited("the device")

    def forget_peak() -> None:
        sim.peak = sim.alive

    major, minor = sim.capability
    about = SimpleNamespace(
        name="a simulated device", total_memory=sim.total, multi_processor_count=108, major=major,
        minor=minor, L2_cache_size=40 << 20,
    )  # fmt: skip
    runtime = SimpleNamespace(cudaHostRegister=sim.register, cudaHostUnregister=sim.unregister)
    values: dict[str, Any] = {
        "Stream": lambda device=None, priority=0: Stream(sim),
        "Event": lambda *_, **__: Event(sim),
        "stream": on,
        "current_stream": lambda device=None: sim.current,
        "default_stream": lambda device=None: sim.default,
        "synchronize": synchronize,
        "device": lambda device=None: nullcontext(),
    }
    for name, answer in {
        "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0,
        "get_device_properties": about, "get_device_name": about.name, "cudart": runtime,
        "get_device_capability": sim.capability, "is_bf16_supported": True, "_lazy_init": None,
        "is_current_stream_capturing": False, "empty_cache": None, "set_device": None,
        "set_per_process_memory_fraction": None, "manual_seed": None, "manual_seed_all": None,
        "set_rng_state": None,
    }.items():  # fmt: skip
        values[name] = lambda *_, answer=answer, **__: answer
    for name, tell in {
        "mem_get_info": lambda: (sim.total - sim.alive, sim.total),
        "memory_allocated": lambda: sim.alive, "max_memory_allocated": lambda: sim.peak,
        "memory_reserved": lambda: sim.alive, "max_memory_reserved": lambda: sim.peak,
        "reset_peak_memory_stats": forget_peak,
        "get_rng_state": lambda: torch.zeros(16, dtype=torch.uint8),
    }.items():  # fmt: skip
        values[name] = lambda *_, tell=tell, **__: (sim.sweep(), tell())[1]
    return values
