"""The recipe in miniature: which layers train, what translation gains and what is forgotten.

The demo's model (SmolLM2-135M, fp32 on a CPU) is fine-tuned in several ways, each from the same
weights, on the same packed rows, for the same number of steps: the recipe's two stages, each of
its halves alone, both at once, as many layers at one end only, everything, and LoRA. Half of the
steps are one pass over the rows: a stage sees every row once, everything else sees it twice.

    python -m benchmarks.recipe.experiment               (an hour on a core, after `make demo`)
    python -m benchmarks.recipe.experiment --steps 120   (another budget)

The results file is written after every variant; the same command goes on where it was stopped.
"""

import argparse
import gc
import importlib.util
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from benchmarks.environment import describe_environment
from benchmarks.recipe.report import RESULTS, draw, table
from xplus_fast import XPlusTrainer
from xplus_fast.config import DataConfig, EvaluationConfig, Recipe, Source, Stage, load_recipe
from xplus_fast.data.corpus import PackCollator, load_corpus
from xplus_fast.data.readers import Example, read_text
from xplus_fast.errors import UserError
from xplus_fast.measuring.heldout import measure
from xplus_fast.planning.selection import resolve_layers

ROOT = Path(__file__).parents[2]
DRAWS = 400  # of a bootstrap
RANK = 64  # of LoRA, as in the published comparison (arXiv 2609.13680); its scale is 2
BESIDE = ("embedding", "final_norm")  # train with everything, beside the layers; the head is tied


@dataclass(frozen=True)
class Variant:
    """One way to fine-tune: what trains, one selection after another with equal steps."""

    stages: tuple[str, ...]
    kind: str = "layers"  # or "full", "lora"


@dataclass(frozen=True)
class Setup:
    """What every variant shares."""

    recipe: Recipe
    tokenizer: Any
    rows: list[dict[str, Any]]  # packed, of the training data
    heldout: dict[str, list[Example]]
    texts: list[str]  # whose loss should not move


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=40, help="of every variant, an even number")
    parser.add_argument("--recipe", default=str(ROOT / "recipes/demo.yaml"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--only", help="these variants, separated by commas; the others later")
    parser.add_argument("--restart", action="store_true", help="throw what --out holds away")
    parser.add_argument("--smoke", action="store_true", help="a tiny random model: seconds")
    options = parser.parse_args(arguments)
    logging.disable_progress_bar()
    try:
        with tempfile.TemporaryDirectory() as folder:
            recipe = tiny_recipe(Path(folder)) if options.smoke else _demo_recipe(options.recipe)
            result = run(
                recipe, steps=options.steps, out=options.out, only=options.only,
                restart=options.restart,
            )  # fmt: skip
    except UserError as e:
        print(f"recipe: {e}", file=sys.stderr)
        return 2
    said = draw(result, options.out.with_suffix(".png"))
    print("\n".join([table(result), "", f"written to {options.out}", *said]))
    return 0


def run(
    recipe: Recipe, *, steps: int, out: Path, only: str | None = None, restart: bool = False
) -> dict[str, Any]:
    """Measure the base and every variant that `out` does not hold yet; returns all, JSON-able.

    Raises `UserError` for an odd number of steps, an unknown variant, and for an `out` that holds
    figures of other settings.
    """
    if steps < 2 or steps % 2:
        raise UserError(f"--steps: an even number from 2 is wanted, found {steps}")
    setup = _set_up(recipe, steps)
    ways = variants(recipe)
    chosen = list(ways) if only is None else [name.strip() for name in only.split(",")]
    if unknown := [name for name in chosen if name not in ways]:
        raise UserError(f"--only: {unknown[0]!r} is not one of {', '.join(ways)}")
    result = _begin(setup, ways, steps, out, restart)
    if "base" not in result:
        model = _load(recipe)
        result["base"] = _measure(model, setup)
        _say("base", result["base"])
        _write(result, out)
        del model
    for name in chosen:
        if result["variants"].get(name, {}).get("status") == "ok":
            continue
        result["variants"][name] = found = _try(ways[name], setup, steps)
        _say(name, found)
        order = {n: result["variants"][n] for n in ways if n in result["variants"]}
        result["variants"] = order
        _write(result, out)
        gc.collect()  # a Trainer refers to itself
    return result


def variants(recipe: Recipe) -> dict[str, Variant]:
    """The ways that are compared, after a recipe's two stages."""
    low, high = (str(stage.layers) for stage in recipe.stages)
    count = _layers(recipe)
    both = len(resolve_layers(f"{low},{high}", count))
    return {
        "two stages": Variant((low, high)),
        "bottom only": Variant((low,)),
        "top only": Variant((high,)),
        "joint": Variant((f"{low},{high}",)),
        "full": Variant(("all",), "full"),
        "LoRA": Variant(("all",), "lora"),
        "as many at the bottom": Variant((f"bottom:{both}",)),
        "as many at the top": Variant((f"top:{both}",)),
    }


def _set_up(recipe: Recipe, steps: int) -> Setup:
    tokenizer = AutoTokenizer.from_pretrained(recipe.model)
    data = recipe.data
    corpus = load_corpus(data.sources, data, tokenizer, seed=recipe.seed, show=False)
    # in memory, and no more than every variant sees: half of the steps are one pass
    rows = [corpus.train[i] for i in range(min(steps // 2, len(corpus.train)))]
    return Setup(recipe, tokenizer, rows, corpus.heldout, read_text(data.retention))


def _begin(
    setup: Setup, ways: dict[str, Variant], steps: int, out: Path, restart: bool
) -> dict[str, Any]:
    """A new result, or the one that was stopped."""
    stage = setup.recipe.stages[-1]
    settings = {
        "steps": steps,
        "rows": len(setup.rows),
        "tokens": sum(len(row["input_ids"]) for row in setup.rows),
        "supervised": sum(int((row["labels"] != -100).sum()) for row in setup.rows),
        "learning_rate": stage.learning_rate,
        "min_learning_rate": stage.min_learning_rate,
        "heldout": {tag: len(examples) for tag, examples in setup.heldout.items()},
        "variants": json.loads(json.dumps({name: asdict(way) for name, way in ways.items()})),
        "rank": RANK,
    }
    if out.exists() and not restart:
        before = json.loads(out.read_text())
        if before.get("settings") != settings:
            raise UserError(f"{out}: holds figures of other settings; --restart throws them away")
        return {**before, **describe_environment()}
    return {**describe_environment(), "settings": settings, "variants": {}}


def _try(way: Variant, setup: Setup, steps: int) -> dict[str, Any]:
    if way.kind == "lora" and importlib.util.find_spec("peft") is None:
        return {"status": "not importable: peft"}
    model = _load(setup.recipe)
    start = time.perf_counter()
    losses: list[float] = []
    trained: set[str] = set()
    for i, layers in enumerate(way.stages):
        model, more, names = _train(model, way.kind, layers, setup, steps // len(way.stages), i)
        losses += more
        trained |= names
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    seconds = time.perf_counter() - start
    if way.kind == "lora":
        count = _count_lora(model)
        model = model.merge_and_unload()
    else:
        count = sum(sizes[name] for name in trained)
    return {
        "status": "ok",
        "trained_parameters": count,
        "seconds": seconds,
        "losses": losses,
        **_measure(model, setup),
    }


def _train(
    model: Any, kind: str, layers: str, setup: Setup, steps: int, index: int
) -> tuple[Any, list[float], set[str]]:
    """One stage -> the model, its losses, the names of what trained."""
    stage = setup.recipe.stages[min(index, len(setup.recipe.stages) - 1)]
    options: dict[str, Any] = {}
    cls: type[Trainer] = XPlusTrainer
    if kind == "lora":
        cls, model = Trainer, _with_lora(model)
    else:
        options["layers"] = layers
        options["also"] = BESIDE if kind == "full" else ()
    training = setup.recipe.training
    with tempfile.TemporaryDirectory() as folder:
        trainer = cls(
            model,
            TrainingArguments(
                folder, use_cpu=True, max_steps=steps, per_device_train_batch_size=1,
                learning_rate=stage.learning_rate, lr_scheduler_type="cosine_with_min_lr",
                lr_scheduler_kwargs={"min_lr": stage.min_learning_rate},
                warmup_steps=stage.warmup, weight_decay=training.weight_decay,
                max_grad_norm=training.max_grad_norm, logging_steps=1,
                logging_nan_inf_filter=False, save_strategy="no", report_to=[],
                disable_tqdm=True, remove_unused_columns=False, seed=setup.recipe.seed,
            ),
            # a stock model knows no shared prompts
            train_dataset=setup.rows,
            data_collator=PackCollator(shared_prefixes=cls is XPlusTrainer), **options,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    trainer.accelerator.free_memory()  # the optimizer's states, before the next stage's come
    return model, losses, names


def _with_lora(model: Any) -> Any:
    """The stock model with adapters on all linear layers of its blocks."""
    from peft import LoraConfig, get_peft_model

    # With a cache Hugging Face's models no longer see where one packed sequence ends
    model.config.use_cache = False
    torch.manual_seed(0)
    config = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


def _count_lora(model: Any) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)


def _measure(model: Any, setup: Setup) -> dict[str, Any]:
    """Held-out loss, chrF++ with its interval, retention loss; samples of what the model writes."""
    start = time.perf_counter()
    config = replace(setup.recipe.evaluation, samples=setup.recipe.evaluation.translate)
    found = measure(
        model, setup.tokenizer, setup.heldout, setup.texts,
        data=setup.recipe.data, config=config, show=True,
    )  # fmt: skip
    found["chrf_interval"] = {tag: _interval(s) for tag, s in found["samples"].items()}
    shown = setup.recipe.evaluation.samples
    found["samples"] = {tag: s[:shown] for tag, s in found["samples"].items()}
    return {**found, "measuring_seconds": time.perf_counter() - start}


def _interval(samples: list[dict[str, str]]) -> list[float]:
    """95 % interval of chrF++ by bootstrap over the sentences (Koehn 2004)."""
    from sacrebleu.metrics import CHRF

    metric, chance, scores = CHRF(word_order=2), random.Random(0), []
    for _ in range(DRAWS):
        drawn = chance.choices(samples, k=len(samples))
        outputs, references = ([s[key] for s in drawn] for key in ("output", "reference"))
        scores.append(metric.corpus_score(outputs, [references]).score)
    scores.sort()
    return [scores[int(0.025 * DRAWS)], scores[int(0.975 * DRAWS)]]


def _load(recipe: Recipe) -> Any:
    return AutoModelForCausalLM.from_pretrained(recipe.model, dtype=torch.float32)


def _layers(recipe: Recipe) -> int:
    config = json.loads((Path(recipe.model) / "config.json").read_text())
    return int(config["num_hidden_layers"])


def _write(result: dict[str, Any], out: Path) -> None:
    """Whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    new = out.with_name(f".{out.name}.new")
    new.write_text(json.dumps(result, indent=1) + "\n")
    new.rename(out)


def _say(name: str, found: dict[str, Any]) -> None:
    if found.get("status", "ok") != "ok":
        print(f"{name}: {found['status']}", file=sys.stderr, flush=True)
        return
    loss = " ".join(f"{tag} {x:.3f}" for tag, x in found["loss"].items())
    chrf = " ".join(f"{tag} {x:.1f}" for tag, x in found["chrf"].items())
    print(
        f"{name}: loss {loss}; chrF++ {chrf}; retention {found['retention']['loss']:.3f};"
        f" {found.get('seconds', 0):.0f} s training, {found['measuring_seconds']:.0f} s measuring",
        file=sys.stderr, flush=True,
    )  # fmt: skip


def _demo_recipe(file: str) -> Recipe:
    recipe = load_recipe(file)
    if not Path(recipe.model).exists():
        raise UserError(f"{recipe.model}: not there; `make demo` makes it")
    if len(recipe.stages) != 2 or not recipe.data.heldout or not recipe.data.retention:
        raise UserError(f"{file}: two stages, data.heldout and data.retention are wanted")
    if len({(s.learning_rate, s.min_learning_rate) for s in recipe.stages}) > 1:
        raise UserError(f"{file}: stages of one learning rate are wanted, which all variants take")
    # everything that is held out is translated, in one batch: the figures are noisy enough
    held = recipe.data.heldout
    evaluation = replace(recipe.evaluation, translate=held, batch_size=held, samples=2)
    return replace(recipe, evaluation=evaluation)


def tiny_recipe(folder: Path) -> Recipe:
    """A random model of four layers, a tokenizer of one token a byte, made-up pairs."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # type: ignore[assignment]
    bpe.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
            bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    words = ["red", "blue", "old", "new", "big", "dry"]
    pairs = [(f"{a} {b}", f"{b.upper()} {a.upper()}") for a in words for b in words]
    (folder / "pairs.jsonl").write_text(
        "".join(json.dumps({"en": a, "fr": b}) + "\n" for a, b in pairs)
    )
    (folder / "text.txt").write_text("A text that should stay.\n\nAnother one.\n")
    return Recipe(
        model=str(folder / "model"),
        output="",
        stages=[Stage("bottom:1", learning_rate=1e-3), Stage("top:2", learning_rate=1e-3)],
        data=DataConfig(
            sources=[Source(str(folder / "pairs.jsonl"), directions="forward")],
            heldout=4,
            retention=[Source(str(folder / "text.txt"), format="text")],
            prompt="{src}-{tgt}: {text}",
            pack_tokens=128,
            cache=str(folder / "cache"),
        ),
        evaluation=EvaluationConfig(samples=1, translate=4, max_new_tokens=8, batch_size=4),
    )


if __name__ == "__main__":
    sys.exit(main())
