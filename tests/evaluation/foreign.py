"""Python environments of other projects, as far as `evaluate` sees them."""

import os
import sys
from pathlib import Path

COMET = """
import json, os
def download_model(name):
    return name
def load_from_checkpoint(path):
    return Model()
class Model:
    def predict(self, data, batch_size, progress_bar):
        # how much of the reference's words it has; no number for an empty translation
        def score(row):
            words = row["ref"].split()
            return sum(w in row["mt"].split() for w in words) / len(words) if row["mt"] else BAD
        return {"scores": [score(row) for row in data]}
BAD = float("nan")
"""


def python_with(folder: Path, **packages: str) -> Path:
    """A Python for which packages are installed, each a module with this text; for unbabel_comet,
    its module `comet`."""
    site = folder / "site"
    for name, text in packages.items():
        (site / f"{name}-2.0.dist-info").mkdir(parents=True)
        about = f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.0\n"
        (site / f"{name}-2.0.dist-info/METADATA").write_text(about)
        module = "comet" if name == "unbabel_comet" else name
        (site / f"{module}.py").write_text(text)
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{site}" exec "{sys.executable}" "$@"\n')
    os.chmod(python, 0o755)
    return python
