"""`xplus-fast`: train · export · verify."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from xplus_fast import __version__
from xplus_fast.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 verification failed, 2 bad input."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except UserError as e:
        print(f"xplus-fast: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nxplus-fast: stopped; start the same command again to go on", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="xplus-fast",
        description="Fine-tune selected layers of Qwen3, Qwen2 and Llama models at full rank.",
    )
    parser.add_argument("--version", action="version", version=f"xplus-fast {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="carry out a recipe, or go on with its run")
    train.add_argument("recipe", type=Path, help="YAML file, see recipes/")
    train.add_argument(
        "overrides", nargs="*", metavar="key=value", help="e.g. stages.0.learning_rate=2e-5"
    )
    train.add_argument("--restart", action="store_true", help="throw an earlier run away")
    train.add_argument(
        "--dry-run", action="store_true", help="show selection, data and first example, then stop"
    )
    train.set_defaults(run=_train)

    export = commands.add_parser("export", help="a finished run -> a Hugging Face folder")
    export.add_argument("run_folder", type=Path, metavar="RUN", help="the run's output folder")
    export.add_argument("out", type=Path, metavar="OUT", help="the folder to make")
    export.set_defaults(run=_export)

    verify = commands.add_parser(
        "verify", help="prove which tensors changed and that every other is bit-identical"
    )
    verify.add_argument("base", metavar="BASE", help="the base model: a folder or hub id")
    verify.add_argument("result", type=Path, metavar="OUT", help="the exported folder")
    verify.add_argument("--layers", help="what may have changed, if the folder does not say")
    verify.add_argument(
        "--also", default="", help="with --layers: embedding,final_norm,head may have changed, too"
    )
    verify.set_defaults(run=_verify)
    return parser


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
    from xplus_fast.model.checkpoint_files import CheckpointFiles
    from xplus_fast.training.export import export
    from xplus_fast.training.run import changed_tensors

    base, tensors, record = changed_tensors(options.run_folder)
    export(base, tensors, options.out, record)
    print(f"{options.out}: {len(tensors)} tensors from {options.run_folder}, the rest from {base}")
    files = CheckpointFiles.open(base)
    for dtype in {files.dtype(n) for n in tensors} - {t.dtype for t in tensors.values()}:
        print(f"the trained tensors are rounded to {dtype}, in which the base stores them")
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
        config = CheckpointFiles.open(base).config
        allowed = set(resolve_layers(options.layers, config["num_hidden_layers"]))
    result = verify(base, options.result, allowed, {BESIDE[kind] for kind in also})
    print(describe(result))
    return 0 if result.ok else 1


def _quiet() -> None:
    """Keep the libraries' own progress bars and advice off our terminal output."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
