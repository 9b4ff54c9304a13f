"""The first recipe, and the packages that are built: what a user gets outside a checkout."""

import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from xplus_fast import __version__
from xplus_fast.cli import main
from xplus_fast.config import load_recipe
from xplus_fast.starter import RECIPES

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("which", RECIPES)
def test_init_writes_a_recipe_that_loads(
    which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", which]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(RECIPES[which])
    for name in RECIPES[which]:
        assert (tmp_path / name).read_bytes() == (ROOT / "recipes" / name).read_bytes()
    recipe = RECIPES[which][0]
    assert load_recipe(recipe).stages[0].layers == "bottom:4"
    said = capsys.readouterr().out
    assert f"xplus-fast plan {recipe}" in said and f"xplus-fast train {recipe}" in said
    # what is there may be the user's own
    mine = tmp_path / RECIPES[which][-1]
    for name in RECIPES[which][:-1]:
        (tmp_path / name).unlink()
    mine.write_text("mine")
    assert main(["init", which]) == 2
    assert capsys.readouterr().err == f"xplus-fast: {mine.name}: file exists; nothing was written\n"
    assert [p.read_text() for p in tmp_path.iterdir()] == ["mine"]


def test_init_is_for_the_8b_model_unless_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init"]) == 0
    assert load_recipe("qwen3-8b-xplus.yaml").model == "Qwen/Qwen3-8B"


def run(folder: Path, path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(path)}
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=folder, env=env, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist, of a copy of what git knows."""
    pytest.importorskip("hatchling")
    out = tmp_path_factory.mktemp("built")
    made = run(ROOT, ROOT, "hatchling", "build", "-d", str(out))
    assert made.returncode == 0, made.stderr
    return out


def test_the_wheel_works_without_a_checkout(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
        (about,) = (n for n in names if n.endswith("/METADATA"))
        metadata = archive.read(about).decode()
    assert {
        "xplus_fast/py.typed",
        "xplus_kernels/py.typed",
        "xplus_fast/recipes/demo.yaml",
        *(f"xplus_fast/training/report_html/page.{kind}" for kind in ("html", "css", "js")),
    } <= names
    assert not any(n.startswith(("tests/", "benchmarks/")) for n in names)
    assert "Project-URL: Paper (LLaMAX2), https://arxiv.org/abs/2510.09189" in metadata
    assert "Classifier: Typing :: Typed" in metadata
    here = tmp_path / "work"
    here.mkdir()
    version = run(here, tmp_path / "site", "xplus_fast", "--version")
    assert version.stdout == f"xplus-fast {__version__}\n", version.stderr
    assert run(here, tmp_path / "site", "xplus_fast", "init", "14b").returncode == 0
    assert load_recipe(here / "qwen3-14b-xplus.yaml").model == "Qwen/Qwen3-14B"


def test_the_sdist_is_whole(built: Path) -> None:
    """Whoever builds from it has the documents, and can run `make test`."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("needs a checkout of git")
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {n for n in tracked.stdout.splitlines() if (ROOT / n).is_file()}
    assert wanted - found == set()
    assert {"Makefile", "docs/memory.md", "constraints/pins.txt", "tests/conftest.py"} <= found


def test_classifiers_are_known() -> None:
    known = pytest.importorskip("trove_classifiers").classifiers
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    assert set(told) - known == set()
