"""A run's folder: whose it is, what the run was begun with, and its files, whole or not there."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from xplus_fast.config import Recipe, load_recipe, stage_name
from xplus_fast.data.corpus import Corpus
from xplus_fast.errors import UserError
from xplus_fast.files import remove, settle, speaking, whole_lines, write_json, write_text
from xplus_fast.locks import is_free, working_in
from xplus_fast.manifest import MANIFEST
from xplus_fast.model.checkpoint_files import CheckpointFiles
from xplus_fast.options import dump_options, first_difference, to_dict
from xplus_fast.planning.cards import Card

# Options that may change between a run and its resumption: they do not change what is computed.
FREE = ("report_to", "save_steps", "save_total_limit")
PLACES = ("cache", "cache_hidden")  # of `data`
# Of `evaluation`, where it decides nothing; the rest of it makes figures that are compared
SHOWN = ("every", "few", "batch_size")
COMPUTED = ("frozen", "head", "bits", "master", "sums")  # of `memory`; the rest of it is placement
STEPS, FORMATS = "steps an epoch", "frozen format"
CARD = "card"  # and the memory on it that the plans count with
MARK = ".xplus-run"  # says that a folder is a run's, and what the run is made of
FILES = (
    "metrics.jsonl", "run.json", "report.md", "report.html", "loss.png", "quality.png",
    "recipe.yaml",
)  # fmt: skip


def hold(run: Path) -> Any:
    """A lock on a run's folder, for all that is done in it. Raises `UserError` if it is another's.

    The mark is written first and says nothing until the rest is there; it says nothing again
    before a run is thrown away. So at any moment the folder is ours, and either begun or free.
    """
    if not is_free(run, MARK) and not (run / MARK).is_file():
        raise UserError(f"{run}: is not empty and no run of ours; choose another output")
    return working_in(run)


def look_at(run: Path, recipe: Recipe) -> None:
    """See that a run begun in this folder is one of this recipe."""
    if _made_of(run):
        there, here = (_comparable(r) for r in (read_recipe(run), recipe))
        if difference := first_difference(there, here):
            raise UserError(
                f"{run} holds a run of another recipe ({difference});"
                " choose another output, or --restart to throw that run away"
            )


def throw_away(run: Path) -> None:
    """Remove an earlier run: what we wrote, and nothing else that may lie in its folder.

    Called again, it goes on where it was cut off.
    """
    stages = _stages(run)
    write_json(run / MARK, {})
    for name in ("evaluation", *stages, *FILES):  # the recipe last: it says what the stages are
        remove(run / name)


def _stages(run: Path) -> list[str]:
    """The folders of a run's stages."""
    try:
        recipe = load_recipe(run / "recipe.yaml")
    except UserError:  # it is gone or damaged: what a stage's folder holds tells
        return [f.parent.parent.name for f in run.glob(f"*/*/{MANIFEST}")]
    return [stage_name(recipe, i) for i in range(len(recipe.stages))]


def claim(
    run: Path, recipe: Recipe, base: Path, corpora: list[Corpus], steps: list[int],
    formats: list[dict[str, str]], card: Card | None,
) -> None:  # fmt: skip
    """Make the run's folder ours, or see that what it is made of is what it began with.

    steps, formats: of each stage, the steps of an epoch and how frozen layers are computed. card:
    what the plans are for, see `card_of`.
    """
    config = (base / "config.json").read_bytes()
    shapes = {n: [str(e.dtype), e.shape] for n, e in CheckpointFiles.open(base).entries.items()}
    made_of = {
        "model": hashlib.sha256(config + json.dumps(shapes).encode()).hexdigest(),
        "data": [Path(c.summary["folder"]).name for c in corpora],
        STEPS: steps,  # another number of processes may give another
        FORMATS: formats,  # of each stage: a plan for another card may choose another
    }
    with speaking(run / MARK):
        settle(run / MARK)  # of a restart that was killed before it threw anything away
    there, told = _made_of(run), (STEPS, FORMATS)
    if not there:
        throw_away(run)  # the rest of what a --restart that was cut off was to remove
        write_text(run / "recipe.yaml", dump_options(recipe))
        planned_for = None if card is None else {"name": card.name, "memory": card.memory}
        write_json(run / MARK, {**made_of, CARD: planned_for})
    for what in made_of if there else ():
        was = (there or {}).get(what)
        if was != made_of[what]:
            raise UserError(
                f"{run}: its {what} is no longer what the run began with"
                + (f" ({first_difference(was, made_of[what], what)})" if what in told else "")
                + "; put it back, choose another output, or --restart"
            )


def card_of(run: Path, card: Card | None) -> Card | None:
    """The card that a run goes on with: with the memory that was free on it when the run began.

    Planned for another figure, micro-batches and formats may be others. On another card, or where
    nothing was begun, it is `card`.
    """
    try:
        planned_for = json.loads((run / MARK).read_text(encoding="utf-8"))[CARD]
        if card is None or planned_for["name"] != card.name:
            return card
        return replace(card, memory=int(planned_for["memory"]))
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return card  # no run yet; or a damaged mark, of which `look_at` speaks


def _made_of(run: Path) -> dict[str, Any] | None:
    """What a run was begun with; empty if it is not begun, None if the folder is not ours."""
    try:
        made_of = json.loads((run / MARK).read_text(encoding="utf-8"))
    except OSError:
        return None
    except (ValueError, RecursionError):
        made_of = None
    if not isinstance(made_of, dict):
        if is_free(run, MARK, MARK):
            return {}  # nothing can be lost
        raise UserError(
            f"{run / MARK}: damaged; --restart throws the run away, or choose another output"
        )
    return made_of


def _comparable(recipe: Recipe) -> dict[str, Any]:
    tree = to_dict(recipe)
    for key in FREE:
        tree["training"].pop(key)
    if recipe.evaluation.patience is None and recipe.evaluation.keep == "last":
        for key in SHOWN:
            tree["evaluation"].pop(key)
    tree["memory"] = {key: tree["memory"][key] for key in COMPUTED}
    tree.pop("output")
    for key in PLACES:
        tree["data"].pop(key)
    return tree


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run, begun or finished."""
    return (folder / "run.json").is_file() or (folder / MARK).is_file()


def read_recipe(run: Path) -> Recipe:
    """The recipe of a run that is begun. Raises `UserError` where there is none."""
    if not _made_of(run):
        raise UserError(f"{run}: no run is here")
    if not (run / "recipe.yaml").is_file():
        raise UserError(f"{run}: its recipe.yaml is gone; --restart throws the run away")
    return load_recipe(run / "recipe.yaml")


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last one that a kill cut short is left out."""
    lines = []
    file = run / "metrics.jsonl"
    for number, line in enumerate(whole_lines(file), 1):
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(found, dict) or not isinstance(found.get("step"), int):
            raise UserError(f"{file}:{number}: damaged: not a step's figures; remove this line")
        lines.append(found)
    return lines


def cut_metrics(run: Path, stage: str, step: int) -> None:
    """Take out what was logged after the step that a stage goes on from."""
    kept = [m for m in read_metrics(run) if m.get("stage") != stage or m["step"] <= step]
    write_text(run / "metrics.jsonl", "".join(json.dumps(m) + "\n" for m in kept))


def last_step(run: Path, stage: str) -> int:
    return max((m["step"] for m in read_metrics(run) if m.get("stage") == stage), default=0)
