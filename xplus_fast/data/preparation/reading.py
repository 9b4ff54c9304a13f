"""The pass over the corpora: cut into parts for the workers; what cannot be read is set aside."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from xplus_fast.data.files import Rejected
from xplus_fast.data.preparation.corpora import read_corpus
from xplus_fast.data.preparation.parts import Part
from xplus_fast.data.preparation.recipe import Corpus, PrepareRecipe, corpus_name, of_corpus
from xplus_fast.data.steps.batch import SCHEMA
from xplus_fast.errors import UserError


class Reading:
    """One pass: parts for the workers, and what could not be read."""

    def __init__(self, recipe: PrepareRecipe, work: Path, quarantine: BinaryIO) -> None:
        self.recipe, self.work, self.quarantine = recipe, work, quarantine
        self.names: list[str] = []
        self.aside: Counter[str] = Counter()  # "corpus: reason" -> records or files
        self.read: Counter[str] = Counter()  # corpus -> pairs

    def calls(self) -> Iterator[tuple[Part, pa.RecordBatch, PrepareRecipe]]:
        """The parts that are still to be worked on."""
        for number, corpus in enumerate(self.recipe.corpora):
            recipe = of_corpus(self.recipe, number)
            for at, rows in enumerate(self._parts(corpus)):
                part = Part(f"{number:05}-{at:06}", str(self.work))
                self.names.append(part.name)
                if not (self.work / f"{part.name}.json").exists():
                    yield part, pa.RecordBatch.from_pylist(rows, schema=SCHEMA), recipe

    def _parts(self, corpus: Corpus) -> Iterator[list[dict[str, Any]]]:
        name, rows = corpus_name(corpus), []
        try:
            for item in read_corpus(corpus):
                if isinstance(item, Rejected):
                    if self.recipe.on_error == "stop":
                        raise UserError(f"{item}; on_error: skip leaves such pairs out")
                    self._set_aside(name, item.where, item.reason, item.detail)
                    continue
                self.read[name] += 1
                rows.append(item)
                if len(rows) == self.recipe.part_pairs:
                    yield rows
                    rows = []
        except UserError as e:
            if self.recipe.on_error == "stop":
                raise
            self._set_aside(name, name, "a file that cannot be read on", str(e))
        if rows:
            yield rows

    def _set_aside(self, corpus: str, where: str, reason: str, detail: str) -> None:
        self.aside[f"{corpus}: {reason}"] += 1
        line = {"corpus": corpus, "where": where, "reason": reason, "detail": detail}
        self.quarantine.write((json.dumps(line) + "\n").encode())
