"""Folders as the hub lays them out, and data sets of the hub by their id."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml

from tests.data.kinds import CARD, PLAIN, StandIn, jsonl, layout
from xplus_fast.config import DataConfig, Source, load_recipe
from xplus_fast.data.corpus import load_corpus
from xplus_fast.data.corpus_text import describe
from xplus_fast.data.readers import Reading, read_examples, read_text
from xplus_fast.errors import UserError
from xplus_fast.model import hub as hub_module


def answers(path: Any, **options: Any) -> list[str]:
    found = read_examples(Source(str(path), **options), PLAIN, Reading())
    return [e.messages[-1]["content"] for e in found]


def test_a_folder_with_subsets_and_splits(tmp_path: Path) -> None:
    root = layout(tmp_path, "data/en-fr/train.jsonl", "data/en-sw/train-00000-of-00001.jsonl",
                  "data/en-sw/dev.jsonl")  # fmt: skip
    assert answers(root, subset="en-fr") == ["data/en-fr/train.jsonl"]
    assert answers(root, subset="en-sw") == ["data/en-sw/train-00000-of-00001.jsonl"]
    assert answers(root, subset="en-sw", split="validation") == ["data/en-sw/dev.jsonl"]
    for options, says in [
        ({}, "has data in the folders en-fr, en-sw; name one of them, as `subset:`"),
        ({"subset": "en-de"}, "no subset 'en-de'; found en-fr, en-sw"),
        ({"subset": "en-sw", "split": "test"}, "no split 'test'; found validation, train"),
    ]:
        with pytest.raises(UserError, match=says):
            answers(root, **options)


def test_sets_by_their_whole_names(tmp_path: Path) -> None:
    root = layout(tmp_path, "data/train_sft-00000-of-00002.jsonl",
                  "data/train_sft-00001-of-00002.jsonl", "data/train_gen-00000-of-00001.jsonl",
                  "data/test_sft-00000-of-00001.jsonl")  # fmt: skip
    assert answers(root, split="train_sft") == [
        "data/train_sft-00000-of-00002.jsonl", "data/train_sft-00001-of-00002.jsonl"
    ]  # fmt: skip
    assert answers(root, split="test") == ["data/test_sft-00000-of-00001.jsonl"]
    with pytest.raises(UserError, match="several sets, train_gen, train_sft; .* as `split:`"):
        answers(root)
    plain = layout(tmp_path / "p", "a.jsonl", "b.jsonl")
    assert answers(plain, split="train") == ["a.jsonl", "b.jsonl"]
    with pytest.raises(UserError, match="no split 'test'; found a, b"):
        answers(plain, split="test")
    files = layout(tmp_path / "f", "en-fr.train.jsonl", "en-sw.train.jsonl", "en-sw.test.jsonl")
    assert answers(files, subset="en-sw") == ["en-sw.train.jsonl"]


def test_the_card_of_a_snapshot_says_what_is_where(tmp_path: Path) -> None:
    names = ("fr/part-1.jsonl", "fr/part-2.jsonl", "sw/a.jsonl", "sw/b.jsonl", "sw/held.jsonl",
             "old/train.jsonl")  # fmt: skip
    root = layout(tmp_path / "r", *names, card=CARD)
    assert answers(root, subset="en-fr") == ["fr/part-1.jsonl", "fr/part-2.jsonl"]
    assert answers(root, subset="en-sw") == ["sw/a.jsonl", "sw/b.jsonl"]
    assert answers(root, subset="en-sw", split="dev") == ["sw/held.jsonl"]
    with pytest.raises(UserError, match="several subsets in its card: en-fr, en-sw; name one"):
        answers(root)
    with pytest.raises(UserError, match="no split 'test' in its card: train, validation"):
        answers(root, subset="en-sw", split="test")
    (root / "README.md").write_text(CARD.replace("en-sw\n", "en-sw\n  default: true\n"))
    assert answers(root) == ["sw/a.jsonl", "sw/b.jsonl"]
    (root / "README.md").write_text("---\nconfigs:\n- config_name: x\n  data_files: gone/*\n---\n")
    with pytest.raises(UserError, match="its card names files for 'x', and none of them is there"):
        answers(root)
    files = "    train: sw/a.jsonl\n    dev: sw/b.jsonl\n"
    (root / "README.md").write_text(f"---\nconfigs:\n- config_name: x\n  data_files:\n{files}---\n")
    assert answers(root) == ["sw/a.jsonl"] and answers(root, split="dev") == ["sw/b.jsonl"]
    card = "---\nconfigs:\n- config_name: x\n  data_dir: sw\n  data_files: '*.jsonl'\n---\n"
    (root / "README.md").write_text(card)
    assert answers(root) == ["sw/a.jsonl", "sw/b.jsonl", "sw/held.jsonl"]


def test_the_cache_of_the_hub(tmp_path: Path) -> None:
    """Given the folder that the hub's client keeps, the newest revision in it is read."""
    cache = tmp_path / "datasets--org--name"
    layout(cache / "snapshots" / "abc", "train.jsonl")
    layout(cache / "snapshots" / "def", "data/train.jsonl", "data/test.jsonl")
    (cache / "blobs").mkdir()
    for i, file in enumerate(sorted((cache / "snapshots" / "def" / "data").iterdir())):
        file.rename(cache / "blobs" / f"{i}")  # where the bytes are, under names that tell nothing
        file.symlink_to(f"../../../blobs/{i}")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("def")
    assert answers(cache) == ["data/train.jsonl"]
    assert answers(cache, split="test") == ["data/test.jsonl"]
    assert answers(cache / "snapshots" / "abc") == ["train.jsonl"]


def test_a_data_set_by_its_id(hub: StandIn, tmp_path: Path, small_tokenizer: Any) -> None:
    names = ("fr/part-1.jsonl", "sw/a.jsonl", "sw/b.jsonl", "sw/held.jsonl")
    layout(hub.repository, *names, card=CARD)
    source = Source("org/pairs", subset="en-sw", split="validation")
    data = DataConfig(cache=str(tmp_path / "cache"))
    corpus = load_corpus([source], data, small_tokenizer, seed=0, show=False)
    assert hub.downloaded == ["README.md", "sw/held.jsonl"]  # and nothing else
    said = describe(corpus.summary)
    assert "read: sw/held.jsonl of org/pairs" in said
    assert answers("org/pairs", subset="en-sw") == ["sw/a.jsonl", "sw/b.jsonl"]
    with pytest.raises(UserError, match="org/pairs: several subsets in its card: en-fr, en-sw"):
        answers("org/pairs")
    with pytest.raises(UserError, match="org/pairs: no subset 'x' in"):
        answers("org/pairs", subset="x")


def test_without_the_hub_what_was_downloaded_is_read(
    hub: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout(hub.local, "train.jsonl")

    def unreachable(url: str) -> None:
        raise OSError("no route")

    monkeypatch.setattr(hub_module, "_reach", unreachable)
    assert answers("org/pairs") == ["train.jsonl"]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert answers("org/pairs", split="train") == ["train.jsonl"]


def test_ids_and_paths_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    tree = {
        "model": "m", "output": "o", "stages": [{"layers": 1}],
        "data": {"sources": [{"path": p} for p in ("org/name", "mine/pairs", "org/x.jsonl", "x")]},
    }  # fmt: skip
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree))
    found = [s.path for s in load_recipe("r.yaml").data.sources]
    assert found == ["org/name", *(str(tmp_path / n) for n in ("mine/pairs", "org/x.jsonl", "x"))]
    for path in ("mine/pairs", "org/x.jsonl"):
        with pytest.raises(UserError, match=f"{path}: no such file or folder"):
            answers(path)
    with pytest.raises(UserError, match="org/name: no such folder here, nor in the hub's cache"):
        answers("org/name")  # HF_HUB_OFFLINE


BAD_OPTIONS = [
    ({"columns": {"source": "a"}}, "data.sources.0.columns.source: unknown; a code of a language"),
    ({"columns": {"src": 1, "tgt": "b"}}, "data.sources.0.columns: names and numbers"),
    ({"columns": {"user": "nope"}}, "x.jsonl:1: columns: no nope in prompt, completion"),
    ({"split": "train"}, "x.jsonl: a file has no split"),
    ({"subset": "en-sw"}, "x.jsonl: a file has no subset"),
]


@pytest.mark.parametrize(("options", "says"), BAD_OPTIONS, ids=lambda v: str(v)[:40])
def test_options_that_fit_nothing(options: dict[str, Any], says: str, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", {"prompt": "q", "completion": "a"})
    tree = {
        "model": "m", "output": "o", "stages": [{"layers": 1}],
        "data": {"sources": [{"path": str(path), **options}]},
    }  # fmt: skip
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError) as e:
        list(read_examples(load_recipe(tmp_path / "r.yaml").data.sources[0], PLAIN, Reading()))
    assert says in str(e.value) and "\n" not in str(e.value)


def test_a_folder_of_one_set_has_no_splits(tmp_path: Path) -> None:
    import datasets

    one = datasets.Dataset.from_list([{"prompt": "q", "completion": "a"}])
    one.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / ".xplus-prepare").touch()
    one.to_parquet(tmp_path / "made" / "data-00000.parquet")
    for name in ("saved", "made"):
        assert answers(tmp_path / name) == ["a"]
        for option in ({"split": "train"}, {"subset": "x"}):
            with pytest.raises(UserError, match="this folder holds one set, with no"):
                answers(tmp_path / name, **option)


def test_what_only_records_have_is_not_asked_of_others(tmp_path: Path) -> None:
    for name in ("x.en", "x.sw", "x.txt"):
        (tmp_path / name).write_text("one\n")
    lines = [str(tmp_path / "x.en"), str(tmp_path / "x.sw")]
    columns = {"columns": {"user": "a"}}
    for options in (columns, {"split": "test"}, {"subset": "x"}):
        (option,) = options
        with pytest.raises(UserError, match=f"{option}: format lines has none"):
            list(read_examples(Source(lines, **options), PLAIN, Reading()))
    with pytest.raises(UserError, match="columns: format text has none"):
        read_text([Source(str(tmp_path / "x.txt"), **columns)])


@pytest.mark.parametrize("name", ["sources", "retention", "validation"])
def test_columns_are_checked_wherever_sources_stand(name: str, tmp_path: Path) -> None:
    source = {"path": "x.csv", "columns": {"nothing": "a"}}
    tree = {"model": "m", "output": "o", "stages": [{"layers": 1}], "data": {name: [source]}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match=f"data.{name}.0.columns.nothing: unknown"):
        load_recipe(tmp_path / "r.yaml")
