"""One stage of a run, trained to its final checkpoint."""

import gc
import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from xplus_fast.config import stage_name
from xplus_fast.data.corpus import PackCollator
from xplus_fast.files import append_lines, make_folder, speaking
from xplus_fast.planning.search import Plan
from xplus_fast.planning.selection import Rotation
from xplus_fast.progress import LiveLine
from xplus_fast.signals import finish_first
from xplus_fast.training.checkpoints import (
    FINAL,
    clean_leftovers,
    latest_checkpoint,
    write_checkpoint,
)
from xplus_fast.training.hidden_cache import HiddenCache
from xplus_fast.training.job import Job
from xplus_fast.training.place import barrier
from xplus_fast.training.planned import PlannedTrainer
from xplus_fast.training.rotation import Rotate, turn_seed
from xplus_fast.training.run_folder import cut_metrics
from xplus_fast.training.stage_data import StageData
from xplus_fast.training.stop import StopWhenAsked
from xplus_fast.training.watch import Watch


def train_stage(
    job: Job, index: int, model: Any, data: StageData, plan: Plan, hidden: HiddenCache | None
) -> dict[str, int]:
    """Train one stage to its final checkpoint; returns what memory it took, by purpose."""
    recipe, run, place = job.recipe, job.run, job.place
    stage, options, name = recipe.stages[index], recipe.training, stage_name(recipe, index)
    corpus, rates = data.corpora[index], job.rates[index]
    rows, folder = corpus.train, run / name
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
    resume = latest_checkpoint(folder)
    if place.first:
        cut_metrics(run, name, int(resume.name.rpartition("-")[2]) if resume else 0)
    log = RunLog(run, name)
    trainer = PlannedTrainer(
        model, _arguments(job, index), plan=plan, rates=rates, say=log.say, hidden=hidden,
        sources=corpus.summary["sources"], train_dataset=rows, callbacks=[log],
        data_collator=PackCollator(shared_prefixes=recipe.data.shared_prompts),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    watch = None
    if isinstance(stage.layers, Rotation):
        trainer.add_callback(Rotate(stage.layers, turn_seed(recipe.seed, index)))
    by_texts = data.texts if recipe.evaluation.by == "retention" else []
    if recipe.evaluation.every and (data.heldout or by_texts):
        watch = Watch(
            recipe, name, run, data.tokenizer, data.heldout, by_texts, place, log.say
        )  # fmt: skip
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
                    "layers": job.selections[index],
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


def _arguments(job: Job, index: int) -> TrainingArguments:
    stage, options = job.recipe.stages[index], job.recipe.training
    name = stage_name(job.recipe, index)
    return TrainingArguments(
        output_dir=str(job.run / name),
        # a row is a whole step: the plan splits it, and another plan only splits it otherwise
        per_device_train_batch_size=1,
        ddp_find_unused_parameters=False,
        learning_rate=max(job.rates[index].values()),
        lr_scheduler_type="cosine_with_min_lr",  # with a warm-up of our own
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
        run_name=f"{job.run.name}-{name}",
        disable_tqdm=True,
        remove_unused_columns=False,
        seed=job.recipe.seed,
        use_cpu=job.place.device.type == "cpu",
    )


class RunLog(TrainerCallback):
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
