"""A recipe and a model's config.json -> a plan for each stage, without loading torch."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from xplus_fast.config import Recipe, stage_name
from xplus_fast.errors import UserError
from xplus_fast.files import resolve
from xplus_fast.model.checkpoint_files import CheckpointFiles, check_against, has_weights
from xplus_fast.model.families import Shape
from xplus_fast.model.hub import config_from_hub
from xplus_fast.model.pretrained import config_shape
from xplus_fast.options import parse_bytes
from xplus_fast.planning.cards import Card, check_trains, find_card, local_card, smallest_card
from xplus_fast.planning.flops import Work, assumed_work
from xplus_fast.planning.hidden import Rows, on_host, plan_hidden
from xplus_fast.planning.plan import plan_stage
from xplus_fast.planning.search import Plan
from xplus_fast.planning.selection import Rotation, resolve_layers

USABLE = 0.97  # of a card's memory: the driver and the screen have the rest
HOST_SHARE = 0.8  # of what the machine has free
ELSEWHERE_HOST = 128 * 10**9  # assumed to be free on a machine that is not this one


@dataclass(frozen=True)
class Where:
    """What the plans are for."""

    card: Card | None
    budget: int | None
    host: int | None
    assumed: str = ""  # what was not said and not found, in words


def plan_recipe(
    recipe: Recipe, *, budget: str = "", card: str = "", host: str = "", here: Card | None = None,
    works: Sequence[Work] = (), read: Sequence[Rows] = (), processes: int = 1,
) -> tuple[Shape, Where, list[tuple[str, Plan]]]:  # fmt: skip
    """Each stage's name and plan; what is given here goes before the recipe's `memory`.

    here: the card of this machine, where the caller knows it better than nvidia-smi tells.
    works: of each stage's data, where they have been read; else assumed. read: of the same.
    processes: that train together, each on a GPU of its own.

    Raises `UserError` for a model, card or size that is not known, and where nothing fits.
    """
    if processes < 1:
        raise UserError(f"processes: {processes}; 1 or more are wanted")
    shape = read_shape(recipe.model)
    memory = recipe.memory
    if card:
        memory = replace(memory, card=card)
    where = find_where(recipe, memory.card, budget or memory.budget, host or memory.host, here,
                       processes)  # fmt: skip
    element = {"float32": 4, "bfloat16": 2}.get(recipe.dtype, 2 if where.card else 4)
    kept = plan_hidden(recipe, shape, element, read)
    plans = []
    for i, stage in enumerate(recipe.stages):
        ids = resolve_layers(stage.layers, shape.layers)
        try:
            room = where.host
            if taken := on_host(kept, i, free_memory() if room is None else room):
                room = room and room - taken
            plan = plan_stage(
                shape, ids, stage.also, memory, card=where.card, dtype_bytes=element,
                pack_tokens=recipe.data.pack_tokens,
                tokens_per_step=recipe.training.tokens_per_step,
                budget=where.budget, host=room, hidden=kept[i],
                rotation=stage.layers if isinstance(stage.layers, Rotation) else None,
                work=works[i] if works else assumed_work(recipe.data.shared_prompts),
                processes=processes, hooked=_watched(recipe),
            )  # fmt: skip
        except UserError as e:
            raise UserError(f"{stage_name(recipe, i)}: {e}") from None
        plans.append((stage_name(recipe, i), plan))
    return shape, where, plans


def _watched(recipe: Recipe) -> bool:
    """Whether wandb will hook itself to the gradients, as transformers can be told."""
    asked = os.environ.get("WANDB_WATCH", "false") in ("gradients", "all")
    return asked and "wandb" in recipe.training.report_to


def find_where(
    recipe: Recipe, card_name: str, budget: str, host: str, here: Card | None = None,
    processes: int = 1,
) -> Where:  # fmt: skip
    """The card, its budget and the host's, from what was said and what is here.

    Raises `UserError`, also for a card on which nothing trains.
    """
    here = here or (None if recipe.device == "cpu" else local_card())
    card = find_card(card_name) if card_name else here
    limit = None if budget == "auto" else parse_bytes(budget, "budget")
    assumed = []
    if card is None and limit is not None:
        card = smallest_card(limit)
        assumed.append(f"no card named and none found: {card.name} is assumed (--card)")
    if card is not None:
        check_trains(f"card: {card.name}", card.capability)
        most = int(card.memory * USABLE)
        if limit is not None and limit > card.memory:
            raise UserError(
                f"budget: {limit / 1e9:.1f} GB are more than there are on {card.name},"
                f" {card.memory / 1e9:.1f} GB"
            )
        limit = most if limit is None else limit
    if host != "auto":
        pinned: int | None = parse_bytes(host, "host memory")
    elif card is None:
        pinned = None
    elif here is not None and card.name == here.name:
        pinned = free_memory()
        together = int(os.environ.get("LOCAL_WORLD_SIZE", processes))  # torchrun's, on this machine
        pinned = pinned and pinned // min(together, processes)  # each pins for itself
    else:
        pinned = int(ELSEWHERE_HOST * HOST_SHARE) // processes
        assumed.append(
            f"{ELSEWHERE_HOST / 1e9:.0f} GB of host memory are assumed, {HOST_SHARE:.0%} of them to"
            f" be pinned{' by all processes' if processes > 1 else ''} (--host-memory)"
        )
    return Where(card, limit, pinned, "; ".join(assumed))


def free_memory() -> int | None:
    """What may be pinned here; None where the system does not say."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    found = re.search(r"MemAvailable:\s+(\d+) kB", text)
    if not found:
        return None
    free = int(found[1]) * 1024
    return int(min(free, container_memory() or free) * HOST_SHARE)


def container_memory(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that this container may still take (cgroup v2); None where it has no limit.

    Pages of files that could be dropped count as free, as the kernel counts them.
    """
    try:
        most, now = ((root / f"memory.{n}").read_text().strip() for n in ("max", "current"))
        idle = re.search(r"^inactive_file (\d+)$", (root / "memory.stat").read_text(), re.M)
    except OSError:
        return None
    if not most.isdigit():
        return None
    return max(0, int(most) - int(now) + (int(idle[1]) if idle else 0))


def read_shape(model: str) -> Shape:
    """The sizes in a model's config.json: of a folder, or of a hub id, from which only it is had.

    transformers would take two seconds to say the same. The weights of a folder that has them are
    those of the sizes, in a format that is read. Raises `UserError`.
    """
    folder = resolve(model)
    shape = config_shape(folder / "config.json" if folder.is_dir() else config_from_hub(model))
    if folder.is_dir() and has_weights(folder):
        check_against(CheckpointFiles.open(folder), shape.tensor_shapes())
    return shape
