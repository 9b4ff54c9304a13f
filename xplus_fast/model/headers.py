"""What a safetensors file's header says of its tensors, read without trusting it.

8 bytes little-endian header length | header, JSON | data. The header maps a name to {"dtype",
"shape", "data_offsets": [begin, end)}, offsets counted from the data's first byte; the tensors tile
the data without gap or overlap (https://github.com/huggingface/safetensors#format).
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xplus_fast.errors import UserError

if TYPE_CHECKING:
    import torch

CHUNK = 16 << 20  # bytes read or written at a time
MAX_HEADER = 100_000_000  # bytes; the safetensors library refuses more

# code -> torch's name, bytes of an element
CODES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: bytes [start, end) of the file, counted from the file's first byte.

    scale: of a matrix stored as FP8 codes, where its scales lie; block: rows and columns of the
    codes that share one.
    """

    file: Path
    code: str  # of CODES
    shape: tuple[int, ...]
    start: int
    end: int
    scale: "Entry | None" = None
    block: tuple[int, int] = (1, 1)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def dtype(self) -> "torch.dtype":
        """What is stored, which is codes where there is a scale."""
        import torch  # plans are made without it

        return getattr(torch, CODES[self.code][0])


def read_range(file: Path, start: int, end: int) -> Iterator[bytes]:
    """Bytes [start, end) of a file in pieces of `CHUNK`, the last one shorter.

    Raises `UserError` if they cannot be read.
    """
    try:
        with file.open("rb") as handle:
            handle.seek(start)
            while start < end:
                piece = handle.read(min(CHUNK, end - start))
                if not piece:
                    raise UserError(f"{file}: ends at byte {start}, {end - start} bytes too early")
                start += len(piece)
                yield piece
    except OSError as e:
        raise UserError(f"{file}: cannot be read ({e.strerror})") from None


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file; `UserError` if it cannot be read or is anything else."""
    try:
        return _parse_object(file.read_bytes())
    except OSError as e:
        raise UserError(f"{file}: cannot be read ({e.strerror})") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{file}: not a valid JSON object: {one_line(e)}") from None


def read_header(file: Path) -> dict[str, Entry]:
    """Tensor name -> Entry of one safetensors file, checked to tile the file exactly.

    Raises `UserError` for an unreadable or truncated file and for a header that is not JSON, names
    a tensor twice, or does not agree with the file's size.
    """
    header, data, size = _open(file)
    header.pop("__metadata__", None)
    entries = {name: _entry(file, name, item, data) for name, item in header.items()}
    at = data
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != at:
            what = "overlaps the tensor before it" if entry.start < at else "leaves a gap before it"
            raise UserError(f"{file}: the header lies: {name!r} {what}, at data byte {at - data}")
        at = entry.end
    if at != size:
        raise UserError(
            f"{file}: {'truncated' if at > size else 'longer than its tensors'}: the header"
            f" describes {at} bytes, the file has {size}"
        )
    return dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)))


def read_metadata(file: Path) -> Any:
    """What a safetensors file's header says beside its tensors; None where it says nothing."""
    return _open(file)[0].get("__metadata__")


def _open(file: Path) -> tuple[dict[str, Any], int, int]:
    """The header, the file offset of the data, and the file's size."""
    try:
        size = file.stat().st_size
        with file.open("rb") as handle:
            prefix = handle.read(8)
            length = int.from_bytes(prefix, "little")
            if prefix == b"version ":
                raise UserError(f"{file}: a Git LFS pointer, not the weights: run `git lfs pull`")
            if len(prefix) < 8 or length > min(size - 8, MAX_HEADER):
                raise UserError(
                    f"{file}: not a whole safetensors file: {size} bytes cannot hold the header"
                )
            text = handle.read(length)
    except OSError as e:
        raise UserError(f"{file}: cannot be read ({e.strerror})") from None
    try:
        header = _parse_object(text)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{file}: the safetensors header is damaged: {one_line(e)}") from None
    return header, 8 + length, size


def _entry(file: Path, name: str, item: Any, data: int) -> Entry:
    """One item of a header, checked in itself; `data` is the file offset of the data."""

    def sizes(key: str) -> list[int]:
        values = item.get(key) if isinstance(item, dict) else None
        if not isinstance(values, list) or not all(type(v) is int and v >= 0 for v in values):
            raise UserError(f"{file}: the header lies: {name!r} has no valid {key}")
        return values

    shape, offsets = sizes("shape"), sizes("data_offsets")
    code = item.get("dtype")
    if not isinstance(code, str) or code not in CODES:
        raise UserError(f"{file}: {name!r} is stored as {code!r}; known: {', '.join(CODES)}")
    want = math.prod(shape) * CODES[code][1]
    if len(offsets) != 2 or offsets[1] - offsets[0] != want:
        raise UserError(
            f"{file}: the header lies: {name!r}, {code} {shape}, takes {want} bytes,"
            f" its offsets are {offsets}"
        )
    return Entry(file, code, tuple(shape), data + offsets[0], data + offsets[1])


def _parse_object(text: bytes) -> dict[str, Any]:
    """JSON text -> object; a key that occurs twice is an error (json would keep the last)."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"{next(k for k in keys if keys.count(k) > 1)!r} occurs twice")
        return found

    tree = json.loads(text, object_pairs_hook=unique)
    if not isinstance(tree, dict):
        raise ValueError(f"found a {type(tree).__name__}")
    return tree


def one_line(e: BaseException) -> str:
    return " ".join(str(e).split())[:200]
