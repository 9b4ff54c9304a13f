"""What all runs of the experiment train on and are measured by, made once from the demo's assets.

In the work folder: `train/` (the demo's short pairs by direction, and what keeps old abilities),
nothing else. What keeps old abilities is the base model's own: its greedy
answers to general requests, none of them like the tasks it is measured by.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.recipe import tasks
from xplus_fast.config import Recipe, Source
from xplus_fast.data.chat import prompt_text
from xplus_fast.data.examples import Example, Reading
from xplus_fast.data.readers import read_examples, read_text
from xplus_fast.evaluation.generate import answers, greedy
from xplus_fast.files import make_folder, write_text

REPLAY = "general"  # file of the base's own answers
TOPICS = (
    "the sea", "a winter morning", "trees", "music", "cooking rice", "friendship", "the moon",
    "trains", "a good night's sleep", "gardening", "volcanoes", "learning to swim", "bread",
    "computers", "rain", "old books", "mountains", "birds", "football", "painting", "bicycles",
    "tea", "the desert", "bees", "maps", "bridges", "honesty", "dreams", "clouds", "a long walk",
)  # fmt: skip
REQUESTS = (
    "Write two sentences about {}.", "Why do people care about {}? Answer briefly.",
    "Tell me something interesting about {}.", "Give a short piece of advice about {}.",
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """How much there is of everything."""

    heldout: int = 40  # pairs of each direction
    longest: int = 48  # tokens of a pair's side at most
    items: int = 60  # questions of a task at most
    prose: int = 20  # paragraphs
    prose_tokens: int = 96  # of each
    replay: int = 96  # general requests answered by the base
    new_tokens: int = 64  # of an answer or a translation


@dataclass(frozen=True)
class Material:
    """heldout: pairs by direction. prompts: their questions as the model reads them.

    sequences: what is scored, by name: "en-fr", ..., "prose", and the tasks; (input_ids, labels),
    int64 [T].
    """

    sources: tuple[Source, ...]
    replay: Path
    tokenizer: Any
    heldout: dict[str, list[Example]]
    prompts: dict[str, list[str]]
    sequences: dict[str, list[tuple[Tensor, Tensor]]]

    @property
    def directions(self) -> list[str]:
        return list(self.heldout)


def prepare(recipe: Recipe, size: Size, work: Path, tokenizer: Any) -> Material:
    """Split the demo's pairs, and encode what is scored. The replay's file is made by `answer`."""
    make_folder(work / "train")
    heldout: dict[str, list[Example]] = {}
    sources = []
    for source in recipe.data.sources:
        held, trained = _split(recipe, source, size, tokenizer)
        tag = held[0].tag
        heldout[tag] = held
        file = work / "train" / f"{tag}.jsonl"
        _write_lines(file, [{"messages": list(e.messages)} for e in trained])
        sources.append(Source(str(file), format="messages"))
    prompts = {
        tag: [prompt_text(e, tokenizer, "masked") for e in part] for tag, part in heldout.items()
    }
    sequences = {
        tag: [
            tasks.sequence(p, e.messages[-1]["content"] + tokenizer.eos_token, tokenizer)
            for p, e in zip(prompts[tag], part, strict=True)
        ]
        for tag, part in heldout.items()
    }
    sequences["prose"] = list(_prose(recipe, size, tokenizer))
    for task in tasks.TASKS:
        sequences[task] = tasks.encode(task, size.items, tokenizer)
    replay = work / "train" / f"{REPLAY}.jsonl"
    return Material(tuple(sources), replay, tokenizer, heldout, prompts, sequences)


def answer_requests(model: Any, material: Material, size: Size) -> None:
    """Write what keeps old abilities: the base's answers to general requests."""
    chance = random.Random(0)
    asked = [request.format(topic) for request in REQUESTS for topic in TOPICS]
    asked = chance.sample(asked, min(size.replay, len(asked)))
    made = translate(model, material.tokenizer, [_one_turn(q, material) for q in asked], size)
    pairs = [(q, a) for q, a in zip(asked, made, strict=True) if a]
    _write_lines(
        material.replay,
        [
            {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
            for q, a in pairs
        ],
    )


def translate(model: Any, tokenizer: Any, prompts: Sequence[str], size: Size) -> list[str]:
    """Greedy answers, in the order of the prompts."""
    made = [""] * len(prompts)
    with greedy(model, tokenizer, size.new_tokens):
        for batch in answers(model, tokenizer, prompts, len(prompts)):
            for i, text, _ in batch:
                made[i] = text
    return made


def _split(
    recipe: Recipe, source: Source, size: Size, tokenizer: Any
) -> tuple[list[Example], list[Example]]:
    """Pairs held out and pairs to train on, short ones only."""

    def short(example: Example) -> bool:
        sides = (m["content"] for m in example.messages[-2:])
        prompt, answer = (len(tokenizer(text)["input_ids"]) for text in sides)
        return answer <= size.longest and prompt <= 2 * size.longest

    seen = {e.key: e for e in read_examples(source, recipe.data, Reading()) if short(e)}
    found = list(seen.values())
    random.Random(0).shuffle(found)
    return found[: size.heldout], found[size.heldout :]


def _prose(recipe: Recipe, size: Size, tokenizer: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Every token but the first is supervised."""
    for text in read_text(recipe.data.retention)[: size.prose]:
        ids = torch.tensor(tokenizer(text)["input_ids"][: size.prose_tokens])
        yield ids, ids.masked_fill(torch.arange(len(ids)) == 0, -100)


def _one_turn(question: str, material: Material) -> str:
    return material.tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )


def _write_lines(file: Path, records: Sequence[dict[str, Any]]) -> None:
    write_text(file, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
