"""A model in a folder for all tests on a simulated device."""

from pathlib import Path

import pytest

from tests.simulated.scenarios import save_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("simulated-model"))
