"""A script written for Trainer, with XPlusTrainer in its place: the top layers learn.

    python examples/trainer.py Qwen/Qwen3-0.6B pairs.jsonl out
    torchrun --nproc-per-node=4 examples/trainer.py Qwen/Qwen3-0.6B pairs.jsonl out

pairs.jsonl has {"prompt": "...", "completion": "..."} on each line.
"""

import sys

import torch
from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorWithFlattening,
    TrainingArguments,
)

from xplus_fast import XPlusTrainer as Trainer  # was: from transformers import Trainer

model_name, data, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model_name)
model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.bfloat16)


def tokenize(row):
    """The loss counts the answer only: of all before it, the label is -100."""
    chat = [
        {"role": "user", "content": row["prompt"]},
        {"role": "assistant", "content": row["completion"]},
    ]
    options = {"tokenize": False, "enable_thinking": False}
    asked = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, **options)
    answer = tokenizer.apply_chat_template(chat, **options).removeprefix(asked)
    asked, answer = (
        tokenizer(text, add_special_tokens=False).input_ids for text in (asked, answer)
    )
    return {"input_ids": asked + answer, "labels": [-100] * len(asked) + answer}


rows = load_dataset("json", data_files=data, split="train")
trainer = Trainer(
    model,
    TrainingArguments(
        out,
        num_train_epochs=1,
        per_device_train_batch_size=8,
        learning_rate=1e-5,
        lr_scheduler_type="cosine",
        logging_steps=1,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    ),
    train_dataset=rows.map(tokenize, remove_columns=rows.column_names),
    data_collator=DataCollatorWithFlattening(),  # sequences end to end, no padding
    processing_class=tokenizer,
    layers="top:4",  # or requires_grad, set by hand before
)
trainer.train()
trainer.save_model(out)  # what from_pretrained and vLLM load
