"""What a run is to do, with which model, and where: read and checked before anything is loaded."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from xplus_fast.config import Recipe, Stage
from xplus_fast.errors import UserError
from xplus_fast.files import resolve
from xplus_fast.model.checkpoint_files import CheckpointFiles, check_against, resolve_model
from xplus_fast.model.families import Shape, shape_of
from xplus_fast.model.pretrained import load_config
from xplus_fast.planning.cards import Card
from xplus_fast.planning.from_recipe import plan_recipe
from xplus_fast.planning.selection import learning_rates, resolve_layers
from xplus_fast.training.peers import watched
from xplus_fast.training.place import Place, barrier, card_here, find_place
from xplus_fast.training.planned import check_plans
from xplus_fast.training.reporting import check_report_to
from xplus_fast.training.run_folder import card_of, hold, look_at


@dataclass(frozen=True)
class Job:
    """A recipe and what it stands on."""

    recipe: Recipe
    run: Path  # the run's folder
    place: Place
    say: Callable[..., None]  # to the user, by the first process
    base: Path  # the model's folder
    files: CheckpointFiles
    config: Any  # transformers' own
    shape: Shape
    card: Card | None  # that is planned for
    selections: list[list[int]]  # of each stage, the layers that train
    rates: list[dict[str, float]]  # of each stage, as `learning_rates` has them

    @property
    def kind(self) -> dict[str, Any]:
        """In which dtype and where the model is."""
        return {"dtype": self.place.dtype, "device": self.place.device}

    @property
    def here(self) -> Recipe:
        """The recipe with the model's folder in it."""
        return replace(self.recipe, model=str(self.base))


def read_job(recipe: Recipe, restart: bool, held: ExitStack) -> Job:
    """Find the model and the place. Raises `UserError` for what does not fit together."""
    place = find_place(recipe)
    held.enter_context(watched(place))
    # flushed, so that a log file has our lines and the live line in their order
    say = partial(print, flush=True) if place.first else (lambda *_: None)
    base = resolve_model(recipe.model)
    files, config = CheckpointFiles.open(base), load_config(base)
    shape = shape_of(config)
    selections = [resolve_layers(s.layers, shape.layers) for s in recipe.stages]
    rates = [_rates(stage, shape) for stage in recipe.stages]
    check_against(files, shape.tensor_shapes())
    run, free = resolve(recipe.output), card_here(place)
    card = free if restart else card_of(run, free)
    if card is not None and free is not None and card.memory > free.memory:
        say(
            f"memory: planned for the {card.memory / 1e9:.1f} GB that were free on {card.name} when"
            f" this run began; now {free.memory / 1e9:.1f} GB are free"
        )
    return Job(recipe, run, place, say, base, files, config, shape, card, selections, rates)


def check(job: Job) -> None:
    """See that the job is possible, as far as can be known before data are read."""
    _, _, named = plan_recipe(job.here, here=job.card, processes=job.place.processes)
    check_plans([plan for _, plan in named])
    check_report_to(job.recipe.training.report_to)


def take_folder(job: Job, restart: bool, held: ExitStack) -> None:
    """Lock the run's folder, and see that what is in it is a run of this recipe."""
    if job.place.first:
        held.enter_context(hold(job.run))
    barrier(job.place)
    if not restart:
        look_at(job.run, job.recipe)


def _rates(stage: Stage, shape: Shape) -> dict[str, float]:
    """The learning rates of a stage, as `learning_rates` has them. Raises `UserError`."""
    ids = resolve_layers(stage.layers, shape.layers)
    tied = {"head": "embedding"} if shape.tied else {}  # they are one
    also, asked = {tied.get(kind, kind) for kind in stage.also}, stage.learning_rate
    if isinstance(asked, dict):
        if tied and {"head", "embedding"} <= asked.keys():
            raise UserError(
                "learning_rate: embedding and head are tied: give a rate for one of them"
            )
        asked = {tied.get(what, what): rate for what, rate in asked.items()}
    return learning_rates(asked, stage.layer_decay, ids, also, shape.layers)
