"""Every path that is resolved and everything that is written, in one place.

A file or folder is written beside its place, flushed to the disk and renamed: whoever looks finds
what was there before or what is new, never a part, wherever a process is killed. What such a
process leaves are siblings called `.NAME.tmp` (to be removed) and `.NAME.old` (to be put back where
NAME is missing), which the next one that writes NAME clears up. Whatever the system refuses is a
`UserError` of one line. No other module opens a file for writing, makes, renames or removes one,
but `locks`, where several processes may meet.
"""

import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xplus_fast.errors import UserError

BUFFER = 1 << 20  # bytes that are written together; what is larger goes by itself
Bytes = bytes | memoryview


def resolve(path: str | Path) -> Path:
    """The absolute path of what a user calls `path`: `~`, `..` and links to folders followed.

    A link at the end keeps its own name, by which a file's format is told. Nothing need be there.
    Raises `UserError` for what no path can be.
    """
    try:
        given = Path(path).expanduser()
        in_folder = given.parent.resolve() / given.name
        found = given.resolve() if given.name == ".." else in_folder
        os.lstat(found)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return found  # whoever opens it will say so
    except (OSError, RuntimeError, ValueError) as e:  # too long; no such home, a circle; NUL
        why = (e.strerror if isinstance(e, OSError) else None) or e
        raise UserError(f"{str(path)[:100]!r}: not a path ({why})") from None
    return found


def program(name: str) -> str:
    """A program that a user names: one of PATH as it is, the path of another resolved."""
    return str(resolve(name)) if "/" in name else name


@contextmanager
def speaking(path: Path, more: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Make one line of an `OSError` inside: of `path`, and `more` behind it."""
    try:
        yield
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e.strerror or e}){more()}") from None


class NewFile(io.RawIOBase):
    """A file being written from its beginning; closing it flushes it to the disk.

    Every write is one of the system's: `io.BufferedWriter` goes around it for small ones.
    Attributes: size, the bytes so far; digest, their SHA-256 if `hashed`.
    """

    def __init__(self, file: Path, *, hashed: bool = False) -> None:
        super().__init__()
        self.size, self.digest = 0, hashlib.sha256()
        self._hashed, self._flush = hashed, True
        self._handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:  # type: ignore[override]
        view = memoryview(data).cast("B")
        _write(self._handle, view)
        if self._hashed:
            self.digest.update(view)
        self.size += len(view)
        return len(view)

    def close(self) -> None:
        if self.closed:
            return
        super().close()
        try:
            if self._flush:
                os.fsync(self._handle)
        finally:
            os.close(self._handle)

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._flush = kind is None
        self.close()


class PlacedFile:
    """A file that is read and written at any place, and never whole: what is in it proves itself.

    All methods raise `OSError`.
    """

    def __init__(self, file: Path) -> None:
        self._handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def read(self, offset: int, out: memoryview) -> int:
        """Fill `out` with the bytes from `offset` on; returns how many there were."""
        done = 0
        while done < len(out) and (n := os.preadv(self._handle, [out[done:]], offset + done)):
            done += n
        return done

    def write(self, offset: int, data: memoryview) -> None:
        os.lseek(self._handle, offset, os.SEEK_SET)
        _write(self._handle, data)

    def expect(self, offset: int, size: int) -> None:
        """Tell the system that these bytes will be read soon."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._handle, offset, size, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        os.close(self._handle)


def write_file(file: Path, pieces: Iterable[Bytes], *, hashed: bool = False) -> NewFile:
    """Write a file of a folder that is itself new; returns it, closed, for its size and digest.

    Raises `OSError`.
    """
    with NewFile(file, hashed=hashed) as raw, io.BufferedWriter(raw, BUFFER) as out:
        for piece in pieces:
            out.write(piece)
    return raw


def write_bytes(file: Path, data: Bytes | Callable[[Any], Any]) -> None:
    """Write a file whole or not at all: the bytes, or what a function writes into it.

    Its folder is made where it is missing, but none above it: they have vanished, then. Raises
    `UserError`; what was there before is untouched then.
    """
    temporary = sibling(file, "tmp")
    with speaking(file):
        _make_parent(file)
        try:
            with NewFile(temporary) as raw, io.BufferedWriter(raw, BUFFER) as out:
                if callable(data):
                    data(out)
                else:
                    out.write(data)
            os.rename(temporary, file)
        except BaseException:
            _unlink(temporary)
            raise
        sync_folder(file.parent)


def write_text(file: Path, text: str) -> None:
    """`write_bytes` of a text; a lone surrogate, which UTF-8 cannot hold, as its escape."""
    write_bytes(file, text.encode(errors="backslashreplace"))


def write_json(file: Path, value: Any) -> None:
    write_text(file, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_picture(file: Path, figure: Any, **options: Any) -> None:
    """`write_bytes` of a figure of matplotlib."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format=file.suffix[1:], **options)
    write_bytes(file, drawn.getbuffer())


def append_lines(file: Path, lines: Iterable[str]) -> None:
    """Append lines to a file, all of them or none; an end that a kill cut off goes first.

    Raises `UserError`.
    """
    text = "".join(f"{line}\n" for line in lines).encode(errors="backslashreplace")
    with speaking(file):
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            end = _end_of_lines(handle)
            os.lseek(handle, end, os.SEEK_SET)
            try:
                _write(handle, memoryview(text))
                os.fsync(handle)
            except OSError:
                os.ftruncate(handle, end)
                raise
        finally:
            os.close(handle)


def whole_lines(file: Path) -> list[bytes]:
    r"""The lines of a file of `append_lines`, which end in \n: what a kill cut off is no line.

    Empty where there is no file. Raises `UserError` if it cannot be read.
    """
    try:
        return file.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    except OSError as e:
        raise UserError(f"{file}: cannot be read ({e.strerror or e})") from None


def make_folder(folder: Path) -> None:
    """Make a folder and those above it where they are missing. Raises `UserError`."""
    with speaking(folder):
        folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def new_folder(final: Path, needed: int = 0) -> Iterator[Path]:
    """A temporary sibling to fill, which becomes `final` when the block ends without an exception.

    needed: bytes to be written, for the message. An existing `final` is replaced. On any exception
    the temporary folder is removed; an `OSError` (a full disk) becomes a `UserError`. Of two
    processes that may write the same folder, the caller holds a lock.
    """

    def space() -> str:
        home = next(p for p in final.absolute().parents if p.is_dir())
        free = shutil.disk_usage(home).free / 1e6
        wanted = f": {needed / 1e6:,.1f} MB wanted, {free:,.1f} MB free" if needed else ""
        return f"{wanted}; what was there before is untouched"

    with speaking(final, space):
        _make_parent(final)
        settle(final)
        temporary, old = sibling(final, "tmp"), sibling(final, "old")
        try:
            temporary.mkdir()
            yield temporary
            sync_folder(temporary)
            _replace(temporary, final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)  # what went wrong is said already
            raise
        shutil.rmtree(old, ignore_errors=True)  # the new one is there; the next call clears up


def settle(path: Path) -> None:
    """Clear up what a killed process left beside `path`. Raises `OSError`."""
    old = sibling(path, "old")
    if old.exists() and not path.exists():  # killed between the two renames of a replacement
        os.rename(old, path)
    _clear(old)
    _clear(sibling(path, "tmp"))


def remove(path: Path) -> None:
    """Remove a file, or a folder, which goes out of sight first: no part of it is left in its
    place. Nothing need be there. Raises `UserError`."""
    with speaking(path):
        _remove(path, sibling(path, "tmp"))


def move(path: Path, to: Path) -> None:
    """Rename a file or a folder within a file system; a file there is replaced."""
    with speaking(to):
        os.rename(path, to)
        sync_folder(to.parent)


@contextmanager
def scratch(prefix: str) -> Iterator[Path]:
    """A temporary folder, gone afterwards."""
    with speaking(Path(tempfile.gettempdir())):
        folder = Path(tempfile.mkdtemp(prefix=prefix))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # code that a model wrote may have locked it


def sync_folder(folder: Path) -> None:
    """Flush a folder's list of names to the disk. Raises `OSError`."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sibling(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}")


def _make_parent(path: Path) -> None:
    if not path.parent.is_dir():
        path.parent.mkdir(exist_ok=True)


def _write(handle: int, view: memoryview) -> None:
    while len(view):
        view = view[os.write(handle, view) :]


def _end_of_lines(handle: int) -> int:
    r"""Where the last \n of a file ends; what is behind it is cut off."""
    size = end = os.lseek(handle, 0, os.SEEK_END)
    while end:
        start = max(0, end - (1 << 16))
        os.lseek(handle, start, os.SEEK_SET)
        found = os.read(handle, end - start).rfind(b"\n")
        if found >= 0:
            end = start + found + 1
            break
        end = start
    if end < size:
        os.ftruncate(handle, end)
    return end


def _replace(temporary: Path, final: Path) -> None:
    """Rename; a folder that is there goes aside first, and back on an error."""
    old = sibling(final, "old")
    if aside := final.exists():
        os.rename(final, old)
    try:
        os.rename(temporary, final)
        sync_folder(final.parent)
    except OSError:
        if final.exists():
            os.rename(final, temporary)
        if aside:
            os.rename(old, final)
        raise


def _remove(path: Path, aside: Path) -> None:
    _clear(aside)  # of a removal that was killed
    if path.is_dir() and not path.is_symlink():
        os.rename(path, aside)
        _clear(aside)
    else:
        _clear(path)


def _clear(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:  # what went wrong is said already
        pass
