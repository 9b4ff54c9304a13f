"""A Hugging Face model folder, read without trusting it.

`CheckpointFiles.open(folder)` reads config.json, the shard index and every safetensors header, and
checks them against each other and against the files' sizes, before a byte of a tensor is used.

A safetensors file: 8 bytes little-endian header length | header, JSON | data. The header maps a
name to {"dtype", "shape", "data_offsets": [begin, end)}, offsets counted from the data's first
byte; the tensors tile the data without gap or overlap
(https://github.com/huggingface/safetensors#format).
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from xplus_fast.errors import UserError
from xplus_fast.files import resolve

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
RECORD = "xplus_fast.json"  # what `export` says of a model folder that it made
CHUNK = 16 << 20  # bytes read or written at a time
MAX_HEADER = 100_000_000  # bytes; the safetensors library refuses more

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: bytes [start, end) of the file, counted from the file's first byte."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class CheckpointFiles:
    """The weights of one model folder; `open` has checked all that the headers say.

    Attributes: folder, config (the parsed config.json), entries (tensor name -> Entry, in the
    order of the files and of the data in them).
    """

    def __init__(self, folder: Path, config: dict[str, Any], entries: dict[str, Entry]) -> None:
        self.folder = folder
        self.config = config
        self.entries = entries
        self._handles: dict[Path, Any] = {}

    @classmethod
    def open(cls, folder: str | Path) -> "CheckpointFiles":
        """Read and check config.json, the index and all headers of a local model folder.

        Raises `UserError`, one line naming the file, for whatever is missing or contradicts itself.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f"{folder}: no such model folder")
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder}: no config.json: not a Hugging Face model folder")
        config = read_json(folder / "config.json")
        if (folder / INDEX).is_file():
            entries = _read_sharded(folder)
            used = {entry.file for entry in entries.values()}
        elif (folder / SINGLE).is_file():
            entries = read_header(folder / SINGLE)
            used = {folder / SINGLE}
        elif [*folder.glob("pytorch_model*"), *folder.glob("*.pth")]:
            raise UserError(
                f"{folder}: only pickled weights, which can run any code when they are loaded;"
                " safetensors are wanted: convert them first"
            )
        else:
            raise UserError(f"{folder}: neither {SINGLE} nor {INDEX}")
        # which of two sets of weights a library loads is anybody's guess
        for file in [*sorted(folder.glob("model-*-of-*.safetensors")), folder / SINGLE]:
            if file.is_file() and file not in used:
                other = INDEX if (folder / INDEX).is_file() else SINGLE
                raise UserError(f"{file}: not part of the model in {other}: remove what is stale")
        return cls(folder, config, entries)

    @property
    def names(self) -> list[str]:
        return list(self.entries)

    def dtype(self, name: str) -> torch.dtype:
        return self.entries[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entries[name].shape

    def tensor(self, name: str) -> Tensor:
        """The tensor on the CPU in its stored dtype; it may be a private memory map of the file."""
        file = self.entries[name].file
        if file not in self._handles:
            self._handles[file] = safe_open(file, framework="pt")
        return self._handles[file].get_tensor(name)

    def raw(self, name: str) -> Iterator[bytes]:
        """The tensor's stored bytes, in pieces of `CHUNK`: memory stays bounded at any size."""
        entry = self.entries[name]
        return read_range(entry.file, entry.start, entry.end)


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


def read_entry(entry: Entry, out: Tensor) -> None:
    """Read a tensor into `out`, contiguous, of its shape and any dtype, without a map of the file.

    Raises `UserError` if it cannot be read.
    """
    assert out.shape == entry.shape and out.is_contiguous() and out.device.type == "cpu"
    stored = out if out.dtype == entry.dtype else torch.empty(entry.shape, dtype=entry.dtype)
    view = stored.reshape(-1).view(torch.uint8).numpy().data
    try:
        with entry.file.open("rb", buffering=0) as handle:
            handle.seek(entry.start)
            at = 0
            while at < len(view):
                if not (got := handle.readinto(view[at : at + CHUNK])):
                    raise UserError(f"{entry.file}: ends {len(view) - at} bytes too early")
                at += got
    except OSError as e:
        raise UserError(f"{entry.file}: cannot be read ({e.strerror})") from None
    if stored is not out:
        out.copy_(stored)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file; `UserError` if it cannot be read or is anything else."""
    try:
        return _parse_object(file.read_bytes())
    except OSError as e:
        raise UserError(f"{file}: cannot be read ({e.strerror})") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{file}: not a valid JSON object: {_line(e)}") from None


def read_header(file: Path) -> dict[str, Entry]:
    """Tensor name -> Entry of one safetensors file, checked to tile the file exactly.

    Raises `UserError` for an unreadable or truncated file and for a header that is not JSON, names
    a tensor twice, or does not agree with the file's size.
    """
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
        raise UserError(f"{file}: the safetensors header is damaged: {_line(e)}") from None
    header.pop("__metadata__", None)

    data = 8 + length
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


def check_against(files: CheckpointFiles, expected: dict[str, tuple[int, ...]]) -> list[str]:
    """Check that every expected tensor is there in its shape; return the names of all others.

    Raises `UserError` naming the first that is missing or has another shape, and how many do.
    """
    missing = [name for name in expected if name not in files.entries]
    if missing:
        raise UserError(f"{files.folder}: no tensor {missing[0]!r} ({len(missing)} missing in all)")
    wrong = [name for name, shape in expected.items() if files.shape(name) != tuple(shape)]
    if wrong:
        name = wrong[0]
        raise UserError(
            f"{files.entries[name].file}: {name!r} has shape {list(files.shape(name))},"
            f" config.json makes it {list(expected[name])} ({len(wrong)} such tensors in all)"
        )
    return [name for name in files.entries if name not in expected]


def resolve_model(path_or_hub_id: str) -> Path:
    """The folder of a model: a local one as it is, or a hub repository ("org/name"), downloaded.

    Raises `UserError` for a missing folder and for a repository that cannot be had.
    """
    path = resolve(path_or_hub_id)
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{path}: a file; a model folder is wanted")
    # "org/name" is a hub id unless it starts like a path or its first half is a folder here
    hub_id = re.fullmatch(r"\w[\w.-]*/[\w.-]+", path_or_hub_id, re.ASCII)
    if not hub_id or path.parent.is_dir():
        raise UserError(f"{path_or_hub_id}: no such model folder")

    import httpx
    import huggingface_hub
    from huggingface_hub import errors

    wanted = ["*.json", "*.safetensors", "*.txt", "*.jinja", "tokenizer*"]
    try:
        return Path(huggingface_hub.snapshot_download(path_or_hub_id, allow_patterns=wanted))
    except errors.GatedRepoError:
        why = "gated: accept its terms on huggingface.co, then log in with `hf auth login`"
    except errors.RepositoryNotFoundError:
        why = "no such folder here, and no such repository on the hub (or a private one)"
    except errors.HFValidationError:
        why = "no such folder here, and not a hub id (org/name)"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        why = "no such folder here, nor in the hub's cache, and the hub cannot be reached"
    except (OSError, httpx.HTTPError) as e:
        why = f"cannot be downloaded from the hub: {_line(e)}"
    raise UserError(f"{path_or_hub_id}: {why}")


def _read_sharded(folder: Path) -> dict[str, Entry]:
    index = folder / INDEX
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise UserError(f"{index}: no weight_map (tensor name -> file)")
    entries: dict[str, Entry] = {}
    # a file name only: an index must not reach outside its folder
    if bad := [f for f in where.values() if not isinstance(f, str) or Path(f).name != f]:
        raise UserError(f"{index}: {bad[0]!r} is not the name of a file in the folder")
    for shard in sorted(set(where.values())):
        if not (folder / shard).is_file():
            raise UserError(f"{index}: names {shard!r}, which is not in the folder")
        for name, entry in read_header(folder / shard).items():
            if name in entries:
                raise UserError(f"{entry.file}: {name!r} is also in {entries[name].file.name}")
            if name not in where:
                raise UserError(f"{entry.file}: {name!r} is not in {INDEX}")
            entries[name] = entry
    for name, shard in where.items():
        if name not in entries or entries[name].file.name != shard:
            raise UserError(f"{index}: places {name!r} in {shard}, which does not hold it")
    return entries


def _entry(file: Path, name: str, item: Any, data: int) -> Entry:
    """One item of a header, checked in itself; `data` is the file offset of the data."""

    def sizes(key: str) -> list[int]:
        values = item.get(key) if isinstance(item, dict) else None
        if not isinstance(values, list) or not all(type(v) is int and v >= 0 for v in values):
            raise UserError(f"{file}: the header lies: {name!r} has no valid {key}")
        return values

    shape, offsets = sizes("shape"), sizes("data_offsets")
    code = item.get("dtype")
    if not isinstance(code, str) or code not in DTYPES:
        raise UserError(f"{file}: {name!r} is stored as {code!r}; known: {', '.join(DTYPES)}")
    want = math.prod(shape) * DTYPES[code].itemsize
    if len(offsets) != 2 or offsets[1] - offsets[0] != want:
        raise UserError(
            f"{file}: the header lies: {name!r}, {code} {shape}, takes {want} bytes,"
            f" its offsets are {offsets}"
        )
    return Entry(file, DTYPES[code], tuple(shape), data + offsets[0], data + offsets[1])


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


def _line(e: BaseException) -> str:
    return " ".join(str(e).split())[:200]
