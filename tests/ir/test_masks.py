"""Planted faults: the mask is taken out of one store of a kernel, and ttsem has to report it.

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
# Which of tests/gpu/test_every_kernel.py launch the kernels of a module; of others its own name.
TESTS = {
    "norm_fp8": "fp8", "rms_norm": "norms", "short_attention_grad": "short_attention",
    "swiglu_fp8": "fp8",
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


STORES = [
    pytest.param(path, store, mask, id=f"{path.name}:{store.lineno}")
    for path in sorted(KERNELS.glob("*.py"))
    for store, mask in masks(path.read_text())
]


def test_the_stores_are_found():
    assert len(STORES) > 50


def run(kernels: Path, test: str, told: Path) -> None:
    """In a process of its own: a test of every kernel under ttsem, with the package in kernels."""
    from ttsem.sanitize import run_pytest

    with told.open("w") as file:
        os.dup2(file.fileno(), 1)
    options = ["-xq", "-p", "no:cacheprovider", "-o", f"pythonpath=. {kernels}"]
    sys.exit(run_pytest([*options, f"tests/gpu/test_every_kernel.py::test_{test}"]))


@pytest.fixture(scope="module")
def fork() -> Iterator[ForkServerContext]:
    """Starts processes that have imported everything slow, but nothing of the project."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ttsem.sanitize", "tests.assets", "transformers.models.qwen3"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XPLUS_REHEARSE", "ir")
        yield context


@pytest.mark.parametrize("path, store, mask", STORES)
def test_a_store_without_its_mask_is_reported(path, store, mask, fork, tmp_path):
    shutil.copytree(KERNELS, tmp_path / "xplus_kernels")
    broken = without(path.read_text(), store, mask)
    (tmp_path / "xplus_kernels" / path.name).write_text(broken)
    assert len(list(masks(broken))) == len(list(masks(path.read_text()))) - 1
    told = tmp_path / "told"
    process = fork.Process(target=run, args=(tmp_path, TESTS.get(path.stem, path.stem), told))
    process.start()
    process.join()
    assert process.exitcode == 1, told.read_text()[-3000:]
    assert f"`{path.name}:{store.lineno}: " in told.read_text(), told.read_text()[-3000:]
