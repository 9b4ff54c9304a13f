"""Every field of TrainingArguments and of Trainer's constructor: like stock, or refused."""

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from tests.tiny import select, tiny_model
from tests.training.alike import assert_alike, pad, sentences
from xplus_fast import AdamW, XPlusTrainer
from xplus_fast.errors import UserError

EVALUATED = {"eval_strategy": "steps", "eval_steps": 1}
SAVED = {"save_strategy": "steps", "save_steps": 1}
BEST = {**EVALUATED, **SAVED, "load_best_model_at_end": True, "metric_for_best_model": "loss"}

# Run beside stock with this value (and what it needs to have an effect): the same losses, rates,
# norms, evaluations, checkpoints' names and weights.
LIKE_STOCK: dict[str, dict[str, Any]] = {
    "accelerator_config": {"accelerator_config": {"split_batches": True}},
    "adam_beta1": {"adam_beta1": 0.5},
    "adam_beta2": {"adam_beta2": 0.5},
    "adam_epsilon": {"adam_epsilon": 1e-2},
    "auto_find_batch_size": {"auto_find_batch_size": True},
    "average_tokens_across_devices": {"average_tokens_across_devices": False},
    "batch_eval_metrics": {**EVALUATED, "batch_eval_metrics": True},
    "bf16_full_eval": {"bf16_full_eval": False},
    "data_seed": {"data_seed": 11},
    "dataloader_drop_last": {"dataloader_drop_last": True, "max_steps": -1},
    "dataloader_in_order": {"dataloader_in_order": False},
    "dataloader_multiprocessing_context": {
        "dataloader_multiprocessing_context": "fork", "dataloader_num_workers": 1,
    },
    "dataloader_num_workers": {"dataloader_num_workers": 1},
    "dataloader_persistent_workers": {
        "dataloader_persistent_workers": True, "dataloader_num_workers": 1,
    },
    "dataloader_pin_memory": {"dataloader_pin_memory": False},
    "dataloader_prefetch_factor": {"dataloader_prefetch_factor": 3, "dataloader_num_workers": 1},
    "disable_tqdm": {"disable_tqdm": False},
    "enable_jit_checkpoint": {"enable_jit_checkpoint": True},
    "eval_accumulation_steps": {**EVALUATED, "eval_accumulation_steps": 1},
    "eval_delay": {**EVALUATED, "eval_delay": 2},
    "eval_do_concat_batches": {**EVALUATED, "eval_do_concat_batches": False},
    "eval_on_start": {**EVALUATED, "eval_on_start": True},
    "eval_steps": {"eval_strategy": "steps", "eval_steps": 2},
    "eval_strategy": {"eval_strategy": "epoch", "max_steps": -1},
    "eval_use_gather_object": {**EVALUATED, "eval_use_gather_object": True},
    "fp16": {"fp16": True},  # on a CPU stock computes in fp32, too
    "fp16_full_eval": {"fp16_full_eval": False},
    "full_determinism": {"full_determinism": False},
    "gradient_accumulation_steps": {"gradient_accumulation_steps": 3},
    "activation_checkpointing": {"activation_checkpointing": True},  # said to be unneeded
    "activation_checkpointing_kwargs": {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": False},
    },
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "gradient_checkpointing_kwargs": {
        "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
    "greater_is_better": {**BEST, "greater_is_better": True},
    "ignore_data_skip": {"ignore_data_skip": True},
    "include_for_metrics": {**EVALUATED, "include_for_metrics": ["inputs"]},
    "include_num_input_tokens_seen": {"include_num_input_tokens_seen": "all"},
    "label_names": {"label_names": ["labels"]},
    "label_smoothing_factor": {"label_smoothing_factor": 0.1},
    "learning_rate": {"learning_rate": 1e-2},
    "length_column_name": {
        "length_column_name": "size", "train_sampling_strategy": "group_by_length",
        "remove_unused_columns": False,
    },
    "load_best_model_at_end": {**BEST, "learning_rate": 1e-2},
    "log_level": {"log_level": "error"},
    "log_level_replica": {"log_level_replica": "error"},
    "log_on_each_node": {"log_on_each_node": False},
    "logging_first_step": {"logging_steps": 2, "logging_first_step": True},
    "logging_nan_inf_filter": {"logging_nan_inf_filter": False},
    "logging_steps": {"logging_steps": 2},
    "logging_strategy": {"logging_strategy": "epoch", "max_steps": -1},
    "lr_scheduler_kwargs": {
        "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-4},
    },
    "lr_scheduler_type": {"lr_scheduler_type": "reduce_lr_on_plateau", **EVALUATED},
    "max_grad_norm": {"max_grad_norm": 0.01},
    "max_steps": {"max_steps": 2},
    "metric_for_best_model": {**BEST, "metric_for_best_model": "eval_runtime_free"},
    "neftune_noise_alpha": {"neftune_noise_alpha": 5.0},
    "num_train_epochs": {"num_train_epochs": 1.5, "max_steps": -1},
    "optim": {"optim": "adafactor"},
    "output_dir": SAVED,
    "per_device_eval_batch_size": {**EVALUATED, "per_device_eval_batch_size": 3},
    "per_device_train_batch_size": {"per_device_train_batch_size": 3},
    "prediction_loss_only": {**EVALUATED, "prediction_loss_only": True},
    "remove_unused_columns": {"remove_unused_columns": False},
    "restore_callback_states_from_checkpoint": {"restore_callback_states_from_checkpoint": True},
    "run_name": {"run_name": "a run"},
    "save_on_each_node": {**SAVED, "save_on_each_node": True},
    "save_steps": {"save_strategy": "steps", "save_steps": 2},
    "save_strategy": {**EVALUATED, "save_strategy": "best", "metric_for_best_model": "loss"},
    "save_total_limit": {**SAVED, "save_total_limit": 1},
    "seed": {"seed": 7},
    "skip_memory_metrics": {"skip_memory_metrics": False},
    "torch_empty_cache_steps": {"torch_empty_cache_steps": 1},
    "train_sampling_strategy": {"train_sampling_strategy": "group_by_length"},
    "use_cache": {"use_cache": True, **EVALUATED},
    "use_cpu": {"use_cpu": True},
    "warmup_steps": {"warmup_steps": 0.4},
    "weight_decay": {"weight_decay": 0.5},
}  # fmt: skip

REFUSED: dict[str, dict[str, Any]] = {
    "debug": {"debug": "underflow_overflow"},
    "optim_args": {"optim_args": "amsgrad=True"},
    "optim_target_modules": {"optim_target_modules": ["mlp"]},
    "torch_compile": {"torch_compile": True},
    "torch_compile_backend": {"torch_compile_backend": "eager"},
    "torch_compile_mode": {"torch_compile_mode": "default"},
    "use_liger_kernel": {"use_liger_kernel": True},
}

# Where they are tested, or why they are not here.
ELSEWHERE = {
    "bf16": "test_trainer.py: near stock's autocast, whose residual stream is fp32",
    "save_only_model": "test_trainer.py",
    "deepspeed": "refused, test_launchers_are_refused",
    "fsdp": "refused, test_launchers_are_refused",
    "fsdp_config": "read with fsdp only",
    "parallelism_config": "refused, test_launchers_are_refused",
    "liger_kernel_config": "read with use_liger_kernel only",
    "push_to_hub": "refused but for the end, test_a_checkpoint_is_not_pushed",
    "hub_strategy": "test_a_checkpoint_is_not_pushed",
    **dict.fromkeys(
        ("hub_token", "hub_private_repo", "hub_model_id", "hub_always_push", "hub_revision"),
        "transformers' own push of the end's model, no code of ours",
    ),
    **dict.fromkeys(
        ("report_to", "project", "trackio_space_id", "trackio_bucket_id",
         "trackio_static_space_id"),
        "transformers' own callbacks, which get every log",
    ),
    **dict.fromkeys(
        ("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers",
         "ddp_static_graph", "ddp_backend", "ddp_timeout", "local_rank"),
        "accelerate's, with several processes: test_run.py trains with two",
    ),
    "tf32": "torch's own switch, on a GPU",
    **dict.fromkeys(
        ("do_train", "do_eval", "do_predict", "resume_from_checkpoint"),
        "for scripts to read; no Trainer does",
    ),
}  # fmt: skip
FIELDS = {f.name for f in dataclasses.fields(TrainingArguments)}


def test_every_argument_is_in_a_table() -> None:
    known = LIKE_STOCK.keys() | REFUSED.keys() | ELSEWHERE.keys()
    assert FIELDS - known == set()
    assert not LIKE_STOCK.keys() & REFUSED.keys()
    assert not (LIKE_STOCK.keys() | REFUSED.keys()) & ELSEWHERE.keys()


@pytest.mark.parametrize("name", sorted(LIKE_STOCK.keys() & FIELDS))
def test_like_stock(name: str, tmp_path: Path) -> None:
    arguments = dict(LIKE_STOCK[name])
    options: dict[str, Any] = {"eval_dataset": sentences(6, seed=2)}
    if name == "metric_for_best_model":
        arguments["metric_for_best_model"] = "half"
        options["compute_metrics"] = lambda p: {"half": float((_labelled(p) > 0).mean())}
    if name == "batch_eval_metrics":
        options["compute_metrics"] = _BatchMetrics()
    if name in ("include_for_metrics", "eval_do_concat_batches", "eval_accumulation_steps"):
        options["compute_metrics"] = _metrics
    if name == "length_column_name":
        rows = [{**row, "size": len(row["input_ids"])} for row in sentences()]
        options["train_dataset"] = rows
    if {*arguments} - FIELDS:
        pytest.skip(f"this version of transformers lacks {sorted({*arguments} - FIELDS)}")
    assert_alike(tmp_path, arguments, **options)


@pytest.mark.parametrize("name", sorted(REFUSED.keys() & FIELDS))
def test_refused(name: str, tmp_path: Path) -> None:
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], **REFUSED[name])
    with pytest.raises(UserError, match=rf"{name.replace('_backend', '').replace('_mode', '')}"):
        XPlusTrainer(select(tiny_model(), [1]), arguments, train_dataset=sentences())


@pytest.mark.parametrize("name", ["deepspeed", "fsdp", "parallelism_config"])
def test_launchers_are_refused(name: str, tmp_path: Path) -> None:
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    setattr(arguments, name, ["full_shard"])  # setting them up needs what is not here
    with pytest.raises(UserError, match=f"{name}="):
        XPlusTrainer(select(tiny_model(), [1]), arguments, train_dataset=sentences())


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints"])
def test_a_checkpoint_is_not_pushed(strategy: str, tmp_path: Path) -> None:
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to=[], push_to_hub=True, hub_strategy=strategy
    )
    with pytest.raises(UserError, match="push_to_hub.*hub_strategy='end'"):
        XPlusTrainer(select(tiny_model(), [1]), arguments, train_dataset=sentences())


@pytest.mark.parametrize("optim", ["lomo", "adalomo", "galore_adamw_layerwise"])
def test_optimizers_within_the_backward_are_refused(optim: str, tmp_path: Path) -> None:
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], optim=optim)
    with pytest.raises(UserError, match=f"optim={optim}"):
        XPlusTrainer(select(tiny_model(), [1]), arguments, train_dataset=sentences())


# --- what is given to the constructor

CONSTRUCTOR: dict[str, Any] = {
    "model": {},
    "args": {},
    "data_collator": {"data_collator": lambda rows: pad(rows[:2])},
    "train_dataset": {"train_dataset": sentences(30, seed=5)},
    "eval_dataset": {"eval_dataset": {"a": sentences(4, seed=2), "b": sentences(5, seed=3)}},
    "processing_class": {"processing_class": None},
    "compute_loss_func": {
        "compute_loss_func": lambda outputs, labels, num_items_in_batch=None: (
            torch.nn.functional.cross_entropy(
                outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
            )
            / num_items_in_batch
        )
    },
    "compute_metrics": {"compute_metrics": lambda p: {"mean": float(_labelled(p).mean())}},
    "callbacks": {"callbacks": [EarlyStoppingCallback(1)]},
    "optimizer_cls_and_kwargs": {
        "optimizer_cls_and_kwargs": (torch.optim.Adagrad, {"lr": 1e-2}),
    },
    "preprocess_logits_for_metrics": {
        "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1),
        "compute_metrics": lambda p: {"mean": float(_labelled(p).mean())},
    },
}
GIVEN_ELSEWHERE = {"model_init", "optimizers", "self"}  # below


def test_everything_that_the_constructor_takes_is_tried() -> None:
    taken = set(inspect.signature(Trainer.__init__).parameters)
    assert taken - CONSTRUCTOR.keys() - GIVEN_ELSEWHERE == set()


@pytest.mark.parametrize("name", sorted(CONSTRUCTOR))
def test_given_to_the_constructor(name: str, tmp_path: Path) -> None:
    extra = {"metric_for_best_model": "loss", "load_best_model_at_end": True, **SAVED}
    arguments = {**EVALUATED, **(extra if name == "callbacks" else {})}
    assert_alike(tmp_path, arguments, **{"eval_dataset": sentences(6, seed=2)} | CONSTRUCTOR[name])


def test_model_init(tmp_path: Path) -> None:
    def init() -> Any:
        return select(tiny_model(seed=3), [1, 2])

    assert_alike(tmp_path, {}, model=None, model_init=init)


def test_an_optimizer_and_a_scheduler_of_ones_own(tmp_path: Path) -> None:
    def given(model: Any) -> Any:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=1e-2, eps=1e-5)
        return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    assert_alike(tmp_path, {}, optimizers=given)


def test_arguments_changed_after_the_constructor_count(tmp_path: Path) -> None:
    def change(trainer: Any) -> None:
        trainer.args.learning_rate, trainer.args.adam_beta1 = 1e-2, 0.5
        trainer.args.adam_epsilon, trainer.args.weight_decay = 1e-3, 0.7

    assert_alike(tmp_path, {"learning_rate": 1e-4}, before=change)


def test_a_search_uses_each_trials_rate(tmp_path: Path) -> None:
    pytest.importorskip("optuna").logging.set_verbosity(40)
    used: list[tuple[float, float]] = []

    class Spy(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            used.append((args.learning_rate, kwargs["optimizer"].param_groups[0]["lr"]))

    rates = iter((1e-3, 5e-2))
    trainer = XPlusTrainer(
        None,
        TrainingArguments(
            str(tmp_path), max_steps=1, use_cpu=True, report_to=[], disable_tqdm=True,
            lr_scheduler_type="constant",
        ),
        model_init=lambda: select(tiny_model(), [1]), train_dataset=sentences(),
        eval_dataset=sentences(4), data_collator=pad, callbacks=[Spy()],
    )  # fmt: skip
    trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": next(rates)}, n_trials=2, backend="optuna"
    )
    assert used == [(1e-3, 1e-3), (5e-2, 5e-2)]
    assert isinstance(trainer.optimizer.optimizer, AdamW)


def _labelled(prediction: Any) -> np.ndarray:
    """What was predicted where something is: of padding, stock's logits are what chance made."""
    pairs = [(prediction.predictions, prediction.label_ids)]
    if isinstance(prediction.predictions, list):  # not concatenated
        pairs = list(zip(*pairs[0], strict=True))
    return np.concatenate(
        [np.asarray(values)[:, :-1][np.asarray(labels)[:, 1:] != -100] for values, labels in pairs]
    )


def _metrics(prediction: Any) -> dict[str, float]:
    given = getattr(prediction, "inputs", None)
    inputs = 0.0 if given is None else float((np.asarray(given) > 0).mean())
    return {"mean": float(_labelled(prediction).mean()), "inputs": inputs}


class _BatchMetrics:
    """Adds up over batches, as `batch_eval_metrics` asks for."""

    def __init__(self) -> None:
        self.total = 0.0

    def __call__(self, prediction: Any, compute_result: bool = False) -> dict[str, float]:
        self.total += float(_labelled(prediction).mean())
        if not compute_result:
            return {}
        total, self.total = self.total, 0.0
        return {"mean": total}
