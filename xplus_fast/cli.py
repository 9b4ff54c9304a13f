"""`xplus-fast`: from `init`, which writes a first recipe, to `compare`; `--help` lists all."""

import argparse
import importlib
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from xplus_fast import __version__
from xplus_fast.errors import UserError
from xplus_fast.files import resolve
from xplus_fast.locks import working_in
from xplus_fast.options import PATH, check_text
from xplus_fast.signals import Stopped, listen
from xplus_fast.starter import RECIPES, init
from xplus_fast.terminal import StandardStreams, one_line
from xplus_fast.threads import sleep_where_busy

RESUMABLE = ("prepare", "train", "evaluate")
MOST_LAYERS = 1 << 16  # of a base; more than any has
PATHS = ("model", "base", "data")  # of arguments that are text
BENCHMARKS = {"kernels": "kernels.measure", "train": "training.race",
              "profile": "training.profile", "fit": "memory.fit"}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 verification failed, 2 bad input or output
    that cannot be written, 128 + a signal that ended it."""
    streams = StandardStreams()
    try:
        with streams:
            code = _run(arguments)
    except SystemExit:  # argparse's
        if not streams.lost:
            raise
        code = 2
    return code or (2 if streams.lost else 0)


def _run(arguments: Sequence[str] | None) -> int:
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if any(r.startswith("-") or "=" not in r for r in rest) or (
        rest and not hasattr(options, "overrides")
    ):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # argparse takes key=value only before the first option
        options.overrides += rest
    try:
        for name, value in vars(options).items():
            for each in value if isinstance(value, list) else [value]:
                if isinstance(each, str | Path):
                    plain = name in PATHS and "=" not in str(each)  # DATA may be key=value
                    check_text(str(each), name, PATH if plain or isinstance(each, Path) else "")
        sleep_where_busy()
        with listen():
            return options.run(options)
    except UserError as e:
        for line in e.args:
            print(f"xplus-fast: {one_line(str(line))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as e:
        signum, said = (e.signum, e.said) if isinstance(e, Stopped) else (signal.SIGINT, "")
        more = "; start the same command again to go on" if options.command in RESUMABLE else ""
        print(f"\nxplus-fast: stopped{said and ' ' + said}{more}", file=sys.stderr)
        return 128 + signum


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="xplus-fast",
        description="Fine-tune selected layers of Qwen3, Qwen2 and Llama models at full rank.",
    )
    parser.add_argument("--version", action="version", version=f"xplus-fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[..., int], says: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=says, description=f"{says[0].upper()}{says[1:]}.")
        made.set_defaults(run=run)
        return made

    def takes_recipe(made: argparse.ArgumentParser, shown: str, override: str) -> None:
        made.add_argument("recipe", type=Path, help=f"YAML file, see {shown}")
        made.add_argument(
            "overrides", nargs="*", metavar="key=value",
            help=f"change an option of the recipe, e.g. {override}",
        )  # fmt: skip

    start = command("init", _init, "write a commented recipe into this folder")
    start.add_argument(
        "which", nargs="?", choices=RECIPES, default="8b", help="for which model (default: 8b)"
    )

    prepare = command("prepare", _prepare, "make a clean training set from raw parallel corpora")
    takes_recipe(prepare, "recipes/prepare-small.yaml", "engine=ray")
    prepare.add_argument("--restart", action="store_true", help="delete an earlier result first")
    prepare.add_argument(
        "--explain", nargs=2, metavar=("SOURCE", "TARGET"),
        help="show what each step does with this pair, then stop",
    )  # fmt: skip
    prepare.add_argument("--languages", metavar="A-B", help="of that pair (default: detected)")

    plan = command("plan", _plan, "say what fits where, and how fast, before anything is loaded")
    takes_recipe(plan, "recipes/", "memory.frozen=bf16")
    plan.add_argument("--budget", default="", help="GPU memory to use: 24GB (10^9 bytes), 24GiB")
    plan.add_argument(
        "--card",
        default="",
        help="the GPU to plan for, e.g. rtx4090, l4, or as nvidia-smi names it",
    )
    plan.add_argument(
        "--host-memory", default="", help="host memory that each process may pin, e.g. 64GB"
    )
    plan.add_argument(
        "--processes", type=int, default=1, help="how many train together, each on its own GPU"
    )
    plan.add_argument("--json", action="store_true", help="print JSON")

    train = command("train", _train, "train as a recipe says, or go on with its run")
    takes_recipe(train, "recipes/", "stages.0.learning_rate=2e-5")
    train.add_argument("--restart", action="store_true", help="delete an earlier run first")
    train.add_argument(
        "--dry-run", action="store_true", help="show layers, data and first example, then stop"
    )

    export = command("export", _export, "write a finished run as a Hugging Face model folder")
    export.add_argument("run_folder", type=Path, metavar="RUN", help="the run's output folder")
    export.add_argument("out", type=Path, metavar="OUT", help="the folder to make")
    export.add_argument(
        "--scale", default="", metavar="S",
        help="take a part of the change: 0.7, or stage-1=1,stage-2=0.5, or 21-28=0.5 (layers)",
    )  # fmt: skip

    verify = command(
        "verify", _verify, "prove which tensors changed and that every other is bit-identical"
    )
    verify.add_argument("base", metavar="BASE", help="the base model: a folder or hub id")
    verify.add_argument("result", type=Path, metavar="OUT", help="the exported folder")
    verify.add_argument("--layers", help="layers that may have changed, if the folder names none")
    verify.add_argument(
        "--also", default="", help="with --layers: embedding,final_norm,head may have changed, too"
    )

    sensitivity = command(
        "sensitivity", _sensitivity,
        "measure which layers your data pull at, and propose selections for a budget",
    )  # fmt: skip
    sensitivity.add_argument("model", metavar="MODEL", help="a folder or hub id")
    sensitivity.add_argument(
        "data", nargs="+", metavar="DATA",
        help="a recipe (.yaml) with key=value, a file or folder, or two line-aligned files",
    )  # fmt: skip
    sensitivity.add_argument("--budget", help="parameters to train, such as 3B or 250M")
    sensitivity.add_argument("--batches", type=int, default=200, help="packed rows (default: 200)")
    sensitivity.add_argument(
        "--out", type=Path, default=Path("sensitivity"), metavar="DIR",
        help="folder for sensitivity.json and .png (default: sensitivity)",
    )  # fmt: skip
    sensitivity.add_argument("--json", action="store_true", help="print JSON")
    sensitivity.set_defaults(overrides=[])

    evaluate = command(
        "evaluate", _evaluate, "compare a model with its base: translation gained, reasoning kept"
    )
    evaluate.add_argument("model", metavar="RUN_OR_MODEL", help="a finished run, or a model folder")
    takes_recipe(evaluate, "recipes/evaluate-xplus.yaml", "batch_size=32")
    evaluate.add_argument("--base", default="", help="to compare with: a folder or hub id")
    evaluate.add_argument(
        "--scales", action="append", default=[], metavar="S,S,...",
        help="evaluate these parts of the change: 0,0.5,1; repeat it for stages: stage-2=0,1",
    )  # fmt: skip
    evaluate.add_argument(
        "--fail-if", default="", metavar="CONDITION",
        help="exit code 1 if this holds, e.g. 'reasoning < -2'",
    )  # fmt: skip
    evaluate.add_argument("--json", action="store_true", help="print JSON")

    compare = command("compare", _compare, "compare runs that were evaluated at several scales")
    compare.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="folder of a run or of its evaluation"
    )
    compare.add_argument(
        "--out", type=Path, default=Path("comparison"), metavar="DIR",
        help="folder for comparison.md, .json, .csv and .png (default: comparison)",
    )  # fmt: skip
    compare.add_argument("--json", action="store_true", help="print JSON")

    bench = command(
        "bench", _bench, "time kernels and training steps (in a checkout of the source)"
    )
    bench.add_argument("what", choices=BENCHMARKS, help="what to time")
    bench.add_argument(
        "arguments", nargs=argparse.REMAINDER, help="see: xplus-fast bench train --help"
    )
    return parser


def _init(options: argparse.Namespace) -> int:
    print(init(options.which))
    return 0


def _prepare(options: argparse.Namespace) -> int:
    from xplus_fast.data.preparation.recipe import load_prepare_recipe

    recipe = load_prepare_recipe(options.recipe, options.overrides)
    if options.languages and not options.explain:
        raise UserError("--languages: goes with --explain; `languages:` of a corpus has its own")
    if options.explain:
        from xplus_fast.data.preparation.explain import explain_pair

        source, target = options.explain
        print(explain_pair(recipe, source, target, options.languages))
        return 0
    from xplus_fast.data.preparation.run import prepare

    print(prepare(recipe, restart=options.restart))
    return 0


def _plan(options: argparse.Namespace) -> int:
    from xplus_fast.config import load_recipe
    from xplus_fast.planning.plan_text import plan_text

    recipe = load_recipe(options.recipe, options.overrides)
    said = plan_text(
        recipe, budget=options.budget, card=options.card, host=options.host_memory,
        processes=options.processes, as_json=options.json,
    )  # fmt: skip
    print(said)
    return 0


def _train(options: argparse.Namespace) -> int:
    # torch and transformers load where a command needs them: --help answers at once
    from xplus_fast.config import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    _quiet()
    from xplus_fast.training.run import train

    said = train(recipe, restart=options.restart, dry_run=options.dry_run)
    if said:
        print(said)
    return 0


def _export(options: argparse.Namespace) -> int:
    _quiet()
    from xplus_fast.model.checkpoint_files import DTYPE_CODES, CheckpointFiles
    from xplus_fast.model.quantized import plain_code
    from xplus_fast.training.changes import Changes
    from xplus_fast.training.export import export

    changes = Changes(resolve(options.run_folder))
    if options.scale:
        changes = changes.at(options.scale)
    base = changes.base
    export(base, changes, resolve(options.out), changes.record)
    scaled = f", {options.scale} of what was changed" if "scale" in changes.record else ""
    print(
        f"{options.out}: {len(changes)} tensors from {options.run_folder}{scaled},"
        f" the rest from {base}"
    )
    files = CheckpointFiles.open(base)
    entries = [files.entries[name] for name in changes]
    stored = {plain_code(files.config, entry) for entry in entries}
    for code in sorted(stored - {DTYPE_CODES[str(dtype)] for dtype in changes.dtypes}):
        print(f"the trained tensors are rounded to {code}, in which the base stores them")
    if codes := sum(entry.scale is not None for entry in entries):
        print(f"{codes} of them are FP8 in the base, and {', '.join(sorted(stored))} in the result")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from xplus_fast.evaluation.recipe import load_evaluate_recipe

    recipe = load_evaluate_recipe(options.recipe, options.overrides)
    _quiet()
    from xplus_fast.evaluation import verdict
    from xplus_fast.evaluation.evaluate import evaluate, model_folder
    from xplus_fast.evaluation.ready import check
    from xplus_fast.model.checkpoint_files import resolve_model

    if options.fail_if and not options.base and not options.scales:
        raise UserError("--fail-if is about changes: it goes with --base")
    out = resolve(recipe.output)
    # what is missing is told before a model is downloaded or exported
    if options.scales:
        from xplus_fast.evaluation import curve

        base = resolve_model(options.base) if options.base else None
        with working_in(out):
            result = curve.curve(
                resolve(options.model), base, recipe, options.scales, condition=options.fail_if
            )
        said = curve.describe(recipe.output, result)
    else:
        lines = check(recipe, options.fail_if)
        base = resolve_model(options.base) if options.base else None
        with working_in(out):
            result = evaluate(model_folder(options.model, out), base, recipe, lines=lines)
        said = verdict.describe(recipe.output, result)
    print(json.dumps(result, indent=2) if options.json else said)
    if options.scales and options.fail_if and "@" not in options.fail_if and not result["chosen"]:
        print(
            "xplus-fast: --fail-if: no point keeps the base's reasoning, so none passes",
            file=sys.stderr,
        )
        return 1
    return int(bool(options.fail_if) and verdict.failed(options.fail_if, result["changes"]))


def _compare(options: argparse.Namespace) -> int:
    _quiet()
    from xplus_fast.evaluation.compare import compare, describe

    out = resolve(options.out)
    with working_in(out):
        result = compare([resolve(run) for run in options.runs], out)
    print(json.dumps(result, indent=2) if options.json else describe(options.out, result))
    return 0


def _verify(options: argparse.Namespace) -> int:
    _quiet()
    from xplus_fast.model.checkpoint_files import CheckpointFiles, resolve_model
    from xplus_fast.model.families import BESIDE
    from xplus_fast.planning.selection import resolve_layers
    from xplus_fast.training.export import describe, verify

    base = resolve_model(options.base)
    allowed, also = None, [kind for kind in options.also.split(",") if kind]
    if unknown := set(also) - set(BESIDE):
        raise UserError(f"--also: {unknown.pop()!r} is not one of {', '.join(BESIDE)}")
    if also and options.layers is None:
        raise UserError("--also goes with --layers; without it the folder's own record counts")
    if options.layers is not None:
        layers = CheckpointFiles.open(base).config.get("num_hidden_layers")
        if type(layers) is not int or not 1 <= layers <= MOST_LAYERS:
            raise UserError(f"{base / 'config.json'}: no num_hidden_layers")
        allowed = set(resolve_layers(options.layers, layers))
    result = verify(base, resolve(options.result), allowed, {BESIDE[kind] for kind in also})
    print(describe(result))
    return 0 if result.ok else 1


def _sensitivity(options: argparse.Namespace) -> int:
    _quiet()
    from xplus_fast.evaluation.sensitivity import analyse
    from xplus_fast.evaluation.sensitivity_report import (
        check_budget,
        describe,
        summarize,
        write,
    )

    budget = check_budget(options.model, options.budget)
    changes = [word for word in options.data if "=" in word and not os.path.exists(word)]
    data = [word for word in options.data if word not in changes]
    changes += options.overrides
    out = resolve(options.out)
    with working_in(out):  # written to before an hour's work, not after it
        seen, about = analyse(options.model, data, changes, batches=options.batches, show=True)
        result = summarize(seen, about, budget=budget)
        files = write(result, out)
    if options.json:
        print(json.dumps(result, indent=1))
    else:
        print("\n".join([describe(result), "", f"written to {files[0]} and {files[1]}"]))
    return 0


def _bench(options: argparse.Namespace) -> int:
    root = Path(__file__).parents[1]
    # both: another project's `benchmarks` may lie beside an installed package
    module = f"benchmarks.{BENCHMARKS[options.what]}"
    if not all((root / p).is_file() for p in ("pyproject.toml", f"{module.replace('.', '/')}.py")):
        raise UserError("bench: works in a checkout of the source; benchmarks/ is not installed")
    sys.path.insert(0, str(root))
    return importlib.import_module(module).main(options.arguments)


def _quiet() -> None:
    """Keep the libraries' own progress bars and advice off our terminal output."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from logging import ERROR, getLogger

    from transformers.utils import logging

    getLogger("bitsandbytes.backends.cpu").setLevel(ERROR)  # it misses a kernel nobody asks for
    logging.set_verbosity_error()
    logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
