"""A recipe, carried out: stages one after another, each resumable, then the report.

The run's folder holds everything: `recipe.yaml`, `metrics.jsonl` (one line an optimizer step),
`evaluation/*.json`, and per stage a folder of checkpoints whose last is `final`. Starting the same
recipe again goes on where the run was cut off.
"""

import gc
import json
import platform
import sys
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

import xplus_kernels as ops
from xplus_fast import __version__
from xplus_fast.config import (
    Recipe,
    Stage,
    resolved,
    stage_name,
)
from xplus_fast.data.chat import Encoded, preview
from xplus_fast.data.corpus import Corpus, PackCollator, describe, load_corpus, read_validation
from xplus_fast.data.packed import look_at_work
from xplus_fast.data.readers import read_text
from xplus_fast.errors import UserError
from xplus_fast.evaluation.heldout import measure
from xplus_fast.files import append_lines, make_folder, resolve, speaking, write_json
from xplus_fast.model.checkpoint_files import (
    CheckpointFiles,
    check_against,
    read_header,
    resolve_model,
)
from xplus_fast.model.families import Shape, shape_of, stage_shapes
from xplus_fast.model.load import Weights, arrange, load_model
from xplus_fast.model.prepare import forget_changes, load_tensors
from xplus_fast.model.pretrained import load_config, load_tokenizer
from xplus_fast.planning.flops import Work, total_parameters, trained_parameters
from xplus_fast.planning.from_recipe import plan_recipe
from xplus_fast.planning.plan import Plan
from xplus_fast.planning.plan import to_dict as plan_dict
from xplus_fast.planning.plan_text import describe as describe_plans
from xplus_fast.planning.selection import Rotation, learning_rates, resolve_layers
from xplus_fast.signals import finish_first
from xplus_fast.training.checkpoints import (
    FINAL,
    FINAL_TENSORS,
    Final,
    clean_leftovers,
    latest_checkpoint,
    write_checkpoint,
)
from xplus_fast.training.hidden_cache import HiddenCache, HiddenCaches, read_rows
from xplus_fast.training.peers import watched
from xplus_fast.training.place import (
    Place,
    barrier,
    cap,
    card_here,
    device_name,
    find_place,
    share,
)
from xplus_fast.training.planned import PlannedTrainer, check_plans, frozen_formats
from xplus_fast.training.progress import LiveLine
from xplus_fast.training.report import write_report
from xplus_fast.training.reporting import check_report_to
from xplus_fast.training.rotation import Rotate, turn_seed
from xplus_fast.training.run_folder import (
    card_of,
    claim,
    cut_metrics,
    hold,
    last_step,
    look_at,
    read_metrics,
    throw_away,
)
from xplus_fast.training.shortage import ran_out
from xplus_fast.training.stop import StopWhenAsked
from xplus_fast.training.watch import Watch


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
    place = find_place(recipe)
    held.enter_context(watched(place))
    # flushed, so that a log file has our lines and the live line in their order
    say = partial(print, flush=True) if place.first else (lambda *_: None)
    base = resolve_model(recipe.model)
    files, config = CheckpointFiles.open(base), load_config(base)
    shape = shape_of(config)
    selections = [resolve_layers(s.layers, shape.layers) for s in recipe.stages]
    rates = [rates_of(stage, shape) for stage in recipe.stages]
    turning = any(isinstance(stage.layers, Rotation) for stage in recipe.stages)
    if turning and place.processes > 1:
        raise UserError("layers.rotate: on one process; gradients of several are summed for all")
    check_against(files, shape.tensor_shapes())
    run = resolve(recipe.output)
    here, free = replace(recipe, model=str(base)), card_here(place)
    card = free if restart else card_of(run, free)
    if card is not None and free is not None and card.memory > free.memory:
        say(
            f"memory: planned for the {card.memory / 1e9:.1f} GB that were free on {card.name} when"
            f" this run began; {free.memory / 1e9:.1f} GB are now"
        )
    _, _, named = plan_recipe(here, here=card)  # what is impossible is so before data are read
    check_plans([plan for _, plan in named])
    check_report_to(recipe.training.report_to)
    if not dry_run:
        if place.first:
            held.enter_context(hold(run))
        barrier(place)
        if not restart:
            look_at(run, recipe)
    tokenizer = load_tokenizer(base)
    texts = read_text(recipe.data.retention) if recipe.data.retention else []
    corpora, works = _load_corpora(recipe, tokenizer, shape.vocabulary, say, place)
    _show_first(corpora[0], tokenizer, say)
    read = [read_rows(*x, place) for x in zip(corpora, works, strict=True)]
    _, where, named = plan_recipe(here, here=card, works=works, read=read)
    plans = [plan for _, plan in share(named, place)]
    whole = dry_run or where.card is not None
    in_words = describe_plans(recipe.model, shape, where, named, whole=whole, known=True)
    if dry_run:
        say(in_words)
        return "dry run: nothing was trained"
    hidden = HiddenCaches(place, say)
    if place.first:
        held.enter_context(hidden.hold(recipe.data.cache_hidden))
        if restart:
            throw_away(run)
        steps = [len(c.train) // place.processes for c in corpora]
        claim(run, recipe, base, corpora, steps, [frozen_formats(plan) for plan in plans], card)
    say(in_words)  # behind whatever may be wrong with the data
    barrier(place)

    cap(place.device, where.budget)
    weights = Weights(files)
    kind: dict[str, Any] = {"dtype": place.dtype, "device": place.device}
    if place.device.type == "cuda":
        q = torch.empty(1, shape.heads, shape.head_dim, **kind)
        short = "our own where sequences are short, else " if ops.takes_short(q) else ""
        say(f"attention: {short}{ops.attention_backend(q)}")
        say(f"loading {recipe.model} ...")
    model: Any = load_model(weights, config, plans[0].layout, **kind)
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
    for i, (stage, ids, plan) in enumerate(zip(recipe.stages, selections, plans, strict=True)):
        name = stage_name(recipe, i)
        arrange(model, plan.layout, weights, **kind)
        done, memory = run / name / FINAL, {}
        if done.exists():
            load_tensors(model, Final(done, name, stage_shapes(shape, ids, stage.also)))
            say(f"stage {name}: trained before, taken from {done}")
        else:
            kept = hidden.of_stage(i, plan.request.hidden, model)
            memory = _train_stage(
                recipe,
                i,
                model,
                corpora[i],
                plan,
                rates[i],
                run,
                place,
                tokenizer,
                (heldout, texts),
                kept,
            )
        weights.cover(read_header(done / FINAL_TENSORS))
        forget_changes(model)
        stages.append(
            {
                "name": name,
                "layers": ids,
                "also": list(stage.also),
                "trained_parameters": trained_parameters(shape, ids, stage.also),
                "total_parameters": total_parameters(shape),
                "steps": last_step(run, name),
                "tensors": sorted(stage_shapes(shape, ids, stage.also)),
                "data": corpora[i].summary,
                "plan": plan_dict(plan),
                "memory": memory,
            }
        )
        evaluate(f"after-{name}")
    if not place.first:
        return ""
    about = {
        "stages": stages,
        "device": device_name(place),
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


def rates_of(stage: Stage, shape: Shape) -> dict[str, float]:
    """The learning rates of a stage, as `learning_rates` has them. Raises `UserError`."""
    ids = resolve_layers(stage.layers, shape.layers)
    # a tied head is the embedding
    also = {"embedding" if kind == "head" and shape.tied else kind for kind in stage.also}
    return learning_rates(stage.learning_rate, stage.layer_decay, ids, also, shape.layers)


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
        del state.log_history[:-1]  # all of it is in the file; a checkpoint would repeat it
        self.live = self.live or LiveLine(self.stage, state.max_steps)
        self.live.update(line)
        append_lines(self.file, [json.dumps(line)])

    def say(self, line: str) -> None:
        """Say something for good, above the live line."""
        if self.live is not None:
            self.live.close()
            self.live = None
        print(line, flush=True)

    def close(self) -> None:
        if self.live is not None:
            self.live.close()


def _train_stage(
    recipe: Recipe, index: int, model: Any, corpus: Corpus, plan: Plan, rates: dict[str, float],
    run: Path, place: Place, tokenizer: Any, watched: tuple[dict[str, Any], list[str]],
    hidden: HiddenCache | None,
) -> dict[str, int]:  # fmt: skip
    """Train one stage to its final checkpoint; returns what memory it took, by purpose."""
    stage, options, name = recipe.stages[index], recipe.training, stage_name(recipe, index)
    rows, (heldout, texts) = corpus.train, watched
    folder = run / name
    if place.first:
        make_folder(folder)
        clean_leftovers(folder)
    barrier(place)
    if place.first:
        steps = len(rows) // place.processes
        print(
            f"stage {name}: {steps:,} {'steps' if steps > 1 else 'step'} an epoch, of about"
            f" {rows.total_tokens / steps:,.0f} tokens (asked for: {options.tokens_per_step:,})",
            flush=True,
        )
    arguments = TrainingArguments(
        output_dir=str(folder),
        # a row is a whole step: the plan splits it, and another plan only splits it otherwise
        per_device_train_batch_size=1,
        ddp_find_unused_parameters=False,
        learning_rate=max(rates.values()),
        lr_scheduler_type="cosine_warmup_with_min_lr",  # whose first step's rate is not 0
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
    trainer = PlannedTrainer(
        model, arguments, plan=plan, rates=rates, say=log.say, hidden=hidden,
        sources=corpus.summary["sources"], train_dataset=rows, callbacks=[log],
        data_collator=PackCollator(shared_prefixes=recipe.data.shared_prompts),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    watch = None
    if isinstance(stage.layers, Rotation):
        trainer.add_callback(Rotate(stage.layers, turn_seed(recipe.seed, index)))
    if recipe.evaluation.every and (heldout or texts):
        watch = Watch(recipe, name, run, tokenizer, heldout, texts, place, log.say)
        trainer.add_callback(watch)
    if resume and place.first:
        print(f"stage {name}: going on from {resume}", flush=True)
    with finish_first(f"stage {name} finishes its step and saves") as asked:
        stop = StopWhenAsked(asked, place)
        trainer.add_callback(stop)
        try:
            with speaking(folder):  # for those of report_to, which write there
                trainer.train(resume)
        finally:
            log.close()
        stop.check(name)
    best = 0 if watch is None or recipe.evaluation.keep == "last" else watch.best_step
    if best and best != trainer.state.global_step:
        trainer.go_back(best)
        log.say(f"stage {name} ends with step {best}, the best that was measured")
    if place.first:
        write_checkpoint(
            folder / FINAL,
            {"trained": trainer.final_tensors()},
            {
                "selection": {
                    "layers": resolve_layers(stage.layers, len(model.model.layers)),
                    "stage": name,
                    "dtype": str(place.dtype).removeprefix("torch."),
                }
            },
        )
    barrier(place)
    memory = trainer.memory
    # A Trainer refers to itself: its optimizer's states must go before the next stage's come.
    trainer.accelerator.free_memory()
    del trainer
    gc.collect()
    return memory


def _load_corpora(
    recipe: Recipe, tokenizer: Any, vocabulary: int, say: Any, place: Place
) -> tuple[list[Corpus], list[Work]]:
    """One corpus a stage, in rows of an optimizer step, and what there is to do in them.

    Stages without sources of their own share that of `data.sources`. The first one holds pairs
    out, the others keep the same ones out. Steps look at data alone and at no plan: a run goes on
    with the same ones under another budget.
    """
    given = read_validation(recipe.data) if recipe.data.validation else {}
    if given:
        say("validation: " + ", ".join(f"{tag} {len(part):,}" for tag, part in given.items()))
    loaded: dict[Any, Corpus] = {}
    works: dict[Any, Work] = {}
    keys = []
    for i, stage in enumerate(recipe.stages):
        sources = recipe.data.sources if stage.sources is None else stage.sources
        if not sources:
            raise UserError(
                f"stages.{i}: no data: neither data.sources nor its own sources are given"
            )
        key = repr(sources)
        if key not in loaded:
            first = next(iter(loaded.values()), None)
            heldout = given if first is None else first.heldout
            held = [e for part in heldout.values() for e in part]
            data = recipe.data if first is None else replace(recipe.data, heldout=0)
            if not place.first:
                barrier(place)  # the first process makes the corpus, the others find it
            corpus = load_corpus(
                sources, data, tokenizer, seed=recipe.seed, show=place.first, keep_out=held,
                vocabulary=vocabulary,
            )  # fmt: skip
            if place.first:
                barrier(place)
            rows = corpus.train.packed(recipe.training.tokens_per_step, place.processes)
            works[key] = look_at_work(rows, data.pack_tokens, shared=data.shared_prompts)
            summary = {**corpus.summary, "saved": works[key].saved}
            loaded[key] = replace(corpus, train=rows, summary=summary)
            if given:
                loaded[key] = replace(loaded[key], heldout=given)
            say(describe(summary))
            say(f"cache: {'found in' if summary['cached'] else 'written to'} {summary['folder']}")
        keys.append(key)
    return [loaded[key] for key in keys], [works[key] for key in keys]


def _show_first(corpus: Corpus, tokenizer: Any, say: Any) -> None:
    """The first training example as the model will see it, the supervised part marked."""
    row = corpus.train[0]
    n = row["lengths"][0]
    first = Encoded(row["input_ids"][:n].numpy(), (row["labels"][:n] != -100).numpy())
    say("first example (what is supervised is marked):")
    say(preview(first, tokenizer, sys.stdout.isatty()))
