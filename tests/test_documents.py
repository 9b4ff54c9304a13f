"""What the documents tell a user to type or to look for is there."""

import ast
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from xplus_fast.cli import _parser
from xplus_fast.config import Recipe
from xplus_fast.data.preparation.recipe import PrepareRecipe
from xplus_fast.evaluation.recipe import EvaluateRecipe
from xplus_fast.options import load_options

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    p for p in ROOT.rglob("*.md") if not {".venv", ".git", "build", "runs"} & {*p.parts}
]  # fmt: skip
NAMES = [str(p.relative_to(ROOT)) for p in DOCUMENTS]
RECIPES = {
    "train": (Recipe, "recipes/demo.yaml"), "plan": (Recipe, "recipes/demo.yaml"),
    "prepare": (PrepareRecipe, "recipes/prepare-small.yaml"),
    "evaluate": (EvaluateRecipe, "recipes/evaluate-xplus.yaml"),
}  # fmt: skip
GAP = "\0"  # in a message, for what differs


# --- messages


def constants(tree: ast.Module) -> dict[str, str]:
    """Names that a module gives to texts."""
    return {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name) and isinstance(node.value.value, str)
    }


def part(node: ast.expr, known: dict[str, str]) -> str:
    """One piece of an f-string."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    value = node.value if isinstance(node, ast.FormattedValue) else node
    return known.get(value.id, GAP) if isinstance(value, ast.Name) else GAP


@cache
def texts() -> list[str]:
    """Every text of the package's code, with a gap for each value that is put in."""
    found = []
    for file in (ROOT / "xplus_fast").rglob("*.py"):
        tree = ast.parse(file.read_text())
        known = constants(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part(value, known) for value in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return [" ".join(text.split()) for text in found]


def is_said(message: str) -> bool:
    """Whether all of a message's words between `...` stand together in the code."""
    pieces = [piece.strip(" :;,()'") for piece in message.split("...")]
    return all(any(piece in text for text in texts()) for piece in pieces)


MESSAGES = re.findall(r"^### `(.+)`$", (ROOT / "docs/it-went-wrong.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_that_is_explained_is_said(message: str) -> None:
    assert max(map(len, message.split("..."))) > 10  # enough to know it by
    assert is_said(message)


def test_twenty_messages_are_explained() -> None:
    headings = re.findall("^### .*$", (ROOT / "docs/it-went-wrong.md").read_text(), re.MULTILINE)
    assert len(MESSAGES) == len(headings) == len(set(MESSAGES)) >= 20


@pytest.mark.parametrize(
    "message", ["...: unknown setting; ...", "memory.budget: the fattest plan"]
)
def test_one_that_nobody_says_is_noticed(message: str) -> None:
    assert not is_said(message)


# --- commands


def commands(document: Path) -> list[list[str]]:
    """The `xplus-fast ...` lines of a document's shell blocks, in words."""
    blocks = re.findall(r"^```bash\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [
        shlex.split(line, comments=True)[1:] for line in lines if line.startswith("xplus-fast ")
    ]


COMMANDS = [
    (name, words)
    for name, file in zip(NAMES, DOCUMENTS, strict=True)
    for words in commands(file)
]  # fmt: skip


@pytest.mark.parametrize(("name", "words"), COMMANDS, ids=lambda x: " ".join(x)[:60])
def test_commands_and_options_are_known(name: str, words: list[str]) -> None:
    options, rest = _parser().parse_known_args(words)
    assert all("=" in word and word[0] != "-" for word in rest), rest
    given = [*getattr(options, "overrides", []), *rest]
    if words[0] in RECIPES:
        cls, recipe = RECIPES[words[0]]
        load_options(cls, ROOT / recipe, given)
    else:
        assert not given or words[0] == "sensitivity"


# --- links


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    file = ROOT / name
    for link in re.findall(r"\]\(([^)\s]+)\)", file.read_text()):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (file.parent / path) if path else file
        assert target.exists(), link
        if anchor:
            heads = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            made = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in heads]
            assert anchor in made, link
