"""Which files of a folder are trained on, what of a record is not read, and what is too much."""

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from xplus_fast.config import DataConfig, Source
from xplus_fast.data import files as files_module
from xplus_fast.data import readers as readers_module
from xplus_fast.data.corpus import load_corpus
from xplus_fast.data.corpus_text import describe
from xplus_fast.data.files import read_records
from xplus_fast.data.languages import is_language
from xplus_fast.data.readers import Reading, read_examples, source_files
from xplus_fast.errors import UserError

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
DATA = DataConfig()


def put(root: Path, *names: str) -> Path:
    """Files of one record each, which says where it stands."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {"messages": [TURNS[0], {"role": "assistant", "content": name}]}
        if name.endswith(".parquet"):
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), path)
        elif name.endswith(".json"):
            path.write_text(json.dumps([record]))
        elif name.endswith(".gz"):
            path.write_bytes(gzip.compress(json.dumps(record).encode()))
        elif name.endswith(".zst"):
            path.write_bytes(pyarrow.compress(json.dumps(record).encode(), "zstd", asbytes=True))
        elif name.endswith(".jsonl"):
            path.write_text(json.dumps(record) + "\n")
        else:
            path.write_text("about")
    return root


def read(path: Path, **options: Any) -> list[str]:
    reading = Reading()
    found = read_examples(Source(str(path), **options), DATA, reading)
    return [e.messages[-1]["content"] for e in found]


TRAIN, TEST = "train-00000-of-00001.parquet", "test-00000-of-00001.parquet"
FOLDERS = [
    ([TRAIN, TEST], [TRAIN]),
    (["train.jsonl", "valid.jsonl", "test.jsonl"], ["train.jsonl"]),
    (["my_train.jsonl.gz", "my_dev.jsonl.gz"], ["my_train.jsonl.gz"]),
    (["a.train.json", "a.eval.json"], ["a.train.json"]),
    (["Train.jsonl", "Validation.jsonl"], ["Train.jsonl"]),
    (["train-1.jsonl", "train-2.jsonl", "holdout.jsonl"], ["train-1.jsonl", "train-2.jsonl"]),
    (["en-sw.train.jsonl", "en-fr.train.jsonl"], ["en-fr.train.jsonl", "en-sw.train.jsonl"]),
    (["a.jsonl", "b.jsonl", "notes.csv"], ["a.jsonl", "b.jsonl"]),
    (["a.jsonl", "test/b.jsonl"], ["a.jsonl"]),
    (["README.md", "dataset_infos.json", f"data/{TRAIN}", f"data/{TEST}"], [f"data/{TRAIN}"]),
    (["train/0.jsonl", "train/1.jsonl", "test/0.jsonl"], ["train/0.jsonl", "train/1.jsonl"]),
    (["latest.jsonl", "contest.jsonl"], ["contest.jsonl", "latest.jsonl"]),  # no words of splits
    ([f"en-sw/{TRAIN}", f"en-sw/{TEST}"], [f"en-sw/{TRAIN}"]),
    ([f"data/en-sw/{TRAIN}", "data/en-sw/dev.jsonl"], [f"data/en-sw/{TRAIN}"]),
    (["data/train/a.jsonl", "data/test/a.jsonl"], ["data/train/a.jsonl"]),
    ([".cache/train.jsonl", "train.jsonl.zst"], ["train.jsonl.zst"]),
    (["my_train/a.jsonl", "my_test/a.jsonl"], ["my_train/a.jsonl"]),
]


@pytest.mark.parametrize(("there", "taken"), FOLDERS, ids=lambda v: " ".join(v)[:50])
def test_the_training_split_is_taken(there: list[str], taken: list[str], tmp_path: Path) -> None:
    put(tmp_path, *there)
    assert read(tmp_path) == taken
    assert source_files(Source(str(tmp_path))) == [tmp_path / name for name in taken]


UNCLEAR = [
    (["test.jsonl", "dev.jsonl"], "none of a training split"),
    (["train.jsonl", "more.jsonl"], "that of more.jsonl does not"),
    (["more.jsonl", "test.jsonl"], "that of more.jsonl does not"),
    (["train-test.jsonl", "train.jsonl"], "that of train-test.jsonl does not"),
    (["train.jsonl", "train.parquet"], "train.jsonl is there in several formats"),
    (["train_sft-00000-of-00001.parquet", "train_gen-00000-of-00001.parquet"],
     "holds several sets, train_gen, train_sft"),
    ([f"en-fr/{TRAIN}", f"en-sw/{TRAIN}"], "has data in the folders en-fr, en-sw; name one"),
    ([f"data/a/{TRAIN}", f"data/b/{TRAIN}"], "has data in the folders a, b; name one"),
    (["train.txt", "README.md"], "no data in this folder"),
    (["train.jsonl", "train.csv"], "train.csv is there in several formats"),
]  # fmt: skip


@pytest.mark.parametrize(("there", "says"), UNCLEAR, ids=lambda v: str(v)[:50])
def test_what_is_not_clear_is_one_line(there: list[str], says: str, tmp_path: Path) -> None:
    put(tmp_path, *there)
    with pytest.raises(UserError) as e:
        read(tmp_path)
    assert says in str(e.value) and str(tmp_path) in str(e.value) and "\n" not in str(e.value)


def test_the_description_names_files_and_unread_keys(tmp_path: Path, small_tokenizer: Any) -> None:
    put(tmp_path / "d", TRAIN, TEST)
    record = {"messages": TURNS, "id": 3, "source": "web", "score": 0.5, "tools": None}
    (tmp_path / "x.jsonl").write_text(json.dumps(record) + "\n")
    sources = [Source(str(tmp_path / "d")), Source(str(tmp_path / "x.jsonl"))]
    data = DataConfig(cache=str(tmp_path / "cache"))
    corpus = load_corpus(sources, data, small_tokenizer, seed=0, show=False)
    said = describe(corpus.summary)
    assert f"read: {TRAIN} of {tmp_path / 'd'}; left alone: {TEST}\n" in said + "\n"
    assert "keys of records that are not read: id, score, source\n" in said + "\n"


MEANT: list[dict[str, Any]] = [
    {"tools": [{"name": "f"}]}, {"tools": '[{"name": "f"}]'}, {"functions": [1]},
    {"documents": [{"text": "t"}]}, {"chat_template_kwargs": {"enable_thinking": False}},
    {"weight": 0}, {"weight": 0.5}, {"train": False}, {"loss_mask": [0, 1]}, {"images": ["x.png"]},
    {"system": "be"}, {"system_prompt": "be"}, {"history": [["q", "a"]]}, {"context": "c"},
    {"toolCalls": [1]}, {"reasoning_content": "hm"}, {"label": False}, {"assistant_mask": [1]},
]  # fmt: skip
HARMLESS: dict[str, Any] = {
    "id": 1, "source": "web", "category": "x", "score": 0.0, "lang": "en", "url": "u", "topic": "t",
    "prompt_id": "p", "dataset": "d", "license": "l", "tools": [], "functions": None, "weight": 1,
    "train": True, "documents": "[]", "label": True, "text": "t", "used_in_training": True,
    "metadata": {"a": 1}, "images": [], "full_topic": "t", "constraints": ["c"], "has_image": False,
}  # fmt: skip


@pytest.mark.parametrize("more", MEANT, ids=str)
@pytest.mark.parametrize("form", ["messages", "prompt", "alpaca", "flat"])
def test_keys_that_change_what_is_meant_are_refused(
    more: dict[str, Any], form: str, tmp_path: Path
) -> None:
    record: dict[str, Any] = {
        "messages": {"messages": TURNS}, "prompt": {"prompt": "q", "completion": "a"},
        "alpaca": {"instruction": "q", "output": "a"}, "flat": {"en": "q", "sw": "a"},
    }[form]  # fmt: skip
    (key,) = more
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(record | more) + "\n")
    if form == "alpaca" and key in ("system", "history"):
        return  # read, and refused where it cannot be
    if key == "tools" and form in ("messages", "prompt"):
        return  # offered to the model
    with pytest.raises(UserError, match=f"x.jsonl:1: keys that are not read .{key}: .*ignore: "):
        read(path)
    assert read(path, ignore=[key])[0] == "a"
    about = {k: v for k, v in HARMLESS.items() if form != "flat" or not is_language(k)}
    path.write_text(json.dumps(record | about) + "\n")
    assert read(path)[0] == "a"


@pytest.mark.parametrize(
    "more", [{"weight": 0.5}, {"mask": 0}, {"train_detail": [1]}, {"thinking": "hm"}, {"x": 1}],
    ids=str,
)  # fmt: skip
def test_a_message_with_more_to_say_is_refused(more: dict[str, Any], tmp_path: Path) -> None:
    (key,) = more
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"messages": [TURNS[0], TURNS[1] | more]}) + "\n")
    with pytest.raises(UserError, match=f"a message with other keys .{key}[:;]"):
        read(path)
    assert read(path, ignore=[key]) == ["a"]
    about = {"id": 1, "weight": 1, "tool_calls": None, "timestamp": "t"}
    path.write_text(json.dumps({"messages": [TURNS[0], TURNS[1] | about]}) + "\n")
    assert read(path) == ["a"]


def test_a_variable_of_the_template_is_not_dropped(tmp_path: Path, small_tokenizer: Any) -> None:
    import copy

    tokenizer = copy.copy(small_tokenizer)
    tokenizer.chat_template = "{{ persona }}" + small_tokenizer.chat_template
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"messages": TURNS, "persona": "a pirate"}) + "\n")
    data = DataConfig(cache=str(tmp_path / "cache"))
    with pytest.raises(UserError, match="x.jsonl:1: the chat template has a variable 'persona'"):
        load_corpus([Source(str(path))], data, tokenizer, seed=0, show=False)
    ignoring = Source(str(path), ignore=["persona"])
    assert load_corpus([ignoring], data, tokenizer, seed=0, show=False).summary["sequences"] == 1


# --- too much


def test_lines_and_items_have_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "LINE_LIMIT", 1 << 20)
    endless = tmp_path / "x.jsonl.gz"
    with gzip.open(endless, "wb", compresslevel=1) as f:
        for _ in range(64):
            f.write(b"x" * (1 << 20))
    for text in (b'["' + b"x" * (3 << 20) + b'"]', b"[" + b"[\n" * (3 << 20)):
        (tmp_path / "x.json").write_bytes(text)
        with pytest.raises(UserError, match=r"x.json:1: (a line|an item) of more than 1 MiB|malf"):
            list(read_records(tmp_path / "x.json"))
    tracemalloc.start()
    with pytest.raises(UserError, match="x.jsonl.gz:1: a line of more than 1 MiB"):
        list(read_records(endless))
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()


def test_a_long_list_is_read_item_by_item(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps([{"n": i, "text": "abc " * 100} for i in range(20_000)], indent=1))
    tracemalloc.start()
    numbers = [r["n"] for _, r in read_records(path) if isinstance(r, dict)]
    assert numbers == list(range(20_000))
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_what_libraries_read_whole_has_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xplus_fast.data.preparation import corpora
    from xplus_fast.data.preparation.recipe import Corpus

    for module in (corpora, readers_module):
        monkeypatch.setattr(module, "WHOLE_LIMIT", 1 << 20)
    catalog = tmp_path / "sw" / "LC_MESSAGES" / "x.po"
    catalog.parent.mkdir(parents=True)
    catalog.write_bytes(b"#" * (1 << 20) + b"\n")
    with pytest.raises(UserError, match="x.po: a catalog of 1,048,577 bytes; 1,048,576 are read"):
        read(catalog)
    unit = b'<tu><tuv xml:lang="en"><seg>a</seg></tuv><tuv xml:lang="sw"><seg>b</seg></tuv></tu>'
    memory = tmp_path / "x.tmx"
    memory.write_bytes(b"<tmx><body>" + unit * 20_000 + b"</body></tmx>")  # no unit is large
    assert len(list(corpora.read_corpus(Corpus(str(memory))))) == 20_000
    memory.write_bytes(b"<tmx><body>" + unit.replace(b"a", b"a" * (2 << 20)) + b"</body></tmx>")
    with pytest.raises(UserError, match="x.tmx: a unit of more than 1,048,576 bytes"):
        list(corpora.read_corpus(Corpus(str(memory))))


def test_the_limits_are_those_that_the_readme_tells() -> None:
    from xplus_fast.data import template

    said = " ".join((Path(__file__).parents[2] / "README.md").read_text().split())
    assert f"more than {files_module.TEXT_LIMIT:,} characters" in said
    assert f"a chat template spends {template.SECONDS} s or {template.MEMORY >> 30} GiB" in said
    assert f"lines of more than {files_module.LINE_LIMIT >> 20} MiB" in said


def test_a_text_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xplus_fast.data.readers.TEXT_LIMIT", 1000)
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"prompt": "q", "completion": "a" * 1001}) + "\n")
    with pytest.raises(UserError, match="x.jsonl:1: a text that is too long .1,002 characters"):
        read(path)


@pytest.mark.parametrize("saved", [False, True])
def test_tables_with_values_that_python_cannot_have(saved: bool, tmp_path: Path) -> None:
    good = pyarrow.array([b"a", b"\xff\xfe", b"c"], pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 3, good.buffers())
    days = pyarrow.array([0, 0, 2**40], pyarrow.timestamp("s"))
    table = pyarrow.table({"prompt": text, "completion": ["x", "y", "z"], "day": days})
    path = tmp_path / "x.parquet"
    if saved:
        import datasets

        path = tmp_path / "saved"
        datasets.Dataset(table).save_to_disk(str(path))
    else:
        pyarrow.parquet.write_table(table, path)
    reading = Reading()
    found = list(read_examples(Source(str(path)), DataConfig(on_error="skip"), reading))
    assert [e.messages[0]["content"] for e in found] == ["a"]
    assert dict(reading.skipped) == {"not UTF-8": 1, "a value that cannot be read": 1}
    assert reading.first["not UTF-8"] == [f"{path}:2"]
