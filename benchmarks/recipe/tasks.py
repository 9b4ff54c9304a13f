"""Questions whose answers can be checked, made by a seeded generator: what a model is able to do.

Each task shows solved examples and then asks, as text that goes on ("Question: ... Answer: ..."),
in which a small model is at its best, or as turns of a conversation. An answer counts if the
model's greedy answer is the expected one to the letter, its end included.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SHOTS = 8  # solved examples before a question
NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Julia", "Leo",
         "Maria", "Noah", "Olivia", "Paul", "Rosa", "Sam", "Tom", "Victor")  # fmt: skip
THINGS = ("apple", "ball", "book", "boat", "cake", "chair", "clock", "coat", "cup", "doll", "drum",
          "hat", "kite", "lamp", "map", "pen", "ring", "shoe", "spoon", "table")  # fmt: skip
PLACES = ("park", "school", "beach", "library", "market", "museum", "station", "garden", "farm",
          "bakery", "lake", "church", "theater", "hospital", "forest", "zoo")  # fmt: skip
COLORS = ("red", "blue", "green", "yellow", "black", "white", "brown", "pink")
CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo",
    "Russia": "Moscow", "Egypt": "Cairo", "Greece": "Athens", "Austria": "Vienna",
    "Portugal": "Lisbon", "Ireland": "Dublin", "Norway": "Oslo", "Sweden": "Stockholm",
    "Finland": "Helsinki", "Denmark": "Copenhagen", "Poland": "Warsaw", "Hungary": "Budapest",
    "Belgium": "Brussels", "Cuba": "Havana", "Peru": "Lima", "Kenya": "Nairobi", "Iraq": "Baghdad",
    "Iran": "Tehran", "Turkey": "Ankara", "Canada": "Ottawa", "China": "Beijing",
    "Thailand": "Bangkok", "Vietnam": "Hanoi", "Chile": "Santiago", "Ukraine": "Kyiv",
    "Syria": "Damascus", "Lebanon": "Beirut", "Jordan": "Amman", "Romania": "Bucharest",
    "Bulgaria": "Sofia", "Croatia": "Zagreb", "Serbia": "Belgrade", "Venezuela": "Caracas",
    "Colombia": "Bogota", "Ecuador": "Quito", "India": "New Delhi", "Nepal": "Kathmandu",
    "Afghanistan": "Kabul", "Algeria": "Algiers", "Libya": "Tripoli", "Ghana": "Accra",
    "Senegal": "Dakar", "Mexico": "Mexico City", "Australia": "Canberra", "England": "London",
    "Scotland": "Edinburgh", "Indonesia": "Jakarta", "South Korea": "Seoul",
    "Pakistan": "Islamabad",
}  # fmt: skip
OPPOSITES = (
    ("hot", "cold"), ("big", "small"), ("up", "down"), ("day", "night"), ("open", "closed"),
    ("happy", "sad"), ("fast", "slow"), ("hard", "soft"), ("old", "young"), ("rich", "poor"),
    ("black", "white"), ("left", "right"), ("early", "late"), ("high", "low"), ("full", "empty"),
    ("wet", "dry"), ("light", "dark"), ("strong", "weak"), ("true", "false"), ("good", "bad"),
    ("clean", "dirty"), ("first", "last"), ("long", "short"), ("loud", "quiet"), ("near", "far"),
    ("thick", "thin"), ("wide", "narrow"), ("win", "lose"), ("buy", "sell"), ("love", "hate"),
    ("start", "end"), ("push", "pull"), ("in", "out"), ("inside", "outside"), ("male", "female"),
    ("deep", "shallow"), ("cheap", "expensive"), ("easy", "difficult"), ("brave", "cowardly"),
    ("above", "below"), ("before", "after"), ("north", "south"), ("east", "west"), ("war", "peace"),
    ("alive", "dead"), ("boy", "girl"), ("king", "queen"), ("brother", "sister"),
)  # fmt: skip


Made = tuple[str, str]  # a question and its answer


def _words(c: random.Random) -> list[str]:
    return c.sample(THINGS + PLACES, 4)


def _copy(c: random.Random) -> Made:
    words = " ".join(_words(c)[:3])
    return f"Repeat: {words}", words


def _first(c: random.Random) -> Made:
    words = _words(c)
    return f"First word: {' '.join(words)}", words[0]


def _last(c: random.Random) -> Made:
    words = _words(c)
    return f"Last word: {' '.join(words)}", words[-1]


def _sort(c: random.Random) -> Made:
    numbers = c.sample(range(1, 10), 3)
    return f"Sort: {' '.join(map(str, numbers))}", " ".join(map(str, sorted(numbers)))


def _count(c: random.Random) -> Made:
    n, thing = c.randint(1, 5), c.choice(THINGS + PLACES)
    return f"Count: {' '.join([thing] * n)}", str(n)


def _add(c: random.Random) -> Made:
    a, b = c.randint(1, 12), c.randint(1, 9)
    return f"What is {a} + {b}?", str(a + b)


def _next(c: random.Random) -> Made:
    a = c.randint(10, 197)
    return f"Continue: {a} {a + 1}", str(a + 2)


def _yes_no(c: random.Random) -> Made:
    name, thing = c.choice(NAMES), c.choice(THINGS)
    color, other = c.sample(COLORS, 2)
    right = c.random() < 0.5
    asked = color if right else other
    return f"{name} has a {color} {thing}. Is the {thing} {asked}?", "Yes" if right else "No"


def _format(c: random.Random) -> Made:
    name, age = c.choice(NAMES), c.randint(10, 89)
    return f"{name} is {age} years old.", f"name={name}; age={age}"


def _capital(c: random.Random) -> Made:
    country = c.choice(list(CAPITALS))
    return f"What is the capital of {country}?", CAPITALS[country]


def _opposite(c: random.Random) -> Made:
    pair = c.choice(OPPOSITES)
    return f"What is the opposite of {pair[0]}?", pair[1]


@dataclass(frozen=True)
class Task:
    """make: a question and its answer. chat: whether it is asked in turns of a conversation."""

    make: Callable[[random.Random], Made]
    chat: bool = False


TASKS = {
    "copying": Task(_copy, chat=True), "first word": Task(_first, chat=True),
    "last word": Task(_last), "sorting": Task(_sort), "counting": Task(_count),
    "adding": Task(_add), "next number": Task(_next), "yes or no": Task(_yes_no),
    "format": Task(_format, chat=True), "capital": Task(_capital), "opposite": Task(_opposite),
}  # fmt: skip


def make(task: str, count: int, seed: int = 0) -> tuple[list[Made], list[Made]]:
    """The solved examples of a task, and as many other questions, or as many as it has.

    None is there twice.
    """
    chance, seen = random.Random(f"{task} {seed}"), dict[str, str]()
    for _ in range(50 * (count + SHOTS)):
        seen.setdefault(*TASKS[task].make(chance))
        if len(seen) == count + SHOTS:
            break
    made = list(seen.items())
    return made[:SHOTS], made[SHOTS:]


def encode(task: str, count: int, tokenizer: Any, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Questions as `score` takes them: input_ids and labels, int64 [T], the answer supervised."""
    shown, asked = make(task, count, seed)
    write = _in_turns if TASKS[task].chat else _as_text
    return [sequence(*write(shown, pair, tokenizer), tokenizer) for pair in asked]


def _in_turns(shown: Sequence[Made], pair: Made, tokenizer: Any) -> tuple[str, str]:
    turns = [
        {"role": role, "content": text}
        for made in (*shown, pair)
        for role, text in zip(("user", "assistant"), made, strict=True)
    ]
    before = tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
    return before, pair[1] + tokenizer.eos_token


def _as_text(shown: Sequence[Made], pair: Made, tokenizer: Any) -> tuple[str, str]:
    before = "".join(f"Question: {q}\nAnswer: {a}\n\n" for q, a in shown)
    return f"{before}Question: {pair[0]}\nAnswer:", f" {pair[1]}\n"


def sequence(before: str, answer: str, tokenizer: Any) -> tuple[Tensor, Tensor]:
    first, rest = (tokenizer(x, add_special_tokens=False)["input_ids"] for x in (before, answer))
    ids = torch.tensor([*first, *rest])
    return ids, ids.masked_fill(torch.arange(len(ids)) < len(first), -100)
