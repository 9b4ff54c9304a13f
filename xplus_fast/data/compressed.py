"""Compressed files, told by their suffix: a.jsonl.gz, .xz, .bz2 and .zst are read as a.jsonl is."""

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xplus_fast.errors import UserError

COMPRESSED = {".gz": "gzip", ".xz": "xz", ".bz2": "bzip2", ".zst": "zstd"}  # suffix -> its name


def bare(name: str) -> str:
    """A file's name without the suffix of its compression."""
    path = Path(name)
    return path.stem if path.suffix in COMPRESSED else name


def kind(path: Path) -> str:
    """The suffix that tells a file's format: ".jsonl" of both a.jsonl and a.jsonl.gz."""
    return Path(bare(path.name)).suffix


def stem(path: Path) -> str:
    """The file's name without suffix: "a" of both a.jsonl and a.jsonl.gz."""
    return Path(bare(path.name)).stem


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """The bytes of a file, plain or compressed, as a stream that has `readline`.

    Raises `UserError` for a file that cannot be read, or whose compression is broken.
    """
    form = COMPRESSED.get(path.suffix, "")
    try:
        with _stream(path) as stream:
            yield stream
    except (EOFError, zlib.error, lzma.LZMAError) as e:
        raise UserError(f"{path}: not a whole {form} file ({e})") from None
    except OSError as e:
        if e.errno is None:  # what decompressors raise has no number
            raise UserError(f"{path}: not a whole {form} file ({e})") from None
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None


class _AsUtf8(io.RawIOBase):
    """A stream of UTF-16, with its mark, as UTF-8; what is broken there is broken here."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._left = stream, b""
        self._decoder = codecs.getincrementaldecoder("utf-16")("surrogatepass")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            read = self._stream.read(1 << 16)
            self._left = self._decoder.decode(read).encode(errors="surrogatepass")
            if not read:
                half, _ = self._decoder.getstate()  # of a character
                self._decoder.reset()
                self._left += b"\xff" * bool(half)
                break
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size


def as_utf8(stream: Any) -> Any:
    """A stream of bytes that has `peek`; if it is in UTF-16, in UTF-8.

    Its mark tells, and a zero byte: a blank, a digit or the end of a line has one in UTF-16.
    """
    head = stream.peek(4096)
    if head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) and 0 in head:
        return io.BufferedReader(_AsUtf8(stream))
    return stream


def _stream(path: Path) -> Any:
    if path.suffix == ".gz":
        return gzip.open(path)
    if path.suffix == ".xz":
        return lzma.LZMAFile(path)
    if path.suffix == ".bz2":
        return bz2.BZ2File(path)
    if path.suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return open(path, "rb")
