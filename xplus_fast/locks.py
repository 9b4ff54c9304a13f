"""Where several processes may meet: the one at work holds a lock, which ends with it.

What a killed process left beside its place is cleared up by whoever holds the lock.
"""

import errno
import fcntl
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xplus_fast.errors import UserError
from xplus_fast.files import make_folder, settle, sibling, speaking

LOCK = ".lock"  # in a folder that one command at a time works in
UNLOCKABLE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # file systems that lock nothing


class Busy(UserError):
    """Another process holds a lock."""


def locked(path: Path, *, wait: bool = False) -> Any:
    """`lock` for the writing of one file or folder: beside it."""
    return lock(sibling(path, "lock"), path, wait=wait)


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """`lock` for a folder that a command works in: inside it.

    The folder is made for it, and goes again if nothing came into it.
    """
    new = not folder.exists()
    try:
        with lock(folder / LOCK, folder):
            yield
    finally:
        if new and folder.is_dir() and not any(folder.iterdir()):
            with speaking(folder):
                folder.rmdir()


@contextmanager
def lock(file: Path, of: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a lock file: one process at a time, however that process ends.

    of: what it is about. Raises `Busy` where another process holds it; wait: waits for its end.
    """
    with speaking(of):
        handle = _acquire(file, of, wait)
    try:
        yield
    finally:
        with speaking(of):
            try:
                file.unlink(missing_ok=True)  # while it is held; `_acquire` looks what it has got
            finally:
                _release(handle)


def _acquire(file: Path, of: Path, wait: bool) -> int:
    make_folder(file.parent)
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            _flock(handle, of, wait)
        except BaseException:
            os.close(handle)
            raise
        try:
            if os.path.samestat(os.fstat(handle), os.stat(file)):
                return handle
        except FileNotFoundError:
            pass
        os.close(handle)  # its holder has removed it meanwhile


def _flock(handle: int, of: Path, wait: bool) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno in (errno.EAGAIN, errno.EACCES):
            if not wait:
                raise Busy(f"{of}: in use by another process of xplus-fast") from None
            print(f"{of}: waiting for another process that writes it", file=sys.stderr)
            fcntl.flock(handle, fcntl.LOCK_EX)
        elif e.errno not in UNLOCKABLE:
            raise


def _release(handle: int) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_UN)  # a forked process may have it open, too
    except OSError as e:
        if e.errno not in UNLOCKABLE:
            raise
    finally:
        os.close(handle)


def is_free(folder: Path, mark: str, *more: str) -> bool:
    """Whether nothing is in a folder but what a process left that was killed before its mark was
    there, and `more`."""
    ours = {LOCK, sibling(folder / mark, "tmp").name, *more}
    return not folder.exists() or (
        folder.is_dir() and all(entry.name in ours for entry in folder.iterdir())
    )


def sweep(folder: Path, names: str) -> None:
    """Clear up what killed processes left in a folder for its entries whose names match.

    names: a regular expression of whole names. What a living process is writing is left alone.
    """
    if not folder.is_dir():
        return
    left = [re.fullmatch(rf"\.({names})\.(?:tmp|old|lock)", p.name) for p in folder.iterdir()]
    for name in sorted({match[1] for match in left if match}):
        with speaking(folder / name):
            try:
                with locked(folder / name):
                    settle(folder / name)
            except Busy:
                continue
