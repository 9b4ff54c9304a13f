"""Planted faults: the mask is taken out of one store of a kernel, and a test under ttsem fails.

The stores are found in the source, so those of a new kernel are among them. `make test-ir` runs
this; each fault is a process of its own.
"""

import ast
import multiprocessing
import os
import shutil
import sys
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

pytest.importorskip("ttsem", reason="needs ttsem, which `make test-ir` installs")

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "kernels" / "xplus_kernels"
# Which of tests/gpu/test_every_kernel.py launches the kernels of a module, if not its own name.
TESTS = {
    "norm_fp8": "fp8", "rms_norm": "norms", "short_attention_grad": "short_attention",
    "swiglu_fp8": "fp8",
}  # fmt: skip
# Where a store spills into what the same program has stored, no access is wrong, only the values.
VALUES = {"swiglu_fp8": "test_fp8.py::test_swiglu_of_awkward_widths_fused_equals_unfused"}

# Equal where one store comes after the other, as in ttsem; on a GPU warps are not in step.
UNSEEN = {
    "tl.store(sum_ptr, tl.sum(tl.sum(dw_a, 0), 0), half < D // 2)":
        "the program's next store overwrites what this one spills",
}  # fmt: skip


def masks(source: str) -> Iterator[tuple[ast.Call, ast.expr]]:
    """Every store that has a mask, with it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.store":
            given = node.args[2:3] + [k.value for k in node.keywords if k.arg == "mask"]
            yield from ((node, mask) for mask in given)


def without(source: str, store: ast.Call, mask: ast.expr) -> str:
    """The source with this mask taken out; lines keep their numbers."""
    lines = source.splitlines(keepends=True)

    def at(line: int | None, column: int | None) -> int:
        assert line is not None and column is not None
        return sum(map(len, lines[: line - 1])) + column

    value = store.args[1]
    start, end = (at(x.end_lineno, x.end_col_offset) for x in (value, mask))
    return source[:start] + "\n" * source[start:end].count("\n") + source[end:]


def marks(store: ast.Call) -> list[pytest.MarkDecorator]:
    why = UNSEEN.get(ast.unparse(store))
    return [pytest.mark.xfail(reason=why, strict=True)] if why else []


STORES = [
    pytest.param(path, store, mask, id=f"{path.name}:{store.lineno}", marks=marks(store))
    for path in sorted(KERNELS.glob("*.py"))
    for store, mask in masks(path.read_text())
]


def test_the_stores_are_found():
    assert len(STORES) > 50


def run(kernels: Path, tests: list[str], told: Path) -> None:
    """In a process of its own: tests under ttsem until one fails, with the package in kernels."""
    from ttsem.sanitize import run_pytest

    with told.open("w") as file:
        os.dup2(file.fileno(), 1)
    options = ["-xq", "-p", "no:cacheprovider", "-o", f"pythonpath=. {kernels}"]
    sys.exit(run_pytest([*options, *(f"tests/gpu/{test}" for test in tests)]))


@pytest.fixture(scope="module")
def fork() -> Iterator[ForkServerContext]:
    """Starts processes that have imported everything slow, but nothing of the project."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ttsem.sanitize", "tests.assets", "transformers.models.qwen3"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XPLUS_REHEARSE", "ir")
        yield context


@pytest.mark.parametrize("path, store, mask", STORES)
def test_a_store_without_its_mask_is_noticed(path, store, mask, fork, tmp_path):
    shutil.copytree(KERNELS, tmp_path / "xplus_kernels")
    broken = without(path.read_text(), store, mask)
    (tmp_path / "xplus_kernels" / path.name).write_text(broken)
    assert len(list(masks(broken))) == len(list(masks(path.read_text()))) - 1
    told, name = tmp_path / "told", path.stem
    tests = [f"test_every_kernel.py::test_{TESTS.get(name, name)}"]
    tests += [VALUES[name]] if name in VALUES else []
    process = fork.Process(target=run, args=(tmp_path, tests, told))
    process.start()
    process.join()
    said = told.read_text()
    assert process.exitcode == 1, said[-3000:]
    by_its_line = "KernelFault: kernel `" in said and f"`{path.name}:{store.lineno}: " in said
    assert by_its_line or name in VALUES and "AssertionError" in said, said[-3000:]
