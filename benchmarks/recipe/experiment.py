"""The recipe in miniature: which layers train, what translation gains and what is forgotten.

The demo's model (SmolLM2-135M) is fine-tuned in several ways, each from the same weights, on the
same pairs, for the same number of steps, long and hot enough that something may be forgotten. Each
run is measured at several scales of its change: loss and chrF++ of held-out translations, tasks
with checkable answers, loss of English prose.

    python -m benchmarks.recipe.experiment            (after `make demo`)
    python -m benchmarks.recipe.experiment --list     (what is done and what is not)

What matters most comes first. Each run's result is written when it is there, and the same command
goes on where it was stopped, by kill -9 too; `--first 12` does so many runs only.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from benchmarks.environment import describe_environment
from benchmarks.recipe import tasks
from benchmarks.recipe.material import Material, Size, answer_requests, prepare, translate
from benchmarks.recipe.score import score
from benchmarks.recipe.tiny import tiny_recipe
from benchmarks.recipe.training import Run, carry_out, recipe_of, variants
from xplus_fast.config import Recipe, load_recipe
from xplus_fast.errors import UserError
from xplus_fast.files import make_folder, write_json

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/recipe.json"
WORK = ROOT / "build/recipe"
BASE = "base"


@dataclass(frozen=True)
class Setup:
    """What every run shares."""

    steps: int = 64
    tokens: int = 512  # of a step
    rates: tuple[float, float] = (5e-4, 1e-4)  # hot, cool
    seeds: int = 3
    scales: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    least: float = 0.5  # of a task's questions the base answers, or it is not asked afterwards
    size: Size = field(default_factory=Size)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=WORK, help="for what is not finished")
    parser.add_argument("--first", type=int, help="so many runs; the others another time")
    parser.add_argument("--list", action="store_true", help="the runs, and which are done")
    parser.add_argument("--smoke", action="store_true", help="a tiny random model: seconds")
    options = parser.parse_args(arguments)
    logging.disable_progress_bar()
    try:
        with tempfile.TemporaryDirectory() as folder:
            demo = tiny_recipe(Path(folder)) if options.smoke else demo_recipe()
            setup = TINY if options.smoke else Setup()
            todo = runs(demo, setup)
            if options.list:
                print("\n".join(_listed(todo, options.work)))
                return 0
            experiment(demo, setup, todo[: options.first], options.work, options.out)
    except UserError as e:
        print(f"recipe: {e}", file=sys.stderr)
        return 2
    return 0


TINY = Setup(
    steps=4, tokens=256, rates=(1e-2, 1e-3), seeds=1, scales=(0.5, 1.0), least=0.0,
    size=Size(heldout=4, longest=64, items=4, prose=2, replay=4, new_tokens=4),
)  # fmt: skip


def runs(demo: Recipe, setup: Setup) -> list[Run]:
    """All runs, those first that say most."""
    hot, cool = setup.rates
    ways = list(variants(demo))
    made = [Run(way, hot, False, seed) for seed in range(setup.seeds) for way in ways]
    made += [Run(way, hot, True, 0) for way in ways]
    made += [Run(way, cool, False, 0) for way in ways]
    for seed in range(1, setup.seeds):
        made += [Run(way, hot, True, seed) for way in ways]
        made += [Run(way, cool, False, seed) for way in ways]
    return made + [Run(way, cool, True, seed) for seed in range(setup.seeds) for way in ways]


def experiment(
    demo: Recipe, setup: Setup, todo: Sequence[Run], work: Path, out: Path
) -> dict[str, Any]:
    """Carry out and measure what `work` does not hold yet; returns all, JSON-able.

    Raises `UserError` for a `work` that holds results of another setup.
    """
    make_folder(work / "results")
    settings = json.loads(json.dumps(asdict(setup) | {"layers": variants(demo)}))
    known = work / "settings.json"
    if known.exists() and json.loads(known.read_text()) != settings:
        raise UserError(f"{work}: holds results of another setup; take another --work")
    write_json(known, settings)
    tokenizer = AutoTokenizer.from_pretrained(demo.model)
    material = prepare(demo, setup.size, work, tokenizer)
    model = _Measured(demo, material, setup)
    file = work / "results" / f"{BASE}.json"
    if not file.exists() or not material.replay.exists():
        answer_requests(model.at({}), material, setup.size)
        write_json(file, model.measure({}, list(tasks.TASKS), chrf=True))
    base = json.loads(file.read_text())
    kept = [
        t for t in tasks.TASKS if base["hits"][t].count("1") >= setup.least * len(base["hits"][t])
    ]
    for run in todo:
        file = work / "results" / f"{run.name}.json"
        if not file.exists():
            _say(f"{run.name} begins")
            write_json(file, _one(run, demo, setup, material, model, kept, work))
            _say(f"{run.name} is done")
            write_result(settings, kept, runs(demo, setup), work, out)
    write_result(settings, kept, runs(demo, setup), work, out)
    return json.loads(out.read_text())


def write_result(
    settings: dict[str, Any], kept: list[str], todo: Sequence[Run], work: Path, out: Path
) -> None:
    """Put what there is into one file, a run a line."""
    found = {
        name: json.loads(file.read_text())
        for name in (BASE, *(run.name for run in todo))
        if (file := work / "results" / f"{name}.json").exists()
    }
    head = {**describe_environment(), "settings": settings, "tasks": kept, "planned": len(todo)}
    lines = [f" {json.dumps(name)}: {json.dumps(one)}" for name, one in found.items()]
    text = json.dumps(head, indent=1)[:-2] + ',\n "runs": {\n' + ",\n".join(lines) + "\n }\n}\n"
    make_folder(out.parent)
    new = out.with_name(f".{out.name}.new")
    new.write_text(text)
    new.rename(out)


class _Measured:
    """The base model, loaded once, whose weights are set to what is measured."""

    def __init__(self, demo: Recipe, material: Material, setup: Setup) -> None:
        self._material, self._setup = material, setup
        kind = torch.bfloat16 if demo.dtype == "auto" else torch.float32
        self._model = AutoModelForCausalLM.from_pretrained(demo.model, dtype=kind).eval()
        self._base = {n: p.detach().clone() for n, p in self._model.named_parameters()}

    def at(self, changed: Mapping[str, Tensor]) -> Any:
        """The model with these tensors, all others the base's."""
        with torch.no_grad():
            for name, p in self._model.named_parameters():
                p.copy_(changed[name] if name in changed else self._base[name])
        return self._model

    def measure(
        self, changed: Mapping[str, Tensor], asked: Sequence[str], *, chrf: bool
    ) -> dict[str, Any]:
        """hits: by task a string of 0 and 1. loss: by direction and of prose, summed a sequence,
        in nats, with tokens. chrf: outputs by direction."""
        model, material, start = self.at(changed), self._material, time.perf_counter()
        texts = [*material.directions, "prose"]
        found = {name: score(model, material.sequences[name]) for name in (*texts, *asked)}
        made: dict[str, Any] = {
            "hits": {t: "".join(str(int(a.hit)) for a in found[t]) for t in asked},
            "loss": {t: [round(a.loss, 3) for a in found[t]] for t in texts},
            "tokens": {t: [a.tokens for a in found[t]] for t in texts},
        }
        if chrf:
            made["outputs"] = {
                tag: translate(model, material.tokenizer, prompts, self._setup.size)
                for tag, prompts in material.prompts.items()
            }
            made["chrf"] = {
                tag: sentence_statistics(outputs, material, tag)
                for tag, outputs in made["outputs"].items()
            }
        return made | {"seconds": round(time.perf_counter() - start, 1)}


def sentence_statistics(outputs: Sequence[str], material: Material, tag: str) -> list[list[int]]:
    """What chrF++ counts in each sentence; summed over sentences, it gives the score."""
    from sacrebleu.metrics import CHRF

    references = [e.messages[-1]["content"].strip() for e in material.heldout[tag]]
    return CHRF(word_order=2)._extract_corpus_statistics(list(outputs), [references])


def _one(
    run: Run, demo: Recipe, setup: Setup, material: Material, model: _Measured,
    asked: Sequence[str], work: Path,
) -> dict[str, Any]:  # fmt: skip
    """Train a run and measure its points; each is kept until all are there."""
    folder = work / "runs" / run.name
    recipe = recipe_of(run, demo, material, setup.steps, setup.tokens, folder)
    start = time.perf_counter()
    at, losses = carry_out(recipe, run, material)
    seconds = time.perf_counter() - start
    points: dict[str, Any] = {}
    for scale in sorted(setup.scales, reverse=True):
        file = folder / f"at-{scale:g}.json"
        if not file.exists():
            write_json(file, model.measure(at(scale), asked, chrf=scale == 1))
        points[f"{scale:g}"] = found = json.loads(file.read_text())
        right = sum(h.count("1") for h in found["hits"].values())
        loss = {t: round(sum(x) / sum(found["tokens"][t]), 3) for t, x in found["loss"].items()}
        _say(f"{run.name} at {scale:g}: {right} answers right, loss {loss}")
    shutil.rmtree(folder)
    return {
        **asdict(run), "steps": len(losses), "seconds": round(seconds, 1),
        "losses": [round(x, 4) for x in losses], "points": points,
    }  # fmt: skip


def _listed(todo: Sequence[Run], work: Path) -> list[str]:
    lines = []
    for name in (BASE, *(run.name for run in todo)):
        done = (work / "results" / f"{name}.json").exists()
        begun = (work / "runs" / name).exists()
        lines.append(f"{'done' if done else 'begun' if begun else '-':6}{name}")
    return lines


def demo_recipe() -> Recipe:
    recipe = load_recipe(ROOT / "recipes/demo.yaml")
    if not Path(recipe.model).exists():
        raise UserError(f"{recipe.model}: not there; `make demo` makes it")
    return recipe


def _say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
