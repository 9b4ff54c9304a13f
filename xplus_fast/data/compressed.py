"""Compressed files, told by their suffix: a.jsonl.gz, .xz, .bz2 and .zst are read as a.jsonl is."""

import bz2
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
