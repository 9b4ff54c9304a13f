"""A model folder's configuration and tokenizer, loaded without trusting what is in it.

The one place where transformers reads them: it never runs a folder's code (`auto_map`), asks the
network only for what is no folder, and whatever it raises comes out as `UserError`.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from xplus_fast.errors import UserError
from xplus_fast.model.families import Shape, shape_of
from xplus_fast.model.quantized import check_config

GENERATION = "generation_config.json"
# What transformers takes where config.json says nothing. Its class defaults, not Qwen's models'.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": dict(hidden_size=4096, intermediate_size=11008, vocab_size=32000, head_dim=None,
                  num_key_value_heads=None),
    "qwen2": dict(hidden_size=4096, intermediate_size=22016, vocab_size=151936, head_dim=None,
                  num_key_value_heads=32),
    "qwen3": dict(hidden_size=4096, intermediate_size=22016, vocab_size=151936, head_dim=128,
                  num_key_value_heads=32),
}  # fmt: skip
COMMON = dict(
    num_hidden_layers=32, num_attention_heads=32, rms_norm_eps=1e-6, hidden_act="silu",
    tie_word_embeddings=False,
)  # fmt: skip


def config_shape(file: Path) -> Shape:
    """The sizes in a config.json, without transformers, which takes two seconds to load.

    Raises `UserError` where the file is missing or damaged, holds impossible values, tells of
    codes that are not read, or is of a model that `shape_of` refuses.
    """
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; a Hugging Face model folder is wanted") from None
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{file}: not a model configuration: {one_line(e)}") from None
    if not isinstance(config, dict):
        raise UserError(f"{file}: not a model configuration: a mapping is wanted")
    check_config(file.parent, config)
    kind = config.get("model_type")
    full = {**COMMON, **DEFAULTS.get(str(kind), {}), **config, "model_type": kind}
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if isinstance(rope, dict):
        rope = {**rope, "rope_type": rope.get("rope_type", rope.get("type", "default"))}
    full["rope_parameters"] = rope
    try:
        shape = shape_of(SimpleNamespace(**full))
        if config.get("use_sliding_window") and not config.get("layer_types"):
            slides = config.get("max_window_layers", 28)
            if type(slides) is not int or shape.layers > slides:
                raise UserError(f"use_sliding_window is not supported for {kind} models")
    except UserError as e:
        raise UserError(f"{file}: {e}") from None
    return shape


def load_config(folder: Path) -> Any:
    """The configuration of a model that the engine can run.

    Raises `UserError` where config.json is missing or damaged, holds impossible values, or is of a
    model that `shape_of` refuses.
    """
    from transformers import AutoConfig

    file = folder / "config.json"
    shape = config_shape(file)  # first: transformers makes lists as long as the numbers say
    with refused(f"{file}: not a model configuration"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    try:
        assert shape_of(config) == shape
    except UserError as e:
        raise UserError(f"{file}: {e}") from None
    pad = config.pad_token_id
    if pad is not None and not -shape.vocabulary <= pad < shape.vocabulary:
        raise UserError(f"{file}: pad_token_id: {pad} is beyond vocab_size, {shape.vocabulary}")
    # the file may name another, even a kernel of the hub's, which would be fetched and run
    config._attn_implementation = "sdpa"
    return config


def load_generation_config(folder: Path) -> Any | None:
    """What generation_config.json says; None where there is none.

    Raises `UserError` where it is damaged or its ids of tokens are none.
    """
    from transformers import GenerationConfig

    file = folder / GENERATION
    if not file.is_file():
        return None
    with refused(f"{file}: not a generation configuration"):
        config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, key, None)
        ids = value if isinstance(value, list) and key == "eos_token_id" else [value]
        if any(i is not None and (type(i) is not int or i < 0) for i in ids):
            raise UserError(f"{file}: {key}: a token's id is wanted, found {value!r:.80}")
    return config


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a model folder (or hub id), with a tokenizer.json or made into such a one.

    Raises `UserError` where there is none, or it cannot be loaded or used.
    """
    from transformers import AutoTokenizer

    what = f"{folder}: its tokenizer cannot be loaded"
    with refused(what):
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=Path(folder).is_dir()
        )
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"{what}: {type(tokenizer).__name__} has no tokenizer.json")
    if not isinstance(tokenizer.chat_template, str | dict | None):
        kind = type(tokenizer.chat_template).__name__
        raise UserError(f"{what}: its chat template is no text but a {kind}")
    with refused(what):  # once: some are damaged in ways that only use shows
        tokenizer(["?"], add_special_tokens=False)
        tokenizer.decode([0])
    return tokenizer


@contextmanager
def refused(what: str) -> Iterator[None]:
    """Whatever the libraries raise inside becomes one line that begins with `what`."""
    try:
        yield
    except Exception as e:  # tokenizers raises plain Exception, transformers nearly anything
        raise UserError(f"{what}: {one_line(e)}") from None
    except BaseException as e:
        if type(e).__name__ != "PanicException":  # of Rust code; it has no importable name
            raise
        raise UserError(f"{what}: {one_line(e)}") from None


def one_line(e: BaseException) -> str:
    """What an exception says, in one line of bounded length."""
    return " ".join(str(e).split())[:300] or type(e).__name__
