"""A Hugging Face model folder, read without trusting it.

`CheckpointFiles.open(folder)` reads config.json, the shard index and every safetensors header, and
checks them against each other and against the files' sizes, before a byte of a tensor is used.
Plans are made of it: torch is loaded where a tensor is read.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xplus_fast.errors import UserError
from xplus_fast.files import resolve
from xplus_fast.model.families import BESIDE
from xplus_fast.model.headers import (
    CHUNK,
    CODES,
    Entry,
    read_header,
    read_json,
    read_range,
)
from xplus_fast.model.hub import model_from_hub
from xplus_fast.model.quantized import check_config, paired, scale_name
from xplus_fast.options import PATH, check_text

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
RECORD = "xplus_fast.json"  # what `export` says of a model folder that it made
DTYPE_CODES = {f"torch.{name}": code for code, (name, _) in CODES.items()}
PIECE = 1 << 21  # codes turned into weights at a time


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
        block = check_config(folder, config)  # a kind by its name, before what its files look like
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
        return cls(folder, config, paired(folder, config, entries, block))

    @property
    def names(self) -> list[str]:
        return list(self.entries)

    def dtype(self, name: str) -> "torch.dtype":
        return self.entries[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entries[name].shape

    def tensor(self, name: str) -> "Tensor":
        """The tensor on the CPU in its stored dtype; it may be a private memory map of the file."""
        from safetensors import safe_open

        file = self.entries[name].file
        if file not in self._handles:
            self._handles[file] = safe_open(file, framework="pt")
        return self._handles[file].get_tensor(name)

    def raw(self, name: str) -> Iterator[bytes]:
        """The tensor's stored bytes, in pieces of `CHUNK`: memory stays bounded at any size."""
        entry = self.entries[name]
        return read_range(entry.file, entry.start, entry.end)


def read_entry(entry: Entry, out: "Tensor") -> None:
    """Read a tensor into `out`, contiguous, of its shape and any dtype, without a map of the file.

    Codes with scales become weights: in fp32, then in `out`'s dtype.

    Raises `UserError` if it cannot be read, and for codes that make a weight that is not finite.
    """
    import torch

    assert out.shape == entry.shape and out.is_contiguous() and out.device.type == "cpu"
    if entry.scale is not None:
        return _dequantize(entry, entry.scale, out)
    stored = out if out.dtype == entry.dtype else torch.empty(entry.shape, dtype=entry.dtype)
    _read_into(entry, stored)
    if stored is not out:
        out.copy_(stored)


def _dequantize(entry: Entry, scale: Entry, out: "Tensor") -> None:
    """Some rows of blocks at a time: the codes are never in memory as a whole.

    E4M3's sign, exponent and mantissa in those places of an fp16 are the weight / 256, exactly, and
    fp16 is converted many times faster.
    """
    import torch

    rows, columns = entry.shape
    high, wide = (min(b, max(1, n)) for b, n in zip(entry.block, entry.shape, strict=True))
    scales = torch.empty(scale.shape)
    read_entry(scale, scales)
    if scales.numel() and 448 * float(scales.max()) > torch.finfo(out.dtype).max:
        raise UserError(f"{scale.file}: a scale at byte {scale.start} makes weights that overflow")
    scales = (scales * 256).repeat_interleave(wide, dim=1)[:, :columns]
    step = max(1, PIECE // max(1, high * columns)) * high
    for a in range(0, rows, step):
        codes = torch.empty(min(step, rows - a), columns, dtype=torch.int8)
        _read_into(replace(entry, start=entry.start + a * columns), codes)
        if codes.numel() and int((codes & 0x7F).max()) == 0x7F:
            raise UserError(
                f"{entry.file}: an FP8 code in rows {a} to {a + len(codes) - 1} of the matrix"
                f" {list(entry.shape)} at byte {entry.start} is not a number"
            )
        bits = codes.to(torch.int16)
        bits <<= 7
        bits &= 0xBF80 - (1 << 16)  # the sign, which the shift spread, and the seven bits
        values = bits.view(torch.float16).float()
        for at, part in enumerate(values.split(high), a // high):
            part *= scales[at]  # [high, columns] * [columns]
        out[a : a + len(codes)] = values


def _read_into(entry: Entry, out: "Tensor") -> None:
    """Fill `out`, of the stored dtype, with the bytes from the entry's start on."""
    import torch

    view = out.reshape(-1).view(torch.uint8).numpy().data
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


def has_weights(folder: Path) -> bool:
    """Whether a folder holds safetensors under their usual names; a plan can do without."""
    return any((folder / name).is_file() for name in (SINGLE, INDEX))


def check_against(files: CheckpointFiles, expected: dict[str, tuple[int, ...]]) -> list[str]:
    """Check that the tensors are those expected, in their shapes, and no others that count.

    Returns the names of all others: the scales of codes, a rotary embedding's frequencies, which
    config.json tells, and a tied head (`Weights` looks whether it is the embedding).

    Raises `UserError` naming the first that is missing, too many or of another shape, and how many
    are.
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
    others = [name for name in files.entries if name not in expected]
    known = {BESIDE["head"], *map(scale_name, expected)}
    more = [n for n in others if n not in known and not n.endswith("rotary_emb.inv_freq")]
    if more:
        raise UserError(
            f"{files.entries[more[0]].file}: {more[0]!r} is nothing that a model of this"
            f" config.json has ({len(more)} such tensors in all)"
        )
    return others


def resolve_model(path_or_hub_id: str) -> Path:
    """The folder of a model: a local one as it is, or a hub repository ("org/name"), downloaded.

    Raises `UserError` for a missing folder and for a repository that cannot be had.
    """
    path = resolve(path_or_hub_id)
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{path}: a file; a model folder is wanted")
    return model_from_hub(path_or_hub_id)


def _read_sharded(folder: Path) -> dict[str, Entry]:
    index = folder / INDEX
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise UserError(f"{index}: no weight_map (tensor name -> file)")
    entries: dict[str, Entry] = {}
    # a file name only: an index must not reach outside its folder
    if bad := [f for f in where.values() if not isinstance(f, str) or Path(f).name != f]:
        raise UserError(f"{index}: {bad[0]!r:.80} is not the name of a file in the folder")
    for shard in set(where.values()):
        check_text(shard, str(index), PATH)
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
