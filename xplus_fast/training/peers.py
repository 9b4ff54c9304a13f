"""Processes of one run watch each other: when one has ended, the others do not wait for ever.

A collective waits for a dead process until its backend's timeout, which is minutes or, with NCCL,
an abort without a word. So each process tells the run's store every other second that it lives.
"""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch

from xplus_fast.errors import UserError
from xplus_fast.training.place import Place

BEAT = 2.0  # seconds between two signs of life
SILENCE = 60.0  # seconds without one after which a process counts as dead
KEPT = "what was trained so far is kept: start the same command again"


@contextmanager
def watched(place: Place) -> Iterator[None]:
    """Watch the other processes, and let them watch this one, until the block ends.

    When one of them has died or failed, this process ends with a line and the exit code 2, or
    raises `UserError` where a collective noticed first.
    """
    if place.processes == 1:
        yield
        return
    store = torch.distributed.TCPStore(  # a connection of our own: nobody else waits on it
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
        wait_for_workers=False, timeout=timedelta(seconds=SILENCE),
    )  # fmt: skip
    over = threading.Event()
    thread = threading.Thread(target=_watch, args=(store, place, over), daemon=True)
    thread.start()
    how = "failed"
    try:
        yield
        how = "done"
    except KeyboardInterrupt:
        how = "stopped"  # as all of them are, at the same step
        raise
    except RuntimeError as e:
        if not _of_a_peer(e):
            raise
        raise UserError(f"another process of this run has ended; {KEPT}") from None
    finally:
        over.set()
        thread.join(2 * BEAT)
        try:
            store.set(_key(place.rank), how)
        except RuntimeError:
            pass  # the store went with the process that kept it


def _watch(store: "torch.distributed.Store", place: Place, over: threading.Event) -> None:
    beats: dict[int, tuple[str, float]] = {}  # rank -> its last sign, and when we saw it change
    others = [rank for rank in range(place.processes) if rank != place.rank]
    count = 0
    while not over.wait(BEAT if count else 0.0):
        count += 1
        try:
            store.set(_key(place.rank), str(count))
            for rank in others:
                sign = store.get(_key(rank)).decode() if store.check([_key(rank)]) else ""
                last, since = beats.get(rank, (None, time.monotonic()))
                if sign == "failed":
                    _end(f"process {rank} of this run has failed")
                if sign != last:
                    beats[rank] = (sign, time.monotonic())
                elif sign != "done" and time.monotonic() - since > SILENCE:
                    _end(f"process {rank} of this run has ended without a word")
        except RuntimeError:
            if not over.is_set():
                _end("the process that held this run together has ended")


def _end(why: str) -> None:
    """End this process from a thread: the main one may wait in a collective for ever."""
    print(f"\nxplus-fast: {why}; {KEPT}", file=sys.stderr, flush=True)
    os._exit(2)


def _key(rank: int) -> str:
    return f"xplus-fast/alive/{rank}"


def _of_a_peer(e: RuntimeError) -> bool:
    named = isinstance(e, torch.distributed.DistError)
    return named or any(word in str(e) for word in ("gloo", "NCCL"))
