"""A CUDA device without one: ops run on the CPU, streams and memory obey CUDA's rules on paper.

`with SimulatedDevice() as sim:` makes `device="cuda"` work. Everything is computed at once and in
the program's order, so values are those of a program that orders its streams rightly; whether it
does is told by clocks (`clocks.py`). Found are (`sim.found`)

    races: two accesses to the same bytes, one of them a write, that nothing orders
    use after free: the same, of memory that the allocator has given to somebody else
    mixes: tensors of host and device in one op

Counted are the host's waits, by the place in the source that waits (`sim.waits`), and bytes of the
device (`sim.alive`, `sim.peak`). The allocation of number `sim.fail_at` runs out of memory.

Not told: an op that the device does not have, a kernel that reads beyond its tensors, time.
"""

import gc
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.simulated.clocks import Simulated, Stream, Timeline
from tests.simulated.memory import Memory, Pools
from tests.simulated.places import file_of, frames, told

CPU = torch.device("cpu")
real_device = torch._C.TensorBase.device.__get__  # type: ignore[attr-defined]
# ops whose result's size or value the host wants to know
ASKING = {
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2",
    "unique_dim", "unique_consecutive", "bincount",
}  # fmt: skip
MAKES_NOTHING = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias",
}  # fmt: skip


class Fault(AssertionError):
    """What a program must not do."""


class SimulatedDevice(TorchDispatchMode, Simulated):
    """One CUDA device.

    capability: which it says it has. strict: raise what is found, at once. total: its bytes.
    """

    def __init__(
        self, *, capability: tuple[int, int] = (9, 0), strict: bool = True, total: int = 80 * 10**9
    ) -> None:
        super().__init__()
        self.capability, self.strict, self.total = capability, strict, total
        self.host = Timeline("the host")
        self.streams = []
        self.current = Stream(self, "the main stream")
        self.default = self.current
        self.found: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()  # "file function" -> how often
        self.reached: set[tuple[str, int]] = set()  # lines of ours that ordered streams
        self.alive = self.peak = 0
        self.allocated: list[str] = []  # "file function", a library's too, of each allocation
        self.fail_at: int | None = None
        self.pinned: dict[int, tuple[int, dict]] = {}  # address -> bytes, accesses
        self._memory: dict[int, Memory] = {}
        self._pools = Pools()
        self._ops: dict[Any, _Op] = {}
        self._paused = 0
        self._launched: list[tuple[Tensor, bool]] | None = None  # what a kernel touches
        self._patches = ExitStack()

    def __enter__(self) -> "SimulatedDevice":
        from tests.simulated.pretence import pretend

        self._patches.enter_context(pretend(self))
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        gc.collect()  # what is left gives its memory back to this device
        self.sweep()
        super().__exit__(*raised)
        self._patches.close()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Look at values without being seen."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    # --- what is told

    def report(self, what: str) -> None:
        self.found[what] += 1
        if self.strict:
            raise Fault(what)

    def ordering(self) -> None:
        self.reached |= {(code.co_filename, line) for code, line in frames(most=100)}

    def waited(self, what: str) -> None:
        if self._paused:
            return
        self.waits[f"{_place()}: {what}"] += 1

    # --- memory

    def memory(self, t: Tensor) -> Memory:
        """A tensor's; what has not been seen yet is the host's."""
        key = t.untyped_storage()._cdata
        found = self._memory.get(key)
        if found is None or found.gone:
            self.sweep()
            region = self._region(t)
            found = self._memory[key] = Memory(t, None, None if region is None else region[1])
            found.pinned = region is not None
        return found

    def is_device(self, t: Tensor) -> bool:
        found = self._memory.get(t.untyped_storage()._cdata)
        return found is not None and found.home is not None and not found.gone

    def shows(self, t: Tensor) -> bool:
        """Whether a tensor says that it is the device's; a kernel's reference sees the host's."""
        return self._launched is None and self.is_device(t)

    def is_pinned(self, t: Tensor) -> bool:
        return not self.is_device(t) and self.memory(t).pinned

    def pin(self, t: Tensor) -> Tensor:
        """Host memory of torch's own allocator, which looks after its reuse."""
        self.memory(t).pinned = True
        return t

    def register(self, address: int, size: int, flags: int) -> int:
        self.pinned[address] = (size, {})
        return 0

    def unregister(self, address: int) -> int:
        _, accesses = self.pinned.pop(address)
        for (_, _, who, _), (at, what, where) in accesses.items():
            if not self.host.follows(who, at):
                self.report(f"{what} on {who} ({told(where)}) may use host memory that is let go")
        return 0

    def _region(self, t: Tensor) -> tuple[int, dict] | None:
        return self.pinned.get(t.untyped_storage().data_ptr())

    def sweep(self) -> None:
        """Take back what nobody holds any more."""
        for key in [key for key, memory in self._memory.items() if memory.gone]:
            memory = self._memory.pop(key)
            if memory.home is not None:
                self.alive -= memory.counted
                self._pools.free(memory)

    def _allocate(self, t: Tensor) -> None:
        key = t.untyped_storage()._cdata
        if key in self._memory and not self._memory[key].gone:
            return
        self.sweep()
        where = frames()
        self.allocated.append(_place())
        if len(self.allocated) == self.fail_at:
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {t.untyped_storage().nbytes()} bytes"
                f" ({told(where)}). GPU 0 is simulated"
            )
        memory = self._memory[key] = self._pools.make(t, self.current, where)
        self.alive += memory.counted
        self.peak = max(self.peak, self.alive)

    def touch(self, t: Tensor, by: Timeline, at: int, writes: bool, what: str) -> None:
        if t.numel():
            for wrong in self.memory(t).touch(t, by, at, writes, what, frames()):
                self.report(wrong)

    # --- ops

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # fmt: skip
        kwargs = dict(kwargs or {})
        op = self._ops.get(func) or self._ops.setdefault(func, _Op(func))
        to_device = False
        if kwargs.get("device") is not None:
            to_device = torch.device(kwargs["device"]).type == "cuda"
            if to_device:
                kwargs["device"] = CPU
        if op.name == "_to_copy" and self._launched is None:
            asked = "device" in kwargs and kwargs["device"] is not None
            return self._to_copy(func, args[0], kwargs, to_device if asked else None)
        if op.name == "copy_" and self._launched is None:
            blocking = not (kwargs.get("non_blocking") or len(args) > 2 and args[2])
            return self._copy(func, args[0], args[1], blocking)
        given = [(t, op.writes[i]) for i, x in enumerate(args) for t in _tensors(x)]
        given += [(t, op.writes_to[name]) for name, x in kwargs.items() for t in _tensors(x)]
        if any(real_device(t).type == "meta" for t, _ in given):
            return func(*args, **kwargs)
        if self._launched is not None:
            self._launched += [pair for pair in given if self.is_device(pair[0])]
            return func(*args, **kwargs)
        here = [self.is_device(t) for t, _ in given]
        on_device = to_device or any(here)
        if any(here) and not all(here):
            self._check_mix(op, [t for t, _ in given], here)
        out = func(*args, **kwargs)
        made = [] if op.view else list(_tensors(out))
        if on_device:
            for t in made:
                self._allocate(t)
        if self._paused or op.view or op.name in MAKES_NOTHING:
            return out
        by, at = self._begin(on_device)
        for t, writes in given:
            if on_device and not self.is_device(t):  # a scalar, which the launch takes along
                self.touch(t, self.host, self.host.tick(), writes, op.name)
            else:
                self.touch(t, by, at, writes, op.name)
        for t in made:
            self.touch(t, by, at, True, op.name)
        if any(here) and self._asks(op, args, kwargs):
            self.waited(op.name)
            self.host.learn(by.clock)
        return out

    def _begin(self, on_device: bool) -> tuple[Timeline, int]:
        """The timeline of what is done next, and its number; a launch follows the host."""
        if not on_device:
            return self.host, self.host.tick()
        self.current.learn(self.host.clock)
        return self.current, self.current.tick()

    def _check_mix(self, op: "_Op", given: list[Tensor], here: list[bool]) -> None:
        for t, is_here in zip(given, here, strict=True):
            if not is_here and t.dim() > 0:
                if op.name.startswith(("index", "_index")) and here[0]:
                    self.waited(f"{op.name} by a host tensor")
                else:
                    shape = tuple(t.shape)
                    self.report(f"{op.name}: {shape} of the host with tensors of the device"
                                f" ({told(frames())})")  # fmt: skip

    def _asks(self, op: "_Op", args: Any, kwargs: Any) -> bool:
        """Whether the host waits for the device to know what comes out."""
        if op.name.startswith("index"):
            return any(t.dtype == torch.bool for t in _tensors(args[1]))
        if op.name == "repeat_interleave":
            return kwargs.get("output_size") is None
        return op.name in ASKING

    def launch(self, kernel: Any, *args: Any, **kwargs: Any) -> Any:
        """A kernel's reference, whose own tensors the device never sees."""
        if self._paused or self._launched is not None:
            return kernel(*args, **kwargs)
        self._launched = touched = []
        try:
            out = kernel(*args, **kwargs)
        finally:
            self._launched = None
        if touched:
            made = list(_tensors(out))
            for t in made:
                self._allocate(t)
            by, at = self._begin(True)
            for t, writes in touched:
                self.touch(t, by, at, writes, kernel.__name__)
            for t in made:
                self.touch(t, by, at, True, kernel.__name__)
        return out

    # --- copies

    def _to_copy(self, func: Any, source: Tensor, kwargs: dict, to_device: bool | None) -> Tensor:
        if real_device(source).type == "meta" or torch.device(kwargs.get("device") or CPU) != CPU:
            return func(source, **kwargs)
        from_device = self.is_device(source)
        to_device = from_device if to_device is None else to_device
        out = func(source, **kwargs)
        if to_device:
            self._allocate(out)
        blocking = not kwargs.get("non_blocking")
        if from_device and not to_device and not blocking:
            self.pin(out)  # as torch does
        self._transfer(out, source, blocking)
        return out

    def _copy(self, func: Any, to: Tensor, source: Tensor, blocking: bool) -> Tensor:
        out = func(to, source)
        if real_device(to).type != "meta":
            self._transfer(to, source, blocking)
        return out

    def _transfer(self, to: Tensor, source: Tensor, blocking: bool) -> None:
        """to <- source, wherever they are."""
        if self._paused:
            return
        down, up = self.is_device(source), self.is_device(to)
        by, at = self._begin(down or up)
        pageable = up and not down and not self.is_pinned(source)
        if pageable:  # it is staged while the host waits
            self.touch(source, self.host, self.host.tick(), False, "a copy")
        else:
            self.touch(source, by, at, False, "a copy")
        self.touch(to, by, at, True, "a copy")
        if down != up and (blocking or not self.is_pinned(source if up else to)):
            why = "" if blocking else " (not pinned)"
            self.waited(f"a copy to the {'device' if up else 'host'}{why}")
            self.host.learn(by.clock)


def _place() -> str:
    for code, _ in frames(least=1, most=1):
        return f"{file_of(code)} {code.co_name}"
    return "a test"


class _Op:
    """What its schema says of an operator."""

    def __init__(self, func: Any) -> None:
        schema = func._schema
        self.name = schema.name.rpartition("::")[2]
        self.writes = [_writes(a) for a in schema.arguments]
        self.writes_to = {a.name: _writes(a) for a in schema.arguments}
        self.view = any(r.alias_info is not None and not r.alias_info.is_write
                        for r in schema.returns)  # fmt: skip


def _writes(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (list, tuple)):
        for each in x:
            yield from _tensors(each)
    elif is_dataclass(x):  # a frozen weight
        yield from _tensors([*vars(x).values()])
