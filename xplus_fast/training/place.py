"""Where a run computes: device, dtype, and which of torchrun's processes this is."""

import os
import platform
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import PartialState

from xplus_fast.config import Recipe
from xplus_fast.errors import UserError
from xplus_fast.planning.cards import (
    CARDS,
    SAME_SIZE,
    Card,
    check_trains,
    left,
    local_card,
    match_card,
    smallest_card,
)
from xplus_fast.planning.memory import context_bytes


@dataclass(frozen=True)
class Place:
    """Where a run computes."""

    device: torch.device
    dtype: torch.dtype
    rank: int
    processes: int

    @property
    def first(self) -> bool:
        return self.rank == 0


def find_place(recipe: Recipe) -> Place:
    """Device, dtype and our place among torchrun's processes."""
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    name = recipe.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device: {name!r} is no device; auto, cpu or cuda is wanted") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device: {name!r} is not supported; auto, cpu or cuda is wanted")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError("device: cuda is asked for, and there is no usable NVIDIA GPU")
        if device.index and processes == 1:
            raise UserError(f"device: {name}: Trainer takes the first GPU; CUDA_VISIBLE_DEVICES="
                            f"{device.index} with device=cuda chooses another")  # fmt: skip
        set_allocator()
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        torch.cuda.set_device(device)
        about = torch.cuda.get_device_properties(device)
        check_trains(f"device: {about.name}", (about.major, about.minor))
    dtype = {
        "auto": torch.bfloat16 if device.type == "cuda" else torch.float32,
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
    }[recipe.dtype]
    if processes > 1:
        PartialState(cpu=device.type == "cpu")  # accelerate's, which Trainer takes up
    return Place(device, dtype, rank, processes)


def set_allocator() -> None:
    """Segments that grow, as micro-batches differ in size and fixed ones would fragment.

    Before CUDA's first use. Not over what a user has set, nor under WSL, where CUDA has none
    (pytorch/pytorch#192330).
    """
    given = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys()
    if not given and "microsoft" not in platform.release().lower():
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def barrier(place: Place) -> None:
    if place.processes > 1:
        torch.distributed.barrier()


def device_name(place: Place) -> str:
    if place.device.type == "cuda":
        return torch.cuda.get_device_name(place.device)
    return f"CPU, {torch.get_num_threads()} threads"


def share(value: Any, place: Place) -> Any:
    """The first process's, for all: what it saw of the machine may differ from what others saw."""
    if place.processes == 1:
        return value
    shared = [value]
    torch.distributed.broadcast_object_list(shared)
    return shared[0]


def card_here(place: Place) -> Card | None:
    """The GPU that a run computes on. Of one that the table does not know, the rates are those of
    the smallest that has its memory."""
    if place.device.type != "cuda":
        return None
    about = torch.cuda.get_device_properties(place.device)
    # what others left; this process's context is among what is gone, and a plan counts it
    free = torch.cuda.mem_get_info(place.device)[0] + torch.cuda.memory_reserved(place.device)
    size = left(about.total_memory, free + context_bytes((about.major, about.minor)))
    known = match_card(f"{about.name}, {about.total_memory >> 20}")
    if known is None and (seen := local_card()) is not None:
        # a slice of it has another size
        if abs(about.total_memory / CARDS[seen.name].memory - 1) < SAME_SIZE:
            known = seen
    if known is not None and known.capability == (about.major, about.minor):
        return replace(known, memory=size)
    like = smallest_card(about.total_memory, (about.major, about.minor))
    return replace(like, name=about.name, memory=size, capability=(about.major, about.minor))


def cap(device: torch.device, budget: int | None) -> None:
    """Hold the allocator to a budget of device memory, of which CUDA itself takes a part."""
    if device.type != "cuda" or budget is None:
        return
    about = torch.cuda.get_device_properties(device)
    share = (budget - context_bytes((about.major, about.minor))) / about.total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, share)), device)
