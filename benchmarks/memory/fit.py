"""Does a plan fit, and is it right: every promised combination on a GPU, from random weights.

Each case is a process of its own, its allocator capped to the case's budget: plan, load, five
optimizer steps of 16 384 tokens of translation-length packs; then what it took against what the
plan said. Last, what streaming costs: the same step with all layers resident and with the frozen
ones on the host.

    python -m benchmarks.memory.fit                            (writes benchmarks/results/fit.json)
    python -m benchmarks.memory.fit --only 8B-stage2-24GB      (keeps the file's other cases)
    python -m benchmarks.memory.fit --smoke                    (no GPU: every path on tiny models)

Exit code 1: a prediction is off by more than 5 %, a process went over its budget, or died; 2: no
GPU, or one that planning/cards.py does not know.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback

from benchmarks.environment import describe_environment
from benchmarks.memory.fit_report import OVERLAP, describe_case, describe_overlap, judge, table
from benchmarks.models import RandomWeights, make_config
from benchmarks.timing import copy_rate
from xplus_fast import XPlusTrainer
from xplus_fast.config import MemoryConfig
from xplus_fast.data.corpus import PackCollator
from xplus_fast.errors import UserError
from xplus_fast.model.families import shape_of
from xplus_fast.model.load import load_model
from xplus_fast.options import parse_bytes
from xplus_fast.planning.cards import Card, local_card
from xplus_fast.planning.flops import SENTENCE, assumed_work
from xplus_fast.planning.from_recipe import USABLE, free_memory
from xplus_fast.planning.plan import plan_stage
from xplus_fast.planning.search import LADDER, Plan
from xplus_fast.planning.selection import resolve_layers
from xplus_fast.training.place import cap, set_allocator

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/fit.json"
STEP, PACK = 16384, 4096  # tokens
CASE_SECONDS = 420
LAYERS = {"stage1": "bottom:4", "stage2": "top:15"}


@dataclass(frozen=True)
class Case:
    """One process."""

    model: str  # a key of `models.CONFIGS`
    layers: str
    budget: str = ""  # empty: the whole card, uncapped
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    dtype: torch.dtype = torch.bfloat16
    step: int = STEP
    pack: int = PACK


CASES = {
    f"{model}-{stage}-{budget or 'uncapped'}": Case(model, LAYERS[stage], budget)
    for model, budget in (
        ("8B", "16GB"), ("8B", "24GB"), ("14B", "24GB"), ("8B", "80GB"), ("8B", ""),
    )
    for stage in LAYERS
}  # fmt: skip
# Resident and streamed bf16, all else alike and on the device; activations: see `_overlap_case`
PLAIN: dict[str, Any] = dict(
    frozen="bf16", head="bf16", embedding="device", gradients="device", states="device",
    micro_batch_tokens=STEP,
)  # fmt: skip
OVERLAPS = ("8B-stage2-resident", "8B-stage2-streamed")


def _tiny(layers: str, dtype: torch.dtype = torch.bfloat16, **memory: Any) -> Case:
    return Case("tiny", layers, "", MemoryConfig(**memory), dtype, step=256, pack=64)


SMOKE = {
    "plain": _tiny("top:2", torch.float32),
    "bf16-streamed": _tiny("bottom:1", placement="host", gradients="host"),
    "fp8-host-states": _tiny(
        "top:2", frozen="fp8", states="host", gradients="host", activations="recompute",
        micro_batch_tokens=64,
    ),
    "nf4-streamed-offload": _tiny(
        "bottom:2", frozen="nf4", placement="host", embedding="host", head="fp8",
        activations="offload", bits=8, micro_batch_tokens=128,
    ),
    "mixed-formats-rounding": _tiny(
        "2-3", frozen={"0-1": "nf4", "4-5": "fp8"}, placement="host", states="host", bits=8,
        activations="recompute_mlp", master=False, micro_batch_tokens=256,
    ),
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="cases, comma-separated; 'overlap': streaming")
    parser.add_argument("--quick", action="store_true", help="3 steps a case, streaming once")
    parser.add_argument("--smoke", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--out", type=Path, default=None, help=f"default: {RESULTS}")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    steps = 3 if options.quick or options.smoke else 5
    names = [name for name in options.only.split(",") if name]
    known = list(SMOKE) if options.smoke else [*CASES, "overlap"]
    if options.child:
        run_child(names[0], steps, options.child)
        return 0
    if unknown := set(names) - set(known):
        print(f"--only: {unknown.pop()!r} is not one of {', '.join(known)}", file=sys.stderr)
        return 2
    if options.smoke:
        return smoke(names or known, steps, options.out)
    if not torch.cuda.is_available():
        print("fit: no CUDA GPU here; --smoke runs every path on the CPU", file=sys.stderr)
        return 2
    card = local_card()
    if card is None:
        print("fit: planning/cards.py does not know this GPU", file=sys.stderr)
        return 2
    out = options.out or RESULTS
    result = _begin(out, bool(names), card)
    bad = False
    for name in names or known:
        if name == "overlap":
            result["overlap"] = measure_overlap(steps, 1 if options.quick else 2)
            bad |= not result["overlap"]["ok"]
            print(describe_overlap(result["overlap"]), flush=True)
        else:
            found = run_case(name, steps, card)
            result["cases"][name] = found
            bad |= found["status"] != "skipped" and not found.get("ok", False)
            print(describe_case(name, found), flush=True)
        out.parent.mkdir(parents=True, exist_ok=True)  # after each: a machine may go away
        out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{table(result)}\n\nwritten to {out}")
    return int(bad)


def smoke(names: Sequence[str], steps: int, out: Path | None) -> int:
    """Every path of the engine on tiny models and the CPU: it runs, and the loss is finite."""
    found, bad = {}, False
    for name in names:
        try:
            found[name] = execute(SMOKE[name], steps, None, torch.device("cpu"))
        except UserError as e:  # the others run nevertheless
            print(f"{name}: not run: {e}", file=sys.stderr)
            bad = True
            continue
        losses = found[name]["losses"]
        assert len(losses) == steps and all(map(math.isfinite, losses)), (name, losses)
        print(f"{name}: loss {losses[0]:.3f} to {losses[-1]:.3f}; {found[name]['layout']}")
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({**describe_environment(), "cases": found}, indent=1) + "\n")
    return int(bad)


def run_case(name: str, steps: int, card: Card) -> dict[str, Any]:
    """One case in a process of its own, and whether its plan was right."""
    case = CASES.get(name)
    if case and case.budget and parse_bytes(case.budget, name) > card.memory:
        return {"status": "skipped", "error": f"{card.name} has less memory"}
    return judge(spawn(name, steps))


def spawn(name: str, steps: int, *flags: str) -> dict[str, Any]:
    """What `run_child` writes, or why it did not."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "case.json"
        command = [sys.executable, "-m", "benchmarks.memory.fit", "--only", name]
        command += ["--child", str(file), *(["--quick"] * (steps == 3)), *flags]
        path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
        try:
            run = subprocess.run(
                command, cwd=folder, env=os.environ | {"PYTHONPATH": path}, capture_output=True,
                text=True, timeout=CASE_SECONDS,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"status": "failed", "error": f"not done after {CASE_SECONDS} s"}
        if run.returncode or not file.exists():
            said = [line for line in run.stderr.splitlines() if line.strip()][-12:]
            return {"status": "failed", "error": "\n".join(said), "exit": run.returncode}
        return json.loads(file.read_text())


def run_child(name: str, steps: int, out: Path) -> None:
    """In the process of a case."""
    if name in SMOKE:
        found = execute(SMOKE[name], steps, None, torch.device("cpu"))
    else:
        set_allocator()  # as `train` does
        card = local_card()
        assert card is not None
        case = _overlap_case(name, card) if name in OVERLAPS else CASES[name]
        found = execute(case, steps, card, torch.device("cuda", 0))
    out.write_text(json.dumps({"status": "ok", **found}))


def execute(case: Case, steps: int, card: Card | None, device: torch.device) -> dict[str, Any]:
    """Plan, load, train; what was planned, and what it took."""
    torch.manual_seed(0)
    config = make_config(case.model)
    shape = shape_of(config)
    plan = make_plan(case, card)
    if case.budget:
        cap(device, parse_bytes(case.budget, "budget"))
    weights: Any = RandomWeights(shape, device)
    model = load_model(weights, config, plan.layout, dtype=case.dtype, device=device)
    loaded = 0
    if device.type == "cuda":
        torch.cuda.synchronize()
        loaded = torch.cuda.max_memory_allocated()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    losses, seconds = train(model, plan, case, steps, device)
    found = {
        "steps": steps,
        "losses": losses,
        "seconds": seconds,
        "tokens_per_second": case.step / statistics.median(seconds[1:]),
        "plan": {
            "device_bytes": plan.device_bytes,
            "host_bytes": plan.host_bytes,
            "device_total": plan.device_total,
            "micro_batch_tokens": plan.micro_batch_tokens,
            "tokens_per_second": plan.predicted_tokens_per_s,
            "update": asdict(plan.update),
        },
        "layout": _layout_line(plan),
    }
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        outside = total - free - torch.cuda.memory_reserved()
        found["measured"] = {
            "allocated": torch.cuda.max_memory_allocated(),
            "reserved": torch.cuda.max_memory_reserved(),
            "outside": outside,  # of the allocator: context, libraries, kernels
            "process": torch.cuda.max_memory_reserved() + outside,
            "loading": loaded,
            "retries": torch.cuda.memory_stats()["num_alloc_retries"],
        }
        found["budget"] = parse_bytes(case.budget, "budget") if case.budget else total
        found["copy_rate"] = copy_rate(device)
        settings = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
        found["allocator"] = {k: os.environ[k] for k in settings if k in os.environ}
    return found


def make_plan(case: Case, card: Card | None, host: int | None = None) -> Plan:
    """As `xplus-fast plan` makes it; host: bytes that may be pinned, as found here where None."""
    shape = shape_of(make_config(case.model))
    budget = None if card is None else int(card.memory * USABLE)
    if case.budget:
        budget = parse_bytes(case.budget, "budget")
    return plan_stage(
        shape, resolve_layers(case.layers, shape.layers), (), case.memory, card=card,
        dtype_bytes=case.dtype.itemsize, pack_tokens=case.pack, tokens_per_step=case.step,
        work=assumed_work(False),  # sentences of random tokens share nothing
        budget=budget, host=host or free_memory(),
    )  # fmt: skip


def train(
    model: Any, plan: Plan, case: Case, steps: int, device: torch.device
) -> tuple[list[float], list[float]]:
    """Losses and seconds of each optimizer step."""
    rows = plan.micro_batch_tokens // case.pack
    count = case.step // plan.micro_batch_tokens
    packs = make_packs(rows * count * steps, case.pack, model.config.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        trainer = XPlusTrainer(
            model,
            TrainingArguments(
                folder, use_cpu=device.type == "cpu", max_steps=steps,
                per_device_train_batch_size=rows, gradient_accumulation_steps=count,
                learning_rate=1e-5, logging_steps=1, save_strategy="no", report_to=[],
                logging_nan_inf_filter=False, disable_tqdm=True, remove_unused_columns=False,
            ),
            train_dataset=packs, data_collator=PackCollator(), update=plan.update,
            activations=None,  # as they were laid out
        )  # fmt: skip
        wanted = [layer.activations for layer in plan.layout.layers]
        assert [block.activations for block in model.model.layers] == wanted
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    lines = [line for line in trainer.state.log_history if "seconds" in line]
    assert [line["tokens"] for line in lines] == [case.step] * steps
    return [line["loss"] for line in lines], [line["seconds"] for line in lines]


def make_packs(count: int, tokens: int, vocabulary: int) -> list[dict[str, Any]]:
    """Rows full of sentences of `SENTENCE` tokens on average, the last part of each supervised."""
    g = torch.Generator().manual_seed(0)
    packs = []
    for _ in range(count):
        lengths: list[int] = []
        while (room := tokens - sum(lengths)) > 0:
            n = int(torch.randint(SENTENCE // 3, 2 * SENTENCE - SENTENCE // 3 + 1, (), generator=g))
            lengths.append(min(n, room))
        ids = torch.randint(0, vocabulary, (tokens,), generator=g)
        supervised = torch.cat([torch.arange(n) >= n // 2 for n in lengths])
        packs.append(
            {"input_ids": ids, "labels": ids.masked_fill(~supervised, -100), "lengths": lengths}
        )
    return packs


def measure_overlap(
    steps: int, rounds: int, run: Callable[[str, int], dict[str, Any]] = spawn
) -> dict[str, Any]:
    """Step times resident and streamed, in turns, and the share that streaming adds."""
    seconds: dict[str, list[float]] = {name: [] for name in OVERLAPS}
    layouts = {}
    for i in range(rounds):
        for name in OVERLAPS if i % 2 == 0 else reversed(OVERLAPS):
            found = run(name, steps)
            if found["status"] != "ok":
                return {"ok": False, "error": f"{name}: {found['error']}"}
            seconds[name] += found["seconds"][1:]
            layouts[name] = found["layout"]
            if name == OVERLAPS[1]:  # all frozen layers are below the trained ones: once a step
                copied = found["plan"]["host_bytes"]["frozen layers"] / found["copy_rate"]
    resident, streamed = (statistics.median(seconds[name]) for name in OVERLAPS)
    share = streamed / resident - 1
    return {
        "ok": share < OVERLAP, "share": share, "resident_seconds": resident,
        "streamed_seconds": streamed, "copy_seconds": copied,
        "hidden": 1 - max(0.0, streamed - resident) / copied, "seconds": seconds,
        "layouts": layouts, "micro_batch_tokens": STEP,
    }  # fmt: skip


def _overlap_case(name: str, card: Card) -> Case:
    """The same activations in both: the least recomputation that the resident one has room for."""
    for policy in reversed(LADDER):
        resident, streamed = (
            Case("8B", LAYERS["stage2"], memory=MemoryConfig(
                placement=place, activations=policy, **PLAIN
            ))
            for place in ("device", "host")
        )  # fmt: skip
        try:
            make_plan(resident, card)
        except UserError:
            continue
        return streamed if name.endswith("streamed") else resident
    raise UserError(f"overlap: {card.name} has no room for 8B with everything resident")


def _layout_line(plan: Plan) -> str:
    """Formats, places and policies with the number of layers of each."""
    counts: dict[str, int] = {}
    for i, layer in enumerate(plan.layout.layers):
        what = "trained" if layer.trains else f"{layer.format} {layer.placement}"
        what += "" if i < plan.request.lowest else f" {layer.activations}"
        counts[what] = counts.get(what, 0) + 1
    u = plan.update
    return (
        ", ".join(f"{n} x {what}" for what, n in counts.items())
        + f"; head {plan.layout.head}, embedding {plan.layout.embedding}, gradients {u.gradients},"
        f" {u.bits}-bit states {u.states}; micro-batches of {plan.micro_batch_tokens}"
    )


def _begin(out: Path, merge: bool, card: Card) -> dict[str, Any]:
    """A new result, with an earlier one's cases where it is of this commit and card."""
    result: dict[str, Any] = {**describe_environment(), "card": card.name, "cases": {}}
    if merge and out.exists():
        before = json.loads(out.read_text())
        if (before.get("commit"), before.get("card")) == (result["commit"], card.name):
            result["cases"] = before["cases"]
            if "overlap" in before:
                result["overlap"] = before["overlap"]
    return result


if __name__ == "__main__":
    sys.exit(main())
