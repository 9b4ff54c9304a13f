"""Every kernel against its peers: first whether it is right, then how long it takes.

An op's providers get the same inputs. Each one's outputs are held against the op in fp32 on a
sample of rows; whoever fails gets no time but a row that says so, and the exit code is 1. The
others are timed as `benchmarks.timing` tells, against limits measured in the same run. Cases of
T = 8192 come first; what the time does not reach is reported as such. torch.compile is asked at
T = 8192 alone (with --quick: for 8B), as every shape costs it seconds.

    python -m benchmarks.kernels.measure [--quick | --smoke] [--ops NAME,...] [--out FILE]
"""

import argparse
import gc
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from benchmarks.environment import describe_environment
from benchmarks.kernels import report as kernel_report
from benchmarks.kernels.case import SIZES, TINY, Case, Inputs, Maker, Provider, error, sampled_rows
from benchmarks.kernels.ops import OPS, plan
from benchmarks.timing import clocks, measure, measure_limits, peak_memory, set_count

FIRST = 8192
TOKENS = (FIRST, 32_768, 16_384, 4096, 2048, 1024)
BUDGET = {"quick": 165.0, "whole": 510.0, "smoke": 45.0}  # seconds, writing and drawing on top
SLICE = 0.4  # seconds a case is timed for, at most
COMPILING = 0.6  # of the budget: later nothing new is given to torch.compile
RESULTS = Path(__file__).parents[1] / "results" / "kernels.json"
SMOKE_RESULTS = Path("build/kernels_smoke.json")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"benchmarks.kernels.measure: {message}", file=sys.stderr)
        raise SystemExit(2)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 done, 1 a provider was wrong or one of ours failed, 2 bad input or no CUDA."""
    parser = _Parser(prog="benchmarks.kernels.measure", description=__doc__.split("\n")[0])
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--quick", action="store_true", help="T = 8192 alone, in 3 minutes")
    mode.add_argument("--smoke", action="store_true", help="tiny sizes on this CPU")
    parser.add_argument("--ops", help=f"of {', '.join(OPS)}; a prefix stands for all it begins")
    parser.add_argument("--out", type=Path, help="the results' JSON; the PNGs go beside it")
    options = parser.parse_args(arguments)
    names = _names(options.ops, parser)
    if not options.smoke and not torch.cuda.is_available():
        parser.error("needs CUDA; --smoke runs tiny sizes on this CPU")
    out = options.out or (SMOKE_RESULTS if options.smoke else RESULTS)
    try:  # before minutes are spent
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a"):
            pass
    except OSError as e:
        parser.error(f"--out {out}: {e.strerror}")
    kind = "smoke" if options.smoke else "quick" if options.quick else "whole"
    result = run(names, kind, out)
    print(kernel_report.table(result))
    for line in kernel_report.draw(result, out.with_suffix("")):
        print(line)
    print(f"{len(result['rows'])} rows in {result['seconds']:.0f} s, written to {out}")
    bad = [r for r in result["rows"] if is_bad(r)]
    for r in bad:
        what = f"{r['op']} {r['way']} {r['size']} T={r['tokens']} {r['provider']}"
        print(f"benchmarks.kernels.measure: {what}: {r['status']}", file=sys.stderr)
    return 1 if bad else 0


def is_bad(row: dict[str, Any]) -> bool:
    """Whether the run must fail for this row: wrong numbers from anybody, any failure of ours."""
    failed = row["status"].startswith("failed") and row["provider"].startswith("ours")
    return row["status"].startswith("wrong") or failed


def _names(asked: str | None, parser: argparse.ArgumentParser) -> list[str]:
    if asked is None:
        return list(OPS)
    names = []
    for name in filter(None, (part.strip() for part in asked.split(","))):
        found = [name] if name in OPS else [op for op in OPS if op.startswith(name)]
        if not found:
            parser.error(f"--ops: {name!r} is not one of {', '.join(OPS)}")
        names += [op for op in found if op not in names]
    if not names:
        parser.error("--ops: no op is named")
    return names


def run(names: Sequence[str], kind: str, out: Path) -> dict[str, Any]:
    """All cases of a run; `out` is rewritten after each, so that a killed run leaves something."""
    start = time.monotonic()
    smoke = kind == "smoke"
    device = torch.device("cpu") if smoke else torch.device("cuda", torch.cuda.current_device())
    tokens = (96,) if smoke else TOKENS[:1] if kind == "quick" else TOKENS
    cases = plan(names, (TINY,) if smoke else SIZES, tokens)
    result: dict[str, Any] = {
        **describe_environment(), "kind": kind, "finished": False,
        "clocks_before": clocks(device), "limits": measure_limits(device, tiny=smoke), "rows": [],
    }  # fmt: skip
    if not smoke:
        result["device"]["L2_bytes"] = torch.cuda.get_device_properties(device).L2_cache_size
    before: Any = None
    for done, (name, way, size, T) in enumerate(cases):
        left = BUDGET[kind] - (time.monotonic() - start)
        if left <= 0:
            case_rows = [_row(name, way, size.name, T, "ours", status="out of time")]
        else:
            if before != (name, size):
                torch.compiler.reset()  # else a function's eighth shape is silently not compiled
                before = (name, size)
            compile_it = T == FIRST and left > (1 - COMPILING) * BUDGET[kind]
            compile_it &= kind == "whole" or size is SIZES[0]
            seconds = min(0.02 if smoke else SLICE, 0.5 * left / (len(cases) - done))
            case_rows = _run(name, way, size, T, device, seconds, result["limits"], compile_it)
        result["rows"] += case_rows
        result["seconds"] = time.monotonic() - start
        _write(out, result)
        said = f"{name} {way} {size.name} T={T}: {_say(case_rows)}"
        print(f"[{done + 1}/{len(cases)} {result['seconds']:.0f} s] {said}", file=sys.stderr)
    result |= {"finished": True, "clocks_after": clocks(device)}
    _write(out, result)
    return result


def _write(out: Path, result: dict[str, Any]) -> None:
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _say(rows: list[dict[str, Any]]) -> str:
    return ", ".join(
        f"{r['provider']} {r['ms']:.3g} ms" if r["status"] == "ok" else f"{r['provider']} -"
        for r in rows
    )


def _row(op: str, way: str, size: str, T: int | None, provider: str, **more: Any) -> dict[str, Any]:
    return {"op": op, "way": way, "size": size, "tokens": T, "provider": provider, **more}


def _run(
    name: str, way: str, size: Any, T: int, device: torch.device, seconds: float,
    limits: dict[str, Any], compile_it: bool,
) -> list[dict[str, Any]]:  # fmt: skip
    """`run_case`, whose own mistakes cost the case and not the run."""
    try:
        case = OPS[name].build(size, T, way)
        return run_case(case, device, seconds, limits, compile_it)
    except Exception as e:  # noqa: BLE001  (a trace is of no use among the rows; the line is)
        return [_row(name, way, size.name, T, "ours", status=_why(e))]
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def run_case(
    case: Case, device: torch.device, seconds: float, limits: dict[str, Any], compile_it: bool
) -> list[dict[str, Any]]:
    """A row for every provider: the gate, peak memory, then the times of those that passed."""
    inputs = case.make(Maker(0, device))
    picked = sampled_rows(case, device)
    truth = [t.detach().clone() for t in case.truth(inputs, picked)]
    rows: dict[str, dict[str, Any]] = {}
    for name, provider in case.providers.items():
        if provider.compiled and not compile_it and device.type == "cuda":
            continue
        row = _row(case.op, case.way, case.size, case.tokens, name, bound=case.bound)
        rows[name] = row
        if provider.cuda_only and device.type != "cuda":
            row["status"] = "needs CUDA"
            continue
        try:
            row |= _gate(case, provider, inputs, picked, truth, device)
        except Exception as e:  # noqa: BLE001
            row["status"] = _why(e)
    _time(case, rows, inputs, device, seconds)
    _judge(case, rows, limits)
    return list(rows.values())


def _gate(
    case: Case, provider: Provider, inputs: Inputs, picked: torch.Tensor,
    truth: list[torch.Tensor], device: torch.device,
) -> dict[str, Any]:  # fmt: skip
    """status, error and peak_bytes; on return what the provider holds is free again."""
    call = provider.bind(_own(inputs, provider))
    outputs = call()
    found: dict[str, Any] = {"status": "ok"}
    if provider.gated:
        off, wrong = error(case.view(outputs, picked), truth, case.bound, case.element)
        found["error"] = off if math.isfinite(off) else None
        if wrong:
            return {**found, "status": f"wrong: {wrong}"}
    del outputs
    return {**found, "peak_bytes": peak_memory(call, device)}


def _time(
    case: Case, rows: dict[str, dict], inputs: Inputs, device: torch.device, seconds: float
) -> None:
    """Into the rows: ms, its percentiles and the number of calls."""
    count = set_count(_bytes(inputs), device)
    sets = [inputs, *(case.make(Maker(seed, device)) for seed in range(1, count))]
    calls: dict[str, list] = {}
    for name, row in rows.items():
        if row["status"] != "ok":
            continue
        try:
            provider = case.providers[name]
            calls[name] = [provider.bind(_own(s, provider)) for s in sets]
        except torch.OutOfMemoryError as e:
            row["status"] = _why(e)
            calls.pop(name, None)
    try:
        timings = measure(calls, seconds, device)
    except Exception as e:  # noqa: BLE001
        for name in calls:
            rows[name]["status"] = _why(e)
        return
    for name, t in timings.items():
        rows[name] |= {
            "ms": t.median * 1e3, "ms_p20": t.p20 * 1e3, "ms_p80": t.p80 * 1e3,
            "calls": t.calls, "sets": count,
        }  # fmt: skip


def _judge(case: Case, rows: dict[str, dict], limits: dict[str, Any]) -> None:
    """Into the timed rows: GB/s or TFLOP/s and the share of the limit."""
    for row in rows.values():
        if "ms" not in row:
            continue
        seconds = row["ms"] / 1e3
        if case.bytes:
            row["gbps"] = case.bytes / seconds / 1e9
        if case.flops:
            row["tflops"] = case.flops / seconds / 1e12
        row["limit"] = case.limit
        if case.limit in rows:
            row["share"] = rows[case.limit]["ms"] / row["ms"] if "ms" in rows[case.limit] else None
        else:
            work = case.bytes if case.limit == "copy_bytes" else case.flops
            row["share"] = work / seconds / limits[case.limit] if case.limit in limits else None


def _own(inputs: Inputs, provider: Provider) -> Inputs:
    """The inputs, or copies for a provider that writes into them."""
    if not provider.mutates:
        return inputs
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


def _bytes(x: Any) -> int:
    if isinstance(x, torch.Tensor):
        return x.numel() * x.element_size()
    parts = x.values() if isinstance(x, dict) else x if isinstance(x, list | tuple) else ()
    return sum(map(_bytes, parts))


def _why(e: Exception) -> str:
    said = (str(e).strip().splitlines() or [""])[0][:200]
    if isinstance(e, ImportError):
        return f"not importable: {said}"
    if isinstance(e, torch.OutOfMemoryError):
        return "out of memory"
    return f"failed: {type(e).__name__}: {said}"


if __name__ == "__main__":
    sys.exit(main())
