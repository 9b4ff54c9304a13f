"""Compiles every kernel for every card it is for, on a machine that needs none of them.

`python -m xplus_kernels.aot` prints a row for each kernel, configuration and architecture:
registers a thread, spills, shared memory, widest and narrowest global load of a thread. It exits
with 1 where one does not compile, spills, takes more shared memory than the card has, or reads
aligned data of 16 bits and less in pieces that are never 128 bits wide.

A module of this package takes part by a function `aot_cases()` that lists its `AotCase`s: what its
launch table launches. Needs Triton (Linux), which brings its own ptxas and cuobjdump.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import pkgutil
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import xplus_kernels
from xplus_kernels.backend import INTERPRET, triton

# Architecture -> shared memory that one block can have, bytes (CUDA C Programming Guide,
# "Technical specifications per compute capability").
SHARED_LIMIT = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
NARROW_TYPES = ("*bf16", "*fp16", "*fp8e4nv", "*fp8e5", "*i8", "*u8")
FP32_SPILLS = 2  # words, where nothing is bf16 or fp16: ptxas gives them for residency
FULL_LOAD = 128  # bits: what a thread can read at once


@dataclass(frozen=True)
class AotCase:
    """One compilation of one kernel: a row of its launch table, at one dtype and shape."""

    kernel: Any  # the jitted function
    name: str  # what the table calls it: "rms_norm forward 8B"
    signature: dict[str, str]  # run-time argument -> type: "*bf16", "i32", "fp32"
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 1
    least: int = 80  # lowest capability it is for
    aligned: tuple[str, ...] = ()  # pointers and strides that divide by 16 at every launch


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a case on one architecture."""

    registers: int = 0  # a thread
    spills: int = 0  # 4-byte words of local memory a thread, as Triton's own n_spills counts
    shared_bytes: int = 0  # a block
    load_bits: tuple[int, int] = (0, 0)  # widest and narrowest global load of a thread
    error: str = ""


def in_all_dtypes(cases: list[AotCase]) -> list[AotCase]:
    """Cases on bf16 tensors, and the same on fp16 and fp32."""
    made = []
    for case in cases:
        if "*bf16" not in case.signature.values():
            made.append(case)
            continue
        for dtype in ("bf16", "fp16", "fp32"):
            types = {
                k: f"*{dtype}" if kind == "*bf16" else kind for k, kind in case.signature.items()
            }
            made.append(replace(case, name=f"{case.name} {dtype}", signature=types))
    return made


def registered_cases() -> dict[str, list[AotCase]]:
    """Module name -> its cases, for the modules of this package that list any."""
    names = sorted(info.name for info in pkgutil.iter_modules(xplus_kernels.__path__))
    modules = {name: importlib.import_module(f"xplus_kernels.{name}") for name in names}
    return {name: m.aot_cases() for name, m in modules.items() if hasattr(m, "aot_cases")}


def compile_case(case: AotCase, capability: int) -> Compiled:
    """Compile `case` for sm_`capability` and read what it takes off the machine code.

    A failure to compile is told in `error`. Raises RuntimeError where nothing could be compiled
    at all, because Triton is absent or interprets.
    """
    if triton is None or INTERPRET:
        raise RuntimeError("compiling ahead of time needs Triton, without TRITON_INTERPRET=1")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    arguments = case.kernel.arg_names
    given = {**case.signature, **dict.fromkeys(case.constexprs, "constexpr")}
    if set(given) != set(arguments) or not set(case.aligned) <= set(case.signature):
        wrong = sorted(set(given) ^ set(arguments) | set(case.aligned) - set(case.signature))
        return Compiled(error=f"arguments of the case and of the kernel differ: {wrong}")
    source = ASTSource(
        case.kernel,
        {name: given[name] for name in arguments},
        case.constexprs,
        {(arguments.index(name),): [["tt.divisibility", 16]] for name in case.aligned},
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    try:
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    except Exception as e:  # any stage of the compiler raises its own: all mean "does not compile"
        return Compiled(error=f"{type(e).__name__}: {e}")
    registers, local_bytes = _resources(made.asm["cubin"])
    return Compiled(registers, local_bytes // 4, made.metadata.shared, load_bits(made.asm["ptx"]))


def problems(case: AotCase, capability: int, made: Compiled) -> list[str]:
    """What is wrong with a compilation; empty where nothing is."""
    if made.error:
        return [made.error]
    found = []
    half = any(kind in ("*bf16", "*fp16") for kind in case.signature.values())
    if made.spills > (0 if half else FP32_SPILLS):
        found.append(f"spills {made.spills} words a thread")
    limit = SHARED_LIMIT[capability]
    if made.shared_bytes > limit:
        found.append(f"{made.shared_bytes} bytes of shared memory, sm_{capability} has {limit}")
    read_wide = any(case.signature[name] in NARROW_TYPES for name in case.aligned)
    if read_wide and 0 < made.load_bits[0] < FULL_LOAD:
        found.append(f"no load is wider than {made.load_bits[0]} bits")
    return found


def load_bits(ptx: str) -> tuple[int, int]:
    """Widest and narrowest load from global memory by one thread, in bits; 0, 0 without any."""
    widths = [
        int(lanes or 1) * int(bits)
        for lanes, bits in re.findall(r"\bld\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)\b", ptx)
    ]
    # Copies to shared memory say their bytes: cp.async.cg.shared.global [to], [from], 0x10
    for size in re.findall(r"\bcp\.async\.c[ag]\.[^;]*?\],[^;]*?\], (0x[0-9a-f]+|\d+)", ptx):
        widths.append(8 * int(size, 0))
    if "cp.async.bulk.tensor" in ptx:  # the copy engine, whole tiles
        widths.append(FULL_LOAD)
    return (max(widths), min(widths)) if widths else (0, 0)


def compile_all(
    capabilities: tuple[int, ...] = tuple(SHARED_LIMIT), *, processes: int = 2
) -> dict[tuple[str, int, int], Compiled]:
    """(module, index of the case, capability) -> what was made, over all registered cases."""
    keys = [
        (module, index, capability)
        for module, cases in registered_cases().items()
        for index, case in enumerate(cases)
        for capability in capabilities
        if capability >= case.least
    ]
    # A jitted function does not travel between processes: each finds the case by its key.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        return dict(zip(keys, pool.map(_compile_registered, keys, chunksize=5), strict=True))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m xplus_kernels.aot", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", choices=SHARED_LIMIT, metavar="80")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(arguments)
    if triton is None or INTERPRET:
        print("xplus_kernels.aot: needs Triton, without TRITON_INTERPRET=1", file=sys.stderr)
        return 2
    made = compile_all(tuple(options.arch or SHARED_LIMIT), processes=options.processes)
    cases = registered_cases()
    width = max((len(case.name) for many in cases.values() for case in many), default=6)
    print(f"{'kernel':{width}}  arch    regs  spills  shared  load bits")
    wrong = 0
    for (module, index, capability), result in made.items():
        case = cases[module][index]
        found = problems(case, capability, result)
        wrong += bool(found)
        widest, narrowest = result.load_bits
        row = (
            f"{case.name:{width}}  sm_{capability:<4} {result.registers:4}  {result.spills:6}"
            f"  {result.shared_bytes:6}  {f'{widest}..{narrowest}':9}"
        )
        print(row + (f"  WRONG: {'; '.join(found)}" if found else ""))
    print(f"{len(made)} compilations, {wrong} wrong")
    return 1 if wrong else 0


def _compile_registered(key: tuple[str, int, int]) -> Compiled:
    module, index, capability = key
    cases = importlib.import_module(f"xplus_kernels.{module}").aot_cases()
    return compile_case(cases[index], capability)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory a thread of the kernel in a cubin takes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if not found:
        raise RuntimeError(f"cuobjdump tells no resources of the kernel: {text.strip()}")
    # of the kernel, and of device functions it calls without inlining
    functions = [tuple(map(int, numbers)) for numbers in found]
    return max(f[0] for f in functions), max(f[1] + f[2] for f in functions)


if __name__ == "__main__":
    sys.exit(main())
