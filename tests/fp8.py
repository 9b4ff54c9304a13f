"""Model folders in FP8, as Qwen3-*-FP8 are stored, and what their weights are meant to be."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from xplus_fast.model.checkpoint_files import INDEX, SINGLE


def encode(weight: Tensor, block: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes of a matrix, and a scale of each block; the last ones may be cut off."""
    high, wide = block
    grid = [-(-n // b) for n, b in zip(weight.shape, block, strict=True)]
    scales, codes = torch.ones(grid), torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    for i in range(grid[0]):
        for j in range(grid[1]):
            at = slice(i * high, (i + 1) * high), slice(j * wide, (j + 1) * wide)
            scales[i, j] = (weight[at].float().abs().max() / 448).clamp(min=1e-12)
            scales[i, j] = scales[i, j].to(dtype).float() * (1 if dtype == torch.float32 else 1.01)
            scales[i, j] = scales[i, j].to(dtype)
            codes[at] = (weight[at].float() / scales[i, j]).to(torch.float8_e4m3fn)
    return codes, scales.to(dtype)


def decode(codes: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """fp32 weights, one element after another: the slow way to say what is meant."""
    rows, columns = (torch.arange(n) // b for n, b in zip(codes.shape, block, strict=True))
    return codes.float() * scales.float()[rows][:, columns]


def fp8_copy(
    base: Path, out: Path, *, block: tuple[int, int] = (128, 128),
    scales: torch.dtype = torch.bfloat16, listed: list[str] | None = None,
) -> Path:  # fmt: skip
    """A copy of a model folder in one file, its projections as codes. listed: not those."""
    shutil.copytree(base, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors: dict[str, Tensor] = {}
    for file in base.glob("*.safetensors"):
        tensors |= load_file(file)
    for name in list(tensors):
        if name.endswith("_proj.weight") and name.removesuffix(".weight") not in (listed or []):
            tensors[name], tensors[f"{name}_scale_inv"] = encode(tensors[name], block, scales)
    save_file(tensors, out / SINGLE, {"format": "pt"})
    told = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
            "weight_block_size": list(block)}  # fmt: skip
    edit_config(
        out, quantization_config=told | ({"modules_to_not_convert": listed} if listed else {})
    )
    return out


def plain_copy(fp8: Path, out: Path) -> Path:
    """A copy with the weights that the codes mean, in fp32, so that none of them is rounded."""
    shutil.copytree(fp8, out)
    tensors = load_file(fp8 / SINGLE)
    block = json.loads((fp8 / "config.json").read_text())["quantization_config"][
        "weight_block_size"
    ]
    for name in [n for n in tensors if n.endswith("_scale_inv")]:
        weight = name.removesuffix("_scale_inv")
        tensors[weight] = decode(tensors[weight], tensors.pop(name), block)
    save_file(tensors, out / SINGLE, {"format": "pt"})
    edit_config(out, quantization_config=None)
    return out


def edit_config(folder: Path, **changes: Any) -> None:
    """Set keys of config.json; None takes one out."""
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, **changes: Any) -> None:
    """Set tensors, by the end of their names or anew; None takes one out."""
    tensors = load_file(folder / SINGLE)
    for name, value in changes.items():
        found = next((n for n in tensors if n.endswith(name)), name)
        if value is None:
            del tensors[found]
        else:
            tensors[found] = value(tensors[found]) if callable(value) else value
    save_file(tensors, folder / SINGLE, {"format": "pt"})


def shard(folder: Path, pieces: int) -> None:
    """The one file of a folder as several, every tensor in the next one."""
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    parts: list[dict[str, Tensor]] = [{} for _ in range(pieces)]
    for i, (name, value) in enumerate(sorted(tensors.items())):
        parts[i % pieces][name] = value
    where = {}
    for i, part in enumerate(parts):
        file = f"model-{i + 1:05}-of-{pieces:05}.safetensors"
        save_file(part, folder / file, {"format": "pt"})
        where |= dict.fromkeys(part, file)
    size = sum(t.nbytes for t in tensors.values())
    told = {"total_size": size, "total_parameters": sum(t.numel() for t in tensors.values())}
    (folder / INDEX).write_text(json.dumps({"metadata": told, "weight_map": where}))
