"""TRL's SFTTrainer on a prepared model: the layers nearest the embedding learn, the rest stays.

    python examples/trl_sft.py Qwen/Qwen3-0.6B pairs.jsonl out

pairs.jsonl has {"prompt": "...", "completion": "..."} on each line; TRL masks the prompt.
"""

import sys

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from xplus_fast import AdamW, prepare_model

model_name, data, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model_name)
model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.bfloat16)
prepare_model(model, [0, 1, 2, 3])  # the ids of the layers that learn


def as_chat(row):
    return {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["completion"]}],
        "chat_template_kwargs": {"enable_thinking": False},
    }


trainer = SFTTrainer(
    model,
    SFTConfig(
        out,
        num_train_epochs=1,
        per_device_train_batch_size=8,
        lr_scheduler_type="cosine",
        logging_steps=1,
        report_to="none",
        bf16=False,  # the weights are bf16 already, and need no autocast
    ),
    train_dataset=load_dataset("json", data_files=data, split="train").map(as_chat),
    processing_class=tokenizer,
    # with fp32 master weights, without which bf16 would round most updates away
    optimizer_cls_and_kwargs=(AdamW, {"lr": 1e-5}),
)
trainer.train()
trainer.save_model(out)
