"""A tiny recipe for a quick look at the experiment: it shows that all runs, and nothing else."""

import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from xplus_fast.config import DataConfig, Recipe, Source, Stage

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] + ':' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def tiny_recipe(folder: Path) -> Recipe:
    """A random model of four layers, a tokenizer of one token a byte, made-up pairs."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # type: ignore[assignment]
    bpe.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=TEMPLATE,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
            bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    words = ["red", "blue", "old", "new", "big", "dry"]
    pairs = [(f"{a} {b}", f"{b.upper()} {a.upper()}") for a in words for b in words]
    (folder / "pairs.jsonl").write_text(
        "".join(json.dumps({"en": a, "fr": b}) + "\n" for a, b in pairs)
    )
    (folder / "text.txt").write_text("A text that should stay.\n\nAnother one.\n")
    return Recipe(
        model=str(folder / "model"),
        output="",
        stages=[Stage("bottom:1", learning_rate=1e-3), Stage("top:2", learning_rate=1e-3)],
        data=DataConfig(
            sources=[Source(str(folder / "pairs.jsonl"), directions="forward")],
            heldout=4,
            retention=[Source(str(folder / "text.txt"), format="text")],
            prompt="{src}-{tgt}: {text}",
            pack_tokens=128,
            cache=str(folder / "cache"),
        ),
        dtype="float32",
    )
