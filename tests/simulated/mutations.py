"""Every call in the package that orders streams, and the package without it."""

import ast
import importlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

from tests.simulated.clocks import PRIMITIVES
from tests.simulated.places import ROOT

PACKAGE = ROOT / "xplus_fast"
NAMES = PRIMITIVES | {"record_stream"}
# threads and processes have it, too: of the device where a module looks at that at all
COMMON = {"wait"}


@dataclass(frozen=True)
class Site:
    """A call, and what is left out with it: the call alone, or the statement that it is part of."""

    file: Path
    function: str  # the outermost one around it, by its qualified name
    lines: tuple[int, int]  # of the call
    at: tuple[int, int]  # line and column of what is left out
    text: str
    whole: bool  # the statement

    @property
    def name(self) -> str:
        what = "statement" if self.whole else "call"
        return f"{self.file.relative_to(ROOT)}:{self.lines[0]} {self.function}: {what} {self.text}"


def find_sites() -> list[Site]:
    """All of them, in the order of files and lines."""
    trees = {
        file: tree
        for file in sorted(PACKAGE.rglob("*.py"))
        if _imports_torch(tree := ast.parse(file.read_text()))
    }
    names, before = set(NAMES), set[str]()
    while names != before:
        before = set(names)
        for tree in trees.values():
            names |= {f.name for f in _functions(tree) if _only_orders(f, before)}
    found = []
    for file, tree in trees.items():
        here = names if "torch.cuda" in file.read_text() else names - COMMON
        for function, outer in _outermost(tree):
            found += _sites_in(file, function, outer, here)
    return found


def _imports_torch(tree: ast.Module) -> bool:
    return any(
        isinstance(node, ast.Import) and any(a.name == "torch" for a in node.names)
        for node in tree.body
    )


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("__"):
            yield node


def _only_orders(function: ast.FunctionDef, names: set[str]) -> bool:
    """Whether it orders streams and does nothing else but forget what it has ordered."""
    statements = [
        node for top in function.body for node in ast.walk(top)
        if isinstance(node, ast.stmt) and not _is_docstring(node)
    ]  # fmt: skip
    orders = [any(_orders(node, names) for node in ast.walk(s)) for s in statements]
    others = [s for s, does in zip(statements, orders, strict=True) if not does]
    return any(orders) and all(_forgets(s) for s in others)


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _forgets(node: ast.stmt) -> bool:
    """x = None, x = [], x.clear()"""
    if isinstance(node, ast.Assign):
        empty = isinstance(node.value, ast.List) and not node.value.elts
        return empty or isinstance(node.value, ast.Constant) and node.value.value is None
    value = node.value if isinstance(node, ast.Expr) else None
    return isinstance(value, ast.Call) and _called(value) == "clear"


def _called(node: ast.Call) -> str:
    f = node.func
    return f.attr if isinstance(f, ast.Attribute) else f.id if isinstance(f, ast.Name) else ""


def _orders(node: ast.AST, names: set[str]) -> bool:
    if not isinstance(node, ast.Call):
        return False
    bare = isinstance(node.func, ast.Name)
    # a bare name is a function's of this module, which says by its underscore that it is
    return _called(node) in names and (not bare or _called(node).startswith("_"))


def _outermost(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef):
                    yield f"{node.name}.{inner.name}", inner


def _sites_in(file: Path, function: str, outer: ast.AST, names: set[str]) -> list[Site]:
    found = []
    for statement in ast.walk(outer):
        if not isinstance(statement, (ast.Expr, ast.Assign, ast.Return)):
            continue
        calls = [node for node in ast.walk(statement) if _orders(node, names)]
        for call in calls:
            assert isinstance(call, ast.Call)
            lines = (call.lineno, call.end_lineno or call.lineno)
            at = (call.lineno, call.col_offset)
            found.append(Site(file, function, lines, at, ast.unparse(call), False))
        if calls and not isinstance(statement, ast.Return) and statement.value not in calls:
            at, text = (statement.lineno, statement.col_offset), ast.unparse(statement)
            lines = (statement.lineno, statement.end_lineno or statement.lineno)
            found.append(Site(file, function, lines, at, text, True))
    # what stands in conditions and loops' heads would be missed
    seen = {site.at for site in found}
    for node in ast.walk(outer):
        assert not _orders(node, names) or (node.lineno, node.col_offset) in seen  # type: ignore
    return found


class _LeaveOut(ast.NodeTransformer):
    def __init__(self, site: Site) -> None:
        self.site, self.done = site, 0

    def _is_it(self, node: Any) -> bool:
        return (node.lineno, node.col_offset) == self.site.at

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, ast.stmt) and self.site.whole and self._is_it(node):
            self.done += 1
            return ast.copy_location(ast.Pass(), node)
        if isinstance(node, ast.Call) and not self.site.whole and self._is_it(node):
            if ast.unparse(node) == self.site.text:
                self.done += 1
                return _nothing(node)
        return self.generic_visit(node)


def _nothing(call: ast.Call) -> ast.expr:
    """An event that was never recorded, in the call's place; its arguments are computed."""
    event = ast.parse("torch.cuda.Event()", mode="eval").body
    last = ast.Subscript(
        ast.Tuple([*call.args, event], ast.Load()), ast.Constant(-1), ast.Load()
    )  # fmt: skip
    for node in ast.walk(last):
        if not hasattr(node, "lineno"):
            ast.copy_location(node, call)
    return ast.fix_missing_locations(ast.copy_location(last, call))


@contextmanager
def left_out(site: Site) -> Iterator[None]:
    """The package runs without it."""
    change = _LeaveOut(site)
    tree = ast.fix_missing_locations(change.visit(ast.parse(site.file.read_text())))
    assert change.done == 1, site
    code = _find(compile(tree, str(site.file), "exec"), site.function)
    function = _live(site)
    before, function.__code__ = function.__code__, code
    try:
        yield
    finally:
        function.__code__ = before


def _find(code: CodeType, name: str) -> CodeType:
    inner = [c for c in code.co_consts if isinstance(c, CodeType)]
    for c in inner:
        if c.co_qualname == name:
            return c
    return next(_find(c, name) for c in inner if name.startswith(f"{c.co_qualname}."))


def _live(site: Site) -> FunctionType:
    path = site.file.relative_to(ROOT).with_suffix("")
    found: Any = importlib.import_module(".".join(path.parts))
    for name in site.function.split("."):
        found = inspect.getattr_static(found, name)
    found = getattr(found, "__func__", getattr(found, "fget", found))
    return inspect.unwrap(found)
