"""Where parts are worked on: this machine's cores, or a Ray cluster, by the same functions.

Each engine takes a stream of calls and gives their results as they come; a few calls more than
there are workers are under way at a time, so that a corpus is never held whole.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import get_context, parent_process
from threading import Thread
from typing import Any

from xplus_fast.errors import UserError

AHEAD = 2  # calls that wait for each worker
LOOK = 5.0  # seconds between two looks at what a cluster has
RETRIES = 3  # times that workers may die while the same call is under way
KILLED = (
    "worker processes were killed again and again, perhaps for want of memory; fewer `workers` or"
    " smaller `part_pairs` need less; start again to go on"
)
Call = tuple[Any, ...]


def run_calls(
    engine: str, function: Callable[..., Any], calls: Iterable[Call], workers: int | None
) -> Iterator[Any]:
    """The results of function(*call) for all calls, in the order in which they finish."""
    if engine == "ray":
        yield from _ray(function, calls, workers)
    elif workers == 1:
        yield from (function(*call) for call in calls)
    else:
        yield from _local(function, calls, workers or _cores())


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _local(function: Callable[..., Any], calls: Iterable[Call], workers: int) -> Iterator[Any]:
    stream = iter(calls)
    todo: deque[tuple[Call, int]] = deque()  # with the times that workers died meanwhile
    while True:
        running: dict[Future, tuple[Call, int]] = {}
        with _pool(workers) as pool:
            try:
                while True:
                    room = workers * AHEAD - len(running) - len(todo)
                    todo.extend((call, 0) for call in islice(stream, room))
                    while todo:
                        running[pool.submit(function, *todo[0][0])] = todo[0]
                        todo.popleft()
                    if not running:
                        return
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        made = future.result()
                        del running[future]
                        yield made
            except BrokenProcessPool:  # one was killed, and with it all that were at work
                todo.extendleft((call, deaths + 1) for call, deaths in running.values())
                if any(deaths > RETRIES for _, deaths in todo):
                    raise UserError(KILLED) from None
            finally:
                for future in running:
                    future.cancel()


def _pool(workers: int) -> ProcessPoolExecutor:
    # spawned: a fork of a process with threads (Arrow's, a tokenizer's) can hang
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_alone)


def _alone() -> None:
    """A worker is one thread, as there are as many as cores; and it ends with its parent."""
    parent = parent_process()
    if parent is not None:  # which, killed, cannot say so: its workers would wait for ever
        Thread(target=_end_after, args=(parent,), daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import pyarrow

    pyarrow.set_cpu_count(1)


def _end_after(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _ray(function: Callable[..., Any], calls: Iterable[Call], workers: int | None) -> Iterator[Any]:
    try:
        import ray
    except ImportError:
        raise UserError("engine: ray needs Ray: pip install 'xplus-fast[ray]'") from None
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS")
        try:
            if address:  # of a cluster, which has the CPUs that it has
                ray.init(log_to_driver=False)
            else:  # Ray starts one on this machine, until we end
                ray.init(num_cpus=workers, log_to_driver=False, include_dashboard=False)
        except (OSError, RuntimeError, ValueError) as e:
            said = " ".join(str(e).split())[:200]
            raise UserError(f"engine: ray: {address or 'Ray'} does not answer ({said})") from None
    remote = ray.remote(function).options(max_retries=RETRIES)
    stream = iter(calls)
    running: list[Any] = []
    while True:
        # asked anew each time: nodes join and leave
        at_once = AHEAD * (workers or max(1, int(ray.cluster_resources().get("CPU", 1))))
        running += [remote.remote(*call) for call in islice(stream, max(0, at_once - len(running)))]
        if not running:
            return
        # a node that joins is given work though no call has ended
        done, running = ray.wait(running, timeout=None if workers else LOOK)
        for reference in done:
            try:
                yield ray.get(reference)
            except ray.exceptions.RayTaskError as e:
                raise e.cause if isinstance(e.cause, UserError) else e from None
            except (
                ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError,
                ray.exceptions.OutOfMemoryError,
            ):  # fmt: skip
                raise UserError(KILLED) from None
