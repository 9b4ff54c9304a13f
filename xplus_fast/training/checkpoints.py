"""Training checkpoints: folders that are whole or not there.

`checkpoint-<step>/` holds `<stem>.safetensors` and `<stem>.json` files (the trained tensors, the
optimizer state, everything else as JSON; never a frozen tensor, never a pickle) and, written last,
`manifest.json` with the size and SHA-256 of each. A process killed at any moment leaves the
checkpoints before it as they were; a run calls `clean_leftovers` before it looks for its
`latest_checkpoint`.
"""

import base64
import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from xplus_fast.errors import UserError
from xplus_fast.files import NewFile, new_folder, remove, write_file
from xplus_fast.locks import sweep
from xplus_fast.manifest import check_files, is_whole, read_manifest, write_manifest
from xplus_fast.model.checkpoint_files import CHUNK, DTYPE_CODES, read_entry, read_header, read_json

FINAL = "final"  # the name of a stage's last checkpoint
FINAL_TENSORS = "trained.safetensors"  # in it


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
    made: dict[str, NewFile] = {}
    with new_folder(folder, needed) as temp:

        def write(name: str, pieces: Iterable[bytes | memoryview]) -> None:
            made[name] = write_file(temp / name, pieces, hashed=True)

        for stem, group in tensors.items():
            write(f"{stem}.safetensors", _safetensors(group))
        for stem, text in texts.items():
            write(f"{stem}.json", [text])
        write_manifest(temp, made)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint after checking every file's size and SHA-256.

    The tensors are on the CPU. Raises `UserError` naming the file that is missing or damaged.
    """
    tensors, documents = {}, {}
    for name in check_files(folder, "remove this checkpoint to go on from the one before it"):
        file = folder / name
        try:
            if file.suffix == ".safetensors":
                tensors[file.stem] = load_file(file)
            else:
                documents[file.stem] = json.loads(file.read_bytes())
        except (SafetensorError, ValueError, RecursionError) as e:
            raise UserError(f"{file}: damaged ({' '.join(str(e).split())[:200]})") from None
    return Checkpoint(folder, tensors, documents)


class Final(Mapping[str, Tensor]):
    """A finished stage's tensors: fp32 masters where it had them, each read when it is asked for.

    dtype: of the weights that it trained, which are the masters' rounding; None where the file
    holds the weights themselves. checksum: the SHA-256 of the file.
    """

    def __init__(self, folder: Path, stage: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """stage: its name; shapes: of what it trains.

        Raises `UserError` for another stage's checkpoint and for a damaged one.
        """
        check_files(folder, "remove it to train the stage again")
        self.entries = read_header(folder / FINAL_TENSORS)
        have = {name: entry.shape for name, entry in self.entries.items()}
        told = read_json(folder / "selection.json")
        of = told.get("stage", stage)
        if of != stage or have != dict(shapes):
            wrong = [n for n in [*shapes, *have] if have.get(n) != shapes.get(n)]
            what = f"it differs in {wrong[0]}" if wrong else f"it is that of {of}"
            raise UserError(
                f"{folder}: not what stage {stage} trains: {what};"
                " remove it to train the stage again"
            )
        self.dtype: torch.dtype | None = getattr(torch, str(told.get("dtype")), None)
        self.checksum: str = read_manifest(folder)[FINAL_TENSORS]["sha256"]

    def __getitem__(self, name: str) -> Tensor:
        entry = self.entries[name]
        read_entry(entry, made := torch.empty(entry.shape, dtype=entry.dtype))
        return made

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


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
        if folder.name != spare:
            remove(folder)


def clean_leftovers(parent: Path) -> None:
    """Undo and remove what a killed process left: call it before `latest_checkpoint`, alone."""
    sweep(parent, rf"checkpoint-\d+|{FINAL}")


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


def tensor_bytes(tensor: Tensor) -> Iterator[memoryview]:
    """A tensor's elements in row-major order as bytes, in pieces of `CHUNK`."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    for start in range(0, len(flat), CHUNK):
        yield flat[start : start + CHUNK].data


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


def _whole_checkpoints(parent: Path) -> list[Path]:
    """The whole checkpoints of a run, by step."""
    steps = {
        int(match[1]): folder
        for folder in parent.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", folder.name)) and is_whole(folder)
    }
    return [steps[step] for step in sorted(steps)]


def _to_base64(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _from_base64(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
