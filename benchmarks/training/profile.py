"""One training step of ours under torch's profiler: where its time goes, part by part of a block.

    python -m benchmarks.training.profile --stage stage2 --frozen fp8   (writes a table and a trace)
    python -m benchmarks.training.profile --smoke                       (a toy model on the CPU)

Kernels are grouped by what they compute. A group's share of its limit is the time of the work that
the selection makes necessary of it - FLOPs of GEMMs and attention, bytes that all else has to move
- at the rates measured in the same run, over the time it took.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from benchmarks.environment import describe_environment
from benchmarks.models import make_config
from benchmarks.timing import measure_limits
from benchmarks.training.contestants import CONTESTANTS
from benchmarks.training.workloads import MIXES, SMOKE, STAGES, Scale, make_steps, necessary_work
from xplus_fast.model.families import Shape, shape_of
from xplus_fast.model.layout import UpdateLayout
from xplus_fast.planning.cards import local_card
from xplus_fast.planning.flops import necessary_flops, trained_parameters
from xplus_fast.planning.memory import state_bytes
from xplus_fast.planning.selection import resolve_layers
from xplus_fast.training.place import set_allocator

ROOT = Path(__file__).parents[2]
OUT = ROOT / "benchmarks/results"
BEGIN, END = "<!-- begin: benchmarks/results/profile.json -->", "<!-- end: profile -->"
# Group -> parts of kernels' and ops' names, in lower case; the first group that fits takes it
GROUPS = {
    "copies": ("memcpy", "memset", "aten::copy_", "aten::to", "aten::_to_copy", "aten::fill_"),
    "head": ("cross_entropy", "softmax_gradient", "log_softmax", "nll", "logsumexp"),
    "attention": ("flash", "fmha", "attention", "bmm", "baddbmm", "softmax"),
    "optimizer": ("adamw", "adam", "foreach_norm", "multi_tensor"),
    "qk_norm_rope": ("qk_norm", "rope"),
    "norms": ("rms_norm",),
    "swiglu": ("swiglu", "silu"),
    "quantize": ("quantize", "transpose_fp8", "fp8"),
    "GEMMs": ("gemm", "cutlass", "cublas", "nvjet", "matmul", "aten::mm", "addmm", "scaled_mm",
              "mkl", "aten::linear"),
}  # fmt: skip


# An op that multiplies matrices -> which of its inputs they are
PRODUCTS = {"aten::mm": 0, "aten::_scaled_mm": 0, "aten::addmm": 1}


def product_part(name: str, inputs: Sequence[Sequence[int]], shape: Shape) -> str | None:
    """Of which weight a product is, forward, dX or dW, by its sizes; None: of none, or no product.

    Each of the three has the weight's two sizes among its three, beside the number of rows. In the
    last layer k and v have products of their own, and q too: where it is as large as o, it is
    counted there.
    """
    first = PRODUCTS.get(name)
    if first is None or [len(i) for i in inputs[first : first + 2]] != [2, 2]:
        return None
    (a, b), (_, c) = inputs[first : first + 2]
    weights = {k: v for k, v in shape.packed_shapes().items() if len(v) == 2}
    weights["head"] = (shape.vocabulary, shape.hidden)
    weights["qkv, last layer"] = (2 * shape.kv_heads * shape.head_dim, shape.hidden)
    for part, (rows, columns) in weights.items():
        left = [a, b, c]
        if rows in left:
            left.remove(rows)
            if columns in left:
                return part.partition(",")[0]
    return None


def group(name: str) -> str:
    low = name.lower()
    return next((g for g, parts in GROUPS.items() if any(p in low for p in parts)), "other")


def necessary_bytes(
    shape: Shape, layers: Collection[int], *, tokens: int, supervised: int, element: int,
    update: UpdateLayout,
) -> dict[str, int]:  # fmt: skip
    """Bytes that a step's elementwise parts have to read and write, by group.

    Forward in all layers: each of two norms H in and out, q and k in and out, SwiGLU 2 F in and F
    out. Backward from the lowest trained layer up: each norm takes its input, its gradient and the
    residual's, and gives one H; q and k are read with their gradient; SwiGLU reads 3 F and writes
    2 F. The final norm is one more. Attention reads q, k and v and writes out; backward it reads
    out and dout besides and writes three gradients. The head reads each logit and writes its
    gradient in its place. The optimizer reads a gradient twice (the norm comes first), a state in
    and out, and writes the weight. What a GEMM moves is its own.
    """
    backwards = shape.layers - min(layers, default=shape.layers)
    qkvo = 2 * (shape.heads + shape.kv_heads) * shape.head_dim
    h, qk, f = shape.hidden, (shape.heads + shape.kv_heads) * shape.head_dim, shape.ffn
    parameters = trained_parameters(shape, layers)
    norms = 2 * (2 * shape.layers + 1) + 4 * (2 * backwards + (backwards > 0))
    return {
        "norms": tokens * element * h * norms,
        "qk_norm_rope": tokens * element * qk * (2 * shape.layers + 3 * backwards),
        "swiglu": tokens * element * f * (3 * shape.layers + 5 * backwards),
        "attention": tokens * element * qkvo * (shape.layers + 2 * backwards),
        "head": 2 * supervised * shape.vocabulary * element,
        "optimizer": round(parameters * (3 * element + 2 * state_bytes(update, element))),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=("8B", "14B"), default="8B")
    parser.add_argument("--stage", choices=tuple(STAGES), default="stage2")
    parser.add_argument("--mix", choices=MIXES, default="pairs")
    parser.add_argument("--frozen", choices=("bf16", "int8", "fp8", "nf4"), default="bf16")
    parser.add_argument("--out", type=Path, help=f"for table and trace; default: {OUT}")
    parser.add_argument("--smoke", action="store_true", help="a toy model on the CPU")
    options = parser.parse_args(arguments)
    if not options.smoke and not torch.cuda.is_available():
        print("profile: no CUDA GPU here; --smoke profiles a toy model", file=sys.stderr)
        return 2
    scale = SMOKE if options.smoke else Scale(options.model)
    layers = dict(scale.stages).get(options.stage, "top:2" if options.smoke else "")
    # a toy replaces no result
    out = options.out or (Path("build/profile_smoke") if options.smoke else OUT)
    result = measure(scale, layers, options.mix, options.frozen, out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "profile.json").write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    print(f"written to {out}: profile.json, trace.json (chrome://tracing, Perfetto)")
    return 0


def measure(scale: Scale, layers: str, mix: str, frozen: str, out: Path) -> dict[str, Any]:
    """Profile the third optimizer step."""
    cuda = scale.model != "tiny"
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    if cuda:
        set_allocator()
    limits = measure_limits(device, tiny=not cuda)
    ours = next(c for n, c in CONTESTANTS.items() if n.startswith(f"ours, {frozen}"))
    torch.manual_seed(0)
    card = local_card() if cuda else None
    make = ours.train(scale, layers, device, card, **dict(ours.options))
    config = make_config(scale.model)
    steps = make_steps(scale, mix, 3, config.vocab_size)
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    recorder = profile(activities=kinds, record_shapes=True)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(steps, folder)
        trainer.add_callback(_OneStep(recorder, at=2))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    out.mkdir(parents=True, exist_ok=True)
    recorder.export_chrome_trace(str(out / "trace.json"))
    groups: dict[str, dict[str, float]] = {}
    for event in recorder.key_averages():
        seconds = (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6
        # an annotation's time is that of the kernels under it, counted already
        if cuda and event.device_type.name != "CUDA" or event.is_user_annotation or not seconds:
            continue
        found = groups.setdefault(group(event.key), {"seconds": 0.0, "calls": 0})
        found["seconds"] += seconds
        found["calls"] += event.count
    work = necessary_work(steps[2])
    shape = shape_of(config)
    products: dict[str, dict[str, float]] = {}
    for event in recorder.key_averages(group_by_input_shape=True):
        part = product_part(event.key, event.input_shapes or (), shape)
        if part is not None:
            seconds = (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6
            one = products.setdefault(part, {"seconds": 0.0, "calls": 0})
            one["seconds"] += seconds
            one["calls"] += event.count
    flops = necessary_flops(shape, resolve_layers(layers, shape.layers), (), work)
    necessary = {"GEMMs": flops.linear + flops.head, "attention": flops.attention}
    rate = limits["fp8_flops" if frozen == "fp8" and "fp8_flops" in limits else "bf16_flops"]
    best = {
        name: n / (rate if name == "GEMMs" else limits["bf16_flops"])
        for name, n in necessary.items()
    }
    moved = necessary_bytes(
        shape, resolve_layers(layers, shape.layers), tokens=work.tokens,
        supervised=work.supervised, element=2, update=UpdateLayout(),
    )  # fmt: skip
    for name, n in moved.items():
        best[name] = max(n / limits["copy_bytes"], best.get(name, 0.0))
    for name, seconds in best.items():
        if name in groups:
            groups[name]["limit_seconds"] = seconds
            groups[name]["share_of_limit"] = seconds / groups[name]["seconds"]
    trained = resolve_layers(layers, shape.layers)
    times = 2 * shape.layers - min(trained) + len(trained)  # forward, dX, dW
    for part, one in products.items():
        if part == "head":
            least = flops.head / limits["bf16_flops"]
        else:
            least = 2 * work.tokens * math.prod(shape.packed_shapes()[part]) * times / rate
        one |= {"limit_seconds": least, "share_of_limit": least / max(one["seconds"], 1e-12)}
    return {
        **describe_environment(), "model": scale.model, "layers": layers, "mix": mix,
        "frozen": frozen, "tokens": work.data_tokens, "limits": limits, "groups": groups,
        "products": products, "smoke": not cuda,
    }  # fmt: skip


class _OneStep(TrainerCallback):
    """Records one optimizer step."""

    def __init__(self, recorder: Any, at: int) -> None:
        self.recorder, self.at = recorder, at

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.at:
            self.recorder.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.at + 1:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.recorder.stop()


def table(result: dict[str, Any]) -> str:
    total = sum(found["seconds"] for found in result["groups"].values())
    where = (
        "on the GPU" if not result["smoke"] else "on the CPU, a toy model: proves the path alone"
    )
    lines = [
        f"{result['model']}, {result['layers']}, {result['mix']}, frozen layers {result['frozen']}:"
        f" {result['tokens']:,} tokens, {total:.3f} s {where}",
        "",
        *_rows("part", result["groups"], total, result["smoke"]),
        "",
        *_rows("GEMMs of", result["products"], total, result["smoke"]),
    ]
    return "\n".join(lines)


def section(result: dict[str, Any] | None) -> str:
    """What docs/performance.md says."""
    if result is None or result["smoke"]:
        return "A step part by part (`xplus-fast bench profile`): not measured on a GPU."
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    return f"{table(result)}\n\n{result['device']['name']}; {versions}; commit {result['commit']}."


def _rows(what: str, groups: dict[str, Any], total: float, smoke: bool) -> list[str]:
    lines = [
        f"| {what} | seconds | share | calls | limit, seconds | of its limit |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in sorted(groups.items(), key=lambda item: -item[1]["seconds"]):
        limit = found.get("share_of_limit")
        of = least = "-"
        if limit is not None and not smoke:
            of, least = f"{limit:.0%}", f"{found['limit_seconds']:.4f}"
        lines.append(
            f"| {name} | {found['seconds']:.4f} | {found['seconds'] / total:.0%} |"
            f" {found['calls']:,} | {least} | {of} |"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
