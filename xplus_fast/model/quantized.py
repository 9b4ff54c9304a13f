"""Weights that a checkpoint stores as codes: the one kind that is read, all others refused by name.

It is FP8 in blocks, as Qwen3-*-FP8 and DeepSeek's models come: config.json says
`quantization_config: {quant_method: fp8, fmt: e4m3, weight_block_size: [128, 128]}`, and a matrix
`X.weight` [out, in] of E4M3 codes lies beside `X.weight_scale_inv`, which holds a scale of each
block, [ceil(out / 128), ceil(in / 128)]. A weight is code * scale, in fp32.

torch is not needed to say so: plans are made of it, too.
"""

from array import array
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from xplus_fast.errors import UserError
from xplus_fast.model.headers import Entry, read_range

FLOATS = ("F64", "F32", "F16", "BF16")
FP8 = "F8_E4M3"
# of the scales: array's code of an unsigned integer as wide, and the bits of infinity. A scale that
# is positive and finite has bits between 0 and those
SCALES = {"F32": ("I", 0x7F800000), "BF16": ("H", 0x7F80), "F16": ("H", 0x7C00)}
WANTED = "an unquantized checkpoint is wanted, or FP8 in blocks (quant_method fp8, fmt e4m3)"
# how names end under which other kinds keep what belongs to their codes
KINDS = {
    ".qweight": "GPTQ or AWQ", ".qzeros": "GPTQ or AWQ", ".g_idx": "GPTQ",
    ".absmax": "bitsandbytes, 4 bits", ".SCB": "bitsandbytes, int8", "_blocks": "MXFP4",
    ".weight_packed": "compressed-tensors", ".weight_scale": "by tensor or channel",
}  # fmt: skip


def check_config(folder: Path, config: dict[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of FP8 blocks, as config.json has them; None where it tells of no codes.

    Raises `UserError`, naming the kind, where it tells of any other.
    """
    where = f"{folder}/config.json"
    # the two others: compressed-tensors before its 0.8, and MLX
    for key in ("quantization_config", "compression_config", "quantization"):
        told = config.get(key)
        if told is None:
            continue
        if not isinstance(told, dict):
            raise UserError(f"{where}: {key}: an object is wanted, found {told!r:.100}")
        if key != "quantization_config" or told.get("quant_method") != "fp8":
            raise UserError(f"{where}: {key}: {_kind(told)} is not read; {WANTED}")
        block = told.get("weight_block_size")
        if block is None:
            raise UserError(
                f"{where}: {key}: FP8 by tensor or channel (no weight_block_size) is not read;"
                f" {WANTED}"
            )
        if (
            not isinstance(block, list) or len(block) != 2
            or not all(type(n) is int and n > 0 for n in block)
        ):  # fmt: skip
            raise UserError(
                f"{where}: {key}.weight_block_size: two whole numbers above 0 are wanted,"
                f" found {block!r:.100}"
            )
        for name, only in (("fmt", "e4m3"), ("activation_scheme", "dynamic")):
            if (found := told.get(name, only)) != only:
                raise UserError(f"{where}: {key}.{name}: {only!r} is read, found {found!r:.100}")
        _listed(where, told)
        return block[0], block[1]
    return None


def paired(
    folder: Path, config: dict[str, Any], entries: dict[str, Entry], block: tuple[int, int] | None
) -> dict[str, Entry]:
    """The entries, each matrix of FP8 codes with its scales; every scale is read and looked at.

    block: what `check_config` returned.

    Raises `UserError` for any tensor that is neither floats nor such a matrix, for scales that are
    not what they should be, and where config.json and the tensors contradict each other.
    """
    where = f"{folder}/config.json"
    kept = _listed(where, config["quantization_config"]) if block else []
    made = dict(entries)
    if block and all(entry.code in FLOATS for entry in entries.values()):
        raise UserError(
            f"{where}: quantization_config says fp8, and no tensor is stored so:"
            " remove it, if these are the weights"
        )
    for name, entry in entries.items():
        what = f"{entry.file}: {name!r}"
        module = name.removesuffix(".weight")
        listed = next((key for key in kept if _names(key, module)), None)
        if entry.code in FLOATS:
            if block and name.endswith("_proj.weight") and listed is None:
                raise UserError(
                    f"{what} is stored as {entry.code}, though {where} says fp8 and its"
                    " modules_to_not_convert does not name it: codes that have lost their scales,"
                    " or weights that it should name"
                )
            continue
        if entry.code != FP8 or not name.endswith(".weight") or len(entry.shape) != 2:
            kinds = (kind for n in entries for end, kind in KINDS.items() if n.endswith(end))
            told = f" ({kind})" if (kind := next(kinds, "")) else ""
            raise UserError(f"{what} is stored as {entry.code}{told}, which is not read; {WANTED}")
        if block is None:
            raise UserError(
                f"{what} is stored as {FP8}, and config.json has no quantization_config; {WANTED}"
            )
        if listed is not None:
            raise UserError(
                f"{what} is stored as {FP8}, though {where}'s modules_to_not_convert names"
                f" {listed!r}"
            )
        scale = entries.get(scale_name(name))
        if scale is None:
            raise UserError(f"{what} is stored as {FP8}, and has no {scale_name(name)!r}")
        made[name] = replace(entry, scale=_checked(name, entry, scale, block), block=block)
    used = {scale_name(name) for name, entry in made.items() if entry.scale is not None}
    for name, entry in entries.items():
        if name.endswith("weight_scale_inv") and name not in used:
            raise UserError(
                f"{entry.file}: {name!r} scales nothing: no FP8 codes are there that config.json"
                " tells of"
            )
    return made


def scale_name(name: str) -> str:
    return f"{name}_scale_inv"


def plain_code(config: dict[str, Any], entry: Entry) -> str:
    """In which dtype a trained tensor takes this one's place: its own, or the model's for codes."""
    if entry.scale is None:
        return entry.code
    told = config.get("dtype", config.get("torch_dtype"))
    return {"float32": "F32", "float16": "F16"}.get(str(told), "BF16")


def plain_config(config: dict[str, Any], modules: Collection[str]) -> dict[str, Any]:
    """config.json of a model some of whose matrices are no longer codes.

    modules: all those whose matrix is not.
    """
    told = dict(config["quantization_config"])
    listed = _listed("config.json", told)
    listed += [module for module in modules if module not in listed]
    told["modules_to_not_convert"] = listed
    if "ignored_layers" in told:
        told["ignored_layers"] = listed
    return {**config, "quantization_config": told}


def _listed(where: str, told: dict[str, Any]) -> list[str]:
    """The modules that are not quantized. Two names of the list are in use: transformers prefers
    the first, vLLM the second."""
    found: list[str] = []
    for key in ("modules_to_not_convert", "ignored_layers"):
        listed = told.get(key)
        listed = [] if listed is None else listed
        if not isinstance(listed, list) or not all(isinstance(m, str) and m for m in listed):
            raise UserError(f"{where}: quantization_config.{key}: a list of names is wanted")
        found += [module for module in listed if module not in found]
    return found


def _names(key: str, module: str) -> bool:
    """Whether a key of the list means a module: by its name, its beginning or its end, or with
    `.*` for anything."""
    first, *others = key.split(".*")
    if not others:
        return f".{key.strip('.')}." in f".{module}."
    at = len(first) if module.startswith(first) else -1
    for part in others:
        at = module.find(part, at) + len(part) if at >= 0 and part in module[at:] else -1
    return at >= 0


def _kind(told: dict[str, Any]) -> str:
    """The kind of quantization in the words of its own configuration."""
    method = str(told.get("quant_method", "a kind that it does not name"))[:60]
    bits = told.get("bits", told.get("w_bit"))
    if told.get("load_in_4bit") or told.get("_load_in_4bit"):
        return f"bitsandbytes {told.get('bnb_4bit_quant_type', '4 bits')!s:.20}"
    if told.get("load_in_8bit") or told.get("_load_in_8bit"):
        return "bitsandbytes int8"
    return f"{method} ({bits} bits)" if type(bits) is int else method


def _checked(name: str, codes: Entry, scale: Entry, block: tuple[int, int]) -> Entry:
    """The scales, if there is one of each block, positive and finite."""
    what = f"{scale.file}: {scale_name(name)!r}"
    if scale.code not in SCALES:
        raise UserError(f"{what} is stored as {scale.code}; {', '.join(SCALES)} are read")
    shape = tuple(-(-n // b) for n, b in zip(codes.shape, block, strict=True))
    if scale.shape != shape:
        raise UserError(
            f"{what} has shape {list(scale.shape)}; {list(codes.shape)} in blocks of {list(block)}"
            f" makes it {list(shape)}"
        )
    kind, infinite = SCALES[scale.code]
    bits = array(kind, b"".join(read_range(scale.file, scale.start, scale.end)))
    if len(bits) and not (0 < min(bits) and max(bits) < infinite):
        raise UserError(f"{what} holds a scale that is zero, negative or not finite")
    return scale
