"""The demo's training step on a CPU, ours against stock Trainer with padding.

Both take the same sentences, 16 a step, from the same weights: stock as one padded batch, ours
packed into one row. A step is what Trainer does for one: forward, backward, clipping, AdamW,
zero_grad. Ours is timed in four ways: with what sentences begin with in common computed once and
the last layer's rows that predict nothing left out, with one of these alone, and with neither; and,
where there are frozen layers below those that train, as in a second epoch, with what these gave
read from a folder (`data.cache_hidden`). All are interleaved step by step, so that a machine whose
speed drifts treats them alike; what is reported is the ratio. Before any time is taken, all must
give the same loss and gradient norm.

    python -m benchmarks.training.cpu_step        (after `make demo`, or `make bench`)
"""

import argparse
import json
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from benchmarks.environment import describe_environment
from xplus_fast import XPlusTrainer
from xplus_fast.config import load_recipe
from xplus_fast.data.corpus import PackCollator, load_corpus
from xplus_fast.files import scratch
from xplus_fast.model import prepare
from xplus_fast.model.families import shape_of
from xplus_fast.planning.selection import describe_layers, resolve_layers
from xplus_fast.training.hidden_cache import HiddenCache, Part
from xplus_fast.training.hidden_store import InFolder
from xplus_fast.training.place import Place

SENTENCES = 16  # a step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=8, help="timed steps of each, per selection")
    parser.add_argument("--recipe", default="recipes/demo.yaml")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu_step.json"))
    options = parser.parse_args()
    recipe = load_recipe(options.recipe)
    if not Path(recipe.model).exists():
        print(f"{recipe.model}: not there; `make demo` makes it", file=sys.stderr)
        return 2
    tokenizer = AutoTokenizer.from_pretrained(recipe.model)
    corpus = load_corpus(recipe.data.sources, recipe.data, tokenizer, seed=recipe.seed, show=False)
    sentences = _sentences(corpus.train, SENTENCES * (options.steps + 1))
    result: dict[str, Any] = {**describe_environment(), "selections": {}}
    for stage in recipe.stages:
        with scratch("cpu-step-") as folder:
            found = _compare(recipe.model, stage.layers, sentences, options.steps, folder)
        result["selections"][str(stage.layers)] = found
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{table(result)}\n\nwritten to {options.out}")
    return 0


def table(result: dict[str, Any]) -> str:
    """The figures as they stand in README.md."""
    names = {
        "plain": "packed", "pruned": "and of the last layer what counts",
        "shared": "packed, and prompts once", "ours": "all of it",
    }  # fmt: skip
    lines = [
        "| layers | real tokens a step | stock Trainer | " + " | ".join(names.values()) + " |",
        "|---|---|---|" + "---|" * len(names),
    ]
    for spec, s in result["selections"].items():
        cells = [f"{s['seconds'][n]:.2f} s, {s['ratios'][n]['median']:.2f}x" for n in names]
        lines.append(
            f"| {spec} | {s['tokens']:.0f} ({s['padded_tokens']:.0f} padded,"
            f" {s['computed_tokens']:.0f} computed) | {s['seconds']['stock']:.2f} s | "
            + " | ".join(cells)
            + " |"
        )
        if "later" in s["ratios"]:
            more = f"{s['seconds']['later']:.2f} s, {s['ratios']['later']['median']:.2f}x"
            lines.append(
                f"| {spec}, second epoch with the cached hidden states | the same | the same |"
                f" {'- | ' * (len(names) - 1)}{more}; {s['later_ratio']['median']:.2f}x of the"
                " first epoch |"
            )
    device = result["device"]
    lines += [
        "",
        f"{device['name']}, {device['threads']} threads, fp32, medians of"
        f" {s['steps']} steps; torch {result['versions']['torch']},"
        f" transformers {result['versions']['transformers']}.",
    ]
    return "\n".join(lines)


WAYS = {  # prompts once, and the last layer's rows
    "later": (True, True),  # and what enters the lowest trained layer is there
    "ours": (True, True),
    "shared": (True, False),
    "pruned": (False, True),
    "plain": (False, False),
}


def _compare(
    model: str, spec: Any, sentences: list[dict], steps: int, folder: Path
) -> dict[str, Any]:
    trainers: dict[str, Trainer] = {}
    for name, cls in (("stock", Trainer), ("ours", XPlusTrainer)):
        loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        layers = resolve_layers(spec, loaded.config.num_hidden_layers)
        loaded.requires_grad_(False)
        for i in layers:
            loaded.model.layers[i].requires_grad_(True)
        # nothing is learnt: every way sees the same weights at each step
        arguments = TrainingArguments(
            "build/cpu_step", use_cpu=True, report_to=[], disable_tqdm=True, learning_rate=0.0,
            weight_decay=0.0, save_strategy="no",
        )  # fmt: skip
        trainers[name] = cls(loaded, arguments)
        trainers[name].create_optimizer()
        trainers[name].current_gradient_accumulation_steps = 1
    ways = list(WAYS) if layers[0] else [name for name in WAYS if name != "later"]
    times: dict[str, list[float]] = {name: [] for name in ["stock", *ways]}
    tokens, padded, computed = [], [], []
    hidden = _hidden(trainers["ours"].model, layers[0], sentences, folder)
    for step in range(steps + 1):
        rows = sentences[step * SENTENCES : (step + 1) * SENTENCES]
        collated = {on: PackCollator(shared_prefixes=on)(rows) for on in (True, False)}
        batches = {name: collated[WAYS[name][0]] for name in ways}
        batches["stock"] = _pad(rows)
        if "later" in ways:
            below = _keep(hidden, trainers["ours"].model, batches["ours"])
            batches["later"] = {**batches["later"], "below": below}
        seen = {}
        for name in list(times) if step % 2 else reversed(times):
            whole = name == "stock" or WAYS[name][1]
            with nullcontext() if whole else mock.patch.object(prepare, "last_rows", _all_rows):
                trainer = trainers["stock" if name == "stock" else "ours"]
                seconds, seen[name] = _step(trainer, batches[name])
            if step:  # the first is a warm-up
                times[name].append(seconds)
        for found in seen.values():
            for a, b in zip(seen["stock"], found, strict=True):
                if abs(a - b) > 1e-3 * abs(a):
                    raise SystemExit(f"step {step}: stock and ours disagree: {seen}")
        if step:
            tokens.append(sum(r["lengths"][0] for r in rows))
            padded.append(batches["stock"]["input_ids"].numel())
            computed.append(batches["ours"]["input_ids"].numel())
    ratios = {
        name: [a / b for a, b in zip(times["stock"], times[name], strict=True)] for name in ways
    }
    result: dict[str, Any] = {
        "layers": describe_layers(layers),
        "steps": steps,
        "tokens": statistics.mean(tokens),
        "padded_tokens": statistics.mean(padded),
        "computed_tokens": statistics.mean(computed),
        "seconds": {name: statistics.median(found) for name, found in times.items()},
        "ratios": {
            name: {"median": statistics.median(r), "least": min(r), "most": max(r)}
            for name, r in ratios.items()
        },
    }
    if "later" in ways:
        r = [a / b for a, b in zip(times["ours"], times["later"], strict=True)]
        result["later_ratio"] = {"median": statistics.median(r), "least": min(r), "most": max(r)}
    return result


def _hidden(model: Any, level: int, sentences: list[dict], folder: Path) -> HiddenCache:
    """An empty cache for the states of the sentences."""
    width = shape_of(model.config).hidden * 4
    store = InFolder(folder, sum(row["lengths"][0] for row in sentences), width)
    return HiddenCache(level, width, store, {}, Place(torch.device("cpu"), torch.float32, 0, 1))


def _keep(hidden: HiddenCache, model: Any, batch: dict[str, Any]) -> Part:
    """As the first epoch does, untimed; returns what the second one begins with."""
    first = hidden.of(batch["layout"])
    with torch.no_grad():
        model(**batch, below=first)
    first.keep()
    return hidden.of(batch["layout"])


def _all_rows(*_: Any) -> None:
    """In place of `last_rows`: the last layer computes every row."""


def _step(trainer: Trainer, batch: dict[str, Any]) -> tuple[float, tuple[float, float]]:
    """One optimizer step as Trainer makes it -> seconds, (loss, gradient norm)."""
    assert trainer.model is not None and trainer.optimizer is not None
    items = (batch["labels"] != -100).sum()
    start = time.perf_counter()
    loss = trainer.training_step(trainer.model, batch, items)
    norm = torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
    trainer.optimizer.step()
    trainer.model.zero_grad()
    return time.perf_counter() - start, (loss.item(), norm.item())


def _sentences(dataset: Any, n: int) -> list[dict]:
    """The corpus's sequences one by one, in a fixed random order."""
    rows = []
    for pack in dataset:
        ids, labels = (pack[k].split(pack["lengths"]) for k in ("input_ids", "labels"))
        rows += [
            {"input_ids": i, "labels": y, "lengths": [len(i)]}
            for i, y in zip(ids, labels, strict=True)
        ]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:n]
    chosen, place = [], 0
    for i in order:
        chosen.append({**rows[i], "places": [place]})
        place += rows[i]["lengths"][0]
    return chosen


def _pad(rows: list[dict]) -> dict[str, torch.Tensor]:
    def column(name: str, fill: int) -> torch.Tensor:
        parts = [r[name] for r in rows]
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=fill)

    ids = column("input_ids", 0)
    lengths = torch.tensor([r["lengths"][0] for r in rows])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return {"input_ids": ids, "labels": column("labels", -100), "attention_mask": mask}


if __name__ == "__main__":
    sys.exit(main())
