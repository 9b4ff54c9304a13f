"""Fixtures that all tests share: a real tokenizer, a small one, a tiny model."""

import gc
from pathlib import Path
from typing import Any

import pytest

from tests.assets import (
    load_tokenizer,
    qwen_tokenizer_folder,
    save_small_tokenizer,
    save_tiny_model,
)


def pytest_collection_finish() -> None:
    """What the imports made is no garbage: Trainer looks for some at each end of a run, and would
    walk through a million of these objects, which takes longer than training a tiny model."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def qwen_tokenizer() -> Any:
    """The real Qwen3 tokenizer, with its chat template."""
    return load_tokenizer(qwen_tokenizer_folder())


@pytest.fixture(scope="session")
def small_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the real tokenizer cut to 16 384 ids and the special ones."""
    folder = tmp_path_factory.mktemp("small-tokenizer")
    save_small_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def small_tokenizer(small_tokenizer_dir: Path) -> Any:
    return load_tokenizer(small_tokenizer_dir)


@pytest.fixture(scope="session")
def tiny_model_dir(small_tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a Qwen3ForCausalLM of 6 layers in bf16, with the small tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-model")
    save_tiny_model(folder, small_tokenizer_dir)
    return folder
