"""A recipe, carried out: stages one after another, each resumable, then the report.

The run's folder holds everything: `recipe.yaml`, `metrics.jsonl` (one line an optimizer step),
`evaluation/*.json`, and per stage a folder of checkpoints whose last is `final`. Starting the same
recipe again goes on where the run was cut off.
"""

import json
import os
import platform
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

import xplus_kernels as ops
from xplus_fast import __version__
from xplus_fast.config import (
    Recipe,
    stage_name,
)
from xplus_fast.data.chat import Encoded, preview
from xplus_fast.data.corpus import Corpus, PackCollator, describe, load_corpus
from xplus_fast.data.readers import read_text
from xplus_fast.errors import UserError
from xplus_fast.evaluation.heldout import measure
from xplus_fast.model.checkpoint_files import CheckpointFiles, check_against, resolve_model
from xplus_fast.model.families import shape_of
from xplus_fast.model.prepare import load_tensors, prepare_model, trained_tensors
from xplus_fast.planning.flops import total_parameters, trained_parameters
from xplus_fast.planning.selection import describe_layers, resolve_layers
from xplus_fast.training.checkpoints import (
    clean_leftovers,
    latest_checkpoint,
    read_checkpoint,
    write_checkpoint,
)
from xplus_fast.training.progress import LiveLine
from xplus_fast.training.report import write_report
from xplus_fast.training.run_folder import (
    claim,
    cut_metrics,
    last_step,
    look_at,
    read_metrics,
    read_recipe,
    throw_away,
    write_json,
)
from xplus_fast.training.trainer import XPlusTrainer

FINAL = "final"


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


def train(recipe: Recipe, *, restart: bool = False, dry_run: bool = False) -> str:
    """Carry out a recipe; returns what is to be said at the end.

    Args:
        recipe: what to do.
        restart: throw away what the output folder holds of an earlier run.
        dry_run: stop after showing selection, data and the first example.

    Raises:
        UserError: whatever the user can put right; what was computed so far is kept.
    """
    place = _place(recipe)
    # flushed, so that a log file has our lines and the live line in their order
    say = partial(print, flush=True) if place.first else (lambda *_: None)
    base = resolve_model(recipe.model)
    files = CheckpointFiles.open(base)
    shape = shape_of(_load_config(base))
    selections = [resolve_layers(s.layers, shape.layers) for s in recipe.stages]
    check_against(files, shape.tensor_shapes())
    say(
        f"{recipe.model}: {shape.family}, {shape.layers} layers,"
        f" {total_parameters(shape):,} parameters"
    )
    for i, (stage, ids) in enumerate(zip(recipe.stages, selections, strict=True)):
        count = trained_parameters(shape, ids, stage.also)
        say(
            f"stage {stage_name(recipe, i)}: layers {describe_layers(ids)}"
            + "".join(f", {kind}" for kind in stage.also)
            + f": {count:,} parameters ({count / total_parameters(shape):.1%})"
        )
    run = Path(recipe.output)
    if not dry_run:
        if restart and place.first:
            throw_away(run)
        _barrier(place)
        look_at(run, recipe)
    tokenizer = _load_tokenizer(base)
    corpora = _load_corpora(recipe, tokenizer, say, place)
    _show_first(corpora[0], tokenizer, say)
    texts = read_text(recipe.data.retention) if recipe.data.retention else []
    if dry_run:
        return "dry run: nothing was trained"
    if place.first:
        claim(run, recipe, base, corpora)
    _barrier(place)

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=place.dtype)
    model.to(place.device)
    prepare_model(model)
    if place.device.type == "cuda":
        q = torch.empty(1, shape.heads, shape.head_dim, dtype=place.dtype, device=place.device)
        say(f"attention: {ops.attention_backend(q)}")
    heldout = corpora[0].heldout

    def evaluate(point: str) -> None:
        file = run / "evaluation" / f"{point}.json"
        if place.first and not file.exists() and (heldout or texts):
            say(f"measuring {point.replace('-', ' ', 1)} ...")
            result = measure(
                model, tokenizer, heldout, texts,
                data=recipe.data, config=recipe.evaluation, show=True,
            )  # fmt: skip
            write_json(file, result)

    evaluate("before")
    stages = []
    for i, (stage, ids) in enumerate(zip(recipe.stages, selections, strict=True)):
        name = stage_name(recipe, i)
        prepare_model(model, ids, also=stage.also, activations=recipe.training.activations)
        done = run / name / FINAL
        if done.exists():
            load_tensors(model, read_checkpoint(done).tensors["trained"])
            say(f"stage {name}: trained before, taken from {done}")
        else:
            _train_stage(recipe, i, model, corpora[i], run, place)
        stages.append(
            {
                "name": name,
                "layers": ids,
                "also": list(stage.also),
                "trained_parameters": trained_parameters(shape, ids, stage.also),
                "total_parameters": total_parameters(shape),
                "steps": last_step(run, name),
                "tensors": sorted(trained_tensors(model)),
                "data": corpora[i].summary,
            }
        )
        evaluate(f"after-{name}")
    if not place.first:
        return ""
    about = {
        "stages": stages,
        "device": _device_name(place),
        "dtype": str(place.dtype).removeprefix("torch."),
        "versions": {
            "xplus-fast": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "seconds": sum(line["seconds"] for line in read_metrics(run)),
    }
    write_json(run / "run.json", about)
    return write_report(run)


def changed_tensors(run: Path) -> tuple[Path, dict[str, torch.Tensor], dict[str, Any]]:
    """What a finished run changed: the base model's folder, the tensors, and a record of them.

    Raises `UserError` where the run is not there or not finished.
    """
    recipe = read_recipe(run)
    tensors: dict[str, torch.Tensor] = {}
    layers: set[int] = set()
    also: set[str] = set()
    base = resolve_model(recipe.model)
    shape = shape_of(_load_config(base))
    for i, stage in enumerate(recipe.stages):
        folder = run / stage_name(recipe, i) / FINAL
        if not folder.exists():
            raise UserError(
                f"{run}: stage {stage_name(recipe, i)} is not finished;"
                " start its recipe again first"
            )
        tensors |= read_checkpoint(folder).tensors["trained"]
        layers |= set(resolve_layers(stage.layers, shape.layers))
        also |= set(stage.also)
    record = {
        "base": recipe.model,
        "layers": sorted(layers),
        "also": sorted(also),
        "stages": [
            {"name": stage_name(recipe, i), "layers": resolve_layers(s.layers, shape.layers)}
            for i, s in enumerate(recipe.stages)
        ],
        "xplus_fast": __version__,
    }
    return base, tensors, record


class _RunLog(TrainerCallback):
    """Writes metrics.jsonl and the live line."""

    def __init__(self, run: Path, stage: str) -> None:
        self.file, self.stage = run / "metrics.jsonl", stage
        self.live: LiveLine | None = None

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not state.is_world_process_zero or "loss" not in logs:
            return
        line = {"stage": self.stage, "step": state.global_step, "steps": state.max_steps}
        line |= {k: v for k, v in logs.items() if k != "epoch"}
        self.live = self.live or LiveLine(self.stage, state.max_steps)
        self.live.update(line)
        try:
            with self.file.open("a", encoding="utf-8") as out:
                out.write(json.dumps(line) + "\n")
        except OSError as e:
            raise UserError(f"{self.file}: cannot be written ({e.strerror})") from None

    def close(self) -> None:
        if self.live is not None:
            self.live.close()


def _train_stage(
    recipe: Recipe, index: int, model: Any, corpus: Corpus, run: Path, place: Place
) -> None:
    stage, options, name = recipe.stages[index], recipe.training, stage_name(recipe, index)
    folder = run / name
    if place.first:
        folder.mkdir(parents=True, exist_ok=True)
        clean_leftovers(folder)
    _barrier(place)
    row = corpus.summary["tokens"] / corpus.summary["packs"]  # real tokens, on average
    rows = max(1, int(options.tokens_per_step / (row * place.processes) + 0.5))  # of a process
    if place.first:
        print(
            f"stage {name}: {rows * place.processes} rows of about {row:,.0f} tokens a step"
            f" (asked for: {options.tokens_per_step:,} tokens)",
            flush=True,
        )
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=rows,
        ddp_find_unused_parameters=False,
        learning_rate=stage.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": stage.min_learning_rate},
        warmup_steps=stage.warmup,  # a share of the steps, below 1
        max_steps=stage.steps or -1,
        num_train_epochs=stage.epochs or 1.0,
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        adam_beta1=options.adam_beta1,
        adam_beta2=options.adam_beta2,
        adam_epsilon=options.adam_epsilon,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=options.save_steps,
        save_total_limit=options.save_total_limit,
        report_to=options.report_to,
        run_name=f"{run.name}-{name}",
        disable_tqdm=True,
        remove_unused_columns=False,
        seed=recipe.seed,
        use_cpu=place.device.type == "cpu",
    )
    resume = latest_checkpoint(folder)
    if place.first:
        cut_metrics(run, name, int(resume.name.rpartition("-")[2]) if resume else 0)
    log = _RunLog(run, name)
    trainer = XPlusTrainer(
        model, arguments,
        train_dataset=corpus.train, data_collator=PackCollator(), callbacks=[log],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    if resume and place.first:
        print(f"stage {name}: going on from {resume}", flush=True)
    try:
        trainer.train(resume)
    finally:
        log.close()
    if place.first:
        write_checkpoint(
            folder / FINAL,
            {"trained": trained_tensors(model)},
            {"selection": {"layers": resolve_layers(stage.layers, len(model.model.layers))}},
        )
    _barrier(place)


def _load_corpora(recipe: Recipe, tokenizer: Any, say: Any, place: Place) -> list[Corpus]:
    """One corpus a stage; stages without sources of their own share that of `data.sources`.

    The first one holds pairs out, the others keep the same ones out.
    """
    loaded: dict[Any, Corpus] = {}
    corpora = []
    for i, stage in enumerate(recipe.stages):
        sources = recipe.data.sources if stage.sources is None else stage.sources
        if not sources:
            raise UserError(
                f"stages.{i}: no data: neither data.sources nor its own sources are given"
            )
        key = repr(sources)
        if key not in loaded:
            first = next(iter(loaded.values()), None)
            held = [] if first is None else [e for part in first.heldout.values() for e in part]
            data = recipe.data if first is None else replace(recipe.data, heldout=0)
            if not place.first:
                _barrier(place)  # the first process makes the corpus, the others find it
            loaded[key] = load_corpus(
                sources, data, tokenizer, seed=recipe.seed, show=place.first, keep_out=held
            )
            if place.first:
                _barrier(place)
            summary = loaded[key].summary
            say(describe(summary))
            say(f"cache: {'found in' if summary['cached'] else 'written to'} {summary['folder']}")
        corpora.append(loaded[key])
    return corpora


def _show_first(corpus: Corpus, tokenizer: Any, say: Any) -> None:
    """The first training example as the model will see it, the supervised part marked."""
    row = corpus.train[0]
    n = row["lengths"][0]
    first = Encoded(row["input_ids"][:n].numpy(), (row["labels"][:n] != -100).numpy())
    say("first example (what is supervised is marked):")
    say(preview(first, tokenizer, sys.stdout.isatty()))


def _load_config(base: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(base)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as e:
        raise UserError(f"{base}/config.json: not a model configuration: {_line(e)}") from None


def _load_tokenizer(base: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(base)
    except (OSError, ValueError, KeyError) as e:
        raise UserError(f"{base}: its tokenizer cannot be loaded: {_line(e)}") from None


def _line(e: Exception) -> str:
    text = " ".join(str(e).split())
    return text[:300] or type(e).__name__


def _place(recipe: Recipe) -> Place:
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
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        torch.cuda.set_device(device)
    dtype = {
        "auto": torch.bfloat16 if device.type == "cuda" else torch.float32,
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
    }[recipe.dtype]
    if processes > 1:
        PartialState(cpu=device.type == "cpu")  # accelerate's, which Trainer takes up
    return Place(device, dtype, rank, processes)


def _barrier(place: Place) -> None:
    if place.processes > 1:
        torch.distributed.barrier()


def _device_name(place: Place) -> str:
    if place.device.type == "cuda":
        return torch.cuda.get_device_name(place.device)
    return f"CPU, {torch.get_num_threads()} threads"
