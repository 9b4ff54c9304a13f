"""A base in FP8: trained as its decoded copy is, and exported with what was trained in bf16."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import FP8Linear, replace_with_fp8_linear
from transformers.quantizers.base import HfQuantizer

from tests.assets import save_small_tokenizer, save_tiny_model
from tests.fp8 import decode, edit_config, edit_tensors, fp8_copy, plain_copy, shard
from tests.tiny import tiny_model
from xplus_fast import cli
from xplus_fast.model.checkpoint_files import INDEX, SINGLE, CheckpointFiles
from xplus_fast.training.export import RECORD, describe, export, verify

BLOCK = (32, 32)
MATRICES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
            "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip


def modules(*layers: int) -> list[str]:
    return [f"model.layers.{i}.{name}" for i in layers for name in MATRICES]


def trained(folder: Path, *layers: int) -> dict[str, torch.Tensor]:
    """New values of whole layers, as a run leaves them."""
    files = CheckpointFiles.open(folder)
    prefixes = tuple(f"model.layers.{i}." for i in layers)
    torch.manual_seed(0)
    return {
        name: torch.randn(files.shape(name))
        for name in files.names
        if name.startswith(prefixes) and not name.endswith("_scale_inv")
    }


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    return fp8_copy(tmp_path / "plain", tmp_path / "base", block=BLOCK, scales=torch.float32)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


@pytest.mark.parametrize("pieces", [1, 3, 8])
def test_trained_matrices_are_plain_and_all_else_keeps_its_bytes(base, tmp_path, pieces):
    meant = plain_copy(base, tmp_path / "meant")
    if pieces > 1:
        shard(base, pieces)  # scales in other files than their codes
    before = stored(base)
    changed = trained(base, 0, 5) | {"lm_head.weight": torch.randn(320, 96)}
    export(base, changed, tmp_path / "out", {"layers": [0, 5]})
    after = stored(tmp_path / "out")
    gone = {f"{module}.weight_scale_inv" for module in modules(0, 5)}
    assert after.keys() == before.keys() - gone
    for name, value in after.items():
        if name in changed:
            assert value.dtype == torch.bfloat16 and torch.equal(value, changed[name].bfloat16())
        else:
            same = value.view(torch.uint8) == before[name].view(torch.uint8)
            assert value.dtype == before[name].dtype and same.all()

    config = json.loads((tmp_path / "out/config.json").read_text())
    wanted = json.loads((base / "config.json").read_text())
    wanted["quantization_config"]["modules_to_not_convert"] = ["lm_head", *sorted(modules(0, 5))]
    told = config["quantization_config"]["modules_to_not_convert"]
    assert told[0] == "lm_head" and len(told) == 15
    config["quantization_config"]["modules_to_not_convert"] = [told[0], *sorted(told[1:])]
    assert config == wanted
    if pieces > 1:
        index = json.loads((tmp_path / "out" / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in after.values())
        assert index["metadata"]["total_parameters"] == sum(t.numel() for t in after.values())
        assert index["weight_map"].keys() == after.keys()

    # transformers reads what is meant (blocks that divide: these are not cut off)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    expected = load_file(meant / SINGLE) | {n: v.bfloat16() for n, v in changed.items()}
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name].float()), name

    result = verify(base, tmp_path / "out")
    assert result.ok and set(result.changed) == set(changed) and result.notes == result.files == []
    assert result.identical == len(before) - len(changed) - len(gone)
    assert sum(result.numel.values()) == sum(t.numel() for t in changed.values())
    assert "all others bit-identical" in describe(result)
    assert verify(base, tmp_path / "out", {0, 5}, {"lm_head.weight"}).ok
    only = verify(base, tmp_path / "out", {0}, {"lm_head.weight"})
    assert not only.ok and set(only.outside) == {n for n in changed if ".5." in n}


def test_which_modules_a_gpu_would_compute_in_fp8(base, tmp_path):
    """transformers' own choice of modules, on a machine that has FP8; vLLM wants whole names."""
    export(base, trained(base, 0, 1), tmp_path / "out", {})
    told = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    config = FineGrainedFP8Config(**told)
    with torch.device("meta"):
        model = tiny_model()
    skip = HfQuantizer.get_modules_to_not_convert(model, config.modules_to_not_convert)
    replace_with_fp8_linear(model, skip, quantization_config=config, pre_quantized=True)
    found = {name for name, module in model.named_modules() if isinstance(module, FP8Linear)}
    assert found == set(modules(2, 3, 4, 5))
    for kind in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):  # which vLLM fuses
        parts = [{m.rpartition(".")[0] for m in told["modules_to_not_convert"] if m.endswith(k)}
                 for k in kind]  # fmt: skip
        assert all(part == parts[0] for part in parts)


def test_both_names_of_the_list_and_what_was_on_it(tmp_path):
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    kept = ["lm_head", "model.layers.3.mlp.down_proj"]
    base = fp8_copy(tmp_path / "plain", tmp_path / "base", block=BLOCK, listed=kept)
    config = json.loads((base / "config.json").read_text())["quantization_config"]
    edit_config(base, quantization_config=config | {"ignored_layers": ["model.norm"]})
    export(base, trained(base, 1), tmp_path / "out", {})
    told = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert told["ignored_layers"] == told["modules_to_not_convert"]
    assert set(told["ignored_layers"]) == {*kept, "model.norm", *modules(1)}
    assert verify(base, tmp_path / "out").ok


def test_where_all_was_trained_no_codes_are_left(base, tmp_path):
    shard(base, 40)  # some of the files hold nothing but scales
    changed = trained(base, *range(6))
    export(base, changed, tmp_path / "out", {})
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert all(torch.equal(model.state_dict()[n], v.bfloat16()) for n, v in changed.items())
    result = verify(base, tmp_path / "out")
    assert result.ok and result.notes == result.files == []


def test_the_dtype_is_the_models(base, tmp_path):
    edit_config(base, dtype="float16")
    changed = trained(base, 2)
    export(base, changed, tmp_path / "out", {})
    assert stored(tmp_path / "out")["model.layers.2.mlp.up_proj.weight"].dtype == torch.float16
    assert verify(base, tmp_path / "out").ok


def flip(at: int = 3):
    def change(value: torch.Tensor) -> torch.Tensor:
        value.view(torch.uint8).view(-1)[at] ^= 1
        return value

    return change


UP4 = "model.layers.4.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({UP4: flip()}, f"changed, though frozen: 1 tensor\n  {UP4}"),
        ({f"{UP4}_scale_inv": flip(0)}, f"changed, though frozen: 1 tensor\n  {UP4}_scale_inv"),
        # decoded without having been trained: the same weights, but not the same bytes
        ({UP4: "decoded", f"{UP4}_scale_inv": None}, f"changed, though frozen: 1 tensor\n  {UP4}"),
        ({UP4: "fp32", f"{UP4}_scale_inv": None}, "of another shape or dtype: 1 tensor"),
    ],
)
def test_what_is_frozen_keeps_codes_and_scales(base, tmp_path, change, said):
    export(base, trained(base, 0), tmp_path / "out", {})
    assert verify(base, tmp_path / "out").ok
    tensors = stored(base)
    value = decode(tensors[UP4], tensors[f"{UP4}_scale_inv"], BLOCK)
    meant = {"decoded": value.bfloat16(), "fp32": value}
    told = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    if f"{UP4}_scale_inv" in change and change[f"{UP4}_scale_inv"] is None:  # else it is refused
        told["modules_to_not_convert"].append(UP4.removesuffix(".weight"))
        edit_config(tmp_path / "out", quantization_config=told)
    edit_tensors(
        tmp_path / "out", **{n: meant[v] if isinstance(v, str) else v for n, v in change.items()}
    )
    result = verify(base, tmp_path / "out")
    assert not result.ok and said in describe(result)


def test_a_configuration_that_export_would_not_write_is_told(base, tmp_path):
    export(base, trained(base, 0), tmp_path / "out", {})
    told = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    told["modules_to_not_convert"].append("model.norm")
    edit_config(tmp_path / "out", quantization_config=told)
    result = verify(base, tmp_path / "out")
    assert not result.ok and result.files == ["config.json: differs in quantization_config"]


def test_a_run_on_codes_is_a_run_on_what_they_mean(tmp_path, capsys):
    save_small_tokenizer(tmp_path / "tokenizer")
    save_tiny_model(tmp_path / "plain", tmp_path / "tokenizer")
    base = fp8_copy(tmp_path / "plain", tmp_path / "fp8", block=(48, 40))
    meant = plain_copy(base, tmp_path / "meant")
    lines = [
        json.dumps({"en": f"The house number {i}.", "de": f"Das Haus {i}."}) for i in range(60)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    losses, tensors = [], []
    for model in (base, meant):
        recipe = {
            "model": str(model), "output": str(tmp_path / f"run-{model.name}"), "dtype": "float32",
            "data": {"sources": [{"path": str(tmp_path / "pairs.jsonl")}], "heldout": 4,
                     "pack_tokens": 256, "cache": str(tmp_path / "cache")},
            "stages": [{"layers": "bottom:1", "steps": 2}, {"layers": "top:2", "steps": 2}],
            "training": {"tokens_per_step": 512}, "evaluation": {"translate": 0, "samples": 0},
        }  # fmt: skip
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
        assert cli.main(["train", str(tmp_path / "r.yaml")]) == 0
        run, out = recipe["output"], tmp_path / f"out-{model.name}"
        metrics = (Path(run) / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in metrics])
        losses[-1].append((Path(run) / "evaluation/before.json").read_text())
        capsys.readouterr()
        seen = tmp_path / f"sensitivity-{model.name}"
        assert cli.main(["sensitivity", str(model), str(tmp_path / "pairs.jsonl"), "--batches", "2",
                         "--out", str(seen)]) == 0  # fmt: skip
        layers = json.loads((seen / "sensitivity.json").read_text())
        losses[-1].append([layers["loss"], layers["layers"]])
        capsys.readouterr()
        assert cli.main(["export", run, str(out)]) == 0
        said = capsys.readouterr().out
        assert ("21 of them are FP8 in the base, and BF16 in the result" in said) == (model == base)
        assert cli.main(["verify", str(model), str(out)]) == 0
        names = json.loads((out / RECORD).read_text())["tensors"]
        tensors.append({name: stored(out)[name].bfloat16() for name in names})
    assert len(losses[0]) == 6 and losses[0] == losses[1]
    assert tensors[0].keys() == tensors[1].keys() and len(tensors[0]) == 33
    assert all(torch.equal(tensors[0][name], value) for name, value in tensors[1].items())
    start = stored(base)
    for name in tensors[0]:
        if name.endswith("_proj.weight"):
            was = decode(start[name], start[f"{name}_scale_inv"], (48, 40))
            moved = (tensors[0][name].float() - was).norm() / was.norm()
            assert 0 < moved < 0.05
