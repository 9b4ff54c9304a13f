"""Levels at which `sandbox` is tried; a test skips where the kernel permits a level to nobody."""

import pytest

from tests.evaluation.shut_in import LEVELS, SHUT, works


@pytest.fixture(params=LEVELS)
def level(request):
    works(request.param)
    return request.param


@pytest.fixture(params=SHUT)
def shut(request):
    works(request.param)
    return request.param


@pytest.fixture
def apart():
    works("namespaces")
    return "namespaces"
