"""What a model answered: what of it is scored, and what is odd about it.

Scored is one line, the very line that is written, as sacrebleu's command reads it: a text ends with
its line. A thought is no part of a translation and is left out; everything else that does not
belong (chatter, loops, the prompt again) is the model's fault, is scored, and is counted.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from string import Formatter

import numpy as np

from xplus_fast.data.languages import language_name
from xplus_fast.measuring.answers import without_thought

ODDITIES = {
    "empty": "empty",
    "truncated": "cut off at the token limit",
    "thoughts": "with a think block, which is not scored",
    "chatter": "with words around the translation",
    "loops": "that repeat themselves",
    "echoes": "that repeat the prompt",
}
_BREAK = re.compile(r"\r\n|[\r\n]")

# stems of "translation" in the languages of the world, by which an answer names itself
WORDS = Path(__file__).with_name("translation_words.txt")
_ASSISTANT = re.compile(
    r"(?:sure|certainly|of course|absolutely|okay|here(?: is| are|'s|\u2019s)|below is|as an ai"
    r"|i(?:'m| am|\u2019m) sorry|i (?:can|cannot|can't|can\u2019t|will|would))\b",
    re.IGNORECASE,
)
# A line of its own behind the translation
_NOTE = re.compile(
    r"\n[\s*_(\[]*(?:notes?|n\.?b\.?|p\.?s\.?|explanations?|please note|alternatively|let me know"
    r"|i hope|i have|i(?:'|\u2019)ve|this translation|the translation|remarques?|anmerkung|hinweis"
    r"|nota|\u6ce8|\u8bf4\u660e)\b",
    re.IGNORECASE,
)
_LABEL = re.compile(r"[\[<(]([^\[\]<>()/:]{2,40})[\]>)]")  # [French], <fr>
_LABELS = {"translation", "translated text", "answer", "output", "result", "response", "target",
           "assistant", "user", "human", "system"}  # fmt: skip
HEAD = 120  # characters in which an answer may name itself
COPY = 20  # characters of a source from which on an answer that has them all repeats it
PIECE = 12  # characters of a line of the prompt, the same
LOOP, TIMES = 24, 3  # characters and turns of a loop at least
LOOKED, GRAM = 8000, 8  # how many characters are looked at for one; in pieces of


@dataclass(frozen=True)
class Answer:
    """What is scored, on one line, and which of `ODDITIES` hold of what was answered."""

    text: str
    odd: frozenset[str] = frozenset()


def one_line(text: str) -> str:
    r"""A text as a line of a file: no line end inside, no space around, and no lone surrogate.

    U+2028 and its like stay: only \n ends a line, and \r is taken for an end by many.
    """
    text = _BREAK.sub(" ", text).strip()
    return text.encode(errors="backslashreplace").decode()


def read(
    text: str, cut: bool, *, source: str, reference: str, prompt: str, languages: tuple[str, str]
) -> Answer:
    """An answer as it was made -> what is scored of it and what is odd about it.

    cut: it ended only at the token limit. prompt: of the recipe, with its {fields}, and whatever
    else the model was told. languages: codes of source and target.
    """
    said, thought = without_thought(text, source)
    line = one_line(said)
    holds = {
        "empty": not line,
        "truncated": cut,
        "thoughts": thought,
        "chatter": _chatter(said.strip(), source, languages),
        "loops": loops(line, source),
        "echoes": _echoes(line, source, reference, prompt, languages),
    }
    return Answer(line, frozenset(kind for kind, is_so in holds.items() if is_so))


def count(answers: Sequence[Answer]) -> dict[str, int]:
    """How many answers are odd in each way, of how many sentences."""
    counts = {kind: sum(kind in a.odd for a in answers) for kind in ODDITIES}
    return {"sentences": len(answers), **counts}


def describe(counts: dict[str, int]) -> str:
    """The ways in which some are odd: "3 empty, 2 that repeat themselves"; "" where none is."""
    return ", ".join(f"{counts[k]} {words}" for k, words in ODDITIES.items() if counts[k])


def _head(text: str) -> str | None:
    """What stands before a colon in the first line."""
    match = re.match(rf"[\s*_#>\"'\u201c\[(]*([^\n:\uff1a]{{1,{HEAD}}})[:\uff1a]", text)
    return match[1].strip(" *_#\"'") if match else None


def _chatter(text: str, source: str, languages: tuple[str, str]) -> bool:
    """Whether something speaks before the translation does, or after it."""
    head, asked = _head(text), _head(source)
    if "```" in text and "```" not in source:
        return True
    if "\n" not in source.strip() and _NOTE.search(text):
        return True
    label = _LABEL.match(text)
    if label and not _LABEL.match(source) and _is_label(label[1], languages):
        return True
    if head is not None and _names_itself().search(head):
        return not _names_itself().search(source)
    if asked is not None or _ASSISTANT.match(source):
        return False
    if head is not None:
        behind = text.partition(head)[2].lstrip("*_: \uff1a")
        if behind.startswith("\n") and "\n" not in source.strip():
            return True
        if _is_label(head, languages):
            return True
    if not _ASSISTANT.match(text):
        return False
    broken = "\n" in text and "\n" not in source.strip()
    return language_name(languages[1]) != "English" or head is not None or broken


@cache
def _names_itself() -> re.Pattern[str]:
    stems = WORDS.read_text(encoding="utf-8").split()
    return re.compile("|".join(map(re.escape, stems)), re.IGNORECASE)


def _is_label(text: str, languages: tuple[str, str]) -> bool:
    """Whether it names what stands behind it, or its language; "no" is a code, "No" is a word."""
    names = _LABELS | _called(languages[0]) | _called(languages[1])
    code = text.lower() if text.isupper() else text
    return code in languages or text.casefold() in names


@cache
def _called(code: str) -> frozenset[str]:
    """A language's name in English and in itself."""
    from langcodes import Language

    return frozenset((language_name(code).casefold(), Language.get(code).autonym().casefold()))


def loops(text: str, source: str = "") -> bool:
    """Whether a text says the same at least `TIMES` times on end, and its source does not."""
    found = _loop(text)
    return found > 0 and _loop(source) * 2 < found


def _loop(text: str) -> int:
    """Characters of the longest stretch that is one piece again and again; 0: there is none."""
    text = text[-LOOKED:]
    grams = len(text) - GRAM + 1
    if grams - len({text[i : i + GRAM] for i in range(grams)}) < LOOP * 2 // 3 - GRAM + 1:
        return 0  # as a loop has no more different ones than its piece has characters
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    longest = 0
    for unit in range(1, (len(codes) + 1) // TIMES + 1):
        unlike = np.flatnonzero(codes[unit:] != codes[:-unit])
        edges = np.concatenate(([-1], unlike, [len(codes) - unit]))
        stretch = int(np.diff(edges).max()) - 1 + unit
        if stretch >= max(LOOP, TIMES * unit - 1):  # the last may lack the space behind it
            longest = max(longest, stretch)
    return longest


def _echoes(
    text: str, source: str, reference: str, prompt: str, languages: tuple[str, str]
) -> bool:
    whole = one_line(source)
    if len(whole) >= COPY and whole in text and whole not in one_line(reference):
        return True
    src, tgt = map(language_name, languages)
    told = "".join(
        literal + {"src": src, "tgt": tgt, "text": "\n"}.get(name or "", "")
        for literal, name, _, _ in Formatter().parse(prompt)
    )
    pieces = {piece.strip() for piece in told.splitlines()}
    return any(
        len(piece) >= PIECE and piece in text and piece not in source and piece not in reference
        for piece in pieces
    )
