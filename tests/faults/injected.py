"""Commands in forked processes whose k-th operation on files kills them or fails.

An operation is an open for writing, a write, a flush to the disk, a rename, a truncation, or the
making or removal of a file or folder. Python's audit hook sees all of them but writes and flushes,
which `xplus_fast.files` makes by `os.write` and `os.fsync`; writes into files that others open in
Python are not seen, and `tests/test_files.py` shows that the package opens none.
"""

import errno
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FDS = "/proc/self/fd/"
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
ALLOCATING = ("open", "write", "fsync", "mkdir")  # what a full disk refuses
LIMIT = 120  # seconds after which a command is stuck
KILLED = -signal.SIGKILL


@dataclass(frozen=True)
class Fault:
    """What happens at the k-th operation.

    kind: "kill", before it; "torn", in the middle of a write; "EIO", it fails once; "ENOSPC", it
    fails, and from then on whatever needs room on the disk.
    """

    k: int
    kind: str


@dataclass(frozen=True)
class Ran:
    code: int  # the exit code; KILLED
    said: str
    operations: list[tuple[str, str]]  # kind, path


class _Hook:
    def __init__(self, root: Path, fault: Fault | None, log: int) -> None:
        self.root, self.fault, self.log = f"{root}/", fault, log
        self.seen, self.real_write, self.real_fsync = 0, os.write, os.fsync
        os.write, os.fsync = self.write, self.fsync  # type: ignore[assignment]
        sys.addaudithook(self.audit)

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[0], str | bytes | os.PathLike):
            if args[2] & WRITING:
                self.operation("open", os.fsdecode(args[0]))
        elif event == "os.rename":
            self.operation("rename", self.path(args[1], args[3]))
        elif event in ("os.remove", "os.mkdir", "os.rmdir"):
            self.operation(event[3:], self.path(args[0], args[-1]))
        elif event == "os.truncate":
            self.operation("truncate", self.path(args[0], -1))
        elif event in ("os.link", "os.symlink"):
            self.operation(event[3:], self.path(args[1], args[-1]))

    def path(self, name: Any, folder: int) -> str:
        if isinstance(name, int):
            return os.readlink(FDS + str(name))
        name = os.fsdecode(name)
        return name if folder == -1 else os.path.join(os.readlink(FDS + str(folder)), name)

    def write(self, handle: int, data: Any) -> int:
        path = os.readlink(FDS + str(handle))
        if path.startswith(self.root):
            torn = memoryview(data)[: len(data) // 2]
            self.operation("write", path, lambda: self.real_write(handle, torn))
        return self.real_write(handle, data)

    def fsync(self, handle: int) -> None:
        self.operation("fsync", os.readlink(FDS + str(handle)))
        self.real_fsync(handle)

    def operation(self, kind: str, path: str, tear: Callable[[], Any] | None = None) -> None:
        path = os.path.abspath(path)
        if not path.startswith(self.root):
            return
        k, self.seen = self.seen, self.seen + 1
        line = f"{kind}\t{path.removeprefix(self.root)}\n"
        self.real_write(self.log, line.encode(errors="backslashreplace"))
        fault = self.fault
        if fault is None or k < fault.k:
            return
        if fault.kind == "ENOSPC" and (k == fault.k or kind in ALLOCATING):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        if k > fault.k:
            return
        if fault.kind == "EIO":
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        if fault.kind == "torn" and tear is not None:
            tear()
        os.kill(os.getpid(), signal.SIGKILL)


def run(command: Callable[[], int], root: Path, fault: Fault | None = None) -> Ran:
    """Run a command in a forked process that works in `root`, with a fault in it.

    Operations on files outside of `root` are neither counted nor harmed.
    """
    said, log = (root.with_name(f"{root.name}.{kind}") for kind in ("said", "log"))
    child = os.fork()
    if not child:
        code = 1
        try:
            out, log_handle = (
                os.open(f, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND) for f in (said, log)
            )
            os.dup2(out, 1)
            os.dup2(out, 2)
            sys.stdout = open(1, "w", closefd=False)
            sys.stderr = open(2, "w", closefd=False, buffering=1)
            os.chdir(root)
            _Hook(root, fault, log_handle)
            code = command()
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    status = _wait(child)
    lines = [line.partition("\t") for line in log.read_text().split("\n")[:-1]]
    operations = [(kind, path) for kind, _, path in lines]
    return Ran(os.waitstatus_to_exitcode(status), said.read_text(errors="replace"), operations)


def _wait(child: int) -> int:
    end = time.monotonic() + LIMIT
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return status
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            return os.waitpid(child, 0)[1]
        time.sleep(0.002)
