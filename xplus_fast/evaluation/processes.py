"""The processes of a command that a model wrote, for `confine`: which there are, what they take.

Imported where nothing of this project can be: the standard library alone.
"""

import os
import resource


def others(apart: bool) -> dict[int, tuple[int, int]]:
    """Process -> threads, resident bytes: all of the namespace, or all that come from here."""
    parents, found = {}, {}
    me = os.getpid()
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == me:
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as f:
                told = f.read().rpartition(b")")[2].split()
        except OSError:
            continue
        parents[int(name)] = int(told[1])
        if told[0] not in (b"Z", b"X"):
            found[int(name)] = (int(told[17]), int(told[21]) * resource.getpagesize())
    if apart:
        return found
    mine, more = {me}, {me}
    while more:
        more = {pid for pid, parent in parents.items() if parent in more} - mine
        mine |= more
    return {pid: about for pid, about in found.items() if pid in mine}


def too_much(running: dict[int, tuple[int, int]], most: int, memory: int) -> str:
    """Why what runs is too much, or nothing. most: processes and threads; memory: bytes of all."""
    if sum(threads for threads, _ in running.values()) > most:
        return f"it ran more than {most} processes and threads at a time"
    if sum(size for _, size in running.values()) > memory:
        # what processes share counts once
        if sum(map(_share, running)) > memory:
            return f"its processes together took more than {memory / 1e9:.3g} GB"
    return ""


def _share(pid: int) -> int:
    """Bytes of memory, those that are shared divided by how many share them."""
    try:
        with open(f"/proc/{pid}/smaps_rollup", "rb") as f:
            line = next(line for line in f if line.startswith(b"Pss:"))
    except (OSError, StopIteration):
        return 0
    return int(line.split()[1]) * 1024
