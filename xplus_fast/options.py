"""YAML files and `key=value` overrides -> a tree of frozen dataclasses, and back.

Unknown keys, wrong types and impossible values raise `UserError` with the key's whole path and,
where a key is misspelt, the nearest right one.
"""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml

from xplus_fast.errors import UserError

Options = TypeVar("Options")


def load_options(cls: type[Options], path: str | Path, overrides: Sequence[str] = ()) -> Options:
    """Read a YAML file into the dataclass `cls`, with `key=value` overrides laid over it.

    Raises `UserError` for a missing or malformed file, an unknown key, a wrong type.
    """
    path = Path(path)
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe") from None
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: cannot be read ({e})") from None
    except yaml.YAMLError as e:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(e).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a recipe is a mapping of options, found {type(tree).__name__}")
    for override in overrides:
        _override(tree, override)
    return _build(cls, tree, "")


class _Loader(yaml.SafeLoader):
    """YAML's safe subset, with the numbers of YAML 1.2: 10:20 is text, 1e-5 a number."""

    yaml_implicit_resolvers = {
        first: [(tag, regexp) for tag, regexp in found if not tag.endswith((":int", ":float"))]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"[-+]?\d+$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?$|[-+]?\.inf$|\.nan$"),
    list("-+.0123456789"),
)


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
        raise UserError(f"'{override}': an override reads key=value, such as stages.0.steps=10")
    try:
        # "-15:" is a selection of layers, not a mapping
        value = text if text.endswith(":") else yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise UserError(f"'{override}': the value is not valid YAML") from None
    node: Any = tree
    *parents, last = key.split(".")
    for depth, part in enumerate([*parents, last]):
        at = ".".join([*parents, last][: depth + 1])
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise UserError(f"'{override}': {at}: the list has items 0 to {len(node) - 1}")
            index: Any = int(part)
        elif isinstance(node, dict):
            index = part
            if depth < len(parents) and node.get(part) is None:
                node[part] = {}
        else:
            raise UserError(f"'{override}': {at}: the option above it holds no options")
        if depth == len(parents):
            node[index] = value
        else:
            node = node[index]


def _build(cls: type, tree: Any, path: str) -> Any:
    """Mapping -> dataclass, checking keys and types on the way."""
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a mapping of options is wanted, found {tree!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in tree.items():
        at = f"{path}.{key}" if path else str(key)
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(fields)}"
            raise UserError(f"{at}: unknown option; {hint}")
        values[key] = _convert(hints[key], value, at)
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise UserError(f"{path + '.' if path else ''}{name}: required, and missing")
    return cls(**values)


def _convert(hint: Any, value: Any, at: str) -> Any:
    origin = get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        members = [m for m in get_args(hint) if m is not type(None)]
        if value is None and len(members) < len(get_args(hint)):
            return None
        for member in members:
            try:
                return _convert(member, value, at)
            except UserError:
                if len(members) == 1:
                    raise
        raise UserError(f"{at}: {_describe(hint)} is wanted, found {value!r}")
    if origin is Literal:
        if value in get_args(hint) and not isinstance(value, bool):
            return value
        raise UserError(
            f"{at}: one of {', '.join(map(str, get_args(hint)))} is wanted, found {value!r}"
        )
    if origin is list:
        (member,) = get_args(hint)
        if not isinstance(value, list):
            raise UserError(f"{at}: a list is wanted, found {value!r}")
        return [_convert(member, v, f"{at}.{i}") for i, v in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{at}: a mapping is wanted, found {value!r}")
        key_hint, member = get_args(hint)
        return {
            _convert(key_hint, str(k), at): _convert(member, v, f"{at}.{k}")
            for k, v in value.items()
        }
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, at)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool):
        return value
    raise UserError(f"{at}: {_describe(hint)} is wanted, found {value!r}")


def _describe(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    if get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_describe(m) for m in get_args(hint) if m is not type(None))
    if get_origin(hint) in (list, dict):
        return "a list" if get_origin(hint) is list else "a mapping"
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def parse_bytes(text: str, at: str) -> int:
    """ "24GB" -> 24e9, "24GiB" -> 24 * 2^30; `at` names the option in an error."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])(i?)B?", text.strip(), re.IGNORECASE)
    if not found or not float(found[1]):
        raise UserError(f"{at}: a size such as 24GB (10^9 bytes) or 24GiB is wanted, not {text!r}")
    power = "KMGT".index(found[2].upper()) + 1
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)
