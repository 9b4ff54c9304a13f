"""What frozen layers give, kept from one epoch to the next: the same run, whatever happens to it."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.training.test_run import PAIRS, losses, workplace, xplus  # noqa: F401  (a fixture)
from xplus_fast.model.prepare import take_over
from xplus_fast.training import hidden_cache, hidden_store
from xplus_fast.training.hidden_store import CHECKS, STATES, InFolder, InMemory

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/kernels", "OMP_NUM_THREADS": "1"}
QUICK = [
    "evaluation.translate=0", "data.retention=[]", "data.heldout=0", "data.sources.0.limit=12",
    "training.save_steps=100",
]  # fmt: skip
TOP = ["stages=[{layers: 'top:2', name: high, learning_rate: 1.0e-3, epochs: 3}]", *QUICK]
HIDDEN, LEVEL = 64, 4  # of the tiny model: its width, and the lowest of its top:2


def train(workplace, output, where, *options, code=0):
    run = workplace / output
    given = [f"output={run}", f"data.cache_hidden={where}", *(options or TOP)]
    assert xplus("train", workplace / "recipe.yaml", *given) == code
    return run


def trained(run):
    """Bytes of what every stage gave."""
    files = sorted(run.glob("*/final/trained.safetensors"))
    assert files
    return [file.read_bytes() for file in files]


def kept(folder):
    """The one cache of a folder, and how many tokens' states are in it."""
    (found,) = folder.glob("hidden-*")
    return found, int(np.count_nonzero(np.fromfile(found / CHECKS, np.uint32)))


@pytest.fixture
def embedded(monkeypatch):
    """How many tokens the lowest layer computed, in training steps."""
    from xplus_fast.model import layer

    seen, run = [], layer.Block.run

    def counted(self, x, pack, last=None):
        if self.layer_idx == 0 and any(p.requires_grad for p in self.parameters()) is False:
            seen.append(len(x))
        return run(self, x, pack, last)

    monkeypatch.setattr(layer.Block, "run", counted)
    return seen


@pytest.mark.parametrize(("micro", "shared"), [(192, "true"), (384, "true"), (192, "false")])
def test_the_same_run_to_the_last_bit(micro, shared, workplace, embedded):
    """Three epochs; in the first, and in it alone, the frozen layers compute."""
    options = [*TOP, f"memory.micro_batch_tokens={micro}", f"data.shared_prompts={shared}"]
    plain = train(workplace, "off", "off", *options)
    computed = sum(embedded)
    for name in ("host", workplace / "kept"):
        embedded.clear()
        run = train(workplace, f"run-{Path(name).name}", name, *options)
        assert losses(run) == losses(plain) and trained(run) == trained(plain)
        assert 3 * sum(embedded) == computed
    assert kept(workplace / "kept")[1] == computed // 3  # a prefix that is cut has two places
    # and another run of the same computes nothing below
    embedded.clear()
    run = train(workplace, "again", workplace / "kept", *options, "stages.0.learning_rate=2e-3")
    assert embedded == [] and len(losses(run)) == len(losses(plain))
