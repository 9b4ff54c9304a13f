"""What rounding the frozen layers costs: loss curves, gradients, and the model that is exported.

The demo's model (SmolLM2-135M, fp32 on a CPU) trains a stage four times from the same weights, on
the same packs in the same order: frozen layers as they are, in INT8, FP8 and NF4. FP8 rounds
activations and gradients too, by the same rule as its GEMMs on a GPU. What trains is never rounded,
and what is exported is put into the unquantized model: so the held-out loss is taken there.

    python -m benchmarks.memory.frozen_formats           (20 minutes on 2 cores, after `make demo`)
    python -m benchmarks.memory.frozen_formats --report  (table and picture, again)
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainingArguments
from transformers.trainer_callback import PrinterCallback

import xplus_kernels as ops
from benchmarks.environment import describe_environment, fill
from xplus_fast import XPlusTrainer
from xplus_fast.config import load_recipe
from xplus_fast.data.corpus import PackCollator, load_corpus, pack_examples
from xplus_fast.model.checkpoint_files import CheckpointFiles
from xplus_fast.model.families import PACKED
from xplus_fast.model.frozen import MATRICES
from xplus_fast.model.layer import unpack
from xplus_fast.model.layout import FORMATS, LayerLayout, Layout
from xplus_fast.model.load import Weights, load_model
from xplus_fast.model.prepare import load_tensors, trained_tensors
from xplus_fast.planning.selection import resolve_layers

ROOT = Path(__file__).parents[2]
RESULTS, DOCUMENT = ROOT / "benchmarks/results/frozen_formats.json", ROOT / "docs/memory.md"
BEGIN, END = "<!-- begin: benchmarks/results/frozen_formats.json -->", "<!-- end -->"
CPU = torch.device("cpu")
TOKENS = 256  # of a pack; a step is one pack
GRADIENT_PACKS = 4  # whose gradients are compared at step 0
WINDOW = 20  # steps of a moving average: what "the loss curve" means below
BARS = {"int8": 0.01, "fp8": 0.01, "nf4": 0.05}  # of the loss curve, at its worst window
COSINE = 0.99  # of all trained gradients together, formats of a byte a weight
COLORS = {"bf16": "#5c6b7a", "int8": "#3b8f4f", "fp8": "#1f6f8b", "nf4": "#c8553d"}
NAMES = {"bf16": "as they are", "int8": "int8", "fp8": "fp8", "nf4": "nf4"}


@dataclass(frozen=True)
class Setup:
    """A model on disk, what it trains on and what it is measured on."""

    folder: Path
    train: Sequence[dict[str, Any]]  # packed rows
    heldout: Sequence[dict[str, Any]]
    stages: Sequence[tuple[str, float, float]]  # layers, learning rate, its floor


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--recipe", default=str(ROOT / "recipes/demo.yaml"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--smoke", action="store_true", help="a tiny random model: seconds")
    parser.add_argument(
        "--report", action="store_true", help="only draw and write what --out holds already"
    )
    options = parser.parse_args(arguments)
    if options.report:
        result = json.loads(options.out.read_text())
        said = [f"written to {DOCUMENT}"]
        DOCUMENT.write_text(with_table(DOCUMENT.read_text(), result))
    else:
        if not options.smoke and not Path(load_recipe(options.recipe).model).exists():
            print("the demo's model is not there; `make demo` makes it", file=sys.stderr)
            return 2
        with tempfile.TemporaryDirectory() as folder:
            setup = _tiny(Path(folder)) if options.smoke else _demo(options.recipe)
            result = measure(setup, options.steps)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        said = [f"written to {options.out}"]
    said += draw(result, options.out.with_suffix(".png"))
    print("\n".join([table(result), "", *said]))
    return 0


def measure(setup: Setup, steps: int) -> dict[str, Any]:
    """Every stage in every format, as JSON."""
    start = time.perf_counter()
    result: dict[str, Any] = {**describe_environment(), "steps": steps, "stages": {}}
    result["tokens_per_step"] = statistics.mean(len(row["input_ids"]) for row in setup.train)
    result["untrained_heldout"] = _heldout_loss(_load(setup, (), "bf16"), setup.heldout)
    for spec, rate, floor in setup.stages:
        found, true = {}, None
        for form in FORMATS:
            found[form], gradients = _train(setup, spec, form, steps, rate, floor)
            true = gradients if true is None else true
            if form != "bf16":
                found[form]["gradients"] = compare_gradients(gradients, true)
                found[form]["curve"] = compare_curves(
                    found[form]["losses"], found["bf16"]["losses"]
                )
            print(f"{spec}, {form}: {found[form]['seconds']:.0f} s", file=sys.stderr, flush=True)
        result["stages"][spec] = {"learning_rate": rate, "formats": found}
    result["seconds"] = time.perf_counter() - start
    return result


def compare_gradients(
    mine: dict[str, Tensor], true: dict[str, Tensor]
) -> dict[str, dict[str, float]]:
    """Cosine and relative error of all gradients together, and over tensors."""
    assert mine.keys() == true.keys()
    cosines, errors = [], []
    dot = one = other = off = 0.0
    for name, t in true.items():
        a, b = mine[name].double(), t.double()
        aa, bb, ab = (float((x * y).sum()) for x, y in ((a, a), (b, b), (a, b)))
        difference = float((a - b).square().sum())
        cosines.append(ab / math.sqrt(aa * bb))
        errors.append(math.sqrt(difference / bb))
        dot, one, other, off = dot + ab, one + aa, other + bb, off + difference
    return {
        "cosine": {
            "all": dot / math.sqrt(one * other),
            "median": statistics.median(cosines),
            "least": min(cosines),
        },
        "error": {
            "all": math.sqrt(off / other),
            "median": statistics.median(errors),
            "most": max(errors),
        },
    }


def compare_curves(mine: Sequence[float], true: Sequence[float]) -> dict[str, float]:
    """Relative distances: of moving averages (mean and worst window), and of the worst step."""
    smooth = zip(moving_average(mine), moving_average(true), strict=True)
    windows = [a / b - 1 for a, b in smooth]
    return {
        "mean": statistics.mean(windows),
        "mean_distance": statistics.mean(map(abs, windows)),
        "worst_window": max(map(abs, windows)),
        "worst_step": max(abs(a / b - 1) for a, b in zip(mine, true, strict=True)),
        "end": windows[-1],
    }


def moving_average(values: Sequence[float]) -> list[float]:
    """Means of `WINDOW` neighbours; of all values, where they are fewer."""
    width = min(WINDOW, len(values))
    return [statistics.mean(values[i : i + width]) for i in range(len(values) - width + 1)]


def table(result: dict[str, Any]) -> str:
    """The figures as they stand in docs/memory.md."""
    lines = [
        "| trained | frozen layers | rounding of weights | loss curve: mean, worst window,"
        " worst step | gradients: cosine of all, least of a tensor | error of all |"
        " held-out loss of the export |",
        "|---|---|---|---|---|---|---|",
    ]
    for spec, stage in result["stages"].items():
        plain = stage["formats"]["bf16"]["heldout"]
        for form, found in stage["formats"].items():
            if form == "bf16":
                lines.append(f"| {spec} | {NAMES[form]} | - | - | - | - | {plain:.4f} |")
                continue
            c, g = found["curve"], found["gradients"]
            lines.append(
                f"| {spec} | {NAMES[form]} | {found['rounding']:.1%} | {c['mean']:+.2%},"
                f" {c['worst_window']:.2%}, {c['worst_step']:.1%} |"
                f" {g['cosine']['all']:.4f}, {g['cosine']['least']:.4f} | {g['error']['all']:.1%} |"
                f" {found['heldout']:.4f} ({found['heldout'] / plain - 1:+.2%}) |"
            )
    lines += ["", *verdicts(result), ""]
    lines.append(
        f"{result['steps']} steps of {result['tokens_per_step']:.0f} tokens on average, a window is"
        f" {WINDOW} steps; held-out loss before training {result['untrained_heldout']:.4f}."
        f" {result['device']['name']}, fp32; torch {result['versions']['torch']}."
    )
    return "\n".join(lines)


def verdicts(result: dict[str, Any]) -> list[str]:
    """One line for each bar: kept or missed."""
    lines = []
    for form, bar in BARS.items():
        worst = {
            spec: s["formats"][form]["curve"]["worst_window"]
            for spec, s in result["stages"].items()
        }
        said = ", ".join(f"{spec} {x:.2%}" for spec, x in worst.items())
        kept = "kept" if max(worst.values()) <= bar else "missed"
        lines.append(f"- {form}: loss curve within {bar:.0%}, at its worst window: {kept} ({said})")
    for form in ("int8", "fp8"):
        cosines = {
            spec: s["formats"][form]["gradients"]["cosine"]["all"]
            for spec, s in result["stages"].items()
        }
        said = ", ".join(f"{spec} {x:.4f}" for spec, x in cosines.items())
        kept = "kept" if min(cosines.values()) > COSINE else "missed"
        lines.append(f"- {form}: cosine of the gradients above {COSINE}: {kept} ({said})")
    return lines


def with_table(document: str, result: dict[str, Any]) -> str:
    """The document with the table between its markers. Raises ValueError where they are missing."""
    return fill(document, BEGIN, table(result), END)


def draw(result: dict[str, Any], file: Path) -> list[str]:
    """Loss curves and their distance, a row for each stage; returns what to say."""
    try:
        import matplotlib
    except ImportError:
        return ["no picture: matplotlib is not installed"]
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import PercentFormatter

    style: Any = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 10}
    with plt.rc_context(style):
        rows = len(result["stages"])
        figure, grid = plt.subplots(
            rows, 2, figsize=(11, 3.4 * rows), squeeze=False, layout="constrained", sharex=True
        )
        for (left, right), (spec, stage) in zip(grid, result["stages"].items(), strict=True):
            smooth = {f: moving_average(s["losses"]) for f, s in stage["formats"].items()}
            offset = result["steps"] - len(next(iter(smooth.values()))) + 1
            steps = range(offset, result["steps"] + 1)
            for form, values in smooth.items():
                options: Any = dict(color=COLORS[form], label=NAMES[form], linewidth=1.8)
                left.plot(steps, values, **options)
                if form == "bf16":
                    right.axhline(0, color=COLORS["bf16"], linewidth=1.2)
                    continue
                away = [a / b - 1 for a, b in zip(values, smooth["bf16"], strict=True)]
                right.plot(steps, away, **options)
                for sign in (1, -1):
                    right.axhline(
                        sign * BARS[form], color=COLORS[form], linewidth=1, linestyle=(0, (2, 3))
                    )
            most = 1.15 * max(BARS.values())
            low, high = right.get_ylim()
            right.set_ylim(min(low, -most), max(high, most))
            right.yaxis.set_major_formatter(PercentFormatter(1.0))
            left.set_title(f"{spec} trained: loss", loc="left", fontsize=11)
            right.set_title("distance to frozen layers as they are", loc="left", fontsize=11)
            left.legend(frameon=False, title="frozen layers", alignment="left")
            right.text(
                0.99, 0.02, "dotted: the bars", transform=right.transAxes, ha="right",
                fontsize=9, color="#5c6b7a",
            )  # fmt: skip
            for axes in (left, right):
                axes.grid(axis="y", color="#e4e8ec", linewidth=0.8)
                axes.set_axisbelow(True)
        for axes in grid[-1]:
            axes.set_xlabel(f"step (mean of the last {WINDOW})")
        figure.savefig(file, dpi=130)
        plt.close(figure)
    return [f"picture: {file}"]


def _train(
    setup: Setup, spec: str, form: str, steps: int, rate: float, floor: float
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """One run: its figures, and its gradients at step 0."""
    start = time.perf_counter()
    torch.manual_seed(0)
    count = AutoConfig.from_pretrained(setup.folder).num_hidden_layers
    layers = resolve_layers(spec, count)
    model = _load(setup, layers, form)
    found: dict[str, Any] = {"rounding": _rounding(model, setup, form)}
    gradients = _gradients(model, setup.train[:GRADIENT_PACKS])
    with tempfile.TemporaryDirectory() as folder:
        trainer = XPlusTrainer(
            model,
            TrainingArguments(
                folder, use_cpu=True, max_steps=steps, per_device_train_batch_size=1,
                learning_rate=rate, lr_scheduler_type="cosine_with_min_lr",
                lr_scheduler_kwargs={"min_lr": floor}, warmup_steps=0.03, weight_decay=0.01,
                logging_steps=1, logging_nan_inf_filter=False, save_strategy="no", report_to=[],
                disable_tqdm=True, remove_unused_columns=False, seed=0,
            ),
            train_dataset=setup.train, data_collator=PackCollator(),
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    found["losses"] = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(found["losses"]) == steps
    export = _load(setup, (), "bf16")
    load_tensors(export, trained_tensors(model))
    found["heldout"] = _heldout_loss(export, setup.heldout)
    found["seconds"] = time.perf_counter() - start
    return found, gradients


def _load(setup: Setup, trained: Sequence[int], form: Any) -> Any:
    config = AutoConfig.from_pretrained(setup.folder)
    layers = tuple(LayerLayout(i in trained, form) for i in range(config.num_hidden_layers))
    weights = Weights(CheckpointFiles.open(setup.folder))
    return load_model(weights, config, Layout(layers), dtype=torch.float32, device=CPU)


def _rounding(model: Any, setup: Setup, form: str) -> float:
    """Norm of what the format takes from the frozen matrices, relative to theirs."""
    weights = Weights(CheckpointFiles.open(setup.folder))
    off = whole = 0.0
    for block in model.model.layers:
        if block.frozen is None:
            continue
        for name in MATRICES:
            names = tuple(f"model.layers.{block.layer_idx}.{part}" for part in PACKED[name])
            true, frozen = weights.read(names, torch.float32), block.frozen.weights[name]
            out = torch.empty_like(true)
            if form == "fp8":
                ops.dequantize_fp8(frozen.rows, out=out)
            elif form == "int8":
                ops.dequantize_int8(frozen, out=out)
            else:
                ops.dequantize_nf4(frozen, out=out)
            off += float((out - true).square().sum())
            whole += float(true.square().sum())
    return math.sqrt(off / whole) if whole else 0.0


def _gradients(model: Any, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Gradients of what trains, under Hugging Face's names."""
    model(**PackCollator()(rows)).loss.backward()
    found: dict[str, Tensor] = {}
    for block in model.model.layers:
        for packed in block.packed:
            p = block.weight(packed)
            if p is not None and p.grad is not None:
                for name, part in unpack(block.shape, packed, p.grad).items():
                    found[f"{block.layer_idx}.{name}"] = part
    model.zero_grad()
    return found


@torch.no_grad()
def _heldout_loss(model: Any, rows: Sequence[dict[str, Any]]) -> float:
    """Nats per supervised token."""
    total, count = 0.0, 0
    for row in rows:
        batch = PackCollator()([row])
        n = len(batch["supervised_rows"])
        total, count = total + float(model(**batch).loss) * n, count + n
    return total / count


def _demo(recipe_file: str) -> Setup:
    recipe = load_recipe(recipe_file)
    tokenizer = AutoTokenizer.from_pretrained(recipe.model)
    data = replace(recipe.data, pack_tokens=TOKENS)
    corpus = load_corpus(data.sources, data, tokenizer, seed=recipe.seed, show=False)
    examples = [e for part in corpus.heldout.values() for e in part]
    stages = [(str(s.layers), s.learning_rate, s.min_learning_rate) for s in recipe.stages]
    # in memory: the Trainer's sampler sees a plain list
    train = [corpus.train[i] for i in range(len(corpus.train))]
    return Setup(Path(recipe.model), train, pack_examples(examples, tokenizer, data), stages)


def _tiny(folder: Path) -> Setup:
    """A random model that fits FP8's multiples of 16, on random tokens."""
    torch.manual_seed(0)
    vocabulary = 96
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    rows = []
    for _ in range(8):
        ids = torch.randint(0, vocabulary, (30,))
        rows.append({"input_ids": ids, "labels": ids.clone(), "lengths": [13, 17]})
    return Setup(folder, rows[:6], rows[6:], [("bottom:1", 1e-3, 1e-4), ("top:2", 1e-3, 1e-4)])


if __name__ == "__main__":
    sys.exit(main())
