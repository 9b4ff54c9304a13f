"""What an evaluation needs, looked at before a model is loaded, downloaded or asked.

What takes no time comes first; what a library must be imported for, or the hub be asked, comes only
where nothing else is missing. Models themselves are looked at by `evaluate`.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from xplus_fast.errors import UserError
from xplus_fast.evaluation import livecodebench, reasoning, translation
from xplus_fast.evaluation.generate import check_device, pick_engine
from xplus_fast.evaluation.recipe import EvaluateRecipe, TranslationConfig
from xplus_fast.evaluation.sets import Lines, read_sets
from xplus_fast.evaluation.verdict import parse_condition
from xplus_fast.files import resolve
from xplus_fast.foreign import check_import, check_packages
from xplus_fast.model.hub import config_from_hub, on_hub

COMET_FILE = "checkpoints/model.ckpt"  # of a repository of unbabel-comet
METRICX_NEEDS = ("torch", "transformers", "sentencepiece", "protobuf")


def check(recipe: EvaluateRecipe, condition: str = "", scales: Sequence[str] = ()) -> list[Lines]:
    """Look at all that a recipe names; returns its test sets.

    condition: of `--fail-if`, in which a change may be at one of the `scales`: reasoning@0.5. What
    a metric or a task lacks is printed and left for later where the recipe says `on_missing: skip`.
    Raises `UserError`, a line for everything that is wrong.
    """
    wrong: list[str] = []
    lacking: dict[str, str] = {}  # metric or task -> what it lacks
    skip = recipe.on_missing == "skip"

    def look(do: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return do(*arguments)
        except UserError as e:
            wrong.append(str(e))

    def look_for(name: str, do: Callable[..., Any], *arguments: Any) -> None:
        if name not in lacking:
            try:
                do(*arguments)
            except UserError as e:
                lacking[name] = str(e)

    lines = look(read_sets, recipe.translation.sets) or []
    look(pick_engine, recipe.engine)
    look(check_device, recipe.device)
    if condition:
        look(_check_condition, condition, recipe, lines, scales)
    metrics, tasks = recipe.translation.metrics if lines else [], recipe.reasoning.tasks
    if "terms" in metrics:
        look(_check_terms, lines)
    for name in metrics:
        look_for(name, _check_metric, name, lines, recipe.translation)
    for task in tasks:
        if task == livecodebench.NAME:
            look_for(task, _about, task, livecodebench.check, recipe)
        else:
            look_for(task, reasoning.check_setup, recipe)
    if not wrong and (skip or not lacking):
        for name in metrics:
            look_for(name, _check_model, name, recipe.translation)
        for task in tasks:
            look_for(task, _about, task, reasoning.check_task, task, recipe)
    told = [*dict.fromkeys(lacking.values())]  # all tasks may lack the same
    if wrong or told and not (skip and any(name not in lacking for name in (*metrics, *tasks))):
        if told and not skip:
            told[-1] += " (on_missing=skip: what lacks something is left out)"
        raise UserError(*wrong, *told)
    for line in told:
        print(f"left out: {line}", file=sys.stderr)
    return lines


def _check_condition(
    condition: str, recipe: EvaluateRecipe, lines: Sequence[Lines], scales: Sequence[str]
) -> None:
    asked, _, _ = parse_condition(condition)
    name, at, scale = asked.partition("@") if scales else (asked, "", "")
    if at and scale not in scales:
        raise UserError(f"--fail-if: {scale!r} is none of the scales {', '.join(scales)}")
    both = lines and "chrf" in recipe.translation.metrics and recipe.reasoning.tasks
    if scales and not at and not both:
        raise UserError(
            f"--fail-if: without a scale it asks about the point to choose, which needs chrf and"
            f" reasoning.tasks; to ask about one point: '{name}@{scales[-1]} ...'"
        )
    config, tasks = recipe.translation, recipe.reasoning.tasks
    known = ["translation"] if lines and "chrf" in config.metrics else []
    known += ["reasoning"] if tasks else []
    for each in lines:
        of_set = (m for m in config.metrics if m != "terms" or each.terms is not None)
        known += [f"{each.name}:{metric}" for metric in of_set]
    if name in known or any(name.startswith(f"{task}:") for task in tasks):
        return
    known += [f"{task}:METRIC" for task in tasks]
    raise UserError(
        f"--fail-if: no change of '{name}' will be measured; there will be {', '.join(known)}"
    )


def _check_metric(name: str, lines: Sequence[Lines], config: TranslationConfig) -> None:
    """What can be seen at once."""
    if name == "xcomet":
        check_packages(config.comet_python, ["unbabel-comet"], option="translation.comet_python")
    elif name == "metricx":
        check_packages(config.metricx_python, METRICX_NEEDS, option="translation.metricx_python")
    elif name != "terms":
        check_one = translation.check_identifier if name == "off_target" else _make
        for target in dict.fromkeys(each.languages[1] for each in lines):
            check_one(name, target, config)


def _make(name: str, target: str, config: TranslationConfig) -> None:
    translation.make_metric(name, target, config)


def _check_terms(lines: Sequence[Lines]) -> None:
    having = [each for each in lines if each.terms is not None]
    if not having:
        raise UserError("translation.metrics: terms: no set names a file of them (terms: FILE.tsv)")
    for each in having:
        if not translation.kept_terms(each, each.references)[:, 1].any():
            raise UserError(
                f"translation.metrics: terms: no source of {each.name} has any of its"
                f" {len(each.terms or {})} terms"
            )


def _check_model(name: str, config: TranslationConfig) -> None:
    """What takes seconds, or the network."""
    if name == "xcomet":
        _check_comet(config.comet_model)
        check_import(config.comet_python, "comet", option="translation.comet_python")
    elif name == "metricx":
        for option in ("metricx_model", "metricx_tokenizer"):
            given = getattr(config, option)
            if not (resolve(given) / "config.json").is_file():
                _about(f"translation.{option}", config_from_hub, given)


def _check_comet(model: str) -> None:
    at = "translation.comet_model"
    if not model.endswith(".ckpt"):
        if "/" in model:  # else one of unbabel-comet's own, older names
            _about(at, on_hub, model, COMET_FILE)
        return
    file = resolve(model)
    beside = file.parent.parent / "hparams.yaml"  # where unbabel-comet looks for it
    for path in (file, beside):
        if not path.is_file():
            raise UserError(f"{at}: {path}: no such file")


def _about(what: str, ask: Callable[..., object], *arguments: Any) -> None:
    try:
        ask(*arguments)
    except UserError as e:
        raise UserError(f"{what}: {e}") from None
