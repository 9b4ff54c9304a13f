"""Training checkpoints: folders that are whole or not there.

`checkpoint-<step>/` holds `<stem>.safetensors` and `<stem>.json` files (the trained tensors, the
optimizer state, everything else as JSON; never a frozen tensor, never a pickle) and, written last,
`manifest.json` with the size and SHA-256 of each. It is written as `.checkpoint-<step>.tmp`,
flushed to the disk, then renamed: a process killed at any moment leaves the checkpoints before it
as they were. A run calls `clean_leftovers` before it looks for its `latest_checkpoint`.
"""

import base64
import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from xplus_fast.errors import UserError
from xplus_fast.model.checkpoint_files import CHUNK, DTYPE_CODES, read_json

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """What `write_checkpoint` was given, by file stem."""

    folder: Path
    tensors: dict[str, dict[str, Tensor]]
    documents: dict[str, Any]


def write_checkpoint(
    folder: Path, tensors: dict[str, dict[str, Tensor]], documents: dict[str, Any]
) -> None:
    """Write `<stem>.safetensors` and `<stem>.json` files as one folder, all of it or nothing.

    tensors: file stem -> tensor name -> tensor of any device, dtype, shape and strides; one at a
    time is copied to the host. documents: file stem -> JSON-able value (keys are text, tuples come
    back as lists). An existing folder of this name is replaced.
    Raises `UserError` if the disk is full or cannot be written; nothing else changes then.
    """
    assert "manifest" not in documents, "manifest.json is the checkpoint's own"
    texts = {stem: json.dumps(document).encode() for stem, document in documents.items()}
    needed = sum(t.nbytes for group in tensors.values() for t in group.values())
    needed += sum(len(text) for text in texts.values())
    listed = {}
    with new_folder(folder, needed) as temp:

        def write(name: str, pieces: Iterable[bytes | memoryview]) -> None:
            digest = hashlib.sha256()
            size = write_file(temp / name, _hashed(pieces, digest))
            listed[name] = {"bytes": size, "sha256": digest.hexdigest()}

        for stem, group in tensors.items():
            write(f"{stem}.safetensors", _safetensors(group))
        for stem, text in texts.items():
            write(f"{stem}.json", [text])
        write_file(temp / MANIFEST, [json.dumps({"files": listed}, indent=1).encode()])


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint after checking every file's size and SHA-256.

    The tensors are on the CPU. Raises `UserError` naming the file that is missing or damaged.
    """
    listed = _manifest(folder)
    hint = "remove this checkpoint to go on from the one before it"
    for name, item in listed.items():
        file = folder / name
        try:
            if (size := file.stat().st_size) != item["bytes"]:
                raise UserError(f"{file}: damaged: {size} bytes, not {item['bytes']}; {hint}")
            with file.open("rb") as handle:
                digest = hashlib.file_digest(handle, "sha256").hexdigest()
        except OSError as e:
            raise UserError(f"{file}: cannot be read ({e.strerror}); {hint}") from None
        if digest != item["sha256"]:
            raise UserError(f"{file}: damaged: its SHA-256 is not that of {MANIFEST}; {hint}")
    tensors, documents = {}, {}
    for name in listed:
        file = folder / name
        if file.suffix == ".safetensors":
            tensors[file.stem] = load_file(file)
        else:
            documents[file.stem] = json.loads(file.read_bytes())
    return Checkpoint(folder, tensors, documents)


def latest_checkpoint(parent: Path) -> Path | None:
    """The whole checkpoint of the highest step in a run's folder; None if there is none.

    Whole: its manifest is there and all sizes agree; `read_checkpoint` checks the contents.
    """
    whole = _whole_checkpoints(parent)
    return whole[-1] if whole else None


def rotate(parent: Path, keep: int, *, spare: str | None = None) -> None:
    """Remove all whole checkpoints but the `keep` newest and the one named `spare`."""
    assert keep >= 1
    for folder in _whole_checkpoints(parent)[:-keep]:
        if folder.name == spare:
            continue
        # out of sight first: a half-removed checkpoint must not look like one
        aside = _sibling(folder, "tmp")
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(folder, aside)
        shutil.rmtree(aside)


def clean_leftovers(parent: Path) -> None:
    """Undo and remove what a killed process left: call it before `latest_checkpoint`, alone."""
    for old in parent.glob(".checkpoint-*.old"):
        final = parent / old.name[1 : -len(".old")]
        if not final.exists() and _is_whole(old):
            os.rename(old, final)  # killed between the two renames of a replacement
        else:
            shutil.rmtree(old)
    for temp in parent.glob(".checkpoint-*.tmp"):
        shutil.rmtree(temp)


def rng_state() -> dict[str, Any]:
    """Random state of python, numpy, torch and the current CUDA device, as JSON-able values."""
    version, internal, gauss = random.getstate()
    kind, key, *rest = np.random.get_state(legacy=True)
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return {
        "python": [version, list(internal), gauss],
        "numpy": [kind, np.asarray(key).tolist(), *rest],
        "torch": _to_base64(torch.get_rng_state()),
        "cuda": None if cuda is None else _to_base64(cuda),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Take up `rng_state`; the CUDA part only where there is a CUDA device."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, key, *rest = state["numpy"]
    np.random.set_state((kind, np.array(key, dtype=np.uint32), *rest))
    torch.set_rng_state(_from_base64(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_from_base64(state["cuda"]))


@contextmanager
def new_folder(final: Path, needed: int) -> Iterator[Path]:
    """A temporary sibling to fill, which becomes `final` when the block ends without an exception.

    needed: bytes to be written, for the message. An existing `final` is replaced. On any exception
    the temporary folder is removed; an `OSError` (a full disk) becomes a `UserError`.
    """
    temp = _sibling(final, "tmp")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        if temp.exists():
            shutil.rmtree(temp)
        temp.mkdir()
        yield temp
        sync_folder(temp)
        _move(temp, final)
    except OSError as e:
        shutil.rmtree(temp, ignore_errors=True)  # before counting what is free without it
        home = next(p for p in final.absolute().parents if p.is_dir())
        free = shutil.disk_usage(home).free
        raise UserError(
            f"{final}: cannot be written ({e.strerror}): {needed / 1e6:,.1f} MB wanted,"
            f" {free / 1e6:,.1f} MB free; what was there before is untouched"
        ) from e
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def write_file(file: Path, pieces: Iterable[bytes | memoryview]) -> int:
    """Write the pieces and flush them to the disk; return the number of bytes."""
    size = 0
    with file.open("wb") as handle:
        for piece in pieces:
            handle.write(piece)
            size += len(piece)
        handle.flush()
        os.fsync(handle.fileno())
    return size


def tensor_bytes(tensor: Tensor) -> Iterator[memoryview]:
    """A tensor's elements in row-major order as bytes, in pieces of `CHUNK`."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    for start in range(0, len(flat), CHUNK):
        yield flat[start : start + CHUNK].data


def sync_folder(folder: Path) -> None:
    """Flush a folder's list of names to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _safetensors(tensors: dict[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, one tensor at a time."""
    # widest dtype first keeps every tensor aligned to its own width
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header, at = {}, 0
    for name in names:
        t = tensors[name]
        assert str(t.dtype) in DTYPE_CODES, f"{name}: {t.dtype} has no safetensors code"
        offsets = [at, at := at + t.numel() * t.itemsize]
        code = DTYPE_CODES[str(t.dtype)]
        header[name] = {"dtype": code, "shape": list(t.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        yield from tensor_bytes(tensors[name])


def _hashed(
    pieces: Iterable[bytes | memoryview], digest: "hashlib._Hash"
) -> Iterator[bytes | memoryview]:
    for piece in pieces:
        digest.update(piece)
        yield piece


def _move(temp: Path, final: Path) -> None:
    """Rename temp to final; what is there goes aside first, and back on an error."""
    old = _sibling(final, "old")
    if final.exists():
        if old.exists():
            shutil.rmtree(old)
        os.rename(final, old)
    try:
        os.rename(temp, final)
        sync_folder(final.parent)
    except OSError:
        if final.exists():
            os.rename(final, temp)
        if old.exists():
            os.rename(old, final)
        raise
    shutil.rmtree(old, ignore_errors=True)  # `clean_leftovers` removes the rest


def _sibling(folder: Path, kind: str) -> Path:
    return folder.with_name(f".{folder.name}.{kind}")


def _whole_checkpoints(parent: Path) -> list[Path]:
    """The whole checkpoints of a run, by step."""
    steps = {
        int(match[1]): folder
        for folder in parent.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", folder.name)) and _is_whole(folder)
    }
    return [steps[step] for step in sorted(steps)]


def _is_whole(folder: Path) -> bool:
    try:
        listed = _manifest(folder)
        return all((folder / n).stat().st_size == item["bytes"] for n, item in listed.items())
    except (UserError, OSError):
        return False


def _manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """File name -> {"bytes", "sha256"}; `UserError` if there is no manifest or it is damaged."""
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder}: no {MANIFEST}: not a checkpoint, or one cut off while written")
    listed = read_json(folder / MANIFEST).get("files")
    if not isinstance(listed, dict) or not all(
        isinstance(item, dict) and item.keys() == {"bytes", "sha256"} for item in listed.values()
    ):
        raise UserError(f"{folder / MANIFEST}: damaged: not a list of files and their checksums")
    return listed


def _to_base64(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _from_base64(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
