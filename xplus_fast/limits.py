"""Bounds on what foreign input may make this process spend."""

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class TooSlow(BaseException):
    """The time of `limits` is over. No `Exception`: what runs inside may swallow those."""


@contextmanager
def limits(seconds: float, memory: int) -> Iterator[None]:
    """Bound the processor time and the memory that Python code inside may take.

    seconds: after which `TooSlow` is raised; in the main thread only, as signals are. memory: bytes
    beyond what the process has, after which `MemoryError` is raised; on Linux only. Code inside
    must be short and start no threads: the bounds are the whole process's.
    """
    most = _address_space()
    before = resource.getrlimit(resource.RLIMIT_AS)
    timed = threading.current_thread() is threading.main_thread()
    try:
        if most is not None:
            ceilings = [most + memory, *(n for n in before if n != resource.RLIM_INFINITY)]
            resource.setrlimit(resource.RLIMIT_AS, (min(ceilings), before[1]))
        if timed:
            handler = signal.signal(signal.SIGVTALRM, _late)
            signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        yield
    finally:
        if timed:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, handler)
        if most is not None:
            resource.setrlimit(resource.RLIMIT_AS, before)


def _late(*_: Any) -> None:
    raise TooSlow


def _address_space() -> int | None:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        return None
    return pages * resource.getpagesize()
