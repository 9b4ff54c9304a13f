"""What reading gives: examples to learn from, pairs that become some, what the user should hear."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from xplus_fast.config import DataConfig
from xplus_fast.data.conversations import Messages
from xplus_fast.data.files import Rejected
from xplus_fast.data.records import TEXT
from xplus_fast.errors import UserError


@dataclass(frozen=True)
class Example:
    """One conversation to learn from, or a document."""

    messages: Messages  # ends with the assistant's answer; of a document: one of the role TEXT
    where: str  # "file:line", for messages to the user
    tag: str  # translation direction "en-fr", else the source's file stem
    key: str  # "language pair\0content", equal for both directions and duplicates
    mirror: str = ""  # of a pair: the same with the other side's text
    tools: list[dict[str, Any]] | None = None  # that the model is offered

    @property
    def is_text(self) -> bool:
        """Whether it is a document."""
        return self.messages[0]["role"] == TEXT

    @property
    def group(self) -> str:
        """The language pair, whatever the direction; else the tag."""
        return self.key.partition("\0")[0] or self.tag


@dataclass
class Reading:
    """What reading did that the user should hear of."""

    formats: dict[str, str] = field(default_factory=dict)  # path -> the format it was read as
    files: dict[str, list[str]] = field(default_factory=dict)  # folder -> names of those read
    left: dict[str, list[str]] = field(default_factory=dict)  # folder -> those of other splits
    unread: dict[str, str] = field(default_factory=dict)  # key of records -> where first seen
    skipped: Counter[str] = field(default_factory=Counter)  # reason -> records left out
    first: dict[str, list[str]] = field(default_factory=dict)  # reason -> the first few of them

    def skip(self, rejected: Rejected, data: DataConfig) -> None:
        """Count a record that cannot be used; with `data.on_error: stop`, raise `UserError`."""
        if data.on_error == "stop":
            raise UserError(f"{rejected}; data.on_error: skip leaves such records out")
        self.skipped[rejected.reason] += 1
        first = self.first.setdefault(rejected.reason, [])
        if len(first) < 3:
            first.append(rejected.where)


@dataclass(frozen=True)
class Pair:
    """A sentence and its translation."""

    where: str
    languages: tuple[str, str]
    texts: tuple[str, str]
