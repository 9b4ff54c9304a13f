"""What tests of kinds of corpora share."""

from typing import Any

import pytest

from xplus_fast.data.files import Rejected
from xplus_fast.data.preparation.corpora import read_corpus
from xplus_fast.data.preparation.recipe import Corpus
from xplus_fast.errors import UserError

EN, SW = ["Hello there.", "Good morning."], ["Habari yako.", "Habari za asubuhi."]
PAIRS = list(zip(EN, SW, strict=True))


def rows(path: Any, **options: Any) -> list[Any]:
    path = [str(p) for p in path] if isinstance(path, list) else str(path)
    return list(read_corpus(Corpus(path, **options)))


def texts(path: Any, **options: Any) -> list[tuple[str, str]]:
    found = rows(path, **options)
    assert not any(isinstance(row, Rejected) for row in found), found
    return [(row["source"], row["target"]) for row in found]


def fault(path: Any, **options: Any) -> str:
    with pytest.raises(UserError) as e:
        rows(path, **options)
    assert "\n" not in str(e.value)
    return str(e.value)


def lines(*text: str) -> bytes:
    return "".join(f"{line}\n" for line in text).encode()


UNIT = '<tu><tuv xml:lang="en"><seg>{}</seg></tuv><tuv xml:lang="sw"><seg>{}</seg></tuv></tu>'
TMX = (
    '<?xml version="1.0"?>\n<tmx version="1.4"><header srclang="en"/><body>\n'
    f"{UNIT.format(*PAIRS[0])}\n</body></tmx>\n"
)
