"""YAML files and `key=value` overrides -> a tree of frozen dataclasses, and back.

Unknown keys, wrong types and impossible values raise `UserError` with the key's whole path and,
where a key is misspelt, the nearest right one.
"""

import dataclasses
import difflib
import math
import os
import re
import reprlib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import yaml

from xplus_fast.errors import UserError
from xplus_fast.recipe_text import BYTES, parse

Options = TypeVar("Options")


def load_options(cls: type[Options], path: str | Path, overrides: Sequence[str] = ()) -> Options:
    """Read a YAML file into the dataclass `cls`, with `key=value` overrides laid over it.

    Raises `UserError` for a missing or malformed file, an unknown key, a wrong type.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            text = file.read(BYTES + 1).decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe") from None
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror or e})") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: cannot be read (byte {e.start + 1} is not UTF-8)") from None
    except ValueError as e:
        raise UserError(f"{str(path)!r:.100}: cannot be read ({e})") from None
    tree = parse(text, str(path))
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a recipe is a mapping of options, found {type(tree).__name__}")
    for override in overrides:
        _override(tree, override)
    return _build(cls, tree, "")


def overlaid(options: Options, changes: dict[str, Any], at: str) -> Options:
    """The options with others laid over them. Raises `UserError`, which names them below `at`."""
    return _build(type(options), {**to_dict(options), **changes}, at)


def to_dict(options: Any) -> dict[str, Any]:
    return dataclasses.asdict(options)


def dump_options(options: Any) -> str:
    return yaml.safe_dump(to_dict(options), sort_keys=False, allow_unicode=True)


def first_difference(a: Any, b: Any, path: str = "") -> str | None:
    """Where two trees of `to_dict` first differ: "stages.0.steps: 40 there, 50 here"."""
    if isinstance(a, dict) and isinstance(b, dict):
        pairs: Any = [(k, a.get(k), b.get(k)) for k in [*a, *(k for k in b if k not in a)]]
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        pairs = [(i, x, y) for i, (x, y) in enumerate(zip(a, b, strict=True))]
    else:
        return None if a == b else f"{path}: {a!r} there, {b!r} here"
    for key, x, y in pairs:
        if found := first_difference(x, y, f"{path}.{key}" if path else str(key)):
            return found
    return None


def _override(tree: dict[str, Any], override: str) -> None:
    key, eq, text = override.partition("=")
    if not eq or not key:
        raise UserError(f"'{override:.80}': an override reads key=value, such as stages.0.steps=10")
    # "-15:" is a selection of layers, not a mapping
    value = text if text.endswith(":") else parse(text, f"'{override[:60]}'")
    node: Any = tree
    *parents, last = key.split(".")
    for depth, part in enumerate([*parents, last]):
        at = ".".join([*parents, last][: depth + 1])
        if isinstance(node, list):
            if not re.fullmatch("[0-9]{1,9}", part) or int(part) >= len(node):
                raise UserError(f"'{override:.80}': {at}: the list has items 0 to {len(node) - 1}")
            index: Any = int(part)
        elif isinstance(node, dict):
            index = part
            if depth < len(parents) and node.get(part) is None:
                node[part] = {}
        else:
            raise UserError(
                f"'{override:.80}': {at}: the name before the last dot is no group of options"
            )
        if depth == len(parents):
            node[index] = value
        else:
            node = node[index]


@dataclasses.dataclass(frozen=True)
class Range:
    """What a number may be, written beside its field: `Annotated[float, Range(0, 1, below=True)]`.

    Every number is finite, and whole ones have at most 15 digits, whatever their range.
    """

    least: float = -math.inf
    most: float = math.inf
    above: bool = False  # `least` itself is none
    below: bool = False  # `most` itself is none

    def __contains__(self, value: float) -> bool:
        low = value > self.least if self.above else value >= self.least
        return low and (value < self.most if self.below else value <= self.most)

    def __str__(self) -> str:
        if self.most < math.inf:
            start = f"above {self.least:,}" if self.above else f"from {self.least:,}"
            return f"{start} to {'below ' if self.below else ''}{self.most:,} is wanted"
        if self.above:
            return f"a number above {self.least:,} is wanted"
        return f"at least {self.least:,} is wanted"


Positive = Range(0, above=True)
AtLeast0 = Range(0)
Amount = Annotated[int, AtLeast0]
Count = Annotated[int, Range(1)]
Share = Annotated[float, Range(0, 1)]
DIGITS = 10**15

# What a text may be, beside its field.
PATH, FOLDER_NAME = "path", "folder name"
PATH_BYTES, NAME_BYTES = 4095, 255  # that Linux takes
STAGE_BYTES = 100  # of a name that others are made of


def check_text(text: str, at: str, kind: str = "") -> None:
    """See that a text is one, and can be of its kind: PATH, FOLDER_NAME or any.

    Raises `UserError`, whose message begins with `at`.
    """
    if "\0" in text:
        raise _BadValue(f"{at}: text with a NUL character in it")
    try:
        # a path may have bytes that are no UTF-8: they stand in it as surrogates
        data = os.fsencode(text) if kind == PATH else text.encode()
    except UnicodeEncodeError:
        raise _BadValue(f"{at}: text that is no Unicode: {text!r:.60}") from None
    if kind == PATH and (
        len(data) > PATH_BYTES or any(len(name) > NAME_BYTES for name in data.split(b"/"))
    ):
        raise _BadValue(
            f"{at}: a path of at most {PATH_BYTES:,} bytes, and {NAME_BYTES} of a name in it, is"
            f" wanted, found {text!r:.60}"
        )
    if kind == FOLDER_NAME and (
        "/" in text
        or text.startswith((".", " "))
        or text.endswith(" ")
        or not text.isprintable()
        or len(data) > STAGE_BYTES
    ):
        raise _BadValue(
            f"{at}: a name of a folder is wanted: no '/', no dot before it, at most {STAGE_BYTES}"
            f" bytes; found {text!r:.60}"
        )


class _BadValue(UserError):
    """A value of the right type that is out of its range."""


def _build(cls: type, tree: Any, path: str) -> Any:
    """Mapping -> dataclass, checking keys and types on the way."""
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a mapping of options is wanted, found {_show(tree)}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls, include_extras=True)
    values = {}
    for key, value in tree.items():
        at = f"{path}.{key}" if path else str(key)
        if key not in fields:
            at = f"{path}.{_show(key)}" if len(str(key)) > 60 else at
            near = difflib.get_close_matches(str(key)[:60], fields, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(fields)}"
            raise UserError(f"{at}: unknown option; {hint}")
        values[key] = _convert(hints[key], value, at)
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise UserError(f"{path + '.' if path else ''}{name}: required, and missing")
    return cls(**values)


def _convert(hint: Any, value: Any, at: str, extra: Any = None) -> Any:
    """The value as its type wants it; `extra` is a `Range` or a kind of text."""
    if hint is Any:  # laid over options later, by `overlaid`, which looks at it
        return value
    origin = get_origin(hint)
    if origin is Annotated:
        inner, extra = get_args(hint)
        return _convert(inner, value, at, extra)
    if origin in (typing.Union, types.UnionType):
        members = [m for m in get_args(hint) if m is not type(None)]
        if value is None and len(members) < len(get_args(hint)):
            return None
        for member in members:
            if dataclasses.is_dataclass(member) and isinstance(value, dict):
                return _convert(member, value, at)  # what is wrong in it is told by its key
            try:
                return _convert(member, value, at)
            except _BadValue:
                raise
            except UserError:
                if len(members) == 1:
                    raise
        raise UserError(f"{at}: {_describe(hint)} is wanted, found {_show(value)}")
    if origin is Literal:
        if isinstance(value, str | int) and value in get_args(hint) and not isinstance(value, bool):
            return value
        raise UserError(
            f"{at}: one of {', '.join(map(str, get_args(hint)))} is wanted, found {_show(value)}"
        )
    if origin is list:
        (member,) = get_args(hint)
        if not isinstance(value, list):
            raise UserError(f"{at}: a list is wanted, found {_show(value)}")
        return [_convert(member, v, f"{at}.{i}") for i, v in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{at}: a mapping is wanted, found {_show(value)}")
        key_hint, member = get_args(hint)
        return {
            _convert(key_hint, str(k), at): _convert(member, v, f"{at}.{str(k):.60}")
            for k, v in value.items()
        }
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, at)
    if hint in (int, float) and type(value) in (int, float):
        if not -DIGITS < value < DIGITS or value != value:
            raise _BadValue(
                f"{at}: a finite number of at most 15 digits is wanted, found {_show(value)}"
            )
        if hint is float:
            value = float(value)
        if extra is not None and isinstance(value, hint) and value not in extra:
            raise _BadValue(f"{at}: {extra}, found {_show(value)}")
    if isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool):
        if isinstance(value, str):
            check_text(value, at, extra or "")
        return value
    raise UserError(f"{at}: {_describe(hint)} is wanted, found {_show(value)}")


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 80


def _show(value: Any) -> str:
    """The value in words of bounded length."""
    if isinstance(value, int) and abs(value) >= DIGITS:
        return "a number of more than 15 digits"
    return _REPR.repr(value)


def _describe(hint: Any) -> str:
    if get_origin(hint) is Annotated:
        return _describe(get_args(hint)[0])
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    if get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_describe(m) for m in get_args(hint) if m is not type(None))
    if dataclasses.is_dataclass(hint):
        return "a mapping"
    if get_origin(hint) in (list, dict):
        return "a list" if get_origin(hint) is list else "a mapping"
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def parse_bytes(text: str, at: str) -> int:
    """ "24GB" -> 24e9, "24GiB" -> 24 * 2^30; `at` names the option in an error."""
    number = r"([0-9]{1,15}(?:\.[0-9]{1,15})?)"
    found = re.fullmatch(rf"{number}\s*([KMGT])(i?)B?", text.strip(), re.IGNORECASE)
    if not found or not float(found[1]):
        raise UserError(
            f"{at}: a size such as 24GB (10^9 bytes) or 24GiB is wanted, not {text!r:.60}"
        )
    power = "KMGT".index(found[2].upper()) + 1
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def check_fields(text: str, at: str, names: Sequence[str], needed: str) -> None:
    """See that a text with {fields} has those of `names` alone, and the one that is needed.

    Raises `UserError`, whose message begins with `at`.
    """
    wanted = " and ".join([*(", ".join(f"{{{n}}}" for n in names[:-1]),), f"{{{names[-1]}}}"])
    wanted = wanted.removeprefix(" and ")
    try:
        found = [(name, how) for _, name, *how in Formatter().parse(text) if name is not None]
    except ValueError as e:
        raise UserError(f"{at}: only {wanted} may stand in braces ({e})") from None
    for name, how in found:
        if name not in names or any(how):  # {text.x}, {text!r} and {text:>9999999} are no fields
            raise UserError(f"{at}: only {wanted} may stand in braces ({name!r:.60})")
    if needed not in [name for name, _ in found]:
        what = {"text": "where the sentence goes", "lang": "where the language goes"}[needed]
        raise UserError(f"{at}: {{{needed}}} is wanted, {what}")
