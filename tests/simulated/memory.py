"""Who touches which bytes when, and what is wrong with it."""

import torch
from torch import Tensor

from tests.simulated.clocks import Stream, Timeline
from tests.simulated.places import Frames, told

# first byte, last byte + 1, timeline, whether it is written -> the last time, by what, from where.
# Those of one timeline are in order, so its last one stands for all.
Accesses = dict[tuple[int, int, str, bool], tuple[int, str, Frames]]
GRAIN = 512  # bytes in which the allocator counts


class Memory:
    """A storage.

    home: the stream whose pool it is of; None: the host's.
    """

    def __init__(self, t: Tensor, home: Stream | None, accesses: Accesses | None = None) -> None:
        storage = t.untyped_storage()
        self.home, self.size = home, storage.nbytes()
        self.accesses: Accesses = {} if accesses is None else accesses
        self.recorded: set[str] = set()  # `record_stream`
        self.pinned = False
        # held weakly, its address belongs to nobody else
        self._weak = storage._weak_ref()

    @property
    def gone(self) -> bool:
        return torch.UntypedStorage._expired(self._weak)

    def __del__(self) -> None:
        torch.UntypedStorage._free_weak_ref(self._weak)

    @property
    def counted(self) -> int:
        return -(-self.size // GRAIN) * GRAIN

    def touch(
        self, t: Tensor, by: Timeline, at: int, writes: bool, what: str, frames: Frames
    ) -> list[str]:
        """Note an access; returns what is wrong with it."""
        low = t.storage_offset() * t.element_size()
        span = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True)) + 1
        high = low + span * t.element_size()
        found = []
        for key, (when, name, whence) in list(self.accesses.items()):
            first, past, who, wrote = key
            ordered = by.follows(who, when)
            if first < high and low < past and (writes or wrote) and not ordered:
                found.append(
                    f"{'write' if writes else 'read'} by {what} on {by.name} ({told(frames)}) is"
                    f" not after {name} on {who} ({told(whence)})"
                )
            if writes and ordered and low <= first and past <= high:
                del self.accesses[key]  # who follows this one follows that one
        self.accesses[low, high, by.name, writes] = (at, what, frames)
        return found


class Pools:
    """The allocator's rule: memory goes back to the stream that it was made on, at once.

    So whoever has it next must follow all that was given to that stream, and to others which
    touched it. What has been freed is taken to be what the next allocation gets.
    """

    def __init__(self) -> None:
        self._late: dict[str, dict[str, tuple[int, str, Frames]]] = {}

    def free(self, memory: Memory) -> None:
        assert memory.home is not None
        late = self._late.setdefault(memory.home.name, {})
        for (_, _, who, _), (at, what, frames) in memory.accesses.items():
            if who != memory.home.name and who not in memory.recorded:
                if at > late.get(who, (0, "", ()))[0]:
                    late[who] = (at, f"{what}, which may still use this memory,", frames)

    def make(self, t: Tensor, home: Stream, frames: Frames) -> Memory:
        late = self._late.setdefault(home.name, {})
        for who, (at, _, _) in list(late.items()):
            if home.follows(who, at):
                del late[who]
        memory = Memory(t, home)
        before = {home.name: (home.clock[home.name], "whoever had this memory", frames), **late}
        memory.accesses = {(0, memory.size, who, True): last for who, last in before.items()}
        return memory
