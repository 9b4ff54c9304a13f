"""A thousand hostile inputs: exit 0 with the right result, or exit 2 with one line, soon and small.

The same ones every time; `XPLUS_FUZZ` times as many with other seeds for a longer look.
"""

import json
import os
import random
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file, save

from tests.fuzz.mutations import mutate_bytes, mutate_tree
from xplus_fast.cli import main
from xplus_fast.config import load_recipe
from xplus_fast.data.corpus import load_corpus
from xplus_fast.data.preparation.recipe import load_prepare_recipe
from xplus_fast.errors import UserError
from xplus_fast.evaluation.recipe import load_evaluate_recipe
from xplus_fast.options import dump_options
from xplus_fast.terminal import one_line

TIMES = int(os.environ.get("XPLUS_FUZZ", 1))
SECONDS = 20  # of the processor, for a case
MEMORY = 2 << 30  # of the process, beyond what it has when the tests begin


@pytest.fixture(scope="module", autouse=True)
def bounded_memory() -> Any:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY


@pytest.fixture
def run(capfd: pytest.CaptureFixture) -> Any:
    """Run a command; its exit code is 0, or 2 with one line, or one of those given."""

    def call(*arguments: str, codes: tuple[int, ...] = (0, 2)) -> int:
        start = time.process_time()
        code = main([str(a) for a in arguments])
        out, err = capfd.readouterr()
        assert time.process_time() - start < SECONDS
        assert code in codes, err
        assert "Traceback" not in out + err
        if code == 2:
            lines = [x for x in err.splitlines() if x.startswith("xplus-fast: ")]
            assert len(lines) == 1 and err.endswith(lines[0] + "\n"), err
        return code

    return call


def seeds(n: int) -> list[int]:
    return list(range(n * TIMES))


RECIPE: dict[str, Any] = {
    "data": {"heldout": 2, "pack_tokens": 128, "prompt": "{src} {tgt}: {text}", "on_error": "stop",
             "system": "be exact", "think": "masked"},
    "stages": [{"layers": "bottom:2", "name": "low", "learning_rate": 1e-3, "steps": 2,
                "also": ["embedding"]},
               {"layers": [4, 5], "epochs": 1, "warmup": 0.1, "min_learning_rate": 0.0}],
    "training": {"tokens_per_step": 256, "save_steps": 2, "adam_beta1": 0.9, "report_to": [],
                 "max_grad_norm": 1.0, "weight_decay": 0.0},
    "memory": {"budget": "20GB", "host": "20GB", "frozen": {"0-3": "nf4"}, "bits": 8,
               "micro_batch_tokens": 128, "activations": "auto"},
    "evaluation": {"samples": 1, "translate": 2, "every": 0, "few": 1, "batch_size": 2},
    "dtype": "auto", "device": "cpu", "seed": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """A model, data and a recipe that are good."""
    root = tmp_path_factory.mktemp("fuzz")
    shutil.copytree(tiny_model_dir, root / "model")
    pairs = [{"en": f"the cat {i}", "sw": f"paka {i} \u00e9"} for i in range(30)]
    (root / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))
    tree = {"model": str(root / "model"), "output": str(root / "run"), **RECIPE}
    tree["data"] = {**RECIPE["data"], "sources": [{"path": str(root / "pairs.jsonl")}],
                    "cache": str(root / "cache")}  # fmt: skip
    (root / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return root


def test_good_input_is_good(place: Path, run: Any) -> None:
    assert run("plan", place / "recipe.yaml", "--card", "rtx4090") == 0
    assert run("train", place / "recipe.yaml", "--dry-run", "memory.frozen=bf16") == 0


@pytest.mark.parametrize("part", range(4))
def test_recipes(place: Path, run: Any, part: int) -> None:
    good = yaml.safe_load((place / "recipe.yaml").read_text())
    path = place / "fuzzed.yaml"
    accepted = 0
    for seed in seeds(80):
        rng = random.Random(seed * 4 + part)
        if part < 3:
            try:
                text = yaml.dump(mutate_tree(good, rng, 1 + part)).encode()
            except UnicodeEncodeError:
                continue
        else:
            text = mutate_bytes(yaml.safe_dump(good).encode(), rng, rng.randrange(1, 5))
        path.write_bytes(text)
        if run("plan", path, "--card", "rtx4090") == 0:
            accepted += 1
            recipe = load_recipe(path)  # what is accepted means what it says
            path.write_text(dump_options(recipe))
            assert load_recipe(path) == recipe
    assert accepted or part > 1


PREPARE: dict[str, Any] = {
    "output": "out", "corpora": [{"path": ["a.en", "a.sw"], "languages": ["en", "sw"], "limit": 5},
                                 {"path": "x.jsonl", "name": "x", "format": "translation"}],
    "clean": {"ratio": 0.5, "max_digits": 0.5}, "dedup": {"near": 3}, "workers": 2, "seed": 1,
    "balance": {"tokens": 1000, "temperature": 2.0, "directions": "both"},
    "instruct": {"prompts": ["{src} {tgt}: {text}"]}, "quality": {"method": "none"},
}  # fmt: skip
EVALUATE: dict[str, Any] = {
    "output": "out", "engine": "generate", "confidence": 0.9, "bootstrap": 10, "seed": 1,
    "translation": {"sets": [{"name": "n", "files": "x/{lang}", "directions": ["en-sw"],
                              "languages": {"en": "eng_Latn"}, "limit": 3}], "metrics": ["chrf"]},
    "reasoning": {"tasks": ["t"], "limit": 2, "code_memory": "1GB"},
}  # fmt: skip


def test_recipes_of_other_commands(tmp_path: Path) -> None:
    accepted = 0
    for seed in seeds(200):
        rng = random.Random(seed)
        load: Any = load_prepare_recipe if seed % 2 else load_evaluate_recipe
        tree = mutate_tree(PREPARE if seed % 2 else EVALUATE, rng, rng.randrange(1, 3))
        try:
            (tmp_path / "r.yaml").write_text(yaml.dump(tree))
        except UnicodeEncodeError:
            continue
        try:
            recipe = load(tmp_path / "r.yaml")
        except UserError as e:
            assert "\n" not in one_line(str(e)) and len(str(e)) < 1000
            continue
        accepted += 1
        (tmp_path / "r.yaml").write_text(dump_options(recipe))
        assert load(tmp_path / "r.yaml") == recipe
    assert accepted > 20


def test_overrides(place: Path, run: Any) -> None:
    keys = ["seed", "stages.0.steps", "stages.1.layers", "data.sources.0.limit", "memory.frozen",
            "memory.budget", "data.prompt", "training.adam_epsilon", "stages", "data.cache",
            "dtype", "stages.0", "device", "memory.card"]  # fmt: skip
    for seed in seeds(120):
        rng = random.Random(seed)
        value = mutate_bytes(rng.choice([b"3", b"[1, 2]", b"{a: 1}", b"top:2", b"20GB"]), rng, 2)
        key = rng.choice(keys) + rng.choice(["", "", "", ".0", ".x", "."])
        run("plan", place / "recipe.yaml", f"{key}={value.decode('utf-8', 'surrogateescape')}")


def mutated_file(file: Path, rng: random.Random) -> None:
    """One file of a folder, as a tree where it is JSON, or as bytes."""
    data = file.read_bytes()
    if file.suffix == ".json" and rng.random() < 0.8:
        tree = mutate_tree(json.loads(data), rng, rng.randrange(1, 3))
        try:
            data = json.dumps(tree).encode()
        except (ValueError, RecursionError):
            data = b"{}"
    else:
        data = mutate_bytes(data, rng, rng.randrange(1, 4))
    file.write_bytes(data)


def test_model_folders(place: Path, run: Any, tmp_path: Path) -> None:
    for seed in seeds(150):
        rng = random.Random(seed)
        model = tmp_path / "model"
        shutil.rmtree(model, ignore_errors=True)
        shutil.copytree(place / "model", model)
        if rng.random() < 0.5:
            mutated_file(model / "config.json", rng)
        elif rng.random() < 0.5:
            file = model / "model.safetensors"
            data = file.read_bytes()
            size = 8 + int.from_bytes(data[:8], "little")
            file.write_bytes(mutate_bytes(data[:size], rng, 1) + data[size:])
        else:
            names = list(load_file(model / "model.safetensors"))
            index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
            file = model / "model.safetensors.index.json"
            file.write_text(json.dumps(mutate_tree(index, rng, 1), allow_nan=True))
        recipe = place / "recipe.yaml"
        if rng.random() < 0.5:
            run("plan", recipe, f"model={model}", "--card", "rtx4090")
        run("train", recipe, "--dry-run", f"model={model}", "memory.frozen=bf16", "memory.bits=32")
        run("verify", place / "model", model, "--layers", "all", codes=(0, 1, 2))


def test_tokenizers(place: Path, run: Any, tmp_path: Path) -> None:
    tree = json.loads((place / "model" / "tokenizer.json").read_text())
    tree["model"]["vocab"] = dict(list(tree["model"]["vocab"].items())[:600])
    tree["model"]["merges"] = [
        m for m in tree["model"]["merges"] if "".join(m) in tree["model"]["vocab"]
        and all(x in tree["model"]["vocab"] for x in m)
    ]  # fmt: skip
    for seed in seeds(110):
        rng = random.Random(seed)
        model = tmp_path / "model"
        shutil.rmtree(model, ignore_errors=True)
        shutil.copytree(place / "model", model)
        (model / "tokenizer.json").write_text(json.dumps(tree))
        config = model / "tokenizer_config.json"
        if rng.random() < 0.4:
            mutated_file(model / "tokenizer.json", rng)
        elif rng.random() < 0.5:
            mutated_file(config, rng)
        else:
            about = json.loads(config.read_text())
            template = about["chat_template"].encode()
            about["chat_template"] = mutate_bytes(template, rng, 2).decode("utf-8", "replace")
            config.write_text(json.dumps(about))
        run("train", place / "recipe.yaml", "--dry-run", f"model={model}", "memory.frozen=bf16",
            "memory.bits=32", f"data.cache={tmp_path / 'cache'}")  # fmt: skip


TURNS = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"},
         {"role": "assistant", "content": "a"}]  # fmt: skip
RECORDS: list[dict[str, Any]] = [
    {"messages": TURNS, "id": 1}, {"prompt": "q", "completion": "a", "source": "x"},
    {"prompt": TURNS[:2], "completion": TURNS[2:]}, {"translation": {"en": "a", "sw": "b"}},
    {"instruction": "q", "input": "i", "output": "a", "system": ""}, {"en": "a", "sw": "b"},
]  # fmt: skip


def test_data_files(tmp_path: Path, small_tokenizer: Any) -> None:
    import gzip

    import pyarrow
    import pyarrow.parquet

    from xplus_fast.config import DataConfig, Source

    right = 0
    for seed in seeds(250):
        rng = random.Random(seed)
        record = RECORDS[seed % len(RECORDS)]
        records: list[Any] = [record] * rng.randrange(1, 4)
        kind = rng.choice(["jsonl", "json", "parquet", "jsonl.gz", "jsonl"])
        path = tmp_path / f"{seed}.{kind}"
        damaged = rng.random() < 0.5
        if not damaged:
            records = mutate_tree(records, rng, rng.randrange(3))
        if kind == "parquet":
            try:
                pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
            except (pyarrow.ArrowException, TypeError, AttributeError, ValueError, OverflowError,
                    UnicodeEncodeError):  # fmt: skip
                continue
        elif kind == "json":
            path.write_text(json.dumps(records))
        else:
            items = records if isinstance(records, list) else [records]
            text = "".join(json.dumps(r) + "\n" for r in items).encode()
            path.write_bytes(gzip.compress(text) if kind.endswith("gz") else text)
        if damaged:
            path.write_bytes(mutate_bytes(path.read_bytes(), rng, rng.randrange(1, 4)))
        data = DataConfig(cache=str(tmp_path / "cache"), on_error=rng.choice(["stop", "skip"]))
        start = time.process_time()
        try:
            corpus = load_corpus([Source(str(path))], data, small_tokenizer, seed=0, show=False,
                                 vocabulary=len(small_tokenizer))  # fmt: skip
        except UserError as e:
            assert str(tmp_path) in str(e) and "\n" not in str(e)
        else:
            row = corpus.train[0]
            assert 0 <= row["input_ids"].min() <= row["input_ids"].max() < len(small_tokenizer)
            assert (np.asarray(row["labels"]) != -100).any()
            right += 1
        assert time.process_time() - start < SECONDS
    assert right > 30


def test_runs_and_checkpoints(place: Path, run: Any, tmp_path: Path) -> None:
    """A finished run, a file of which is damaged: refused, or what it was."""
    recipe = place / "recipe.yaml"
    options = ["memory.frozen=bf16", "memory.bits=32", "stages.0.also=[]", "evaluation.translate=0",
               "stages.1.epochs=null", "stages.1.steps=2", "data.heldout=0"]  # fmt: skip
    good = tmp_path / "good"
    assert run("train", recipe, *options, f"output={good}") == 0
    assert run("export", good, tmp_path / "exported") == 0
    files = sorted(p.relative_to(good) for p in good.rglob("*") if p.is_file())
    files = [f for f in files if f.suffix not in (".png", ".md") and f.name != ".lock"]
    for seed in seeds(100):
        rng = random.Random(seed)
        bad, out = tmp_path / "bad", tmp_path / "out"
        for folder in (bad, out):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good, bad)
        file = bad / rng.choice(files)
        if file.suffix == ".json" or file.name == ".xplus-run":
            tree = mutate_tree(json.loads(file.read_text()), rng, 1)
            try:
                file.write_text(json.dumps(tree))
            except ValueError:
                continue
        else:
            file.write_bytes(mutate_bytes(file.read_bytes(), rng, 1))
        if run("export", bad, out) == 0:
            assert run("verify", tmp_path / "exported", out, "--layers", "all") == 0
            a, b = (load_file(f / "model.safetensors") for f in (tmp_path / "exported", out))
            assert save(a) == save(b)
        if seed % 4 == 0:  # the same command again
            run("train", recipe, *options, f"output={bad}")
