"""Configurations and tokenizers as hostile folders have them: loaded, or one line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from xplus_fast.errors import UserError
from xplus_fast.model.pretrained import (
    config_shape,
    load_config,
    load_generation_config,
    load_tokenizer,
)

QWEN3: dict[str, Any] = {
    "model_type": "qwen3", "vocab_size": 320, "hidden_size": 96, "intermediate_size": 160,
    "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32,
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
}  # fmt: skip
NUMBERS = [0, -1, 10**30, 10**400, 1.5, "x", [], {}, True, float("nan"), float("inf")]
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip


def folder(tmp_path: Path, **changes: Any) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3 | changes))
    return tmp_path


def says(call: Any, *arguments: Any) -> str:
    with pytest.raises(UserError) as e:
        call(*arguments)
    assert "\n" not in str(e.value) and len(str(e.value)) < 1000
    return str(e.value)


def test_a_good_configuration_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    config = load_config(folder(tmp_path, rope_scaling={"rope_type": "llama3", **LLAMA3}))
    assert config.num_hidden_layers == 2 and config_shape(tmp_path / "config.json").head_dim == 32
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    assert type(model.model.rotary_emb)(config).inv_freq.isfinite().all()


@pytest.mark.parametrize("value", NUMBERS, ids=lambda v: repr(v)[:20])
@pytest.mark.parametrize(
    "key",
    [k for k, v in QWEN3.items() if isinstance(v, int) and k != "tie_word_embeddings"],
)
def test_sizes_that_no_model_has(tmp_path: Path, key: str, value: Any) -> None:
    path = folder(tmp_path, **{key: value})
    said = says(load_config, path)
    assert f"{path / 'config.json'}: {key}: a whole number from 1 to" in said
    assert says(config_shape, path / "config.json") == said  # `plan` says the same


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": []}, "model type [] is not supported"),
        ({"num_key_value_heads": 4}, "num_key_value_heads: 4 does not divide"),
        ({"head_dim": 33}, "head_dim: an even number is wanted"),
        ({"head_dim": None, "hidden_size": 5}, "head_dim: an even number is wanted"),
        ({"rms_norm_eps": -1}, "rms_norm_eps: a number from 0"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps: a number from 0"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings: true or false"),
        ({"layer_types": 7}, "layer_types: a list is wanted"),
        ({"layer_types": ["sliding_attention"] * 2}, "layer_types = 'sliding_attention' is not"),
        ({"rope_scaling": 7}, "rope_parameters: a mapping is wanted"),
        ({"rope_scaling": {"type": "foo"}}, "rope_type = 'foo' is not supported"),
        ({"rope_scaling": {"type": ["a"]}}, "rope_type = ['a'] is not supported"),
        ({"rope_scaling": {"type": "proportional"}}, "rope_type = 'proportional' is not"),
        ({"rope_scaling": {"type": "linear"}}, "rope_parameters.factor: a number above 0"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor: a number above 0"),
        ({"rope_scaling": {"type": "yarn", "factor": "x"}}, "factor: a number above 0"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "low_freq_factor: a number"),
        ({"rope_scaling": {"type": "llama3", **LLAMA3, "low_freq_factor": 4.0}}, "less than"),
        ({"rope_theta": 0}, "rope_theta: a number above 0"),
        ({"rope_theta": float("nan")}, "rope_theta: a number above 0"),
    ],
)
def test_values_that_the_block_cannot_take(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = folder(tmp_path, **change)
    assert message in says(load_config, path)
    assert message in says(config_shape, path / "config.json")


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "float99"}, {"torch_dtype": []}, {"pad_token_id": 320}, {"pad_token_id": "x"},
        {"num_labels": {"a": 1}}, {"auto_map": 7}, {"id2label": []},
    ],
    ids=str,
)  # fmt: skip
def test_what_only_transformers_refuses(tmp_path: Path, change: dict[str, Any]) -> None:
    path = folder(tmp_path, **change)
    assert f"{path / 'config.json'}: " in says(load_config, path)


def test_code_and_kernels_of_a_folder_are_not_asked_for(tmp_path: Path) -> None:
    run = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(run)!r}, 'w')\nclass Evil: pass\n")
    mapped = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    path = folder(tmp_path, auto_map=mapped, attn_implementation="someone/kernel")
    config = load_config(path)
    assert config.model_type == "qwen3" and config._attn_implementation == "sdpa"
    assert not run.exists()


@pytest.mark.parametrize("text", ["", "[", "7", "\xff", '{"a": ' * 100_000, "{}"])
def test_damaged_files(tmp_path: Path, text: str, small_tokenizer_dir: Path) -> None:
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    assert str(tmp_path / "config.json") in says(load_config, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        broken = tmp_path / name.partition(".")[0]
        shutil.copytree(small_tokenizer_dir, broken)
        (broken / name).write_text(text, encoding="latin-1")
        if (name, text) != ("tokenizer_config.json", "{}"):
            assert f"{broken}: its tokenizer cannot be loaded: " in says(load_tokenizer, broken)
    (tmp_path / "generation_config.json").write_text(text, encoding="latin-1")
    if text != "{}":
        assert "generation_config.json" in says(load_generation_config, tmp_path)


@pytest.mark.parametrize("eos", ["</s>", -1, [1, "x"], 1.5, {"a": 1}, True])
def test_ids_of_tokens_that_are_none(tmp_path: Path, eos: Any) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    said = says(load_generation_config, tmp_path)
    assert said.startswith(f"{tmp_path / 'generation_config.json'}: ")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    assert load_generation_config(tmp_path).eos_token_id == [1, 2]
