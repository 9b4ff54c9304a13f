"""Sources that have a share of what is learnt, and raw text beside pairs."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from tests.tiny import tiny_model
from tests.training.workplace import make_workplace, write_recipe, xplus
from xplus_fast.config import DataConfig, Source
from xplus_fast.data.chat import encode, pieces
from xplus_fast.data.corpus import PackCollator, load_corpus
from xplus_fast.data.corpus_text import describe
from xplus_fast.data.packed import RowSampler
from xplus_fast.data.packing import mixed_order, shared_order
from xplus_fast.data.readers import Reading, read_examples, read_text
from xplus_fast.errors import UserError
from xplus_fast.model.prepare import prepare_model

PAIRS = [(f"number {i}", f"nambari {i} " + "ya " * (i % 7)) for i in range(800)]
CHATS = [(f"What is {i}?", f"It is {i}. " + "And so on. " * (i % 11)) for i in range(60)]


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    return DataConfig(prompt="{src}>{tgt}: {text}", pack_tokens=192, cache=str(tmp_path / "cache"))


@pytest.fixture
def sources(tmp_path: Path) -> tuple[Source, Source]:
    """Pairs, and few conversations of very different lengths."""
    pairs, chats = tmp_path / "pairs.jsonl", tmp_path / "chats.jsonl"
    pairs.write_text("".join(json.dumps({"en": a, "sw": b}) + "\n" for a, b in PAIRS))
    chats.write_text("".join(json.dumps({"prompt": a, "completion": b}) + "\n" for a, b in CHATS))
    return Source(str(pairs)), Source(str(chats))


def load(sources: Any, data: DataConfig, tokenizer: Any, seed: int = 0) -> Any:
    return load_corpus(list(sources), data, tokenizer, seed=seed, show=False)


@pytest.mark.parametrize("share", [0.05, 0.2, 0.6])
def test_any_fifty_steps_have_the_share(data, sources, small_tokenizer, share) -> None:
    pairs, chats = sources
    corpus = load([pairs, replace(chats, share=share)], data, small_tokenizer)
    rows = corpus.train.packed(768)
    marks = {small_tokenizer(f"It is {i}.")["input_ids"][0] for i in range(60)}
    assert len(marks) == 1  # how every conversation's answer begins, and no translation does
    found = []
    for row in RowSampler(len(rows), 1, seed=3, steady=rows.steady):  # as they are trained
        item, mine, every = rows[row], 0, 0
        for ids, labels in zip(
            item["input_ids"].split(item["lengths"]), item["labels"].split(item["lengths"]),
            strict=True,
        ):  # fmt: skip
            learnt = ids[labels != -100]
            every += len(learnt)
            mine += len(learnt) if int(learnt[0]) in marks else 0
        found.append((mine, every))
    counts = np.array(found)
    assert len(counts) > 50
    for at in range(len(counts) - 49):
        mine, every = counts[at : at + 50].sum(0)
        assert abs(mine / every - share) < 0.01, (at, mine / every)
    (told,) = corpus.summary["shares"].values()
    assert told["asked"] == share and told["share"] == pytest.approx(share, abs=0.002)
    assert told["share"] == pytest.approx(counts[:, 0].sum() / counts[:, 1].sum())
    said = [line for line in describe(corpus.summary).splitlines() if line.startswith("share")]
    assert said == [
        f"share: {told['share']:.1%} of the supervised tokens are of chats (asked for:"
        f" {share:.1%}), {told['times']:.2f} times over an epoch"
    ]


def test_what_has_no_share_is_there_once_and_the_rest_as_evenly_as_can_be(
    data, sources, small_tokenizer
) -> None:
    pairs, chats = sources
    corpus = load([pairs, replace(chats, share=0.5)], data, small_tokenizer)
    train = corpus.train
    of_pairs = 2 * len(PAIRS)  # the first source's sequences come first in the file
    counts = Counter(train.items.tolist())
    assert all(counts[i] == 1 for i in range(of_pairs))
    times = {counts[i] for i in range(of_pairs, of_pairs + len(CHATS))}
    assert max(times) - min(times) <= 1 and min(times) > 1
    again = load([pairs, replace(chats, share=0.5)], data, small_tokenizer)
    assert again.summary["cached"] and np.array_equal(again.train.items, train.items)
    plain = load([pairs, chats], data, small_tokenizer)
    assert plain.summary["shares"] == {} and len(plain.train.items) == of_pairs + len(CHATS)
    assert plain.summary["sequences"] == sum(plain.summary["tags"].values())
    assert corpus.summary["sequences"] == sum(corpus.summary["tags"].values()) == len(train.items)


def test_where_all_have_a_share_as_much_is_drawn_as_there_is() -> None:
    rng = np.random.default_rng(0)
    sources = np.repeat([0, 1, 2], [500, 50, 200])
    kinds = sources * 2 + rng.integers(0, 2, len(sources))
    tokens = rng.integers(1, 60, len(sources))
    shares = [0.3, 0.5, 0.2]
    order = shared_order(kinds, sources, tokens, shares, seed=1)
    drawn = np.bincount(sources[order], tokens[order])
    assert drawn.sum() == pytest.approx(tokens.sum(), rel=0.01)
    assert np.allclose(drawn / drawn.sum(), shares, atol=0.005)
    reached = np.cumsum(np.eye(3)[sources[order]] * tokens[order, None], axis=0)
    off = reached - reached.sum(1, keepdims=True) * np.array(shares)
    assert np.abs(off).max() < 2 * tokens.max()  # at every point
    assert np.array_equal(order, shared_order(kinds, sources, tokens, shares, seed=1))
    assert not np.array_equal(order, shared_order(kinds, sources, tokens, shares, seed=2))


def test_without_shares_the_order_is_the_mixed_one() -> None:
    kinds = np.arange(40) % 3
    none = [None, None]
    order = shared_order(kinds, np.arange(40) % 2, np.full(40, 5), none, seed=4)
    assert np.array_equal(order, mixed_order(kinds, 4))


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        ((None, 1.0), "data.sources: the shares add up to 1; less than 1, for the sources"),
        ((0.7, 0.7), "the shares add up to 1.4; 1, as every source has one, is wanted"),
        ((0.3, 0.3), "the shares add up to 0.6; 1, as every source has one, is wanted"),
        ((None, 0.0), "data.sources.1.share: 0 would train on none of it; leave the source out"),
        ((None, 1.2), "data.sources.1.share"),
        ((None, -0.1), "data.sources.1.share"),
        ((None, "much"), "data.sources.1.share"),
    ],
)
def test_shares_that_cannot_be_are_one_line(tmp_path, tiny_model_dir, capsys, shares, said) -> None:
    recipe = make_workplace(tmp_path, tiny_model_dir)
    (path,) = (s["path"] for s in recipe["data"]["sources"])
    recipe["data"]["sources"] = [{"path": path, **({} if s is None else {"share": s})}
                                 for s in shares]  # fmt: skip
    assert xplus("train", write_recipe(tmp_path, recipe), "--dry-run") == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
    recipe["data"]["sources"] = [{"path": path}]
    recipe["data"]["retention"][0]["share"] = 0.5
    assert xplus("train", write_recipe(tmp_path, recipe), "--dry-run") == 2
    assert "data.retention.0.share: nothing is trained on it" in capsys.readouterr().err


def test_a_stage_may_have_shares_of_its_own_and_a_dry_run_shows_them(
    tmp_path, tiny_model_dir, capsys
) -> None:
    recipe = make_workplace(tmp_path, tiny_model_dir)
    (tmp_path / "old.txt").write_text("\n\n".join(f"Prose {i}. " * 9 for i in range(30)))
    pairs = recipe["data"]["sources"][0]
    replay = {"path": str(tmp_path / "old.txt"), "format": "text", "share": 0.2}
    recipe["stages"][1]["sources"] = [pairs, replay]
    assert xplus("train", write_recipe(tmp_path, recipe), "--dry-run") == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("share: ")]
    assert len(said) == 1 and "of old (asked for: 20.0%)" in said[0]


def test_shares_of_what_is_not_there_or_far_too_small_are_refused(
    data, sources, small_tokenizer, tmp_path
) -> None:
    pairs, chats = sources
    (tmp_path / "none.jsonl").write_text('{"en": "a", "sw": ""}\n')
    none, skip = Source(str(tmp_path / "none.jsonl")), replace(data, on_error="skip")
    for unfit in ([none, replace(chats, share=0.2)], [chats, replace(none, share=0.2)]):
        with pytest.raises(UserError, match="none.jsonl: nothing of it is trained on"):
            load(unfit, skip, small_tokenizer)
    with pytest.raises(UserError, match=r"times over in an epoch; 1,000 at most"):
        load([pairs, replace(chats, limit=1, share=0.99)], data, small_tokenizer)
    two = [replace(pairs, directions="forward", share=0.3), replace(pairs, share=0.2), chats]
    told = load(two, data, small_tokenizer).summary["shares"]
    assert {name: round(of["share"], 2) for name, of in told.items()} == {
        "pairs": 0.3, "pairs#2": 0.2,
    }  # fmt: skip


# --- text ---

DOCUMENTS = [f"Document {i}. " + "It goes on and on. " * (i * 9) for i in range(6)]


@pytest.mark.parametrize("kind", ["txt", "txt.gz", "jsonl", "parquet", "folder"])
def test_documents_are_cut_into_rows_and_every_token_is_learnt_once(
    data, tmp_path, small_tokenizer, kind
) -> None:
    import gzip

    path = tmp_path / f"prose.{kind}"
    if kind.startswith("txt"):
        text = "\n\n\n".join(DOCUMENTS).encode()
        path.write_bytes(gzip.compress(text) if kind.endswith("gz") else text)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"text": d, "url": "x"}) + "\n" for d in DOCUMENTS))
    elif kind == "parquet":
        Dataset.from_dict({"text": DOCUMENTS}).to_parquet(path)
    else:
        Dataset.from_dict({"text": DOCUMENTS}).save_to_disk(str(path))
    format_ = "text" if kind.startswith("txt") else "auto"
    corpus = load([Source(str(path), format=format_)], data, small_tokenizer)
    stripped = [d if not kind.startswith("txt") else d for d in DOCUMENTS]
    expected = []
    for document in stripped:
        ids = small_tokenizer(document)["input_ids"] + [small_tokenizer.eos_token_id]
        expected += list(zip(ids, ids[1:], strict=False))  # what is predicted, after what
    found = []
    for row in (corpus.train[i] for i in range(len(corpus.train))):
        for ids, labels in zip(
            row["input_ids"].split(row["lengths"]), row["labels"].split(row["lengths"]), strict=True
        ):
            assert len(ids) <= data.pack_tokens and int(labels[0]) == -100
            assert torch.equal(ids[1:], labels[1:])
            found += list(zip(ids.tolist(), ids[1:].tolist(), strict=False))
    assert Counter(found) == Counter(expected)
    assert corpus.summary["formats"] == {str(path): "text"}
    assert corpus.summary["cut"] == 0 and corpus.summary["read"] == len(DOCUMENTS)
    texts = read_text([Source(str(path), format=format_)])
    assert [t.strip() for t in texts] == [d.strip() for d in DOCUMENTS]


def test_a_document_longer_than_memory_should_hold_comes_in_parts(data, tmp_path, monkeypatch):
    monkeypatch.setattr("xplus_fast.data.readers.TEXT_LIMIT", 400)
    lines = [f"line {i} of a long document" for i in range(40)]
    (tmp_path / "long.txt").write_text("\n".join(lines))
    source = Source(str(tmp_path / "long.txt"), format="text")
    found = [e.messages[0]["content"] for e in read_examples(source, data, Reading())]
    assert len(found) > 5 and "\n".join(found).split("\n") == lines


@pytest.mark.parametrize(
    ("name", "content", "format_", "said"),
    [
        ("x.txt", "words", "auto", "format: text trains on raw text"),
        ("x.txt", " \n\n \n", "text", "empty data, no example in it"),
        ("x.jsonl", '{"text": 3}\n', "auto", "text: text is wanted, found 3"),
        ("x.jsonl", '{"text": "  "}\n', "auto", "the text is empty"),
        ("x.jsonl", '{"txt": "a"}\n', "text", "not of the format 'text'"),
        ("x.txt", b"\xff\xfe words", "text", "UTF-8"),
    ],
)
def test_text_that_is_none_is_one_line(
    data, tmp_path, small_tokenizer, name, content, format_, said
) -> None:
    raw = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(UserError, match=said):
        load([Source(str(tmp_path / name), format=format_)], data, small_tokenizer)


def test_text_and_pairs_in_one_pack_do_not_see_each_other(data, sources, small_tokenizer) -> None:
    """The loss of a row is the sum of those of its sequences alone, and so are the gradients."""
    examples = [e for s in sources for e in read_examples(replace(s, limit=2), data, Reading())]
    made = [p for e in encode(examples, small_tokenizer, "masked", 192) for p in pieces(e, 192)]
    ids = small_tokenizer("A document of its own, which nobody asks for.")["input_ids"]
    model = prepare_model(tiny_model("qwen3", vocab_size=len(small_tokenizer)), [4, 5])
    collate = PackCollator(shared_prefixes=True)

    def row(parts: list[tuple[Any, Any]]) -> dict[str, Any]:
        tokens = torch.cat([torch.as_tensor(i, dtype=torch.long) for i, _ in parts])
        on = torch.cat([torch.as_tensor(s) for _, s in parts])
        labels = tokens.masked_fill(~on, -100)
        return {"input_ids": tokens, "labels": labels, "lengths": [len(i) for i, _ in parts]}

    document = (ids, np.arange(len(ids)) > 0)
    parts = [(e.input_ids, e.supervised) for e in made]
    parts.insert(2, document)

    def gradients(rows: list[dict[str, Any]]) -> list[torch.Tensor]:
        model.zero_grad()
        for each in rows:
            model(**collate([each]), num_items_in_batch=1).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    together, alone = gradients([row(parts)]), gradients([row([part]) for part in parts])
    assert len(together) > 10
    for a, b in zip(together, alone, strict=True):
        assert torch.allclose(a, b, rtol=2e-4, atol=2e-4 * float(b.abs().max()))


def test_each_sources_loss_is_told(tmp_path, tiny_model_dir, capsys) -> None:
    """Of one step: what the two make together is the step's loss, and each is that of its own."""
    recipe = make_workplace(tmp_path, tiny_model_dir)
    (tmp_path / "prose.txt").write_text("\n\n".join(f"Prose {i}. " * 9 for i in range(30)))
    prose = {"path": str(tmp_path / "prose.txt"), "format": "text"}
    recipe["data"]["sources"].append({**prose, "share": 0.3})
    recipe["data"] |= {"heldout": 0, "retention": []}
    recipe["stages"] = [{**recipe["stages"][0], "steps": 3}]
    recipe["training"]["tokens_per_step"] = 1 << 20  # all of it
    recipe["memory"] = {"micro_batch_tokens": 384}
    assert xplus("train", write_recipe(tmp_path, recipe)) == 0
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    assert {k for k in first if k.startswith("loss/")} == {"loss/pairs", "loss/prose"}
    pairs, both, text = (first[k] for k in ("loss/pairs", "loss", "loss/prose"))
    assert abs(both - 0.7 * pairs - 0.3 * text) < 2e-3 and abs(pairs - text) > 1e-2
    out = capsys.readouterr()
    assert f"loss {json.loads(lines[-1])['loss']:.3f} (pairs " in out.err
    report = (tmp_path / "run/report.md").read_text()
    assert "| the same of pairs |" in report and "| the same of prose |" in report
    # alone, the first loss of the pairs is what it was among the prose
    recipe["data"]["sources"] = recipe["data"]["sources"][:1]
    recipe["output"] = str(tmp_path / "alone")
    assert xplus("train", write_recipe(tmp_path, recipe)) == 0
    alone = json.loads((tmp_path / "alone/metrics.jsonl").read_text().splitlines()[0])
    assert alone["loss"] == pytest.approx(pairs, rel=1e-4) and "loss/pairs" not in alone
