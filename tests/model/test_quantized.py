"""Checkpoints in FP8 are read as they are meant; every other kind of codes is one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.assets import save_small_tokenizer, save_tiny_model
from tests.fp8 import decode, edit_config, edit_tensors, fp8_copy, plain_copy
from tests.tiny import difference, packed_batch, tiny_model
from xplus_fast import cli
from xplus_fast.errors import UserError
from xplus_fast.evaluation import generate
from xplus_fast.model import checkpoint_files
from xplus_fast.model.checkpoint_files import SINGLE, CheckpointFiles, check_against, read_entry
from xplus_fast.model.families import shape_of
from xplus_fast.model.layout import LayerLayout, Layout
from xplus_fast.model.load import Weights, load_model
from xplus_fast.model.quantized import _names
from xplus_fast.training.export import export

DOWN = "model.layers.0.mlp.down_proj.weight"
CPU = torch.device("cpu")


def loaded(folder: Path, dtype: torch.dtype = torch.float32, trains: int = 0):
    files, config = CheckpointFiles.open(folder), AutoConfig.from_pretrained(folder)
    check_against(files, shape_of(config).tensor_shapes())
    layout = Layout(tuple(LayerLayout(trains=i < trains) for i in range(config.num_hidden_layers)))
    return load_model(Weights(files), config, layout, dtype=dtype, device=CPU)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_model(hidden_size=192).to(torch.bfloat16).save_pretrained(folder)
    return folder


# values


@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (127, 129), (300, 5), (5, 300), (256, 384)])
@pytest.mark.parametrize("block", [(128, 128), (64, 32), (1, 1), (1000, 1000)])
@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16, torch.float16])
def test_every_code_times_its_scale(tmp_path, shape, block, scales, monkeypatch):
    monkeypatch.setattr(checkpoint_files, "PIECE", 9000)  # several pieces and a rest
    torch.manual_seed(0)
    numbers = [code for code in range(256) if code & 127 != 127]
    picked = torch.tensor(numbers * (1 + 256 * 384 // len(numbers)))[: shape[0] * shape[1]]
    codes = picked[torch.randperm(len(picked))].to(torch.uint8).view(torch.float8_e4m3fn)
    codes = codes.reshape(shape)
    grid = [-(-n // b) for n, b in zip(shape, block, strict=True)]
    scale = torch.rand(grid).add(0.01).mul(3e-4).to(scales)
    save_file({"a.weight": codes, "a.weight_scale_inv": scale}, tmp_path / SINGLE)
    told = {"quant_method": "fp8", "weight_block_size": list(block)}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": told}))
    entry = CheckpointFiles.open(tmp_path).entries["a.weight"]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        out = torch.full(shape, torch.nan, dtype=dtype)
        read_entry(entry, out)
        assert torch.equal(out, decode(codes, scale, block).to(dtype))


@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_what_transformers_makes_of_it(base, tmp_path, scales, dtype):
    folder = fp8_copy(base, tmp_path / "fp8", block=(32, 32), scales=scales)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    ours = loaded(folder, dtype)
    expected, got = theirs.state_dict(), ours.state_dict()
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name
    plain = loaded(plain_copy(folder, tmp_path / "plain"), dtype)
    batch = packed_batch([9, 4])
    assert torch.equal(ours(**batch).loss, plain(**batch).loss)
    assert not hasattr(ours.config, "quantization_config")


def test_blocks_cut_off_at_the_edge(base, tmp_path):
    folder = fp8_copy(base, tmp_path / "fp8")  # 192 columns: a block and a half
    assert load_file(folder / SINGLE)[f"{DOWN}_scale_inv"].shape == (2, 2)
    plain = plain_copy(folder, tmp_path / "plain")
    expected = load_file(plain / SINGLE)
    for trains in (0, 6):
        got = loaded(folder, torch.bfloat16, trains).state_dict()
        assert all(torch.equal(got[name], value.bfloat16()) for name, value in expected.items())
    # transformers takes a quarter of a matrix for a block: nothing here is left to it
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    assert not torch.equal(theirs[DOWN], expected[DOWN].bfloat16())
    model = generate.load(folder, "float32", "cpu")
    ids = torch.arange(5, 50)[None]
    wanted = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    assert difference(model(ids).logits, wanted(ids).logits) < 1e-5
    with pytest.raises(UserError, match="cut off, which transformers does not read"):
        generate.check_model(folder, stock=True)
    generate.check_model(folder, stock=False)


# what is refused, wherever a model is named


def told(**changes):
    return lambda folder: edit_config(folder, quantization_config=changes)


def retold(**changes):
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        edit_config(folder, quantization_config=config["quantization_config"] | changes)

    return change


def stored(**changes):
    return lambda folder: edit_tensors(folder, **changes)


def cast(dtype):
    return stored(**{DOWN: lambda t: torch.zeros(t.shape).to(dtype)})


SCALE = f"{DOWN}_scale_inv"


def filled(value):
    return stored(**{SCALE: lambda t: torch.full_like(t, value)})


# what is said, of which folder, changed how
REFUSED = [
    (
        "bitsandbytes nf4",
        "plain",
        told(quant_method="bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    ),
    ("bitsandbytes int8", "plain", told(load_in_8bit=True)),
    ("gptq (4 bits)", "plain", told(quant_method="gptq", bits=4)),
    ("awq (4 bits)", "plain", told(quant_method="awq", bits=4)),
    ("compressed-tensors is not", "plain", told(quant_method="compressed-tensors")),
    (
        "compression_config",
        "plain",
        lambda f: edit_config(f, compression_config={"quant_method": "x"}),
    ),
    ("mxfp4 is not", "plain", told(quant_method="mxfp4")),
    ("a kind that it does not name", "plain", told()),
    ("an object is wanted", "plain", lambda f: edit_config(f, quantization_config=["fp8"])),
    ("quantization: a kind", "plain", lambda f: edit_config(f, quantization={"bits": 4})),
    ("no weight_block_size", "fp8", retold(weight_block_size=None)),
    ("two whole numbers above 0", "fp8", retold(weight_block_size=[128, 0])),
    ("fmt: 'e4m3' is read, found 'e5m2'", "fp8", retold(fmt="e5m2")),
    ("activation_scheme: 'dynamic' is read", "fp8", retold(activation_scheme="static")),
    ("a list of names is wanted", "fp8", retold(modules_to_not_convert="lm_head")),
    ("no tensor is stored so", "plain", told(quant_method="fp8", weight_block_size=[128, 128])),
    (
        "has no quantization_config",
        "fp8",
        lambda f: (edit_config(f, quantization_config=None), _without_scales(f)),
    ),
    ("scales nothing: no FP8", "plain", stored(**{SCALE: torch.ones(2, 2)})),
    (
        "names 'model.layers.0.mlp.down_proj'",
        "fp8",
        retold(modules_to_not_convert=["lm_head", "model.layers.0.mlp.down_proj"]),
    ),
    ("names 'model.layers.0'", "fp8", retold(modules_to_not_convert=["model.layers.0"])),
    ("names 'down_proj'", "fp8", retold(ignored_layers=["down_proj"])),
    (f"has no '{SCALE}'", "fp8", stored(**{SCALE: None})),
    ("stored as BF16, though", "fp8", cast(torch.bfloat16)),
    ("does not name it: codes that have lost", "fp8", stored(**{DOWN: torch.ones(192, 160)})),
    ("stored as I16", "plain", cast(torch.int16)),
    ("stored as I8", "plain", cast(torch.int8)),
    ("stored as U8", "plain", cast(torch.uint8)),
    ("stored as BOOL", "plain", cast(torch.bool)),
    (
        "stored as I32 (GPTQ or AWQ)",
        "plain",
        stored(**{DOWN.replace("weight", "qweight"): torch.ones(3, 3, dtype=torch.int32)}),
    ),
    (
        "stored as U8 (bitsandbytes, 4 bits)",
        "plain",
        lambda f: edit_tensors(
            f,
            **{
                DOWN: lambda t: t.new_zeros(t.numel() // 2, 1).to(torch.uint8),
                f"{DOWN}.absmax": torch.ones(3),
            },
        ),
    ),
    ("stored as F8_E5M2", "fp8", cast(torch.float8_e5m2)),
    (
        "norm.weight' is stored as F8_E4M3",
        "fp8",
        stored(**{"model.norm.weight": lambda t: t.to(torch.float8_e4m3fn)}),
    ),
    ("[3, 2]; [192, 160] in blocks", "fp8", stored(**{SCALE: torch.ones(3, 2)})),
    ("has shape []", "fp8", stored(**{SCALE: torch.tensor(1.0)})),
    ("is stored as F64; F32", "fp8", stored(**{SCALE: lambda t: t.double()})),
    ("zero, negative or not finite", "fp8", filled(0.0)),
    ("zero, negative or not finite", "fp8", filled(-0.0)),
    ("negative or not finite", "fp8", filled(-1.0)),
    ("or not finite", "fp8", filled(torch.nan)),
    ("holds a scale", "fp8", filled(torch.inf)),
    (
        "q_proj.bias' is nothing that",
        "plain",
        stored(**{"model.layers.0.self_attn.q_proj.bias": torch.zeros(192)}),
    ),
    (
        "k_scale' is nothing that",
        "fp8",
        stored(**{"model.layers.0.self_attn.k_scale": torch.tensor(1.0)}),
    ),
    (
        "(11 such tensors in all)",
        "plain",
        lambda f: edit_config(f, num_hidden_layers=5, layer_types=None),
    ),
]


def _without_scales(folder: Path) -> None:
    tensors = load_file(folder / SINGLE)
    save_file({n: t for n, t in tensors.items() if "scale" not in n}, folder / SINGLE)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, base) -> Path:
    folder = tmp_path_factory.mktemp("refused")
    shutil.copytree(base, folder / "plain")
    fp8_copy(base, folder / "fp8")
    pairs = [json.dumps({"en": f"House {i}.", "de": f"Haus {i}."}) + "\n" for i in range(9)]
    (folder / "pairs.jsonl").write_text("".join(pairs))
    (folder / "train.yaml").write_text(yaml.safe_dump({
        "model": "?", "output": str(folder / "run"), "stages": [{"layers": "top:1"}],
        "data": {"sources": [{"path": str(folder / "pairs.jsonl")}]},
    }))  # fmt: skip
    (folder / "x.en").write_text("A\n")
    (folder / "x.de").write_text("B\n")
    sets = [{"name": "x", "files": str(folder / "x.{lang}"), "directions": ["en-de"]}]
    (folder / "evaluate.yaml").write_text(
        yaml.safe_dump({"output": str(folder / "out"), "translation": {"sets": sets}})
    )
    return folder


@pytest.mark.parametrize(("said", "kind", "change"), REFUSED, ids=[said for said, *_ in REFUSED])
def test_every_command_refuses_what_it_would_misread(
    said, kind, change, workplace, tmp_path, capsys
):
    model = shutil.copytree(workplace / kind, tmp_path / "model")
    change(model)
    compared = "is nothing that" in said or "such tensors" in said
    commands = {
        "train": ["train", workplace / "train.yaml", f"model={model}", "--dry-run"],
        "plan": ["plan", workplace / "train.yaml", f"model={model}"],
        "sensitivity": ["sensitivity", model, workplace / "pairs.jsonl", "--out", tmp_path / "s"],
        "evaluate": ["evaluate", workplace / "plain", workplace / "evaluate.yaml", "--base", model],
        "verify": ["verify", model, workplace / kind, "--layers", "0"],
    }
    for command, arguments in commands.items():
        code = cli.main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        if command == "verify" and compared:
            assert code == 1 or "config.json differs in" in out
            continue  # it compares any two folders, and names what one of them lacks
        assert code == 2, (command, out)
        assert err.count("\n") == 1 and said in err and str(model) in err, (command, err)
    if not compared:
        with pytest.raises(UserError) as caught:
            export(model, {}, tmp_path / "out", {})
        assert said in str(caught.value) and not (tmp_path / "out").exists()


def test_a_code_that_is_no_number_is_found_when_it_is_read(base, tmp_path):
    for bad in (0x7F, 0xFF):
        folder = fp8_copy(base, tmp_path / f"fp8-{bad}")

        def spoil(codes, bad=bad):
            codes.view(torch.uint8)[130, 7] = bad
            return codes

        edit_tensors(folder, **{DOWN: spoil})
        with pytest.raises(UserError, match=r"an FP8 code in rows 0 to 191.*is not a number"):
            loaded(folder)
        with pytest.raises(UserError, match="is not a number"):
            generate.load(folder, "auto", "cpu")
    folder = fp8_copy(base, tmp_path / "large", scales=torch.float32)
    edit_tensors(folder, **{SCALE: lambda t: torch.full_like(t, 3e38)})
    with pytest.raises(UserError, match="makes weights that overflow"):
        loaded(folder)


def test_what_loses_nothing_may_be_there(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "freq")
    edit_tensors(folder, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)})
    loaded(folder)
    tied = tmp_path / "tied"
    tiny_model("qwen3-tied").to(torch.bfloat16).save_pretrained(tied)
    table = load_file(tied / SINGLE)["model.embed_tokens.weight"]
    edit_tensors(tied, **{"lm_head.weight": table.clone()})
    loaded(tied)
    table[5, 5] += 1
    edit_tensors(tied, **{"lm_head.weight": table})
    with pytest.raises(UserError, match="'lm_head.weight' is not the embedding"):
        loaded(tied)


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("model.layers.3.mlp.up_proj", True), ("up_proj", True), ("mlp.up_proj", True),
        ("model.layers.3", True), ("model.layers.3.", True), ("model.layers.3.*", True),
        (".*mlp.*proj", True), ("model.*.mlp.*", True), (".*", True), ("mlp", True),
        ("lm_head", False), ("model.layers.33", False), ("model.layers.3.mlp.up", False),
        ("layers.3.mlp.up_pro", False), ("model.*.down.*", False), ("layer.*proj", False),
    ],
)  # fmt: skip
def test_the_list_of_what_is_not_quantized(key, named):
    assert _names(key, "model.layers.3.mlp.up_proj") is named


def test_a_plan_is_of_the_weights_in_memory(base, tmp_path, workplace, capsys):
    folder = fp8_copy(base, tmp_path / "fp8")
    plans = []
    for model in (plain_copy(folder, tmp_path / "plain"), folder):
        assert cli.main(["plan", str(workplace / "train.yaml"), f"model={model}", "--card",
                         "rtx4090", "--json"]) == 0  # fmt: skip
        plans.append(json.loads(capsys.readouterr().out)["stages"])
    assert plans[0] == plans[1]
    lone = tmp_path / "config only"  # of a hub id, no more than that is had
    lone.mkdir()
    shutil.copy(folder / "config.json", lone)
    told(quant_method="awq")(lone)
    assert cli.main(["plan", str(workplace / "train.yaml"), f"model={lone}"]) == 2
    assert "awq is not read" in capsys.readouterr().err


def test_it_answers_as_its_decoded_copy_does(tmp_path):
    save_small_tokenizer(tmp_path / "tokenizer")
    save_tiny_model(tmp_path / "base", tmp_path / "tokenizer")
    folder = fp8_copy(tmp_path / "base", tmp_path / "fp8", block=(48, 40))
    other = plain_copy(folder, tmp_path / "plain")
    made = []
    for model in (folder, other):
        generator = generate.Generator(
            generate.subject_of(model, "float32", "cpu"), tmp_path / "cache", engine="generate",
            batch_size=2, max_new_tokens=8, dtype="float32", show=False,
        )  # fmt: skip
        made.append(generator.answer(["The house", "A dog is"], "x"))
    assert made[0] == made[1] and all(text for text, _ in made[0])
