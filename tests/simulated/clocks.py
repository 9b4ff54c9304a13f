"""What comes before what: the host and every stream are timelines, events carry what one knows.

A timeline does one thing after another and numbers them. Its clock says up to which of its things
every other timeline is known to be done; to wait is to learn what the other one knows.
"""

from collections.abc import Callable
from typing import Any

import torch

DEVICE = torch.device("cuda", 0)
Clock = dict[str, int]


class Timeline:
    """The host, or a stream."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.clock: Clock = {name: 0}

    def tick(self) -> int:
        """The number of what it does next."""
        self.clock[self.name] += 1
        return self.clock[self.name]

    def learn(self, clock: Clock) -> None:
        """What comes next follows all that the clock tells of."""
        for name, at in clock.items():
            if at > self.clock.get(name, 0):
                self.clock[name] = at

    def follows(self, name: str, at: int) -> bool:
        """Whether what comes next follows a thing of a timeline, which may be this one."""
        return self.clock.get(name, 0) >= at


class Simulated:
    """What streams and events want of their device."""

    host: Timeline
    current: "Stream"
    streams: list["Stream"]

    def ordering(self) -> None:
        """Streams are being ordered, by whoever calls."""

    def waited(self, what: str) -> None:
        """The host waits."""


def ordering(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that orders streams: the device is told who calls it."""

    def told(self: Any, *args: Any) -> Any:
        self.sim.ordering()
        return method(self, *args)

    told.orders = True  # type: ignore[attr-defined]
    return told


class Stream(Timeline):
    """`torch.cuda.Stream`."""

    device, cuda_stream = DEVICE, 0

    def __init__(self, sim: Simulated, name: str = "") -> None:
        super().__init__(name or f"stream {len(sim.streams)}")
        self.sim = sim
        sim.streams.append(self)

    @ordering
    def wait_event(self, event: "Event") -> None:
        self.learn(event.clock)

    @ordering
    def wait_stream(self, other: "Stream") -> None:
        self.learn(other.clock)

    @ordering
    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event(self.sim)
        event.clock = dict(self.clock)
        return event

    @ordering
    def synchronize(self) -> None:
        self.sim.host.learn(self.clock)
        self.sim.waited("a stream")


class Event:
    """`torch.cuda.Event`. One that was never recorded orders nothing."""

    def __init__(self, sim: Simulated) -> None:
        self.sim = sim
        self.clock: Clock = {}

    @ordering
    def record(self, stream: Stream | None = None) -> None:
        self.clock = dict((stream or self.sim.current).clock)

    @ordering
    def wait(self, stream: Stream | None = None) -> None:
        (stream or self.sim.current).learn(self.clock)

    @ordering
    def synchronize(self) -> None:
        self.sim.host.learn(self.clock)
        self.sim.waited("an event")


# all by which code can order streams, and must be looked for
PRIMITIVES = {
    name for kind in (Stream, Event) for name, method in vars(kind).items()
    if hasattr(method, "orders")
}  # fmt: skip
