"""One run of the experiment: the engine's own for what it trains, stock Trainer with PEFT for LoRA.

Whatever trained it, a run gives the tensors it changed at any scale of the change.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from benchmarks.recipe.material import Material
from xplus_fast.config import DataConfig, Recipe, Source, Stage, TrainingConfig
from xplus_fast.data.corpus import PackCollator, load_corpus
from xplus_fast.files import make_folder
from xplus_fast.training.changes import Changes
from xplus_fast.training.run import train
from xplus_fast.training.run_folder import read_metrics

RANK = 64  # of LoRA, as in the published comparison (arXiv 2609.13680); its scale is 2
BESIDE: list[Any] = ["embedding", "final_norm"]  # train with everything; the head is tied
REPLAY_SHARE = 0.2  # of the supervised tokens
FLOOR = 0.1  # of the learning rate, where its cosine ends
FULL, LORA = "full", "LoRA"
At = Callable[[float], Mapping[str, Tensor]]  # scale -> the tensors that are not the base's


@dataclass(frozen=True)
class Run:
    """variant: a name of `variants`."""

    variant: str
    rate: float
    replay: bool
    seed: int

    @property
    def name(self) -> str:
        replay = "-replay" if self.replay else ""
        return f"{self.variant.replace(' ', '-')}-{self.rate:g}{replay}-seed{self.seed}"


def variants(recipe: Recipe) -> dict[str, tuple[str, ...]]:
    """The ways that are compared, after a recipe's two stages -> the layers of each stage."""
    low, high = (str(stage.layers) for stage in recipe.stages)
    return {
        FULL: ("all",), "two stages": (low, high), "top": (high,), "bottom": (low,),
        LORA: ("all",), "joint": (f"{low},{high}",),
    }  # fmt: skip


def recipe_of(
    run: Run, demo: Recipe, material: Material, steps: int, tokens: int, folder: Path
) -> Recipe:
    """As a user would write it. tokens: of a step."""
    layers = variants(demo)[run.variant]
    also = BESIDE if run.variant == FULL else []
    sources = list(material.sources)
    if run.replay:
        sources.append(Source(str(material.replay), format="messages", share=REPLAY_SHARE))
    return Recipe(
        model=demo.model,
        output=str(folder),
        stages=[
            Stage(
                one, also=also, learning_rate=run.rate, min_learning_rate=FLOOR * run.rate,
                steps=steps // len(layers),
            )  # fmt: skip
            for one in layers
        ],
        data=DataConfig(
            sources=sources, pack_tokens=tokens, cache=str(folder.parent.parent / "cache")
        ),
        training=replace(
            TrainingConfig(), tokens_per_step=tokens, save_steps=max(1, steps // 2),
            save_total_limit=1,
        ),  # fmt: skip
        dtype="bfloat16" if demo.dtype == "auto" else demo.dtype,
        seed=run.seed,
    )  # fmt: skip


def carry_out(recipe: Recipe, run: Run, material: Material) -> tuple[At, list[float]]:
    """Train what is not trained yet: what changed, and the loss of each step."""
    folder = Path(recipe.output)
    if run.variant == LORA:
        return _lora(recipe, material)
    train(recipe)
    changes = Changes(folder)
    return lambda scale: changes.at(f"{scale:g}"), [m["loss"] for m in read_metrics(folder)]


def _lora(recipe: Recipe, material: Material) -> tuple[At, list[float]]:
    """Adapters on all linear layers of the blocks; a run that was cut off begins again."""
    from peft import LoraConfig, get_peft_model

    folder, stage, options = Path(recipe.output), recipe.stages[0], recipe.training
    file = folder / "adapters.safetensors"
    if not file.exists():
        shutil.rmtree(folder, ignore_errors=True)
        make_folder(folder)
        corpus = load_corpus(
            recipe.data.sources, recipe.data, material.tokenizer, seed=recipe.seed, show=False
        )
        torch.manual_seed(recipe.seed)
        stock = AutoModelForCausalLM.from_pretrained(
            recipe.model, dtype=getattr(torch, recipe.dtype)
        )
        # With a cache Hugging Face's models no longer see where one packed sequence ends
        stock.config.use_cache = False
        config = LoraConfig(
            r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        model: Any = get_peft_model(stock, config)
        trainer = Trainer(
            model,
            TrainingArguments(
                str(folder), use_cpu=True, max_steps=stage.steps or -1,
                per_device_train_batch_size=1, learning_rate=_rate(stage),
                lr_scheduler_type="cosine_with_min_lr",
                lr_scheduler_kwargs={"min_lr": stage.min_learning_rate},
                warmup_steps=stage.warmup, weight_decay=options.weight_decay,
                max_grad_norm=options.max_grad_norm, logging_steps=1, save_strategy="no",
                report_to=[], disable_tqdm=True, remove_unused_columns=False, seed=recipe.seed,
            ),
            train_dataset=corpus.train.packed(options.tokens_per_step),
            data_collator=PackCollator(shared_prefixes=False),  # a stock model knows none
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        kept = {"losses": torch.tensor(losses)}
        for name, module in model.base_model.model.named_modules():
            if hasattr(module, "lora_A"):
                kept[f"{name}.weight.a"] = module.lora_A["default"].weight.detach().float()
                kept[f"{name}.weight.b"] = module.lora_B["default"].weight.detach().float()
        new = file.with_suffix(".new")
        save_file(kept, new)
        new.rename(file)
    kept = load_file(file)
    losses = kept.pop("losses").tolist()
    base = AutoModelForCausalLM.from_pretrained(recipe.model, dtype=torch.float32).state_dict()
    names = [key.removesuffix(".a") for key in kept if key.endswith(".a")]

    def at(scale: float) -> dict[str, Tensor]:
        changed = {n: 2 * scale * kept[f"{n}.b"] @ kept[f"{n}.a"] for n in names}
        return {n: base[n] + change for n, change in changed.items()}

    return at, losses


def _rate(stage: Stage) -> float:
    assert isinstance(stage.learning_rate, float)
    return stage.learning_rate
