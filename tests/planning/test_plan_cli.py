"""`xplus-fast plan` as a user meets it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from xplus_fast.cli import main
from xplus_fast.config import load_recipe
from xplus_fast.errors import UserError
from xplus_fast.model.families import shape_of
from xplus_fast.planning import from_recipe
from xplus_fast.planning.cards import CARDS
from xplus_fast.planning.from_recipe import find_where

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "qwen3-8b-xplus.yaml"
QWEN3_8B = dict(
    model_type="qwen3", num_hidden_layers=36, hidden_size=4096, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, intermediate_size=12288, vocab_size=151936,
    rms_norm_eps=1e-6, tie_word_embeddings=False, hidden_act="silu",
)  # fmt: skip


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setattr(from_recipe, "local_card", lambda: None)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(QWEN3_8B))
    return folder


def plan(capsys, model, *arguments):
    code = main(["plan", str(RECIPE), f"model={model}", *arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_it_says_what_fits(capsys, model):
    code, out, err = plan(capsys, model, "--budget", "24GB", "--card", "rtx4090")
    assert (code, err) == (0, "")
    for part in (
        "36 layers, 8,190,735,360 parameters",
        "stage-1: trains layers 0-3 (4 of 36 layers), 771,785,728 parameters (9.4%)",
        "stage-2: trains layers 21-35 (15 of 36 layers), 2,894,196,480 parameters (35.3%)",
        "tokens/s predicted on rtx4090",
        "GFLOP a token necessary",
        "of 24.00 GB",
        "trained layers        5.79  ####",
        "GB = 10^9 bytes",
    ):
        assert part in out
    lines = out.replace(str(model), "model").splitlines()
    assert max(map(len, lines)) <= 110 and out.isascii()


def test_json_adds_up(capsys, model):
    code, out, _ = plan(capsys, model, "--json", "--card=rtx4090", "memory.frozen=nf4")
    assert code == 0
    for stage in json.loads(out)["stages"]:
        assert stage["device_total"] == sum(stage["device_bytes"].values())
        assert stage["host_total"] == sum(stage["host_bytes"].values())
        layers = stage["layout"]["layers"]
        assert {i["format"] for i in layers if not i["trains"]} == {"nf4"}


def test_overrides_may_follow_options(capsys, model):
    _, out, _ = plan(capsys, model, "--card", "rtx4090", "stages.1.layers=top:8")
    assert "trains layers 28-35" in out


def test_without_a_gpu_or_a_card_it_plans_for_a_cpu(capsys, model):
    code, out, _ = plan(capsys, model)
    assert code == 0 and "planned for a CPU" in out and "tokens/s" not in out


def test_a_budget_without_a_card_assumes_one(capsys, model):
    _, out, _ = plan(capsys, model, "--budget", "40GB")
    assert "no card named and none found: l40s is assumed" in out


def test_a_card_by_nvidia_smis_name_is_the_one_by_its_short_name(capsys, model):
    short = plan(capsys, model, "--card", "rtx4090")
    assert short[0] == 0 and "rtx4090, 25.76 GB" in short[1]
    assert plan(capsys, model, "--card", "NVIDIA GeForce RTX 4090") == short
    assert plan(capsys, model, "memory.card=GEFORCE RTX 4090 24GB") == short


def test_a_slice_is_planned_for(capsys, model):
    given = ["--card", "NVIDIA H100 80GB HBM3 MIG 3g.40gb"]
    code, out, _ = plan(capsys, model, *given)
    assert (
        code == 0
        and "tokens/s predicted on h100-80-3g.40gb" in out
        and "h100-80-3g.40gb, 42.41 GB" in out
    )


def test_another_machine_keeps_a_fifth_of_its_memory_as_this_one_does(
    capsys, model, monkeypatch, tmp_path
):
    recipe = load_recipe(RECIPE, [f"model={model}"])
    where = find_where(recipe, "rtx4090", "auto", "auto")
    assert where.host == 102_400_000_000
    said = plan(capsys, model, "--card", "rtx4090")[1]
    assert "128 GB of host memory are assumed, 80% of them to be pinned (--host-memory)" in (
        " ".join(said.split())
    )
    # said: what is said, in full
    assert find_where(recipe, "rtx4090", "auto", "64GB").host == 64 * 10**9
    # here: the same share of what is free
    (tmp_path / "meminfo").write_text("MemAvailable:   125000000 kB\n")
    monkeypatch.setattr(from_recipe, "Path", lambda p: tmp_path / "meminfo")
    monkeypatch.setattr(from_recipe, "container_memory", lambda: None)
    assert find_where(recipe, "4090", "auto", "auto", CARDS["rtx4090"]).host == 102_400_000_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "24"], "budget: a size such as 24GB"),
        (["--budget", "0GB"], "budget: a size such as 24GB"),
        (["--budget", "30GB", "--card", "rtx4090"], "30.0 GB are more than there are on rtx4090"),
        (["--card", "rtx4095"], "did you mean rtx4090"),
        (["--card", "NVIDIA A100"], "may be several; did you mean a100-40 or a100-80"),
        (["memory.card=H100"], "may be several; did you mean h100-pcie or h100-80 or h100-nvl?"),
        (["--card", "Tesla T4"], "card: t4 has compute capability 7.5 and no bf16"),
        (["memory.card=V100 32GB", "dtype=float32"], "card: v100-32 has compute capability 7.0"),
        (["--budget", "4GB", "--card", "rtx4090"], "the leanest plan for layers 0-3 needs"),
        (["--card", "rtx4090", "--host-memory", "1GB", "--budget", "16GB"], "memory.host: "),
        (["memory.frozen=int4"], "memory.frozen: one of auto, bf16, int8, fp8, nf4 is wanted"),
        (["memory.frozen={0-3: int4}"], "memory.frozen.0-3: one of auto, bf16, int8, fp8, nf4"),
        (["memory.frozen={0-36: nf4}"], "memory.frozen: 0-36 is out of range"),
        (["memory.bits=16"], "memory.bits: one of 32, 8 is wanted"),
        (["memory.micro_batch_tokens=5000"], "a multiple of data.pack_tokens"),
        (["memory.micro_batch_tokens=131072"], "more than training.tokens_per_step"),
        (["memory.micro_batch_tokens=some"], "memory.micro_batch_tokens: auto or a multiple"),
        (["memory.budget=much"], "memory.budget: a size such as 24GB"),
        (["stages.0.layers=bottom:37"], "layers: bottom:37: the model has 36 layers"),
        (["model=no/such/folder"], "no/such/folder: no such model folder"),
    ],
)
def test_bad_input_is_one_line_and_2(capsys, model, arguments, message):
    code, out, err = plan(capsys, model, *arguments)
    assert (code, out) == (2, "")
    assert message in err and err.startswith("xplus-fast: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model type 'gpt2' is not supported"),
        ({"hidden_size": "wide"}, "hidden_size: a whole number from 1 to 1,048,576 is wanted"),
        ({"use_sliding_window": True}, "use_sliding_window is not supported"),
        ({"rope_scaling": {"type": "dynamic"}}, "rope_type = 'dynamic' is not supported"),
    ],
)
def test_a_bad_configuration_is_one_line(capsys, model, change, message):
    (model / "config.json").write_text(json.dumps(QWEN3_8B | change))
    code, _, err = plan(capsys, model)
    assert code == 2 and message in err and err.count("\n") == 1


@pytest.mark.parametrize("text", ["{", "[1]", None])
def test_a_broken_configuration_is_one_line(capsys, model, text):
    file = model / "config.json"
    file.unlink() if text is None else file.write_text(text)
    code, _, err = plan(capsys, model)
    assert code == 2 and "config.json" in err and err.count("\n") == 1


def test_a_hub_id_that_cannot_be_had(capsys, model, monkeypatch):
    from huggingface_hub import errors

    def download(*_):
        raise errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("xplus_fast.model.hub._reach", lambda url: None)
    code, _, err = plan(capsys, model, "model=some-org/some-model")
    assert code == 2 and "nor in the hub's cache, and the hub cannot be reached" in err


@pytest.mark.parametrize("config_class", [Qwen3Config, Qwen2Config, LlamaConfig])
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"num_attention_heads": 64, "hidden_size": 512},
        {"num_key_value_heads": 4, "head_dim": 64, "tie_word_embeddings": True},
    ],
)
def test_missing_keys_mean_what_transformers_takes(tmp_path, config_class, given):
    kind = config_class.model_type
    if kind == "qwen2":
        given = {k: v for k, v in given.items() if k != "head_dim"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, **given}))
    assert from_recipe.read_shape(str(tmp_path)) == shape_of(config_class(**given))


def test_it_loads_no_torch(model):
    code = (
        "import sys; from xplus_fast.cli import main;"
        f"main(['plan', {str(RECIPE)!r}, 'model={model}', '--card', 'rtx4090']);"
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_what_a_recipe_says_of_memory_is_heeded(capsys, model, tmp_path):
    recipe = yaml.safe_load(RECIPE.read_text())
    recipe["model"] = str(model)
    recipe["memory"] = {"budget": "20GB", "card": "rtx4090", "frozen": {"4-35": "nf4"}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["plan", str(tmp_path / "r.yaml")]) == 0
    out = capsys.readouterr().out
    assert "of 20.00 GB" in out and "frozen nf4" in out


def test_parse_bytes():
    from xplus_fast.options import parse_bytes

    assert parse_bytes("24GB", "x") == 24 * 10**9 == parse_bytes(" 24 gb ", "x")
    assert parse_bytes("1.5GiB", "x") == 3 * 2**29
    with pytest.raises(UserError, match="^x: "):
        parse_bytes("-1GB", "x")
