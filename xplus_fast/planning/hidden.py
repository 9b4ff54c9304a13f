"""Which stages keep what leaves their frozen layers, where, and what that takes.

What enters the lowest trained layer is the same in every epoch. A stage that goes over its data
again reads it, and so does a later stage over the same data, if nothing below that layer was
trained in between; where its own lowest trained layer is higher, it computes the layers between.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from xplus_fast.config import Recipe, Stage
from xplus_fast.errors import UserError
from xplus_fast.model.families import Shape
from xplus_fast.model.layout import united
from xplus_fast.planning.selection import resolve_layers

OFF, HOST = "off", "host"
CHECKSUM = 4  # bytes a token, beside what is kept of it
NAMES = "hidden-[0-9a-f]{32}"  # of caches in a folder


@dataclass(frozen=True)
class Rows:
    """What a stage trains on, where it has been read."""

    digest: str  # of its contents
    places: int  # for tokens: of all its sequences, each with all its tokens
    tokens: int  # of an epoch that are computed
    steps: int  # of an epoch


@dataclass(frozen=True)
class Hidden:
    """What a stage keeps or finds kept."""

    where: str  # HOST, or a folder
    level: int  # the layer that it enters
    token_bytes: int  # of the state of one token
    last: int  # the last stage that it is kept for
    name: str = ""  # among others there; empty where the data have not been read
    data: str = ""  # digest of their contents
    places: int = 0  # for tokens
    bytes: int | None = None  # in all; None where the data have not been read


@dataclass
class _Chain:
    """Stages that use the same states; the first one's lowest trained layer is their level."""

    stages: list[int]
    level: int
    sources: object


def plan_hidden(
    recipe: Recipe, shape: Shape, element: int, read: Sequence[Rows] = ()
) -> list[Hidden | None]:
    """What each stage keeps; None where it would be of no use.

    element: bytes of the run's dtype. read: of each stage, where the data have been read.

    Raises `UserError` where it is of no use to any stage, and where the disk cannot hold it.
    """
    where, stages = recipe.data.cache_hidden, recipe.stages
    none: list[Hidden | None] = [None] * len(stages)
    if where == OFF:
        return none
    if where == recipe.output:
        raise UserError(f"data.cache_hidden: {where} is the run's own folder; choose another")
    passes = [_passes(s, read[i] if read else None) for i, s in enumerate(stages)]
    chains = [c for c in _chains(recipe, shape, passes) if _useful(c, passes)]
    if not chains:
        lowest = ", ".join(str(_lowest(s, shape)) for s in stages)
        raise UserError(
            f"data.cache_hidden: would do nothing: no stage goes over its data more than once, or"
            f" over those of one before it, with frozen layers below all that train (lowest"
            f" trained: {lowest}); leave it off"
        )
    planned, needed = none, dict[str, int]()
    for chain in chains:
        of = read[chain.stages[0]] if read else None
        token_bytes = shape.hidden * element
        name, data, places, size = "", "", 0, None
        if of is not None:
            about = [of.digest, recipe.model, chain.level, token_bytes]
            name = f"hidden-{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]}"
            share = min(1.0, max(passes[i] or math.inf for i in chain.stages))
            data, places = of.digest, of.places
            size = math.ceil(of.tokens * share) * (token_bytes + CHECKSUM)
            needed[name] = max(size, needed.get(name, 0))  # of two, the second takes the place
        for i in chain.stages:
            planned[i] = Hidden(
                where, chain.level, token_bytes, chain.stages[-1], name, data, places, size
            )
    if read and where != HOST:
        _check_disk(Path(where), needed)
    return planned


def _lowest(stage: Stage, shape: Shape) -> int:
    """The lowest layer whose input needs a gradient, or that trains."""
    trains_embedding = "embedding" in united(tuple(stage.also), tied=shape.tied)
    return 0 if trains_embedding else min(resolve_layers(stage.layers, shape.layers))


def _passes(stage: Stage, rows: Rows | None) -> float | None:
    """How often a stage goes over its data; None: it says steps, and the data are not read."""
    if stage.steps is None:
        return stage.epochs or 1.0
    return None if rows is None else stage.steps / rows.steps


def _chains(recipe: Recipe, shape: Shape, passes: list[float | None]) -> list[_Chain]:
    chains: list[_Chain] = []
    lowest = [_lowest(stage, shape) for stage in recipe.stages]
    for i, stage in enumerate(recipe.stages):
        sources = recipe.data.sources if stage.sources is None else stage.sources
        for chain in reversed(chains):
            between = (passes[i] or 1) * (lowest[i] - chain.level)  # layers computed in vain
            same = sources == chain.sources and chain.level <= min(lowest[chain.stages[0] : i + 1])
            if same and between <= lowest[i]:  # else its own level is cheaper
                chain.stages.append(i)
                break
        else:
            if lowest[i]:
                chains.append(_Chain([i], lowest[i], sources))
    return chains


def _useful(chain: _Chain, passes: list[float | None]) -> bool:
    return len(chain.stages) > 1 or any((passes[i] or math.inf) > 1 for i in chain.stages)


def on_host(planned: Sequence[Hidden | None], stage: int, limit: int | None) -> int:
    """Bytes that lie on the host during a stage, whether or not that stage uses them.

    Raises `UserError` where they are more than `limit`.
    """
    there = [h for h in planned[: stage + 1] if h and h.where == HOST and h.last >= stage]
    size = sum({h.name: h.bytes or 0 for h in there}.values())
    if limit is not None and size > limit:
        raise UserError(
            f"data.cache_hidden: hidden states of {_size(size)} on the host, which has"
            f" {_size(limit)} to give (memory.host); a folder may hold them"
        )
    return size


def _check_disk(folder: Path, needed: dict[str, int]) -> None:
    """See that the disk holds what is missing yet."""
    size = sum(needed.values())
    missing = sum(max(0, n - disk_bytes(folder / name)) for name, n in needed.items())
    try:
        home = next(p for p in (folder, *folder.parents) if p.is_dir())
        free = shutil.disk_usage(home).free
    except OSError as e:
        raise UserError(
            f"data.cache_hidden: {folder}: cannot be used ({e.strerror or e})"
        ) from None
    if missing > free:
        raise UserError(
            f"data.cache_hidden: {folder}: {_size(size)} of hidden states are to be kept,"
            f" {_size(missing)} of them are not there yet, and the disk has {_size(free)} free"
        )


def disk_bytes(folder: Path) -> int:
    """What the files of a folder take of the disk; 0 where it is not there."""
    try:
        return sum(file.stat().st_blocks * 512 for file in folder.iterdir())
    except OSError:
        return 0


def describe_hidden(hidden: Hidden) -> str:
    """What is kept, where, in words."""
    where = "host memory" if hidden.where == HOST else hidden.where
    size = "" if hidden.bytes is None else f"{_size(hidden.bytes)} "
    return f"hidden states: {hidden.token_bytes / 1024:.1f} KiB a token, {size}in {where}"


def _size(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
