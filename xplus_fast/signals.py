"""Signals that ask a command to end: Ctrl-C, SIGTERM, and SIGUSR1, which Slurm sends ahead of time.

Each ends a command with one line and the exit code 128 + its number. While a stage trains, the
first one waits: the step is finished and saved (`finish_first`).
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Stopped(KeyboardInterrupt):
    """A signal asked for the end. said: what was done about it, for the line that tells."""

    def __init__(self, signum: int, said: str = "") -> None:
        super().__init__(said)
        self.signum, self.said = signum, said


class Asked:
    """Whether a signal came: its number, or 0."""

    signum: int = 0


@contextmanager
def listen() -> Iterator[None]:
    """Raise `Stopped` in the main thread when a signal asks for the end."""

    def stop(signum: int, _: FrameType | None) -> None:
        raise Stopped(signum)

    with _handled(stop):
        yield


@contextmanager
def finish_first(what: str) -> Iterator[Asked]:
    """Only note the first signal, and say that `what` is finished first; the second one ends."""
    asked = Asked()

    def note(signum: int, _: FrameType | None) -> None:
        if asked.signum:
            raise Stopped(signum, "at once")
        asked.signum = signum
        name = signal.Signals(signum).name
        # not print: the signal may have come in the middle of one
        text = f"\n{name}: {what}; once more ends at once\n"
        try:
            os.write(2, text.encode())
        except OSError:
            pass  # nobody is there to read it

    with _handled(note):
        yield asked


@contextmanager
def _handled(handler: object) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread gets signals
        return
    before = {signum: signal.signal(signum, handler) for signum in ENDING}  # type: ignore[arg-type]
    try:
        yield
    finally:
        for signum, old in before.items():
            signal.signal(signum, signal.SIG_DFL if old is None else old)
