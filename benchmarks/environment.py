"""What all benchmarks share: what a run ran on, and how its table comes into a document."""

import datetime
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "transformers", "accelerate", "liger-kernel", "bitsandbytes")


def fill(document: str, begin: str, text: str, end: str) -> str:
    """`document` with `text` between two markers. Raises ValueError where they are missing."""
    before, found, rest = document.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"the markers {begin} and {end} are missing")
    return f"{before}{begin}\n{text}\n{end}{after}"


def describe_environment() -> dict[str, Any]:
    """Machine, versions, commit and command, JSON-able."""
    about: dict[str, Any] = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.orig_argv[1:]),
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {name: v for name in PACKAGES if (v := _version(name))},
    }
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        about["device"] = {"name": card.name, "memory_bytes": card.total_memory}
    else:
        about["device"] = {"name": _processor(), "threads": torch.get_num_threads()}
    return about


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True, text=True, cwd=Path(__file__).parent,
    )  # fmt: skip
    return run.stdout.strip() if run.returncode == 0 else None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
