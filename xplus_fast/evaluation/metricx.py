"""MetricX (Juraska et al. 2024, arXiv 2410.03983) on the classes that transformers has.

    python metricx.py MODEL TOKENIZER ROWS SCORES

Run by its path in a Python that has torch, transformers and sentencepiece: it imports nothing of
this project. A MetricX model is an mT5 whose first logit of one certain piece is the number of
errors, from 0 to 25; its own classes (github.com/google-research/metricx) want transformers 4.30.
"""

import json
import sys
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, MT5ForConditionalGeneration

ERRORS = 250089  # the piece <extra_id_10>
LENGTH = 1536  # tokens, as it was trained
WORST = 25.0
TOKENS = 8192  # of a batch


def main(model_name: str, tokenizer_name: str, rows: str, scores: str) -> None:
    with open(rows, encoding="utf-8") as f:
        data = [json.loads(line) for line in f]
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load(model_name).to(device).eval()
    asked = []
    for row in data:
        text = f"source: {row['source']} candidate: {row['hypothesis']}"
        text += f" reference: {row['reference']}"
        # less the token that ends it, as it was trained
        asked.append(tokenizer(text, max_length=LENGTH, truncation=True)["input_ids"][:-1])
    order = sorted(range(len(asked)), key=lambda i: len(asked[i]))
    found = [0.0] * len(asked)
    while order:
        batch = [order.pop()]  # the longest that are left
        while order and len(asked[batch[0]]) * (len(batch) + 1) <= TOKENS:
            batch.append(order.pop())
        width = len(asked[batch[0]])
        ids = torch.zeros((len(batch), width), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for b, i in enumerate(batch):
            ids[b, : len(asked[i])] = torch.tensor(asked[i])
            mask[b, : len(asked[i])] = 1
        with torch.no_grad():
            logits = model(
                input_ids=ids.to(device), attention_mask=mask.to(device),
                decoder_input_ids=torch.zeros((len(batch), 1), dtype=torch.long, device=device),
            ).logits  # fmt: skip
        for i, value in zip(
            batch, logits[:, 0, ERRORS].float().clamp(0, WORST).tolist(), strict=True
        ):
            found[i] = value
    with open(scores, "w") as f:
        json.dump(found, f)


def load(name: str) -> Any:
    """A model whose embeddings are one and whose head is its own, as T5 of version 1.1 has it:
    transformers 4 reads it so, 5 takes all three for one or for none."""
    config = AutoConfig.from_pretrained(name)
    config.tie_word_embeddings = False
    made: Any = MT5ForConditionalGeneration.from_pretrained(
        name, config=config, output_loading_info=True
    )
    model, info = made
    if missing := [key for key in info["missing_keys"] if "embed_tokens" not in key]:
        sys.exit(f"it lacks {missing[0]} and {len(missing) - 1} more: no MetricX model")
    for stack in (model.encoder, model.decoder):
        stack.set_input_embeddings(model.shared)
    return model


if __name__ == "__main__":
    main(*sys.argv[1:])
