"""Every kind of file that people train on: what is learnt of it, to the letter, and a step."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import yaml

from tests.data.kinds import (
    CARD,
    CHAT_OF_TOOLS,
    PLAIN,
    TALK,
    TOOL,
    StandIn,
    jsonl,
    layout,
    message,
    previews,
    share,
    turn,
)
from xplus_fast.cli import main
from xplus_fast.config import DataConfig, Source
from xplus_fast.data.corpus import load_corpus
from xplus_fast.data.readers import Reading, read_examples
from xplus_fast.errors import UserError

# --- kinds of records: (records, options of the source, what is shown of the first)

RECORDS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "sharegpt": (
        {"conversations": [share("human", "q"), share("gpt", "a")]}, {}, turn("q", "a")
    ),
    "sharegpt-system": (
        {"conversations": [share("system", "be"), share("human", "q"), share("gpt", "a")]},
        {}, turn("q", "a", "be"),
    ),
    "sharegpt-system-beside": (
        {"system": "be", "conversations": [share("human", "q"), share("gpt", "a")]},
        {}, turn("q", "a", "be"),
    ),
    "conversations-of-roles": ({"conversations": TALK}, {}, turn("q", "a")),
    "parts": (
        {"messages": [message("user", [{"type": "text", "text": "q"}]),
                      message("assistant", [{"type": "text", "text": "a"},
                                            {"type": "text", "text": "b"}])]},
        {}, turn("q", "ab"),
    ),
    "question-answer": ({"question": "q", "answer": "a", "id": 7}, {}, turn("q", "a")),
    "instruction-response": (
        {"instruction": "q", "context": "c", "response": "a"}, {}, turn("q\nc", "a")
    ),
    "columns-user": (
        {"title": "q", "body": "a"}, {"columns": {"user": "title", "assistant": "body"}},
        turn("q", "a"),
    ),
    "columns-system": (
        {"title": "q", "body": "a", "persona": "be"},
        {"columns": {"user": "title", "assistant": "body", "system": "persona"}},
        turn("q", "a", "be"),
    ),
    "columns-messages": (
        {"chat": TALK}, {"columns": {"messages": "chat"}}, turn("q", "a")
    ),
    "columns-pair": (
        {"a": "one", "b": "moja"},
        {"columns": {"src": "a", "tgt": "b"}, "languages": ["en", "sw"]},
        turn("English>Swahili: one", "moja"),
    ),
    "columns-languages": (
        {"a": "one", "b": "moja"}, {"columns": {"en": "a", "sw": "b"}},
        turn("English>Swahili: one", "moja"),
    ),
    "source-target": (
        {"source": "one", "target": "moja"}, {"languages": ["en", "sw"]},
        turn("English>Swahili: one", "moja"),
    ),
    "source-target-named": (
        {"source_text": "one", "target_text": "moja", "source_lang": "en", "target_lang": "sw"},
        {}, turn("English>Swahili: one", "moja"),
    ),
    "names-of-languages": (
        {"English": "one", "Swahili": "moja"}, {}, turn("English>Swahili: one", "moja")
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", RECORDS)
def test_a_kind_of_record(kind: str, tmp_path: Path, small_tokenizer: Any) -> None:
    record, options, seen = RECORDS[kind]
    path = jsonl(tmp_path / "x.jsonl", record)
    assert previews(Source(str(path), **options), small_tokenizer)[0] == seen


@pytest.mark.parametrize("suffix", ["json", "parquet"])
@pytest.mark.parametrize("kind", ["sharegpt-system", "parts", "columns-user"])
def test_a_kind_of_record_in_other_files(
    kind: str, suffix: str, tmp_path: Path, small_tokenizer: Any
) -> None:
    record, options, seen = RECORDS[kind]
    path = tmp_path / f"x.{suffix}"
    if suffix == "json":
        path.write_text(json.dumps([record]))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), path)
    assert previews(Source(str(path), **options), small_tokenizer)[0] == seen


# --- tables and compression

TABLES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "x.csv": ("question,answer\nq,a\n", {}, [turn("q", "a")]),
    "quoted.csv": (
        'question,answer\n"one, ""two""\nthree",a\n"q",b\n',
        {}, [turn('one, "two"\nthree', "a"), turn("q", "b")],
    ),
    "semicolons.csv": ("question;answer\nq, r;a\n", {}, [turn("q, r", "a")]),
    "windows.csv": ("\ufeffquestion,answer\r\nq,a\r\n", {}, [turn("q", "a")]),
    "pandas.csv": (",question,answer\n0,q,a\n", {}, [turn("q", "a")]),
    "pairs.csv": ("en,sw\none,moja\n", {"directions": "forward"},
                  [turn("English>Swahili: one", "moja")]),
    "columns.csv": (
        "Quelle,Ziel\none,moja\n",
        {"directions": "forward", "columns": {"src": "Quelle", "tgt": "Ziel"},
         "languages": ["en", "sw"]},
        [turn("English>Swahili: one", "moja")],
    ),
    "x.en-sw.tsv": ("source\ttarget\none\tmoja\n", {"directions": "forward"},
                    [turn("English>Swahili: one", "moja")]),
    "x.tsv": ("English\tSwahili\none\tmoja\n", {"directions": "backward"},
              [turn("Swahili>English: moja", "one")]),
    "literal.tsv": ('en\tsw\n"one," he said\t"moja"\n', {"directions": "forward"},
                    [turn('English>Swahili: "one," he said', '"moja"')]),
    "written.tsv": ('en\tsw\n"say ""one"""\tmoja\n', {"directions": "forward"},
                    [turn('English>Swahili: say "one"', "moja")]),
    "quoted.tsv": ('"en"\t"sw"\n"one\n""two"""\t"moja"\n', {"directions": "forward"},
                   [turn('English>Swahili: one\n"two"', "moja")]),
    "numbered.csv": ("id,en,sw\n1,one,moja\nb-2,two,mbili\n", {"directions": "forward"},
                     [turn("English>Swahili: one", "moja"), turn("English>Swahili: two", "mbili")]),
    "messages.csv": (
        'messages\n"[{""from"": ""Human"", ""value"": ""q""}, '
        '{""from"": ""gpt"", ""value"": ""a""}]"\n',
        {}, [turn("q", "a")],
    ),
    "bare.tsv": ("one\tmoja\n", {"directions": "forward", "columns": {"en": 1, "sw": 2}},
                 [turn("English>Swahili: one", "moja")]),
    "scored.tsv": ("1.07\tone\tmoja\n",
                   {"directions": "forward", "columns": {"score": 1, "src": 2, "tgt": 3},
                    "languages": ["en", "sw"]},
                   [turn("English>Swahili: one", "moja")]),
    "prompts.tsv": ("user\tassistant\nq\ta\n", {}, [turn("q", "a")]),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_a_table(name: str, tmp_path: Path, small_tokenizer: Any) -> None:
    text, options, seen = TABLES[name]
    path = tmp_path / name
    path.write_bytes(text.encode())
    assert previews(Source(str(path), **options), small_tokenizer) == seen


def zstd(data: bytes) -> bytes:
    return pyarrow.compress(data, "zstd", asbytes=True)


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress, ".zst": zstd
}  # fmt: skip


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed(suffix: str, tmp_path: Path, small_tokenizer: Any) -> None:
    table = "question,answer\n" + "".join(f"q {i} {i * 7919 % 997},a\n" for i in range(3000))
    path = tmp_path / f"x.csv{suffix}"
    path.write_bytes(whole := COMPRESS[suffix](table.encode()))
    source = Source(str(path))
    examples = list(read_examples(source, PLAIN, Reading()))
    assert len(examples) == 3000 and examples[-1].where == f"{path}:3001"
    records = jsonl(tmp_path / "y.jsonl", {"prompt": "q", "completion": "a"}).read_bytes()
    (tmp_path / f"y.jsonl{suffix}").write_bytes(COMPRESS[suffix](records))
    again = Source(str(tmp_path / f"y.jsonl{suffix}"))
    assert previews(again, small_tokenizer) == [turn("q", "a")]
    sides = [tmp_path / f"z.{code}{suffix}" for code in ("en", "sw")]
    for side, text in zip(sides, (b"one\n", b"moja\n"), strict=True):
        side.write_bytes(COMPRESS[suffix](text))
    lines = Source([str(side) for side in sides], directions="forward")
    assert previews(lines, small_tokenizer) == [turn("English>Swahili: one", "moja")]
    for broken in (whole[: len(whole) // 2], b"nonsense, not compressed at all"):
        path.write_bytes(broken)
        with pytest.raises(UserError, match=rf"x.csv\{suffix}: not a whole \w+ file") as e:
            list(read_examples(source, PLAIN, Reading()))
        assert "\n" not in str(e.value)


BAD_TABLES = [
    ("x.csv", "question,answer\nq,a,b\n", "x.csv:2: a row with more or fewer columns (2 are"),
    ("x.csv", 'question,answer\n"q"x,a\n', "x.csv:2: malformed CSV"),
    ("x.csv", 'question,answer\nq,a\n"q,a\nq,a\n', "x.csv:3: a quoted text that does not end"),
    ("x.csv", "title,body\nq,a\n", "x.csv:2: no known format has the keys title, body"),
    ("x.csv", "a,a\nq,a\n", "x.csv:1: two columns are named 'a'"),
    ("x.csv", "source,target\nq,a\n", "x.csv:2: nothing tells the languages of src and tgt"),
    ("x.tsv", "question\tanswer\nq\n", "x.tsv:2: a row with more or fewer columns (2 are wanted"),
    ("x.csv", b"question,answer\nq,caf\xe9\n", "x.csv:2: not UTF-8"),
    ("x.csv", b"caf\xe9,answer\nq,a\n", "x.csv:1: not UTF-8"),
    ("x.csv", b"", "x.csv: the file is empty"),
    ("x.csv", b"question,answer\n", "x.csv: empty data, no example in it"),
    ("x.csv", "question,answer,tools\nq,a,[1]\n", "tools: a list of objects is wanted"),
    ("x.csv", "question,answer,images\nq,a,x.png\n", "keys that are not read (images:"),
]


@pytest.mark.parametrize(("name", "text", "says"), BAD_TABLES, ids=lambda v: str(v)[:40])
def test_a_table_that_cannot_be_used(
    name: str, text: Any, says: str, tmp_path: Path, small_tokenizer: Any
) -> None:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    data = DataConfig(cache=str(tmp_path / "cache"))
    with pytest.raises(UserError) as e:
        load_corpus([Source(str(path))], data, small_tokenizer, seed=0, show=False)
    assert says in str(e.value) and "\n" not in str(e.value)


# --- a step on all of them


def test_a_step_is_trained_on_every_kind(
    hub: StandIn, tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources: list[dict[str, Any]] = []
    for i, (record, options, _) in enumerate(RECORDS.values()):
        sources.append({"path": str(jsonl(tmp_path / f"r{i}.jsonl", record)), **options})
    for name, (text, options, _) in TABLES.items():
        (tmp_path / name).write_bytes(text.encode())
        sources.append({"path": str(tmp_path / name), **options})
    for suffix, compress in COMPRESS.items():
        path = tmp_path / f"c.jsonl{suffix}"
        path.write_bytes(compress(b'{"prompt": "q", "completion": "a"}\n'))
        sources.append({"path": str(path)})
    tools = {"messages": CHAT_OF_TOOLS, "tools": [TOOL]}
    weighted = {"messages": [*TALK, TALK[0], message("assistant", "b", weight=0)]}
    for name, record in (("tools", tools), ("weighted", weighted)):
        sources.append({"path": str(jsonl(tmp_path / f"{name}.jsonl", record))})
    root = layout(tmp_path / "folder", "data/en-sw/train.jsonl", "data/en-fr/train.jsonl")
    sources.append({"path": str(root), "subset": "en-sw"})
    layout(hub.repository, "sw/a.jsonl", "sw/b.jsonl", "fr/part-1.jsonl", card=CARD)
    sources.append({"path": "org/pairs", "subset": "en-sw"})
    recipe = {
        "model": str(tiny_model_dir), "output": str(tmp_path / "run"),
        "data": {"sources": sources, "pack_tokens": 512, "cache": str(tmp_path / "cache")},
        "stages": [{"layers": "top:1", "epochs": 1}],
        "training": {"tokens_per_step": 8192},
        "evaluation": {"translate": 0, "samples": 0},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 0
    said = capsys.readouterr().out
    for form in ("sharegpt", "messages", "prompt", "alpaca", "translation"):
        assert f".jsonl: {form}" in said or f".csv: {form}" in said
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 1 and 0 < json.loads(line)["loss"] < 20
