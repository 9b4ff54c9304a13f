"""Fixtures of the GPU tests."""

import os
from collections.abc import Iterator

import pytest
import torch

from tests.gpu import common, ir
from tests.kernels.interpreter.common import poison_empty

if common.IR:
    ir.install()

# Before the first cuBLAS call: without it PyTorch refuses a GEMM where it is to be deterministic.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a kernel does not store stays NaN."""
    poison_empty(monkeypatch)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def memory_given_back() -> Iterator[None]:
    """A test of large tensors leaves its memory to the next one."""
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
