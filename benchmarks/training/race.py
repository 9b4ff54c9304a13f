"""Training steps of selected layers, ours against every peer that runs here, on one card.

Each contestant trains each stage in a process of its own, from the same random weights, on
sequences of real lengths ("pairs") or of 4096 tokens ("full"): steps to warm up, then steps that
are timed. A loss that is not the others' disqualifies. Results go into
benchmarks/results/train.json; tables and pictures are made of it (`python -m benchmarks.report`).

    python -m benchmarks.training.race                          (8B, under 9 minutes on an H200)
    python -m benchmarks.training.race --mixes full --out benchmarks/results/train-full.json
    python -m benchmarks.training.race --model 14B --only "ours, bf16,tuned"
    python -m benchmarks.training.race --smoke                  (no GPU: all, with a toy model)
"""

import argparse
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_callback import PrinterCallback

from benchmarks.environment import describe_environment
from benchmarks.models import make_config
from benchmarks.timing import clocks, measure_limits
from benchmarks.training.clock import Clock
from benchmarks.training.contestants import CONTESTANTS, CannotRun, Contestant
from benchmarks.training.report import draw, table
from benchmarks.training.workloads import MIXES, SMOKE, STAGES, Scale, make_steps, necessary_work
from xplus_fast.errors import UserError
from xplus_fast.model.families import Shape, shape_of
from xplus_fast.planning.cards import Card, local_card
from xplus_fast.planning.flops import Work, layer_gemms, necessary_flops
from xplus_fast.planning.selection import resolve_layers
from xplus_fast.training.place import set_allocator
from xplus_fast.training.planned import PlannedTrainer

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/train.json"
MINUTES = 8.5  # after which nothing is begun, and half a minute later nothing goes on
CHILD_SECONDS = 240
MODULE = "benchmarks.training.race"
NORM = 10  # times a loss's tolerance: a gradient's norm's


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=("8B", "14B"), default="8B")
    parser.add_argument("--stages", default="stage1,stage2", help=f"of {', '.join(STAGES)}")
    parser.add_argument("--mixes", default="", help="of pairs, full, 1k; default: pairs")
    parser.add_argument("--only", default="", help="contestants, comma-separated (by their starts)")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="begin nothing after these")
    parser.add_argument("--smoke", action="store_true", help="a toy model on the CPU")
    parser.add_argument(
        "--out", type=Path, default=None, help=f"default: {RESULTS}; of a part, a temporary file"
    )
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    scale = SMOKE if options.smoke else Scale(options.model)
    if not options.smoke and not torch.cuda.is_available():
        print("train: no CUDA GPU here; --smoke runs every contestant on the CPU", file=sys.stderr)
        return 2
    stages = [s for s, _ in scale.stages if options.smoke or s in options.stages.split(",")]
    # a toy runs two in no time ("1k" is made as "full" is)
    mixes = (options.mixes or ("pairs,full" if options.smoke else "pairs")).split(",")
    names = list(CONTESTANTS)
    if options.only:
        asked = [o.strip() for o in options.only.replace(", ", "\0").split(",")]
        asked = [o.replace("\0", ", ") for o in asked]
        names = [n for n in names if any(n.startswith(o) for o in asked)]
    bad = [s for s in options.stages.split(",") if s not in STAGES]
    bad += [m for m in mixes if m not in MIXES]
    if bad or not names or not stages:
        print(f"train: {bad[0] if bad else options.only!r} is not known", file=sys.stderr)
        return 2
    if options.child:
        # one contestant, one stage
        found = run_child(names[0], scale, stages[0], mixes)
        options.child.write_text(json.dumps(found))
        return 0
    whole_table = RESULTS if scale.model == "8B" else RESULTS.with_stem(f"train_{scale.model}")
    part = options.only or stages != ["stage1", "stage2"] or mixes != ["pairs"]
    # neither a toy nor a part of the table replaces the table
    temporary = options.smoke or part
    out = options.out or (Path(tempfile.mkdtemp()) / "train.json" if temporary else whole_table)
    if out == whole_table:
        keep_earlier(out)
    result = race(scale, names, stages, mixes, options.minutes, options.smoke, out)
    print(table(result))
    print("\n".join(draw(result, out.with_suffix(""))))
    print(f"written to {out}")
    return int(any(row["status"].startswith("wrong") for row in result["rows"]))


def race(
    scale: Scale, names: Sequence[str], stages: Sequence[str], mixes: Sequence[str],
    minutes: float, smoke: bool, out: Path,
) -> dict[str, Any]:  # fmt: skip
    """Every contestant at every stage; what is there is written after each."""
    start = time.monotonic()
    device = torch.device("cuda", 0) if torch.cuda.is_available() and not smoke else None
    limits = measure_limits(device or torch.device("cpu"), tiny=device is None)
    if device is not None:
        torch.cuda.empty_cache()
    result: dict[str, Any] = {
        **describe_environment(), "model": scale.model, "tokens_per_step": scale.step,
        "warm": scale.warm, "timed": scale.timed, "limits": limits, "smoke": smoke,
        "settings": {n: CONTESTANTS[n].settings for n in names}, "rows": [],
    }  # fmt: skip
    for name in names:
        own = mixes[:1] if CONTESTANTS[name].once else mixes
        for stage in stages:
            left = 60 * minutes - (time.monotonic() - start)
            if left < 0:
                found = {"status": "not begun", "why": f"after {minutes} minutes"}
            elif smoke:
                found = run_child(name, scale, stage, own)
            else:
                found = _spawn(name, scale.model, stage, own, min(CHILD_SECONDS, left + 30))
            budget = dict(CONTESTANTS[name].options).get("budget")
            base = {"contestant": name, "stage": stage, "layers": dict(scale.stages)[stage]}
            for mix in own:
                more = found.get("mixes", {}).get(mix, {})
                result["rows"].append(
                    {**base, "mix": mix, "budget": budget, **_outer(found), **more}
                )
                print(_say(result["rows"][-1]), file=sys.stderr, flush=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
    result["rows"].sort(key=lambda row: (stages.index(row["stage"]), mixes.index(row["mix"])))
    judge(result["rows"], scale, limits)
    out.write_text(json.dumps(result, indent=1) + "\n")
    return result


def keep_earlier(out: Path) -> None:
    """Move a result aside that is about to be replaced: the history is made of those."""
    if out.exists():
        earlier = json.loads(out.read_text())
        begun = earlier["time"].partition("+")[0].replace(":", "")
        out.rename(out.with_name(f"{out.stem}-{begun}-{earlier['commit']}.json"))


def _outer(found: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in found.items() if k != "mixes"}


def _say(row: dict[str, Any]) -> str:
    name = f"{row['stage']} {row['mix']}: {row['contestant']}"
    if row["status"] != "ok":
        return f"{name}: {row['status']}: {row['why']}"
    return f"{name}: {row['tokens_per_s']:,.0f} tokens/s, loss {row['losses'][0]:.4f}"


def _spawn(
    name: str, model: str, stage: str, mixes: Sequence[str], seconds: float
) -> dict[str, Any]:
    """A contestant in a process of its own: its memory is gone after it, whatever happens."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "row.json"
        first = CONTESTANTS[name].first
        start = ["-m", MODULE]
        if first and importlib.util.find_spec(first):
            run = f"run_module({MODULE!r}, run_name='__main__', alter_sys=True)"
            start = ["-c", f"import {first}, runpy; runpy.{run}"]
        command = [
            sys.executable, *start, "--model", model, "--stages", stage,
            "--mixes", ",".join(mixes), "--only", name, "--child", str(file),
        ]  # fmt: skip
        path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
        try:
            run = subprocess.run(
                command, cwd=folder, env=os.environ | {"PYTHONPATH": path}, capture_output=True,
                text=True, timeout=seconds,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"status": "failed", "why": f"not done after {seconds:.0f} s"}
        if run.returncode or not file.exists():
            said = [line for line in run.stderr.splitlines() if line.strip()][-1:]
            return {"status": "failed", "why": " ".join(said)[:300] or f"exit {run.returncode}"}
        return json.loads(file.read_text())


def run_child(name: str, scale: Scale, stage: str, mixes: Sequence[str]) -> dict[str, Any]:
    """One contestant at one stage: built once, then every mix."""
    device = torch.device("cuda", 0) if scale.model != "tiny" else torch.device("cpu")
    if device.type == "cuda":
        set_allocator()  # for all, as `xplus-fast train` does
    try:
        return {"status": "ok", "mixes": _measure(CONTESTANTS[name], scale, stage, mixes, device)}
    except CannotRun as e:
        return {"status": "not run", "why": str(e)}
    except (UserError, ImportError, NotImplementedError) as e:
        return {"status": "not run", "why": " ".join(str(e).split())[:300]}
    except torch.OutOfMemoryError as e:
        free, total = torch.cuda.mem_get_info()
        why = str(e).split(". ")[0]
        return {"status": "out of memory", "why": f"of {total / 1e9:.0f} GB: {why}"}


def _measure(
    contestant: Contestant, scale: Scale, stage: str, mixes: Sequence[str], device: torch.device
) -> dict[str, Any]:
    torch.manual_seed(0)
    card: Card | None = local_card() if device.type == "cuda" else None
    layers = dict(scale.stages)[stage]
    options = dict(contestant.options)
    if device.type == "cpu" and "budget" in options:
        options["budget"] = 0  # a CPU has none to hold to; the plan is the leanest one instead
        options |= {"activations": "recompute", "states": "host", "gradients": "host"}
    make = contestant.train(scale, layers, device, card, **options)
    config, found, warm = make_config(scale.model), {}, scale.warm
    vocabulary = config.vocab_size
    for mix in mixes:
        steps = make_steps(scale, mix, scale.warm + scale.timed, vocabulary)
        with tempfile.TemporaryDirectory() as folder:
            trainer = make(steps, folder)
            clock = Clock(trainer, device, warm=scale.warm)
            trainer.add_callback(clock)
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        logged = [line for line in trainer.state.log_history if "loss" in line]
        clock.close()
        works = [necessary_work(step) for step in steps[warm:]]
        tokens = [work.data_tokens for work in works]
        seconds = clock.seconds[warm:]
        found[mix] = {
            "losses": [line["loss"] for line in logged],
            "grad_norms": [line["grad_norm"] for line in logged],
            "seconds": seconds,
            "tokens": tokens,
            "computed": clock.computed[warm:],  # padding is computed, too
            "work": [asdict(work) for work in works],
            "tokens_per_s": statistics.median(n / s for n, s in zip(tokens, seconds, strict=True)),
            "split": clock.split(warm),  # of the median step
            "peak": clock.peak(),
            "planned": planned(trainer),
            "joules": clock.joules,  # of the timed steps together
            "clocks": clocks(device),
        }
    return found


def planned(trainer: Any) -> int | None:
    """Bytes that our plan said would be allocated at the peak; None of a peer."""
    if not isinstance(trainer, PlannedTrainer):
        return None
    beside = ("margin", "CUDA context")  # of the allocator
    return sum(n for what, n in trainer.plan.device_bytes.items() if what not in beside)


def judge(rows: list[dict[str, Any]], scale: Scale, limits: dict[str, Any]) -> None:
    """The gate, and each row's share of what the card could do."""
    shape = shape_of(make_config(scale.model))
    for kind in {(row["stage"], row["mix"]) for row in rows}:
        ran = [r for r in rows if (r["stage"], r["mix"]) == kind and r["status"] == "ok"]
        exact = [r for r in ran if CONTESTANTS[r["contestant"]].loose < 0.01]
        same = [r for r in exact if CONTESTANTS[r["contestant"]].alike]
        if not exact:
            continue
        right = statistics.median(r["losses"][0] for r in exact)
        norm = statistics.median([r["grad_norms"][0] for r in same] or [math.nan])
        for row in ran:
            contestant = CONTESTANTS[row["contestant"]]
            row["loss_off"] = off = row["losses"][0] / right - 1
            row["limit_seconds"] = _limit(shape, row, limits)
            row["share"] = row["limit_seconds"] / statistics.median(row["seconds"])
            if not abs(off) <= contestant.loose or not all(map(math.isfinite, row["losses"])):
                row["status"], row["why"] = "wrong loss", f"{off:+.2%} off the others'"
            elif contestant.alike and same:
                row["norm_off"] = off = row["grad_norms"][0] / norm - 1
                if not abs(off) <= NORM * contestant.loose:
                    row["status"] = "wrong gradient"
                    row["why"] = f"its norm is {off:+.1%} off the others'"


def _limit(shape: Shape, row: dict[str, Any], limits: dict[str, Any]) -> float:
    """Seconds of the necessary FLOPs of the median step at the rates measured in this run."""
    layers = resolve_layers(row["layers"], shape.layers)
    middle = sorted(range(len(row["seconds"])), key=lambda i: row["seconds"][i])
    i = middle[len(middle) // 2]
    work = Work(**row["work"][i])
    flops = necessary_flops(shape, layers, (), work)
    bf16 = limits["bf16_flops"]
    frozen = CONTESTANTS[row["contestant"]].rate == "fp8" and "fp8_flops" in limits
    if not frozen:
        return flops.total / bf16
    last = shape.layers - 1 in layers
    own = layer_gemms(shape, work) * (len(layers) - last)
    own = 3 * (own + layer_gemms(shape, work, last=True) * last)  # forward, dX and dW
    return (flops.linear - own) / limits["fp8_flops"] + (flops.total - flops.linear + own) / bf16


if __name__ == "__main__":
    sys.exit(main())
