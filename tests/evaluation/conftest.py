"""Levels at which `sandbox` is tried; a test skips where the kernel permits a level to nobody.
Models, a test set and a task for `evaluate`."""

import json
from pathlib import Path

import pytest
import yaml

from tests.assets import load_tokenizer, save_small_tokenizer, save_tiny_model
from tests.evaluation.shut_in import LEVELS, SHUT, works

SENTENCES = {
    "en": ["Good morning.", "The house is red.", "It rains today.", "She has two dogs."],
    "fr": ["Bonjour.", "La maison est rouge.", "Il pleut aujourd'hui.", "Elle a deux chiens."],
}


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


def write_task(tasks: Path, rows: list[dict]) -> None:
    """A task "sums" of lm-evaluation-harness: question q, choices c, the right one a."""
    tasks.mkdir()
    (tasks / "sums.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    task = {
        "task": "sums", "dataset_path": "json", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(tasks / "sums.jsonl")}},
        "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "{{c}}",
        "doc_to_target": "{{a}}", "metric_list": [{"metric": "acc"}], "metadata": {"version": 1},
    }  # fmt: skip
    (tasks / "sums.yaml").write_text(yaml.safe_dump(task))


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """Two models that differ, a test set, a task of lm-evaluation-harness."""
    folder = tmp_path_factory.mktemp("evaluate")
    save_small_tokenizer(folder / "tokenizer")
    save_tiny_model(folder / "base", folder / "tokenizer")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    for p in model.model.layers[0].parameters():
        p.data *= 1.5
    model.save_pretrained(folder / "tuned")
    load_tokenizer(folder / "tokenizer").save_pretrained(folder / "tuned")
    for code, lines in SENTENCES.items():
        (folder / f"{code}.devtest").write_text("\n".join(lines) + "\n")
    rows = [{"q": f"{a}+{b}=", "c": [str(a + b), str(a * b + 7)], "a": 0}
            for a in range(2) for b in range(3)]  # fmt: skip
    write_task(folder / "tasks", rows)
    return folder
