"""YAML text -> plain values, within bounds: recipes and the values of `key=value`."""

import re
from typing import Any

import yaml

from xplus_fast.errors import UserError

BYTES = 1 << 18  # of a recipe
VALUES = 50_000  # of a recipe, aliases written out
DEPTH = 50  # of lists and mappings in each other


def parse(text: str, what: str) -> Any:
    """The value of a YAML text; `what` begins an error's message.

    Raises `UserError` for what is not valid YAML, repeats a key, or is larger than any recipe.
    """
    if len(text) > BYTES:
        raise UserError(f"{what}: more than {BYTES:,} characters: no recipe")
    try:
        tree = yaml.load(text, _Loader)
        _check_size(tree, what)
        return tree
    except yaml.YAMLError as e:
        raise UserError(f"{what}: not valid YAML: {' '.join(str(e).split())[:300]}") from None
    except RecursionError:
        raise UserError(f"{what}: not a recipe: nested too deeply") from None
    # of values that a tag or their digits say to be what they are not
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(f"{what}: not valid YAML: {' '.join(str(e).split())[:300]}") from None


def _check_size(tree: Any, what: str) -> None:
    """Count the values: aliases make a small text large."""
    todo, seen = [(tree, 0)], 0
    while todo:
        value, depth = todo.pop()
        seen += 1
        if seen > VALUES:
            raise UserError(f"{what}: more than {VALUES:,} values with aliases written out")
        if depth > DEPTH:
            raise UserError(f"{what}: lists and mappings nested more than {DEPTH} deep")
        if isinstance(value, dict):
            todo += [(v, depth + 1) for v in value.values()]
        elif isinstance(value, list | set | tuple):
            todo += [(v, depth + 1) for v in value]


class _Loader(yaml.SafeLoader):
    """YAML's safe subset, with the scalars of YAML 1.2: 10:20, 2025-01-31 and no are text, 1e-5 is
    a number."""

    yaml_implicit_resolvers = {
        first: [
            (tag, regexp)
            for tag, regexp in found
            if not tag.endswith((":int", ":float", ":timestamp", ":bool"))
        ]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """As it is, but for keys that occur twice, of which the last would count."""
        if isinstance(node, yaml.MappingNode):
            keys = [k.value for k, _ in node.value if isinstance(k, yaml.ScalarNode)]
            if twice := next((k for k in keys if k != "<<" and keys.count(k) > 1), None):
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {twice!r} occurs twice", node.start_mark
                )
        return super().construct_mapping(node, deep=deep)

    def flatten_mapping(self, node: Any) -> None:
        super().flatten_mapping(node)
        if len(node.value) > VALUES:  # merged mappings of merged mappings
            raise yaml.constructor.ConstructorError(
                None, None, f"a mapping of more than {VALUES:,} keys", node.start_mark
            )


# 010 is ten, not eight
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?[0-9]+$"),
                              list("-+0123456789"))  # fmt: skip
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$|[-+]?\.inf$|\.nan$"
    ),
    list("-+.0123456789"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
