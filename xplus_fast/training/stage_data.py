"""What each stage trains on and is measured by."""

import sys
from dataclasses import dataclass, replace
from typing import Any

from xplus_fast.data.chat import Encoded, preview
from xplus_fast.data.corpus import Corpus, load_corpus, read_validation
from xplus_fast.data.corpus_text import describe
from xplus_fast.data.packed import look_at_work
from xplus_fast.data.readers import Example, read_text
from xplus_fast.errors import UserError
from xplus_fast.measuring.heldout import is_direction
from xplus_fast.model.pretrained import load_tokenizer
from xplus_fast.planning.flops import Work
from xplus_fast.training.job import Job
from xplus_fast.training.place import barrier


@dataclass(frozen=True)
class StageData:
    """A corpus a stage, what there is to do in each, and plain texts whose loss should not move."""

    tokenizer: Any
    corpora: list[Corpus]
    works: list[Work]
    texts: list[str]

    @property
    def heldout(self) -> dict[str, list[Example]]:
        """By direction: what no stage trains on."""
        return self.corpora[0].heldout


def load_data(job: Job) -> StageData:
    """Read, or find again, what the recipe names, and show the first example of it."""
    tokenizer = load_tokenizer(job.base)
    texts = read_text(job.recipe.data.retention) if job.recipe.data.retention else []
    corpora, works = _load_corpora(job, tokenizer)
    _show_first(corpora[0], tokenizer, job.say)
    data = StageData(tokenizer, corpora, works, texts)
    if job.recipe.evaluation.by == "chrf":
        if not any(is_direction(tag, part) for tag, part in data.heldout.items()):
            raise UserError(
                "evaluation.by: chrf, and no translations are held out:"
                f" {', '.join(data.heldout) or 'nothing'}"
            )
    return data


def _load_corpora(job: Job, tokenizer: Any) -> tuple[list[Corpus], list[Work]]:
    """One corpus a stage, in rows of an optimizer step, and what there is to do in them.

    Stages without sources of their own share that of `data.sources`. The first one holds pairs
    out, the others keep the same ones out. Steps look at data alone and at no plan: a run goes on
    with the same ones under another budget.
    """
    recipe, place, say = job.recipe, job.place, job.say
    given = {}
    if recipe.data.validation:
        given = read_validation(recipe.data, tokenizer, job.shape.vocabulary)
    if given:
        say("validation: " + ", ".join(f"{tag} {len(part):,}" for tag, part in given.items()))
    loaded: dict[Any, Corpus] = {}
    works: dict[Any, Work] = {}
    keys = []
    for i, stage in enumerate(recipe.stages):
        sources = recipe.data.sources if stage.sources is None else stage.sources
        if not sources:
            raise UserError(
                f"stages.{i}: no data: neither data.sources nor its own sources are given"
            )
        key = repr(sources)
        if key not in loaded:
            first = next(iter(loaded.values()), None)
            heldout = given if first is None else first.heldout
            held = [e for part in heldout.values() for e in part]
            data = recipe.data if first is None else replace(recipe.data, heldout=0)
            if not place.first:
                barrier(place)  # the first process makes the corpus, the others find it
            corpus = load_corpus(
                sources, data, tokenizer, seed=recipe.seed, show=place.first, keep_out=held,
                vocabulary=job.shape.vocabulary,
            )  # fmt: skip
            if place.first:
                barrier(place)
            rows = corpus.train.packed(recipe.training.tokens_per_step, place.processes)
            works[key] = look_at_work(rows, data.pack_tokens, shared=data.shared_prompts)
            summary = {**corpus.summary, "saved": works[key].saved}
            loaded[key] = replace(corpus, train=rows, summary=summary)
            if given:
                loaded[key] = replace(loaded[key], heldout=given)
            say(describe(summary))
            say(f"cache: {'found in' if summary['cached'] else 'written to'} {summary['folder']}")
        keys.append(key)
    return [loaded[key] for key in keys], [works[key] for key in keys]


def _show_first(corpus: Corpus, tokenizer: Any, say: Any) -> None:
    """The first training example as the model will see it, the supervised part marked."""
    row = corpus.train[0]
    n = row["lengths"][0]
    first = Encoded(row["input_ids"][:n].numpy(), (row["labels"][:n] != -100).numpy())
    say("first example (what is supervised is marked):")
    say(preview(first, tokenizer, sys.stdout.isatty()))
