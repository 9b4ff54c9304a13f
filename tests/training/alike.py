"""The same training by stock Trainer and by XPlusTrainer, and what one can see of it."""

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from tests.tiny import VOCABULARY, select, tiny_model
from xplus_fast import XPlusTrainer, prepare_model

CLOSE = 2e-5  # losses and weights
# What tells of the machine, or of what XPlusTrainer says beside.
OWN = ("runtime", "per_second", "mem_", "total_flos", "seconds", "tokens", "supervised", "mfu",
       "memory_bytes")  # fmt: skip


def sentences(n: int = 24, seed: int = 1, least: int = 4, most: int = 20) -> list[dict]:
    """Rows of random ids, the first two tokens unsupervised."""
    g = torch.Generator().manual_seed(seed)
    rows = []
    for length in torch.randint(least, most, (n,), generator=g).tolist():
        ids = torch.randint(0, VOCABULARY, (length,), generator=g).tolist()
        rows.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    return rows


def pad(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Right-padded rows, all of one width so that evaluation can gather them."""

    def column(values: list[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([v + [fill] * (20 - len(v)) for v in values])

    return {
        "input_ids": column([r["input_ids"] for r in rows], 0),
        "labels": column([r["labels"] for r in rows], -100),
        "attention_mask": column([[1] * len(r["input_ids"]) for r in rows], 0),
    }


def trained(cls: Any, folder: Path, arguments: dict[str, Any], **options: Any) -> Any:
    """A trainer after its training: two layers of the tiny model, a few steps, all logged.

    Takes Trainer's options, and `layers`; `before`, called with the trainer before it trains;
    `optimizers`, called with the model to make them; `resume`, a checkpoint to go on from.
    """
    before, resume = options.pop("before", None), options.pop("resume", None)
    layers = options.pop("layers", [1, 2])
    model = options.pop("model", tiny_model())
    if model is not None:
        model = select(model, layers)
    if make := options.pop("optimizers", None):
        options["optimizers"] = make(prepare_model(model) if cls is XPlusTrainer else model)
    given = dict(
        max_steps=3, per_device_train_batch_size=4, learning_rate=2e-3, weight_decay=0.1,
        logging_steps=1, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", seed=3,
        num_train_epochs=1,
        adam_epsilon=1e-5,  # the default makes a whole step of a gradient's last bit
    )  # fmt: skip
    trainer = cls(
        model,
        TrainingArguments(str(folder), **{**given, **arguments}),
        **{"train_dataset": sentences(), "data_collator": pad} | options,
    )
    trainer.remove_callback(PrinterCallback)
    if cls is XPlusTrainer:
        trainer.meter.peak = 1e12  # known: not measured each time
    if before is not None:
        before(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logs(trainer: Any) -> list[dict[str, float]]:
    """All that was logged, but for what `OWN` names."""
    lines = trainer.state.log_history
    return [{k: v for k, v in line.items() if not any(o in k for o in OWN)} for line in lines]


def assert_alike(folder: Path, arguments: dict[str, Any], **options: Any) -> None:
    """Logs (losses, norms, rates, evaluations), checkpoints and weights are stock's."""
    stock = trained(Trainer, folder / "stock", arguments, **options)
    ours = trained(XPlusTrainer, folder / "ours", arguments, **options)
    assert stock.state.global_step == ours.state.global_step > 0
    assert [line.keys() for line in logs(ours)] == [line.keys() for line in logs(stock)]
    for here, there in zip(logs(ours), logs(stock), strict=True):
        for key, value in there.items():
            # a norm is as large as it is: stock's own kernels differ by as much
            near = CLOSE * max(1.0, abs(value)) * (5 if key == "grad_norm" else 1)
            assert abs(here[key] - value) <= near, (key, here, there)
    assert any("loss" in line for line in logs(stock)) or arguments.get("logging_strategy") == "no"
    made = [sorted(p.name for p in (folder / side).glob("checkpoint-*"))
            for side in ("stock", "ours")]  # fmt: skip
    assert made[0] == made[1]
    best = [t.state.best_model_checkpoint and Path(t.state.best_model_checkpoint).name
            for t in (stock, ours)]  # fmt: skip
    assert best[0] == best[1]
    weights = ours.model.state_dict()
    changed = False
    for name, value in stock.model.state_dict().items():
        assert (weights[name] - value).abs().max() <= CLOSE * max(1.0, value.abs().max()), name
        changed |= "layers.1." in name
    assert changed
