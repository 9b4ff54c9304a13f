"""Recipes as users and strangers write them: right, or one line of bounded length and time."""

import dataclasses
import time
import typing
from pathlib import Path
from typing import Any

import pytest

from xplus_fast.config import RESERVED, Recipe, load_recipe
from xplus_fast.data.preparation.recipe import PrepareRecipe, load_prepare_recipe
from xplus_fast.errors import UserError
from xplus_fast.evaluation.recipe import EvaluateRecipe, load_evaluate_recipe
from xplus_fast.options import parse_bytes
from xplus_fast.training.run_folder import FILES

TRAIN = "model: m\noutput: o\nstages: [{layers: all}]\n"
PREPARE = "output: o\ncorpora: [{path: x.jsonl}]\n"
EVALUATE = "output: o\nreasoning: {tasks: [t]}\n"


@pytest.fixture
def says(tmp_path: Path) -> Any:
    def call(text: str | bytes, *overrides: str, load: Any = load_recipe) -> str:
        path = tmp_path / "r.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        start = time.monotonic()
        with pytest.raises(UserError) as e:
            load(path, overrides)
        assert time.monotonic() - start < 10
        said = str(e.value)
        assert "\n" not in said and len(said) < 600 + len(str(tmp_path))
        return said

    return call


# --- every number has a range


def numbers(cls: type, at: str = "") -> list[tuple[str, type]]:
    """The path and type of every number in a tree of options."""
    found: list[tuple[str, type]] = []
    for name, hint in typing.get_type_hints(cls).items():
        members = typing.get_args(hint) or (hint,)
        for member in members:
            if member in (int, float):
                found.append((at + name, member))
            elif dataclasses.is_dataclass(member):
                index = ".0." if typing.get_origin(hint) is list else "."
                found += numbers(typing.cast(type, member), at + name + index)
    return found


TREES = [(Recipe, TRAIN, load_recipe), (PrepareRecipe, PREPARE, load_prepare_recipe),
         (EvaluateRecipe, EVALUATE, load_evaluate_recipe)]  # fmt: skip
NUMBERS = [(path, kind, text, load) for cls, text, load in TREES for path, kind in numbers(cls)]
FREE = ("memory.micro_batch_tokens", "stages.0.layers", "memory.bits")  # words for these
SIGNED = ("dedup.near", "dedup.near_one", "quality.threshold", "quality.margin")


@pytest.mark.parametrize(
    ("path", "kind", "text", "load"), NUMBERS, ids=[f"{n[3].__name__}-{n[0]}" for n in NUMBERS]
)
def test_every_number_is_finite_and_in_its_range(
    path: str, kind: type, text: str, load: Any, says: Any
) -> None:
    if path.startswith(("data.sources.0", "data.retention.0", "data.validation.0",
                        "stages.0.sources.0", "translation.sets.0")):  # fmt: skip
        full = {"data": "data: {X: [{path: p}]}\n".replace("X", path.split(".")[1]),
                "stages": "stages: [{layers: all, sources: [{path: p}]}]\n",
                "translation": "translation: {sets: [{name: n, files: '{lang}',"
                " directions: [en-sw]}]}\n"}[path.split(".")[0]]  # fmt: skip
        text = text.replace("stages: [{layers: all}]\n", "") + full
        text += (
            ""
            if "stages" in text or "corpora" in text or load is not load_recipe
            else ("stages: [{layers: all}]\n")
        )
    if path in FREE:
        return
    bad = [".nan", ".inf", "-.inf", "true", "null", "x", "[]", "{}", "'1'", "9" * 16, "9" * 5000,
           "1e300"]  # fmt: skip
    bad += [] if path in SIGNED else ["-1", "-0.5"]
    bad += ["1.5"] if kind is int else []
    optional = "null" if says_null(load, path) else ""
    for value in bad:
        if value == optional:
            continue
        said = says(text, f"{path}={value}", load=load)
        assert said.startswith((f"{path}: ", f"'{path}=")), said


def says_null(load: Any, path: str) -> bool:
    """Whether an option may be empty."""
    cls: Any = {load_recipe: Recipe, load_prepare_recipe: PrepareRecipe}.get(load, EvaluateRecipe)
    hint: Any = cls
    for part in path.split("."):
        if part.isdigit():
            continue
        hint = typing.get_type_hints(hint)[part]
        inner = [a for a in typing.get_args(hint) if dataclasses.is_dataclass(a)]
        hint = inner[0] if inner else hint
    return type(None) in typing.get_args(hint)


@pytest.mark.parametrize(
    ("load", "text", "override", "message"),
    [
        (load_recipe, TRAIN, "training.adam_epsilon=0", "a number above 0 is wanted, found 0"),
        (load_recipe, TRAIN, "training.adam_beta1=1", "from 0 to below 1 is wanted, found 1.0"),
        (load_recipe, TRAIN, "data.pack_tokens=1", "from 2 to 16,777,216 is wanted, found 1"),
        (load_recipe, TRAIN, "seed=-1", "from 0 to 4,294,967,295 is wanted, found -1"),
        (load_recipe, TRAIN, f"seed={2**32}", "from 0 to 4,294,967,295 is wanted"),
        (load_recipe, TRAIN, "stages.0.steps=0", "at least 1 is wanted, found 0"),
        (load_recipe, TRAIN, "memory.master=1", "memory.master: true or false is wanted"),
        (load_prepare_recipe, PREPARE, "balance.temperature=.nan", "finite number"),
        (load_prepare_recipe, PREPARE, "balance.temperature=0.9", "at least 1 is wanted"),
        (load_prepare_recipe, PREPARE, "corpora.0.limit=-3", "at least 1 is wanted, found -3"),
        (load_prepare_recipe, PREPARE, "clean.max_digits=1.5", "from 0 to 1 is wanted"),
        (load_prepare_recipe, PREPARE, "instruct.prompts=['{text:>999999999}']", "stand in braces"),
        (load_prepare_recipe, PREPARE, "instruct.prompts=['{text.x}']", "only {src}, {tgt} and"),
        (load_evaluate_recipe, EVALUATE, "confidence=1", "from 0.5 to below 1 is wanted"),
        (load_evaluate_recipe, EVALUATE, "translation.prompt='{txt}'", "only {src}, {tgt} and"),
        (load_recipe, TRAIN, "data.prompt='{text!r}'", "only {src}, {tgt} and {text} may stand"),
        (load_recipe, TRAIN, "data.prompt='{'", "only {src}, {tgt} and {text} may stand"),
        (load_recipe, TRAIN, "data.prompt=x", "data.prompt: {text} is wanted"),
    ],
)
def test_ranges_are_told(load: Any, text: str, override: str, message: str, says: Any) -> None:
    assert message in says(text, override, load=load)


# --- YAML


BOMB = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n"
                                   for i in range(1, 12))  # fmt: skip
MERGE = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 9)
)
HOSTILE = {
    "aliases": (TRAIN + BOMB, "more than 50,000 values"),
    "merges": (TRAIN + MERGE, ""),  # newer PyYAML merges each key once
    "a circle": (TRAIN + "data: &d {sources: [*d]}", "nested more than 50 deep"),
    "flow nesting": (TRAIN + "data: " + "[" * 5000, "nested too deeply"),
    "flow nesting, closed": (TRAIN + "data: " + "[" * 200 + "]" * 200, "nested"),
    "block nesting": (TRAIN + "".join(" " * i + "a:\n" for i in range(600)), "nested"),
    "large": (TRAIN + "#" * 300_000, "more than 262,144 characters"),
    "repeated key": (TRAIN + "seed: 1\nseed: 2\n", "the key 'seed' occurs twice"),
    "repeated below": ("model: m\noutput: o\nstages: [{layers: all, steps: 1, steps: 2}]",
                       "the key 'steps' occurs twice"),
    "date": (TRAIN + "seed: 2025-01-31", "seed: a whole number is wanted, found '2025-01-31'"),
    "no date": (TRAIN + "seed: 2025-13-45", "seed: a whole number is wanted"),
    "tag": (TRAIN + "seed: !!python/object:os.system x", "not valid YAML"),
    "timestamp tag": (TRAIN + "seed: !!timestamp x", "not valid YAML"),
    "int tag": (TRAIN + "seed: !!int x", "not valid YAML"),
    "float tag": (TRAIN + "seed: !!float x", "not valid YAML"),
    "bool tag": (TRAIN + "seed: !!bool x", "not valid YAML"),
    "binary tag": (TRAIN + "seed: !!binary x", "not valid YAML"),
    "set tag": (TRAIN + "data: !!set {a, b}", "data: a mapping of options is wanted"),
    "digits": (TRAIN + "seed: " + "9" * 5000, "not valid YAML"),
    "unhashable key": (TRAIN + "? [a]\n: b", "not valid YAML"),
    "number for a key": (TRAIN + "1: x", "1: unknown option"),
    "list": ("[1, 2]", "a recipe is a mapping of options, found list"),
    "nothing": ("", "a recipe is a mapping of options, found NoneType"),
    "control character": (TRAIN + "x: \x07", "not valid YAML"),
    "not UTF-8": (b"model: \xff", "byte 8 is not UTF-8"),
    "NUL": ('model: "a\\0b"\noutput: o\nstages: [{layers: all}]', "model: text with a NUL"),
    "surrogate": ('model: "\\ud800"\noutput: o\nstages: [{layers: all}]', "model: "),
    "long path": (TRAIN.replace("o\n", "a" * 256 + "\n"), "output: a path of at most 4,095"),
    "longer path": (TRAIN.replace("o\n", "a/" * 3000 + "\n"), "output: a path of at most 4,095"),
    "long source": (TRAIN + f"data: {{cache: {'a' * 300}}}", "data.cache: a path"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_recipes(case: str, says: Any) -> None:
    text, message = HOSTILE[case]
    assert message in says(text)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data=&a [*a]", "nested more than 50 deep"),
        ("seed=" + "9" * 5000, "not valid YAML"),
        ("seed=!!timestamp x", "not valid YAML"),
        ("seed={a: 1, a: 2}", "the key 'a' occurs twice"),
        ("stages.\u00b2.steps=1", "the list has items 0 to 0"),
        ("stages.99999999999999999999.steps=1", "the list has items 0 to 0"),
        ("output=a\0b", "not valid YAML"),
        ("=1", "an override reads key=value"),
        ("data.x.y.z=1", "data.x: unknown option"),
    ],
)
def test_hostile_overrides(override: str, message: str, says: Any) -> None:
    assert message in says(TRAIN, override)


def test_paths_that_are_none(tmp_path: Path) -> None:
    for path in ("a\0b", "a" * 300, str(tmp_path), str(tmp_path / "none.yaml")):
        with pytest.raises(UserError):
            load_recipe(path)


def test_words_that_yaml_1_1_takes_for_others(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(TRAIN + "data: {sources: [{path: p, languages: [en, no]}], heldout: 010}\n")
    recipe = load_recipe(path, ["data.system=2025-01-31"])
    assert recipe.data.sources[0].languages == ["en", "no"]
    assert recipe.data.system == "2025-01-31" and recipe.data.heldout == 10


def test_anchors_and_merges_of_a_usual_size_are_read(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model: m\noutput: o\nstages: [&s {layers: all, steps: 3}, {<<: *s, steps: 4}]")
    assert [s.steps for s in load_recipe(path).stages] == [3, 4]


@pytest.mark.parametrize(
    "name",
    [*RESERVED, "Evaluation", "RECIPE.YAML", "a/b", ".a", " a", "a ", "a\nb", "x" * 101, "stage-2"],
)
def test_stage_names_that_are_none(name: str, says: Any, tmp_path: Path) -> None:
    text = f"model: m\noutput: o\nstages: [{{layers: all, name: {name!r}}}, {{layers: all}}]"
    if "\n" in name:
        text = text.replace("'a\\nb'", '"a\\nb"')
    assert says(text).startswith("stages.")


def test_stages_without_end(says: Any) -> None:
    stages = "stages: [" + ", ".join(["{layers: all}"] * 101) + "]"
    assert "at most 100 are carried out, found 101" in says(f"model: m\noutput: o\n{stages}")


def test_reserved_names_are_the_runs_files() -> None:
    assert set(FILES) <= set(RESERVED) and "evaluation" in RESERVED


@pytest.mark.parametrize("text", ["9" * 5000 + "GB", "0GB", "nan", "-1GB", "1e999GB", ""])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="a size such as 24GB"):
        parse_bytes(text, "memory.budget")
