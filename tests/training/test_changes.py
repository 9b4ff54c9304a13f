"""Part of what a run changed: base + scale * change, by stage and by layer."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.training.workplace import make_workplace, write_recipe, xplus
from xplus_fast.errors import UserError
from xplus_fast.model.checkpoint_files import CheckpointFiles
from xplus_fast.training.changes import Changes, grid
from xplus_fast.training.checkpoints import read_checkpoint
from xplus_fast.training.export import layer_of

STAGES = {"low": range(0, 3), "high": range(2, 5)}  # layer 2 trains twice


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def run(request, tmp_path_factory, tiny_model_dir):
    """A finished run of two stages that have a layer in common."""
    folder = tmp_path_factory.mktemp("changes")
    recipe = make_workplace(folder, tiny_model_dir)
    recipe["dtype"] = request.param
    recipe["data"] |= {"heldout": 0, "retention": []}
    for stage in recipe["stages"]:
        ids = STAGES[stage["name"]]
        stage |= {"steps": 2, "layers": f"{ids[0]}-{ids[-1]}"}
    assert xplus("train", write_recipe(folder, recipe)) == 0
    assert xplus("export", folder / "run", folder / "whole") == 0
    return folder


def stored(folder):
    files = CheckpointFiles.open(folder)
    return {name: files.tensor(name).clone() for name in files.names}


def exported(run, tmp_path, scale):
    assert xplus("export", run / "run", tmp_path / "out", "--scale", scale) == 0
    return stored(tmp_path / "out")


def test_the_ends_are_the_base_and_the_export_bit_for_bit(run, tmp_path, tiny_model_dir):
    for scale, same in (("0", tiny_model_dir), ("1", run / "whole"), ("low=1,high=1.0", None)):
        out = tmp_path / scale
        assert xplus("export", run / "run", out, "--scale", scale) == 0
        for file in (same or run / "whole").glob("*.safetensors"):
            assert (out / file.name).read_bytes() == file.read_bytes()
    whole, one = (json.loads((f / "xplus_fast.json").read_text()) for f in (run / "whole", out))
    assert whole == one and "scale" not in whole
    none = json.loads((tmp_path / "0" / "xplus_fast.json").read_text())
    assert none["tensors"] == [] and none["layers"] == [] and none["scale"] == "0"


def finals(run):
    """What each stage left, in fp32: its masters, where it has them."""
    return [load_file(run / "run" / name / "final" / "trained.safetensors") for name in STAGES]


def test_between_it_is_the_base_and_a_part_of_the_change_rounded_once(
    run, tmp_path, tiny_model_dir
):
    base, (low, high) = stored(tiny_model_dir), finals(run)
    got = exported(run, tmp_path, "0.7")
    for name, before in base.items():
        a = before.float()
        b = low[name].float() if name in low else a
        c = high[name].float() if name in high else b
        # the two changes of a layer that trained twice are one after the other
        want = a + 0.7 * (b - a) if name in low else a.clone()
        want = want + 0.7 * (c - b) if name in high else want
        assert torch.equal(got[name], want.to(before.dtype)), name
    assert any(not torch.equal(got[n], base[n]) for n in low)


def test_a_final_holds_the_masters_whose_rounding_the_weights_are(run):
    (last,) = sorted((run / "run" / "low").glob("checkpoint-*"))[-1:]
    weights, (low, _) = read_checkpoint(last).tensors["trained"], finals(run)
    narrow = next(iter(weights.values())).dtype == torch.bfloat16
    assert low.keys() == weights.keys()
    for name, value in weights.items():
        assert low[name].dtype == torch.float32 and torch.equal(low[name].to(value.dtype), value)
    assert narrow == any(not torch.equal(low[n], v.float()) for n, v in weights.items())
    whole, changes = stored(run / "whole"), Changes(run / "run")
    assert all(torch.equal(changes[n].to(t.dtype), t) for n, t in whole.items() if n in changes)


def moved(got, base):
    return {layer_of(name) for name, value in got.items() if not torch.equal(value, base[name])}


@pytest.mark.parametrize(
    ("scale", "layers", "as_trained"),
    [
        ("low=1,high=0", {0, 1, 2}, {0, 1}),
        ("low=0,high=1", {2, 3, 4}, {3, 4}),
        ("high=0.5", {0, 1, 2, 3, 4}, {0, 1}),
        ("0,3-4=1", {3, 4}, {3, 4}),
        ("low=0.5,0=1,high=0", {0, 1, 2}, {0}),
        ("bottom:2=0,1.5", {2, 3, 4}, set()),
    ],
)
def test_a_scale_of_a_stage_or_of_layers_changes_those_alone(
    run, tmp_path, tiny_model_dir, capsys, scale, layers, as_trained
):
    base, whole = stored(tiny_model_dir), stored(run / "whole")
    got = exported(run, tmp_path, scale)
    assert moved(got, base) == layers
    same = {layer_of(n) for n, value in got.items() if torch.equal(value, whole[n])}
    differ = {layer_of(n) for n, value in got.items() if not torch.equal(value, whole[n])}
    assert (same - differ) & layers == as_trained
    assert xplus("verify", tiny_model_dir, tmp_path / "out") == 0
    assert f"note: scaled: {scale} of what the run changed" in capsys.readouterr().out


def test_the_first_stage_whole_and_nothing_of_the_second_is_what_the_first_left(run, tmp_path):
    got, (low, _) = exported(run, tmp_path, "high=0"), finals(run)
    dtype = next(iter(got.values())).dtype
    assert all(torch.equal(got[name], value.to(dtype)) for name, value in low.items())


@pytest.mark.parametrize(
    ("scale", "said"),
    [
        ("1.6", "'1.6': a scale from 0 to 1.5 is wanted"),
        ("-0.1", "'-0.1': a scale"),
        ("nan", "'nan': a scale"),
        ("1e-1", "'1e-1': a scale"),
        ("low=", "'low=': a scale"),
        ("0.5,0.7", "two scales for everything"),
        ("low=1,low=0", "low is named twice"),
        ("0-2=1,2=0", "2 is named twice"),
        ("mid=1", "'mid' is no stage of"),
        ("9=1", "'9' is no stage of"),
        ("5=0.5", "layer 5 of '5' was not trained"),
        ("head=0.5", "head of 'head' was not trained"),
        ("", "a scale from 0"),
    ],
)
def test_scales_that_mean_nothing_are_refused_in_one_line(run, tmp_path, capsys, scale, said):
    with pytest.raises(UserError, match="--scale: ") as refused:
        Changes(run / "run").at(scale)
    assert said in str(refused.value) and "\n" not in str(refused.value)
    if scale:
        assert xplus("export", run / "run", tmp_path / "out", f"--scale={scale}") == 2
        assert not (tmp_path / "out").exists()


def test_a_grid_has_every_combination():
    assert grid(["0,0.5,1"]) == ["0", "0.5", "1"]
    assert grid(["low=0,1", "high=0,.5,1"]) == [
        "low=0,high=0", "low=0,high=.5", "low=0,high=1",
        "low=1,high=0", "low=1,high=.5", "low=1,high=1",
    ]  # fmt: skip
    assert grid([".5, 0.00001"]) == [".5", "0.00001"]
    many = [f"{name}=" + ",".join(f"0.{i}" for i in range(1, 99)) for name in "abcdef"]
    for wrong in (many, ["0,0.0"], ["x"], [""], ["0,1.6"], ["a=" + ",".join(map(str, range(200)))]):
        with pytest.raises(UserError, match="--scales: "):
            grid(wrong)


def test_a_tied_head_is_the_embedding_and_a_stored_one_goes_with_it(tmp_path, small_tokenizer_dir):
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    from tests.tiny import tiny_model
    from xplus_fast.evaluation.generate import digest_of, model_digest
    from xplus_fast.training.export import contents

    base = tmp_path / "base"
    model = tiny_model("qwen3-tied", vocab_size=16500).to(torch.bfloat16)
    model.save_pretrained(base)
    for file in small_tokenizer_dir.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    stored_too = load_file(base / "model.safetensors")
    stored_too["lm_head.weight"] = stored_too["model.embed_tokens.weight"].clone()
    save_file(stored_too, base / "model.safetensors", {"format": "pt"})
    recipe = make_workplace(tmp_path, base)
    recipe["data"] |= {"heldout": 0, "retention": []}
    recipe["stages"] = [{"layers": "5", "also": ["head"], "steps": 1, "warmup": 0.0,
                         "learning_rate": {"5": 1e-3, "head": 1e-4}}]  # fmt: skip
    assert xplus("train", write_recipe(tmp_path, recipe)) == 0
    changes = Changes(tmp_path / "run").at("head=0.5")
    assert xplus("export", tmp_path / "run", tmp_path / "out", "--scale", "head=0.5") == 0
    got = stored(tmp_path / "out")
    assert torch.equal(got["lm_head.weight"], got["model.embed_tokens.weight"])
    made = contents(CheckpointFiles.open(base), changes)
    assert digest_of((str(name), pieces) for name, pieces in made) == model_digest(tmp_path / "out")
    assert "model.embed_tokens.weight" in changes and "lm_head.weight" not in changes
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out") is not None
