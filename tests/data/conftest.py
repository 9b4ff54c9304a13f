"""A stand-in of the Hugging Face hub, which no test can reach."""

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest

from tests.data.kinds import StandIn
from xplus_fast.data import sources
from xplus_fast.model import hub as hub_module


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    stand_in = StandIn(tmp_path / "repository", tmp_path / "downloaded")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_module, "_reach", lambda url: None)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: stand_in)
    for name in ("hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, name, getattr(stand_in, name))
    monkeypatch.chdir(tmp_path)
    sources._downloaded.cache_clear()
    yield stand_in
    sources._downloaded.cache_clear()
