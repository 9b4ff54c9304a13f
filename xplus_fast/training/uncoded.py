"""What an export makes of a base in FP8: what was trained is codes no longer.

To make codes of a trained matrix again would round most of what was trained away: an E4M3 code has
4 bits, and a step at a learning rate of 1e-5 moves a weight by far less. So a trained matrix is
stored in the model's own dtype, its scales are left out, and config.json names it in
`modules_to_not_convert`, as transformers and vLLM ask for it. What is frozen keeps its codes.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xplus_fast.model.checkpoint_files import INDEX, CheckpointFiles
from xplus_fast.model.families import BESIDE
from xplus_fast.model.headers import CODES, read_json, read_metadata, read_range
from xplus_fast.model.quantized import plain_code, plain_config, scale_name
from xplus_fast.training.checkpoints import tensor_bytes


def uncoded_config(files: CheckpointFiles, names: Collection[str]) -> bytes:
    """The result's config.json. names: of the matrices that are codes in the base only."""
    if all(entry.scale is None or name in names for name, entry in files.entries.items()):
        rest = {key: value for key, value in files.config.items() if key != "quantization_config"}
        return _text(rest)
    tables = (BESIDE["embedding"], BESIDE["head"])
    plain = [
        name for name, entry in files.entries.items()
        if name.endswith(".weight") and len(entry.shape) == 2 and name not in tables
        and (entry.scale is None or name in names)
    ]  # fmt: skip
    # a list of one's own takes the place of the default, which is the head
    modules = [BESIDE["head"].removesuffix(".weight")] + [n.removesuffix(".weight") for n in plain]
    return _text(plain_config(files.config, modules))


def uncoded_index(files: CheckpointFiles, names: Collection[str]) -> bytes:
    """The result's index of shards, of a base that has one."""
    index = read_json(files.folder / INDEX)
    kept = _kept(files, names)
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if n in kept}
    told = index.get("metadata")
    if isinstance(told, dict):
        sizes = {"total_size": sum(size for _, size in kept.values())}
        sizes["total_parameters"] = sum(files.entries[name].numel for name in kept)
        told |= {key: size for key, size in sizes.items() if key in told}
    return _text(index)


def uncoded_shard(
    files: CheckpointFiles, shard: Path, changed: Mapping[str, Tensor]
) -> Iterator[bytes | memoryview]:
    """The bytes of a shard with the changed tensors in it, and without their scales."""
    entries = files.entries
    kept = {
        name: kind for name, kind in _kept(files, changed).items() if entries[name].file == shard
    }
    # widest dtype first keeps every tensor aligned to its own width
    order = sorted(kept, key=lambda name: -CODES[kept[name][0]][1])
    header: dict[str, Any] = {}
    at = 0
    if (told := read_metadata(shard)) is not None:
        header["__metadata__"] = told
    for name in order:
        code, size = kept[name]
        offsets = [at, at := at + size]
        header[name] = {"dtype": code, "shape": list(entries[name].shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        if name in changed:
            dtype = getattr(torch, CODES[kept[name][0]][0])
            yield from tensor_bytes(changed[name].detach().to(dtype))
        else:
            yield from read_range(entries[name].file, entries[name].start, entries[name].end)


def uncoded_shards(files: CheckpointFiles, names: Collection[str]) -> dict[Path, bool]:
    """The shards that such matrices and their scales are in, and whether anything stays of each."""
    kept, entries = _kept(files, names), files.entries
    left = {entries[name].file for name in kept}
    mine = [e for n in names for e in (entries[n], entries[n].scale) if e is not None]
    return {e.file: e.file in left for e in mine}


def _text(tree: dict[str, Any]) -> bytes:
    return json.dumps(tree, indent=2).encode() + b"\n"


def _kept(files: CheckpointFiles, changed: Collection[str]) -> dict[str, tuple[str, int]]:
    """Code and bytes of every tensor of the result."""
    gone = {scale_name(n) for n in changed if n in files.entries and files.entries[n].scale}
    kept = {}
    for name, entry in files.entries.items():
        if name not in gone:
            code = plain_code(files.config, entry) if name in changed else entry.code
            kept[name] = (code, entry.numel * CODES[code][1])
    return kept
