"""From files to batches: what is held out, what is cached, what a batch says of itself."""

import errno
import json
import os
import pickle
from collections import Counter
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.assets import shared_data
from xplus_fast.config import DataConfig, Source
from xplus_fast.data import corpus as corpus_module
from xplus_fast.data.chat import Encoded, encode
from xplus_fast.data.corpus import (
    Corpus,
    PackCollator,
    describe,
    load_corpus,
    pack_examples,
    pack_texts,
)
from xplus_fast.data.packed import RowSampler
from xplus_fast.data.readers import Reading, read_examples
from xplus_fast.errors import UserError

PAIRS = [(f"number {i}", f"nambari {i} " + "ya " * (i % 7)) for i in range(60)]


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    return DataConfig(prompt="{src}>{tgt}: {text}", pack_tokens=128, cache=str(tmp_path / "cache"))


def write(path: Path, pairs: list[tuple[str, str]]) -> Source:
    path.write_text("".join(json.dumps({"en": a, "sw": b}) + "\n" for a, b in pairs), "utf-8")
    return Source(str(path))


def load(sources: Any, data: DataConfig, tokenizer: Any, **options: Any) -> Corpus:
    sources = [sources] if isinstance(sources, Source) else sources
    return load_corpus(sources, data, tokenizer, **{"seed": 0, "show": False, **options})


def sequences(corpus: Corpus) -> list[tuple[list[int], list[int]]]:
    """(input ids, labels) of every packed sequence."""
    found = []
    for row in (corpus.train[i] for i in range(len(corpus.train))):
        assert sum(row["lengths"]) == len(row["input_ids"]) == len(row["labels"])
        parts = zip(
            row["input_ids"].split(row["lengths"]), row["labels"].split(row["lengths"]), strict=True
        )
        found += [(ids.tolist(), labels.tolist()) for ids, labels in parts]
    return found


def texts(corpus: Corpus, tokenizer: Any) -> str:
    return "\n".join(tokenizer.decode(ids) for ids, _ in sequences(corpus))


def test_every_sequence_is_packed_once(
    data: DataConfig, small_tokenizer: Any, tmp_path: Path
) -> None:
    source = write(tmp_path / "x.jsonl", PAIRS)
    corpus = load(source, data, small_tokenizer)
    examples = list(read_examples(source, data, Reading()))
    expected = []
    for e in encode(examples, small_tokenizer, "masked", 128):
        assert isinstance(e, Encoded)
        expected.append((e.input_ids.tolist(), np.where(e.supervised, e.input_ids, -100).tolist()))
    assert sorted(sequences(corpus)) == sorted(expected)
    s = corpus.summary
    assert s["read"] == s["sequences"] == 120 and s["tags"] == {"en-sw": 60, "sw-en": 60}
    assert s["tokens"] == sum(len(i) for i, _ in expected)
    assert s["supervised"] == sum(x != -100 for _, labels in expected for x in labels)
    assert s["formats"] == {source.path: "translation"}
    with pytest.raises(IndexError):
        corpus.train[len(corpus.train)]


def test_held_out_pairs_are_nowhere_in_training(
    data: DataConfig, small_tokenizer: Any, tmp_path: Path
) -> None:
    # Every English sentence twice, with two translations; every translation of two sentences.
    pairs = [(f"English {i // 2}.", f"Kiswahili {(i + 1) // 2}.") for i in range(80)]
    source = write(tmp_path / "x.jsonl", pairs)
    corpus = load(source, replace(data, heldout=5), small_tokenizer)
    assert {t: len(e) for t, e in corpus.heldout.items()} == {"en-sw": 5, "sw-en": 5}
    trained = texts(corpus, small_tokenizer)
    answers = [e.messages[-1]["content"] for part in corpus.heldout.values() for e in part]
    assert len(set(answers)) == 10
    for answer in answers:
        assert answer not in trained
    assert corpus.summary["kept_out"] + corpus.summary["sequences"] == 160
    # Turned around and in another order, the same pairs are held out.
    other = tmp_path / "y.jsonl"
    other.write_text("".join(json.dumps({"sw": b, "en": a}) + "\n" for a, b in reversed(pairs)))
    again = load(Source(str(other)), replace(data, heldout=5), small_tokenizer)
    assert {e.key for e in again.heldout["en-sw"]} == {e.key for e in corpus.heldout["en-sw"]}


def test_held_out_is_per_language_pair_and_per_tag(
    data: DataConfig, small_tokenizer: Any, tmp_path: Path
) -> None:
    pairs = write(tmp_path / "pairs.jsonl", PAIRS)
    french = tmp_path / "fr.jsonl"
    french.write_text("".join(f'{{"en": "{a}", "fr": "le {a}"}}\n' for a, _ in PAIRS))
    chat = tmp_path / "chat.jsonl"
    chat.write_text("".join(f'{{"prompt": "q{i}", "completion": "a"}}\n' for i in range(9)))
    sources = [pairs, Source(str(french), directions="backward"), Source(str(chat))]
    corpus = load(sources, replace(data, heldout=3), small_tokenizer)
    counts = {t: len(e) for t, e in corpus.heldout.items()}
    assert counts == corpus.summary["heldout"] == {"en-sw": 3, "sw-en": 3, "fr-en": 3, "chat": 3}
    assert corpus.summary["tags"] == {"en-sw": 57, "sw-en": 57, "fr-en": 57, "chat": 6}
    with pytest.raises(UserError, match="^data.heldout: .* nothing is left to train on of chat$"):
        load(sources, replace(data, heldout=9), small_tokenizer)


def test_what_another_corpus_holds_out_is_kept_out(
    data: DataConfig, small_tokenizer: Any, tmp_path: Path
) -> None:
    source = write(tmp_path / "x.jsonl", PAIRS)
    first = load(source, replace(data, heldout=5), small_tokenizer)
    held = [e for part in first.heldout.values() for e in part]
    second = load(source, data, small_tokenizer, keep_out=held)
    assert sorted(sequences(second)) == sorted(sequences(first))
    assert len(sequences(load(source, data, small_tokenizer))) == 120  # another cache entry


def test_cache_is_found_again_and_follows_content_and_options(
    data: DataConfig, small_tokenizer: Any, qwen_tokenizer: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    source = write(tmp_path / "x.jsonl", PAIRS)
    data = replace(data, heldout=4)
    calls: Counter[str] = Counter()

    def counted(*args: Any) -> Any:
        calls["encode"] += 1
        return encode(*args)

    monkeypatch.setattr(corpus_module, "encode", counted)
    first = load(source, data, small_tokenizer)
    second = load(source, data, small_tokenizer)
    assert calls["encode"] == 1
    assert not first.summary["cached"] and second.summary["cached"]
    assert sequences(second) == sequences(first) and second.heldout == first.heldout
    assert describe(second.summary) == describe(first.summary)
    changes: list[tuple[Any, DataConfig, Any, int]] = [
        (source, replace(data, think="loss"), small_tokenizer, 0),
        (source, replace(data, prompt="{text}"), small_tokenizer, 0),
        (replace(source, directions="forward"), data, small_tokenizer, 0),
        (source, data, qwen_tokenizer, 0),
        (source, data, small_tokenizer, 1),
    ]
    for n, (changed, options, tokenizer, seed) in enumerate(changes, 2):
        load(changed, options, tokenizer, seed=seed)
        assert calls["encode"] == n
    write(tmp_path / "x.jsonl", [*PAIRS[:-1], ("number 59", "nambari!")])
    assert "nambari!" in texts(load(source, data, small_tokenizer), small_tokenizer)


def test_a_killed_process_leaves_nothing_that_is_taken_for_whole(
    data: DataConfig, small_tokenizer: Any, tmp_path: Path
) -> None:
    source, cache = write(tmp_path / "x.jsonl", PAIRS), Path(data.cache)

    def killed() -> None:
        corpus_module.write_manifest = lambda *_: os._exit(9)  # everything else is written
        load(source, data, small_tokenizer)

    other = write(tmp_path / "y.jsonl", PAIRS[:30])
    process = get_context("fork").Process(target=killed)
    process.start()
    process.join(60)
    assert process.exitcode == 9
    assert {p.suffix for p in cache.iterdir()} == {".tmp", ".lock"}
    (cache / ".mine.tmp").mkdir()  # not one of ours
    (cache / ".building-x1y2").mkdir()  # by a version that held no locks
    load(other, data, small_tokenizer)  # which has no use for what was left
    assert sorted(p.name[:5] for p in cache.iterdir() if p.name[0] == ".") == [".mine"]
    corpus = load(source, data, small_tokenizer)
    assert not corpus.summary["cached"] and len(sequences(corpus)) == 120


def test_two_processes_at_once(
    data: DataConfig, small_tokenizer: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """The second waits for the first and finds what it made; a third corpus is made meanwhile."""
    source, build = write(tmp_path / "x.jsonl", PAIRS), corpus_module._build
    other = write(tmp_path / "y.jsonl", PAIRS[:30])
    fork, found = get_context("fork"), get_context("fork").Queue()

    def second() -> None:
        corpus_module._build = lambda *_: os._exit(1)  # nothing is built twice
        found.put(load(source, data, small_tokenizer).summary["sequences"])

    process = fork.Process(target=second)

    def slower(folder: Path, *args: Any) -> None:
        build(folder, *args)
        monkeypatch.setattr(corpus_module, "_build", build)
        process.start()
        load(other, data, small_tokenizer)
        process.join(0.5)
        assert process.is_alive()

    monkeypatch.setattr(corpus_module, "_build", slower)
    assert len(sequences(load(source, data, small_tokenizer))) == 120
    assert found.get(timeout=60) == 120
    process.join(60)
    assert process.exitcode == 0 and len(list(Path(data.cache).iterdir())) == 2


def test_full_disk(
    data: DataConfig, small_tokenizer: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    source = write(tmp_path / "x.jsonl", PAIRS)
    monkeypatch.setattr(np, "save", full)
    with pytest.raises(UserError, match=r"cache/.* cannot be written \(No space left on device\)"):
        load(source, data, small_tokenizer)
    assert list(Path(data.cache).iterdir()) == []


def test_a_damaged_cache_is_named(data: DataConfig, small_tokenizer: Any, tmp_path: Path) -> None:
    """One flipped bit in any of its files, one that is missing, one cut short."""
    source = write(tmp_path / "x.jsonl", PAIRS)
    load(source, replace(data, heldout=3), small_tokenizer)
    folder = next(Path(data.cache).iterdir())
    files = sorted(folder.iterdir())
    assert len(files) == 7
    for file in files:
        whole = file.read_bytes()
        flipped = bytes([*whole[:-3], whole[-3] ^ 1, *whole[-2:]])
        for damaged in (flipped, whole[:-8], None):
            file.unlink()
            if damaged is not None:
                file.write_bytes(damaged)
            with pytest.raises(UserError) as caught:
                load(source, replace(data, heldout=3), small_tokenizer)
            assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
            file.write_bytes(whole)
    assert load(source, replace(data, heldout=3), small_tokenizer).summary["cached"]


def test_records_left_out_are_told(data: DataConfig, small_tokenizer: Any, tmp_path: Path) -> None:
    long = "word " * 120
    source = write(tmp_path / "x.jsonl", [("a", "b"), ("", "c"), (long, "d"), ("e", long)])
    with pytest.raises(UserError, match=r"x\.jsonl:2: the text to answer is empty; data.on_error"):
        load(source, data, small_tokenizer)
    too_long = write(tmp_path / "z.jsonl", [("a", "b"), (long, "d")])
    with pytest.raises(UserError, match=r"z\.jsonl:2: longer than the token budget \(1\d\d tokens"):
        load(too_long, data, small_tokenizer)
    data = replace(data, on_error="skip")
    corpus = load(source, data, small_tokenizer)
    # long -> d and long -> e leave no room; d -> long and e -> long are cut.
    assert corpus.summary["skipped"] == {
        "the text to answer is empty": 1,
        "longer than the token budget": 2,
    }
    assert corpus.summary["cut"] == 2 and corpus.summary["sequences"] == 4
    told = describe(corpus.summary)
    where = f"{source.path}:3, {source.path}:4"
    assert f"left out: 2 x longer than the token budget: {where}\n" in told
    assert "cut to 128 tokens: 2 answers" in told
    only_bad = write(tmp_path / "y.jsonl", [("", "c")])
    with pytest.raises(UserError, match="y.jsonl: empty data, .*1 x the text to answer is empty"):
        load(only_bad, data, small_tokenizer)


def test_collator(data: DataConfig) -> None:
    rows = [
        {"input_ids": torch.tensor([5, 6, 7]), "labels": torch.tensor([-100, 6, 7]),
         "lengths": [3]},
        # The labels of the last sequence start at its first token, which nothing predicts: it is
        # not labelled in the batch, where Trainer counts labels to divide by.
        {"input_ids": torch.tensor([1, 2, 3, 4]), "labels": torch.tensor([-100, -100, 3, 4]),
         "lengths": [2, 2]},
        {"input_ids": [8], "labels": [-100]},
    ]  # fmt: skip
    batch = PackCollator()(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 1, 2, 3, 4, 8]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, -100, -100, 4, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 0]]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 3, 5, 7, 8]
    assert batch["supervised_rows"].tolist() == [0, 1, 5]
    assert type(batch["max_length_q"]) is int and batch["max_length_q"] == 3
    dtypes = {k: v.dtype for k, v in batch.items() if isinstance(v, torch.Tensor)}
    assert dtypes.pop("cu_seq_lens_q") == dtypes.pop("cu_seq_lens_k") == torch.int32
    assert set(dtypes.values()) == {torch.int64}


def test_small_sets_in_memory(data: DataConfig, small_tokenizer: Any, tmp_path: Path) -> None:
    source = write(tmp_path / "x.jsonl", PAIRS)
    corpus = load(source, data, small_tokenizer)
    rows = pack_examples(list(read_examples(source, data, Reading())), small_tokenizer, data)
    in_memory = [i for row in rows for i in row["input_ids"].split(row["lengths"])]
    assert sorted(i.tolist() for i in in_memory) == sorted(i for i, _ in sequences(corpus))
    assert pack_examples([], small_tokenizer, data) == []

    plain = ["one two three", "", "x", "a longer text that is cut to the budget"]
    rows = pack_texts(plain, small_tokenizer, 6)
    assert sorted(n for row in rows for n in row["lengths"]) == [3, 6]
    for row in rows:
        labels, ids = row["labels"].tolist(), row["input_ids"].tolist()
        assert labels[0] == -100 and labels[1:] == ids[1:]
    assert pack_texts([], small_tokenizer, 6) == []


def test_processes_share_each_row(data: DataConfig, small_tokenizer: Any, tmp_path: Path) -> None:
    train = load(write(tmp_path / "x.jsonl", PAIRS), data, small_tokenizer).train
    whole, shared = train.packed(512), train.packed(512, 3)
    assert len(shared) == 3 * len(whole)
    for i, row in enumerate(whole):
        parts = [shared[3 * i + p] for p in range(3)]
        assert all(part["lengths"] for part in parts)
        places = [p for part in parts for p in part["places"]]
        assert sorted(places) == sorted(row["places"])
    order = RowSampler(len(whole), 3, seed=0)
    first = list(order)
    assert sorted(first) == list(range(len(shared)))
    assert all(first[i] % 3 == i % 3 and first[i] // 3 == first[i - i % 3] // 3 for i in first)
    assert list(order) == first
    order.epoch = 1
    assert list(order) != first and sorted(order) == sorted(first)
    with pytest.raises(UserError, match="120 sequences to train on, fewer than processes .121."):
        train.packed(512, 121)


def test_workers_map_the_same_files(data: DataConfig, small_tokenizer: Any, tmp_path: Path) -> None:
    train = load(write(tmp_path / "x.jsonl", PAIRS), data, small_tokenizer).train
    carried = pickle.dumps(train)
    assert len(carried) < 1000
    assert pickle.loads(carried)[0]["input_ids"].tolist() == train[0]["input_ids"].tolist()


def test_real_sentences(data: DataConfig, small_tokenizer: Any) -> None:
    folder = shared_data("parallel")
    files = [str(folder / f"tatoeba.en-sw.{code}.gz") for code in ("en", "sw")]
    corpus = load(Source(files), replace(data, heldout=20, pack_tokens=512), small_tokenizer)
    s = corpus.summary
    assert s["read"] == 774 and s["skipped"] == {}
    assert s["heldout"] == {"en-sw": 20, "sw-en": 20}
    assert s["sequences"] + s["kept_out"] == 774
    rows = [sum(row["lengths"]) for row in corpus.train]
    assert max(rows) <= 512 and sum(rows) > 0.85 * 512 * len(rows)
    trained = texts(corpus, small_tokenizer)
    for part in corpus.heldout.values():
        for e in part:
            assert e.messages[0]["content"] + "<|im_end|>" not in trained


def test_a_record_in_two_files_is_held_out_of_both(tmp_path: Path, small_tokenizer: Any) -> None:
    records = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(30)]
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(r) + "\n" for r in records))
    sources = [Source(str(tmp_path / name)) for name in ("a.jsonl", "b.jsonl")]
    data = DataConfig(heldout=5, pack_tokens=128, cache=str(tmp_path / "cache"))
    corpus = load_corpus(sources, data, small_tokenizer, seed=0, show=False)
    held = {e.messages[0]["content"] for part in corpus.heldout.values() for e in part}
    trained = "".join(small_tokenizer.decode(row["input_ids"]) for row in corpus.train)
    assert len(held) == 5 and not any(f"{question}<" in trained for question in held)
