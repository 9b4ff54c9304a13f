"""Export a trained model as a Hugging Face folder, and verify that nothing else changed.

`export` copies the base folder and replaces the bytes of the changed tensors only, so that every
other byte of every shard and of every file beside them is the base's; it adds xplus_fast.json.
`verify` compares two folders tensor by tensor on their stored bytes (NaNs and the sign of zero
count) in bounded memory, and the files beside them. What both make of a base in FP8 is told in
`uncoded`.
"""

import json
from collections import ChainMap
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xplus_fast.errors import UserError
from xplus_fast.files import make_folder, new_folder, settle, speaking, sync_folder, write_file
from xplus_fast.locks import locked
from xplus_fast.model.checkpoint_files import (
    INDEX,
    RECORD,
    CheckpointFiles,
    read_json,
    read_range,
)
from xplus_fast.model.families import layer_of
from xplus_fast.model.headers import CODES
from xplus_fast.model.quantized import plain_code, scale_name
from xplus_fast.training.checkpoints import tensor_bytes
from xplus_fast.training.uncoded import uncoded_config, uncoded_index, uncoded_shard, uncoded_shards

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# what from_pretrained, tokenizers and servers read beside the weights; never code, never pickles
COMPANIONS = ("*.json", "*.txt", "*.jinja", "*.model", "LICENSE*", "NOTICE*")
TEMPLATES = "additional_chat_templates"  # a folder of *.jinja, next to chat_template.jinja
# which files of a result, and which keys of a JSON file, may be others than the base's: those that
# no library reads
MAY_DIFFER = (RECORD, "*.md", "LICENSE*", "NOTICE*", ".*")
UNREAD = ("transformers_version", "_name_or_path")


@dataclass(frozen=True)
class Verification:
    """What `verify` found, by tensor name in the base's order.

    missing: in the base only. extra: in the result only. reshaped: in both, with another shape or
    dtype. changed: other bytes; outside: those of them that were not to change, where a record
    or a selection has `judged` that. files: beside the weights, what is not as it was, and how.
    """

    base: Path
    result: Path
    changed: list[str]
    outside: list[str]
    missing: list[str]
    extra: list[str]
    reshaped: list[str]
    files: list[str]
    judged: bool
    numel: dict[str, int]  # of what changed
    identical: int  # tensors
    identical_bytes: int
    notes: list[str]

    @property
    def changed_parameters(self) -> int:
        return sum(self.numel.values())

    @property
    def ok(self) -> bool:
        return not (self.outside or self.missing or self.extra or self.reshaped or self.files)


def export(base: Path, changed: Mapping[str, Tensor], out: Path, record: dict[str, Any]) -> None:
    """Write the base model with `changed` in place of its own tensors to the new folder `out`.

    changed: Hugging Face name -> tensor of the base's shape, any dtype and device; it is rounded
    to the dtype in which the base stores it, or, where that is codes, to the model's.
    record: JSON-able (resolved layers, base, version); it goes to xplus_fast.json with the changed
    names under "tensors". An `out` that holds this very export already is left as it is.
    Raises `UserError` if `out` holds anything else, for names, shapes or dtypes that the base does
    not have, for values that are not finite, for a damaged base, and for a full disk; `out` does
    not come into being then.
    """
    with locked(out):
        _export(CheckpointFiles.open(base), changed, out, record)


def _export(
    files: CheckpointFiles, changed: Mapping[str, Tensor], out: Path, record: dict[str, Any]
) -> None:
    base = files.folder
    with speaking(out):
        settle(out)
    record = {**record, "tensors": sorted(_with_head(files, changed))}
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        # killed after its last step, it has only to be started again
        if "checksums" in record and (out / RECORD).is_file() and read_json(out / RECORD) == record:
            return
        raise UserError(f"{out}: exists already; export writes to a new or empty folder")
    for name, tensor in changed.items():
        _check(files, name, tensor)

    shards = {entry.file for entry in files.entries.values()}
    needed = sum(file.stat().st_size for file in [*shards, *_companions(base)])
    with new_folder(out, needed) as temp:
        for place, pieces in contents(files, changed):
            make_folder((temp / place).parent)
            write_file(temp / place, pieces)
        write_file(temp / RECORD, [json.dumps(record, indent=2).encode()])
        if (temp / TEMPLATES).is_dir():
            sync_folder(temp / TEMPLATES)


def _with_head(files: CheckpointFiles, changed: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Some tied checkpoints store both; a head left as it was would no longer be tied."""
    if _tied(files) and EMBEDDING in changed and HEAD in files.entries:
        return ChainMap({HEAD: changed[EMBEDDING]}, changed)  # type: ignore[arg-type]  # read only
    return changed


def contents(
    files: CheckpointFiles, changed: Mapping[str, Tensor]
) -> Iterator[tuple[Path, Iterable[bytes | memoryview]]]:
    """Every file of an export but its record: its place in the folder, and its bytes.

    files: of the base. changed: as `export` has it.
    """
    changed = _with_head(files, changed)
    uncoded = {name for name in changed if files.entries[name].scale is not None}
    made_anew = uncoded_shards(files, uncoded)
    texts = {"config.json": uncoded_config, INDEX: uncoded_index} if uncoded else {}
    rewritten = {files.entries[name].file for name in changed}
    for file in _companions(files.folder):
        name = file.relative_to(files.folder)
        make = texts.get(str(name))
        yield name, [make(files, uncoded)] if make else _copy(file)
    for shard in sorted({entry.file for entry in files.entries.values()}):
        replaced = changed if shard in rewritten else {}
        if shard not in made_anew:
            yield Path(shard.name), _shard(files, shard, replaced)
        elif made_anew[shard]:
            yield Path(shard.name), uncoded_shard(files, shard, changed)


def verify(
    base: Path, result: Path, allowed: set[int] | None = None, also: Collection[str] = ()
) -> Verification:
    """Compare every tensor of two model folders byte for byte, and the files beside the weights.

    allowed: ids of the decoder layers that may differ; None: the tensors that the result's
    xplus_fast.json names, all where there is none. also: names of tensors that may differ beside
    those layers. A head that one side leaves out because it is tied is that side's embedding.

    Raises `UserError` if a folder cannot be read.
    """
    a, b = CheckpointFiles.open(base), CheckpointFiles.open(result)
    recorded = _recorded(result) if allowed is None else None
    judged, may_change = allowed is not None or recorded is not None, recorded or set()
    changed, outside, missing, extra, reshaped = [], [], [], [], []
    numel: dict[str, int] = {}
    identical = identical_bytes = 0
    uncoded = {n for n in a.entries if _uncoded(a, b, n)}
    gone = {scale_name(name) for name in uncoded}  # with the codes that they were of
    for name in [*a.entries, *(n for n in b.entries if n not in a.entries)]:
        x, y = _stored(a, name), _stored(b, name)
        if name in gone and y is None:
            continue
        if x is None:
            extra.append(name)
        elif y is None:
            missing.append(name)
        elif name not in uncoded and _kind(a, x) != _kind(b, y):
            reshaped.append(f"{name} ({_kind(a, x)} in the base, {_kind(b, y)} in the result)")
        elif name not in uncoded and _same(a.raw(x), b.raw(y)):
            identical += 1
            identical_bytes += a.entries[x].end - a.entries[x].start
        else:
            changed.append(name)
            numel[name] = a.entries[x].numel
            if allowed is None:
                permitted = not judged or bool(may_change & {x, y})
            else:
                permitted = layer_of(name) in allowed or bool({x, y}.intersection(also))
            if not permitted:
                outside.append(name)

    notes = []
    if recorded is not None and (scale := read_json(result / RECORD).get("scale")) is not None:
        notes.append(f"scaled: {scale} of what the run changed")
    if still := sorted(may_change.difference(changed)):
        notes.append(f"trained, but unchanged: {_count(len(still))}, first {still[0]}")
    if not judged:
        notes.append(f"no {RECORD} says what was to change: a list, no proof; --layers judges it")
    return Verification(
        base=base,
        result=result,
        changed=changed,
        outside=outside,
        missing=missing,
        extra=extra,
        reshaped=reshaped,
        files=_files(a, b, uncoded),
        judged=judged,
        numel=numel,
        identical=identical,
        identical_bytes=identical_bytes,
        notes=notes,
    )


def describe(verification: Verification) -> str:
    """A verification as a few lines for the terminal."""
    v = verification
    lines = []
    if v.changed:
        ids = sorted({i for name in v.changed if (i := layer_of(name)) is not None})
        places = [f"layer{'s' if len(ids) > 1 else ''} {_ranges(ids)}"] if ids else []
        places += [name for name in v.changed if layer_of(name) is None]
        lines.append(f"changed: {_size(v, v.changed)} in {', '.join(places)}")
        for i in ids if not v.judged else ():
            of_layer = [name for name in v.changed if layer_of(name) == i]
            lines.append(f"  layer {i}: {_size(v, of_layer)}")
    else:
        lines.append("changed: no tensor")
    others = "all others bit-identical" if v.ok else "bit-identical"
    lines.append(f"{others}: {_count(v.identical)} ({v.identical_bytes / 1e9:.3f} GB)")
    for what, names in (
        ("changed, though frozen", v.outside),
        ("missing in the result", v.missing),
        ("in the result only", v.extra),
        ("of another shape or dtype", v.reshaped),
        ("beside the weights", v.files),
    ):
        if names:
            kind = "file" if names is v.files else "tensor"
            lines.append(f"{what}: {_count(len(names), kind)}")
            lines += [f"  {name}" for name in names[:20]]
            lines += [f"  and {len(names) - 20} more"] if len(names) > 20 else []
    lines += [f"note: {note}" for note in v.notes]
    lines.append(f"{'OK' if v.ok else 'NOT OK'}: {v.result} against {v.base}")
    return "\n".join(lines)


def _check(files: CheckpointFiles, name: str, tensor: Tensor) -> None:
    if name not in files.entries:
        raise UserError(f"{files.folder}: no tensor {name!r} to replace")
    if files.shape(name) != tuple(tensor.shape):
        raise UserError(
            f"{files.folder}: {name!r} has shape {list(files.shape(name))},"
            f" the trained one {list(tensor.shape)}"
        )
    code = plain_code(files.config, files.entries[name])
    if not torch.isfinite(tensor.detach().to(getattr(torch, CODES[code][0]))).all():
        raise UserError(f"{name!r}: the trained tensor is not finite in {code}")


def _shard(
    files: CheckpointFiles, shard: Path, changed: Mapping[str, Tensor]
) -> Iterator[bytes | memoryview]:
    """The bytes of a shard, those of the changed tensors replaced: header and layout stay."""
    at = 0
    for name, entry in files.entries.items():  # in the order of the data
        if entry.file != shard or name not in changed:
            continue
        yield from read_range(shard, at, entry.start)
        yield from tensor_bytes(changed[name].detach().to(entry.dtype))
        at = entry.end
    yield from read_range(shard, at, shard.stat().st_size)


def _companions(base: Path) -> list[Path]:
    """The base's files beside the weights that a user of the result needs."""
    found = {p for pattern in COMPANIONS for p in base.glob(pattern) if p.is_file()}
    found |= set((base / TEMPLATES).glob("*.jinja"))
    return sorted(p for p in found if p.name != RECORD and not p.name.startswith("pytorch_model"))


def _copy(file: Path) -> Iterator[bytes]:
    return read_range(file, 0, file.stat().st_size)


def _tied(files: CheckpointFiles) -> bool:
    return bool(files.config.get("tie_word_embeddings"))


def _stored(files: CheckpointFiles, name: str) -> str | None:
    """The name under which a folder stores a tensor; None if it does not."""
    if name not in files.entries and name == HEAD and _tied(files):
        name = EMBEDDING
    return name if name in files.entries else None


def _uncoded(base: CheckpointFiles, result: CheckpointFiles, name: str) -> bool:
    """Whether a matrix of codes in the base has become what `export` makes of one."""
    a, b = base.entries[name], result.entries.get(name)
    plain = b is not None and (b.code, b.shape) == (plain_code(base.config, a), a.shape)
    return a.scale is not None and plain


def _recorded(result: Path) -> set[str] | None:
    """The tensors that the result's own record says were trained; None where it has none."""
    file = result / RECORD
    if not file.is_file():
        return None
    names = read_json(file).get("tensors")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{file}: 'tensors' is not a list of tensor names")
    return set(names)


def _files(a: CheckpointFiles, b: CheckpointFiles, uncoded: Collection[str]) -> list[str]:
    """What is not as it was beside the weights, in words."""
    told = {"config.json": uncoded_config(a, uncoded)} if uncoded else {}
    weights = {entry.file.name for f in (a, b) for entry in f.entries.values()} | {INDEX}
    of_base = {str(p.relative_to(a.folder)) for p in _companions(a.folder)} - weights
    here = {p.relative_to(b.folder) for p in b.folder.rglob("*") if p.is_file()}
    found = []
    for name in sorted(of_base | {str(path) for path in here} - weights):
        if any(fnmatch(name, pattern) for pattern in MAY_DIFFER):
            continue
        if Path(name) not in here:
            found.append(f"{name}: missing")
        elif not (a.folder / name).is_file():
            found.append(f"{name}: in the result only")
        elif differ := _difference(a.folder / name, b.folder / name, told.get(name)):
            found.append(f"{name}: {differ}")
    return found


def _difference(a: Path, b: Path, became: bytes | None = None) -> str:
    """How two files differ: JSON by its values, all else by bytes; empty if they do not.

    became: what an export makes of the first.
    """
    if not became and a.stat().st_size == b.stat().st_size and _same(_copy(a), _copy(b)):
        return ""
    if a.suffix != ".json":
        return "another"
    try:
        there = json.loads(became or b"".join(_copy(a)))
        here = json.loads(b"".join(_copy(b)))
    except ValueError:
        return "another"
    if not isinstance(there, dict) or not isinstance(here, dict):
        return "" if there == here else "another"
    keys = [k for k in [*there, *(k for k in here if k not in there)] if k not in UNREAD]
    differ = [k for k in keys if there.get(k) != here.get(k)]
    return f"differs in {', '.join(differ)}" if differ else ""


def _size(v: Verification, names: list[str]) -> str:
    return f"{_count(len(names))} ({sum(v.numel[name] for name in names):,} parameters)"


def _same(a: Iterator[bytes], b: Iterator[bytes]) -> bool:
    """Equal, piece by piece: both sides are of one size and cut alike."""
    return all(x == y for x, y in zip(a, b, strict=True))


def _kind(files: CheckpointFiles, name: str) -> str:
    return f"{files.entries[name].code} {list(files.shape(name))}"


def _count(number: int, kind: str = "tensor") -> str:
    return f"{number:,} {kind}{'' if number == 1 else 's'}"


def _ranges(ids: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    runs: list[list[int]] = []
    for i in ids:
        if runs and i == runs[-1][-1] + 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
