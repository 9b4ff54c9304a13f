"""A recipe, carried out: stages one after another, each resumable, then the report.

The run's folder holds everything: `recipe.yaml`, `metrics.jsonl` (one line an optimizer step),
`evaluation/*.json`, and per stage a folder of checkpoints whose last is `final`. Starting the same
recipe again goes on where the run was cut off.
"""

import platform
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import transformers

import xplus_kernels as ops
from xplus_fast import __version__
from xplus_fast.config import Recipe, resolved, stage_name
from xplus_fast.errors import UserError
from xplus_fast.files import write_json
from xplus_fast.measuring.heldout import measure
from xplus_fast.model.checkpoint_files import read_header
from xplus_fast.model.families import stage_shapes
from xplus_fast.model.load import Weights, arrange, load_model
from xplus_fast.model.prepare import forget_changes, load_tensors
from xplus_fast.planning.flops import total_parameters, trained_parameters
from xplus_fast.planning.from_recipe import plan_recipe
from xplus_fast.planning.plan import to_dict as plan_dict
from xplus_fast.planning.plan_text import describe as describe_plans
from xplus_fast.planning.search import Plan
from xplus_fast.training.checkpoints import FINAL, FINAL_TENSORS, Final
from xplus_fast.training.hidden_cache import HiddenCaches, read_rows
from xplus_fast.training.job import Job, check, read_job, take_folder
from xplus_fast.training.place import barrier, cap, device_name, share
from xplus_fast.training.planned import frozen_formats
from xplus_fast.training.report import write_report
from xplus_fast.training.run_folder import claim, last_step, read_metrics, throw_away
from xplus_fast.training.shortage import ran_out
from xplus_fast.training.stage import train_stage
from xplus_fast.training.stage_data import StageData, load_data


def train(recipe: Recipe, *, restart: bool = False, dry_run: bool = False) -> str:
    """Carry out a recipe; returns what is to be said at the end.

    Args:
        recipe: what to do.
        restart: throw away what the output folder holds of an earlier run.
        dry_run: stop after showing selection, data and the first example.

    Raises:
        UserError: whatever the user can put right; what was computed so far is kept.
    """
    try:
        with ExitStack() as held:
            return _train(resolved(recipe), restart, dry_run, held)
    except RuntimeError as e:
        if not ran_out(e):
            raise
        said = " ".join(str(e).split(". ")[0].split())
        raise UserError(
            f"{said}; what was trained so far is kept: plan for less memory with"
            " memory.budget and start the same command again"
        ) from None


def _train(recipe: Recipe, restart: bool, dry_run: bool, held: ExitStack) -> str:
    job = read_job(recipe, restart, held)
    check(job)
    if not dry_run:
        take_folder(job, restart, held)
    data = load_data(job)
    plans = _plan(job, data, whole=dry_run)
    if dry_run:
        job.say(plans.in_words)
        return "dry run: nothing was trained"
    hidden = _begin(job, data, plans, restart, held)
    model, weights = _load(job, plans)
    stages = _train_stages(job, data, plans, hidden, model, weights)
    return _report(job, stages) if job.place.first else ""


@dataclass(frozen=True)
class _Plans:
    of_stages: list[Plan]
    budget: int | None  # of the device
    in_words: str


def _plan(job: Job, data: StageData, whole: bool) -> _Plans:
    """Plan each stage by its data. whole: in words, all of it even where there is no GPU."""
    read = [read_rows(*x, job.place) for x in zip(data.corpora, data.works, strict=True)]
    _, where, named = plan_recipe(
        job.here, here=job.card, works=data.works, read=read, processes=job.place.processes
    )
    plans = [plan for _, plan in share(named, job.place)]
    whole = whole or where.card is not None
    said = describe_plans(job.recipe.model, job.shape, where, named, whole=whole, known=True)
    return _Plans(plans, where.budget, said)


def _begin(
    job: Job, data: StageData, plans: _Plans, restart: bool, held: ExitStack
) -> HiddenCaches:
    """Make the folder this run's, or see that it is; from here on it can be gone on with."""
    hidden = HiddenCaches(job.place, job.say)
    if job.place.first:
        held.enter_context(hidden.hold(job.recipe.data.cache_hidden))
        if restart:
            throw_away(job.run)
        steps = [len(c.train) // job.place.processes for c in data.corpora]
        formats = [frozen_formats(plan) for plan in plans.of_stages]
        claim(job.run, job.recipe, job.base, data.corpora, steps, formats, job.card)
    job.say(plans.in_words)  # behind whatever may be wrong with the data
    barrier(job.place)
    return hidden


def _load(job: Job, plans: _Plans) -> tuple[Any, Weights]:
    """The model as the first stage wants it, and where its tensors are read from."""
    cap(job.place.device, plans.budget)
    weights = Weights(job.files)
    if job.place.device.type == "cuda":
        q = torch.empty(1, job.shape.heads, job.shape.head_dim, **job.kind)
        short = "our own where sequences are short, else " if ops.takes_short(q) else ""
        job.say(f"attention: {short}{ops.attention_backend(q)}")
        job.say(f"loading {job.recipe.model} ...")
    return load_model(weights, job.config, plans.of_stages[0].layout, **job.kind), weights


def _train_stages(
    job: Job, data: StageData, plans: _Plans, hidden: HiddenCaches, model: Any, weights: Weights
) -> list[dict[str, Any]]:
    """Train one after another what is not trained yet, measure between; what each was."""
    evaluate = _evaluation(job, data, model)
    evaluate("before")
    stages = []
    for i, plan in enumerate(plans.of_stages):
        name, stage, ids = stage_name(job.recipe, i), job.recipe.stages[i], job.selections[i]
        shapes = stage_shapes(job.shape, ids, stage.also)
        arrange(model, plan.layout, weights, **job.kind)
        done, memory = job.run / name / FINAL, {}
        if done.exists():
            load_tensors(model, Final(done, name, shapes))
            job.say(f"stage {name}: trained before, taken from {done}")
        else:
            kept = hidden.of_stage(i, plan.request.hidden, model)
            memory = train_stage(job, i, model, data, plan, kept)
        weights.cover(read_header(done / FINAL_TENSORS))
        forget_changes(model)
        stages.append(
            {
                "name": name,
                "layers": ids,
                "also": list(stage.also),
                "trained_parameters": trained_parameters(job.shape, ids, stage.also),
                "total_parameters": total_parameters(job.shape),
                "steps": last_step(job.run, name),
                "tensors": sorted(shapes),
                "data": data.corpora[i].summary,
                "plan": plan_dict(plan),
                "memory": memory,
            }
        )
        evaluate(f"after-{name}")
    return stages


def _evaluation(job: Job, data: StageData, model: Any) -> Callable[[str], None]:
    """What measures the model at a point of the run, unless that was done before."""

    def evaluate(point: str) -> None:
        file = job.run / "evaluation" / f"{point}.json"
        if job.place.first and not file.exists() and (data.heldout or data.texts):
            job.say(f"measuring {point.replace('-', ' ', 1)} ...")
            found = measure(
                model, data.tokenizer, data.heldout, data.texts,
                data=job.recipe.data, config=job.recipe.evaluation, show=True,
            )  # fmt: skip
            write_json(file, found)

    return evaluate


def _report(job: Job, stages: list[dict[str, Any]]) -> str:
    about = {
        "stages": stages,
        "device": device_name(job.place),
        "dtype": str(job.place.dtype).removeprefix("torch."),
        "versions": {
            "xplus-fast": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "seconds": sum(line["seconds"] for line in read_metrics(job.run)),
    }
    write_json(job.run / "run.json", about)
    return write_report(job.run)
