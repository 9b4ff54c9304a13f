"""Fixtures of the interpreter tier."""

import pytest

from tests.kernels.interpreter.common import poison_empty


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a kernel does not store stays NaN."""
    poison_empty(monkeypatch)
