"""Who trains in the training benchmark, and with which settings.

All of them are trained by `transformers.Trainer` or a subclass, on the same steps of the same
sequences in the same order; what differs is said in `settings`, and is each one's best.
"""

import importlib.util
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from benchmarks.models import make_config
from benchmarks.training.padding_free import flat, register
from benchmarks.training.workloads import NamedWeights, Scale
from benchmarks.training.workloads import Sequence as Sentence
from xplus_fast.config import MemoryConfig
from xplus_fast.data.corpus import PackCollator
from xplus_fast.model.families import shape_of
from xplus_fast.model.load import load_model
from xplus_fast.planning.cards import Card
from xplus_fast.planning.flops import assumed_work
from xplus_fast.planning.from_recipe import USABLE, free_memory
from xplus_fast.planning.plan import plan_stage
from xplus_fast.planning.selection import resolve_layers
from xplus_fast.training.place import cap
from xplus_fast.training.planned import PlannedTrainer

Steps = list[list[list[Sentence]]]
RATE = 1e-5


class CannotRun(Exception):
    """Why a contestant is not in the race."""


@dataclass(frozen=True)
class Contestant:
    settings: str  # for the table's notes
    train: Callable[..., Any]  # see `_ours`, `_stock`
    options: tuple[tuple[str, Any], ...] = ()
    rate: str = "bf16"  # whose GEMM rate the frozen layers' limit is
    loose: float = 0.005  # how far the first loss may be off the unrounded one's
    alike: bool = True  # trains what the selection says: its gradient's norm is the others', too
    first: str = ""  # what has to be imported before transformers
    once: bool = False  # of several mixes the first tells enough


def _need(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise CannotRun("not importable here")


class _InOrder:
    """Mixin: the sequences come as they are listed."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return SequentialSampler(self.train_dataset)  # type: ignore[attr-defined]


class _Ours(_InOrder, PlannedTrainer):
    pass


class _Stock(_InOrder, Trainer):
    pass


def _arguments(folder: str, device: torch.device, steps: int, micro: int, **more: Any) -> Any:
    return TrainingArguments(
        folder, use_cpu=device.type == "cpu", max_steps=steps, learning_rate=RATE,
        per_device_train_batch_size=1, gradient_accumulation_steps=micro, logging_steps=1,
        save_strategy="no", report_to=[], disable_tqdm=True, remove_unused_columns=False,
        logging_nan_inf_filter=False, max_grad_norm=1.0, weight_decay=0.01, **more,
    )  # fmt: skip


def _ours(
    scale: Scale, layers: str, device: torch.device, card: Card | None, *, budget: int = 0,
    shared: bool = True, **memory: Any,
) -> Callable[[Steps, str], Any]:  # fmt: skip
    """Ours: planned for the card (or a budget), packed rows, one process.

    shared: whether prompts are computed once in a micro-batch.
    """
    config = make_config(scale.model)
    shape = shape_of(config)
    room = int(card.memory * USABLE) if card else None
    plan = plan_stage(
        shape, resolve_layers(layers, shape.layers), (), MemoryConfig(**memory),
        card=card, dtype_bytes=2, pack_tokens=scale.row, tokens_per_step=scale.step,
        budget=budget or room, host=free_memory(), work=assumed_work(shared),
    )  # fmt: skip
    if budget:
        cap(device, budget)
    weights: Any = NamedWeights(shape, device)
    model = load_model(weights, config, plan.layout, dtype=torch.bfloat16, device=device)

    def trainer(steps: Steps, folder: str) -> Any:
        batches = [
            [{"input_ids": s.ids, "labels": s.labels} for row in step for s in row]
            for step in steps
        ]  # whole steps: the plan splits them
        collate = PackCollator(shared_prefixes=shared)
        return _Ours(
            model, _arguments(folder, device, len(steps), 1), train_dataset=batches,
            data_collator=lambda items: collate(items[0]), plan=plan, activations=None,
            say=lambda line: None,
        )  # fmt: skip

    return trainer


def _stock(
    scale: Scale, layers: str, device: torch.device, card: Card | None, *,
    rows: int = 0, liger: bool = False, compiled: bool = False, rank: int = 0, whole: bool = False,
) -> Callable[[Steps, str], Any]:  # fmt: skip
    """Hugging Face's model and Trainer; see `CONTESTANTS` for what the flags mean.

    rows: packed rows of a micro-batch, without padding, and only what passes a gradient is
    checkpointed; 0: as people run it, 8 sentences as they come, padded, all layers checkpointed.
    """
    if liger:
        _need("liger_kernel")
        if device.type != "cuda":
            raise CannotRun("needs CUDA")
    if rank:
        _need("peft")
    model = _hugging_face(scale, device, register() if rows else "sdpa")
    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_qwen3

        apply_liger_kernel_to_qwen3(model=model)
    stack = model.model.layers
    ids = resolve_layers(layers, len(stack))
    if rank:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
        )
    elif not whole:
        model.requires_grad_(False)
        for i in ids:
            stack[i].requires_grad_(True)
    if rows:
        # only what passes a gradient is checkpointed, and no input is made to require one
        inner = model.get_base_model() if rank else model
        inner.gradient_checkpointing_enable({"use_reentrant": False})
        with suppress(AttributeError):
            inner.disable_input_require_grads()
        for i, layer in enumerate(stack):
            layer.gradient_checkpointing = bool(rank) or whole or i >= min(ids)
    if compiled:
        # one for each mixture of frozen and trained, with and without a graph, of lengths
        torch._dynamo.config.recompile_limit = 64
        for layer in stack:
            # its forward, not its call: hooks that time it would break the graph
            layer.forward = torch.compile(
                layer.forward, backend="inductor" if device.type == "cuda" else "eager"
            )
    return _peer(model, scale, rows, device, gradient_checkpointing=not rows)


def _unsloth(
    scale: Scale, layers: str, device: torch.device, card: Card | None
) -> Callable[[Steps, str], Any]:
    """Unsloth's model, loaded by Unsloth from a folder, which is the only way it takes one."""
    _need("unsloth")
    from unsloth import FastLanguageModel

    with tempfile.TemporaryDirectory() as folder:
        whole = _hugging_face(scale, device, "sdpa")
        words = {f"<{i}>": i for i in range(whole.config.vocab_size)}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(WordLevel(words, unk_token="<0>")),
            eos_token="<1>", pad_token="<2>",
        )  # fmt: skip
        tokenizer.save_pretrained(folder)
        whole.save_pretrained(folder)
        del whole
        if device.type == "cuda":
            torch.cuda.empty_cache()
        model, _ = FastLanguageModel.from_pretrained(
            folder, max_seq_length=scale.row, dtype=torch.bfloat16, load_in_4bit=False,
            full_finetuning=True, use_gradient_checkpointing="unsloth",
        )  # fmt: skip
    model.requires_grad_(False)
    stack = model.model.layers
    for i in resolve_layers(layers, len(stack)):
        stack[i].requires_grad_(True)
    return _peer(model, scale, 0, device)


def _hugging_face(scale: Scale, device: torch.device, attention: str) -> Any:
    """Hugging Face's model in bf16 with the weights that every contestant starts from."""
    config = make_config(scale.model)
    config.use_cache = False
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation=attention
        )
    weights = NamedWeights(shape_of(config), device)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weights.read((name,), torch.bfloat16))
    return model


def _peer(
    model: Any, scale: Scale, rows: int, device: torch.device, **more: Any
) -> Callable[[Steps, str], Any]:
    """`transformers.Trainer` on `_batches` of the steps."""
    more["optim"] = "adamw_torch_fused" if device.type == "cuda" else "adamw_torch"

    def trainer(steps: Steps, folder: str) -> Any:
        groups = [_batches(step, rows, scale) for step in steps]
        micro = _even(groups)
        batches = [batch for group in groups for batch in group]
        collate = flat if rows else _pad
        return _Stock(
            model, _arguments(folder, device, len(steps), micro, **more), train_dataset=batches,
            data_collator=lambda items: collate(items[0]),
        )  # fmt: skip

    return trainer


def _batches(step: list[list[Sentence]], rows: int, scale: Scale) -> list[list[Sentence]]:
    """A step's micro-batches: `rows` packed rows in each, or for 0 at most 8 sentences."""
    if rows:
        return [[s for row in step[i : i + rows] for s in row] for i in range(0, len(step), rows)]
    sentences = [s for row in step for s in row]
    size = min(8, -(-len(sentences) * scale.row // scale.step))
    return [sentences[i : i + size] for i in range(0, len(sentences), size)]


def _even(groups: list[list[list[Sentence]]]) -> int:
    """Cut batches in two until every step has as many as any; returns how many."""
    most = max(len(group) for group in groups)
    for group in groups:
        while len(group) < most:
            largest = max(range(len(group)), key=lambda i: len(group[i]))
            whole = group[largest]
            if len(whole) < 2:
                raise CannotRun("steps of unequal numbers of sentences")
            group[largest : largest + 1] = [whole[: len(whole) // 2], whole[len(whole) // 2 :]]
    return most


def _pad(sentences: list[Sentence]) -> dict[str, torch.Tensor]:
    """[B, longest], padded on the right."""
    width = max(len(s) for s in sentences)
    shape = (len(sentences), width)
    ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, -100)
    for i, s in enumerate(sentences):
        ids[i, : len(s)], labels[i, : len(s)], mask[i, : len(s)] = s.ids, s.labels, 1
    if mask.all():
        return {"input_ids": ids, "labels": labels}
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


_TUNED = (
    "no padding (packed rows, FlashAttention over each sequence),"
    " micro-batches of {} tokens, no input-gradient hook, checkpointing from the lowest layer up"
    " that trains, fused AdamW"
)
# The most telling first: a run that has to stop leaves out the last
CONTESTANTS: dict[str, Contestant] = {
    "ours, bf16": Contestant(
        "fp32 master weights; planned for the whole card, all frozen layers bf16 and on it", _ours,
        (("frozen", "bf16"), ("placement", "device"), ("head", "bf16")),
    ),
    "tuned + Liger": Contestant(
        _TUNED.format("16384") + "; Liger's kernels and fused loss", _stock,
        (("rows", 4), ("liger", True)),
    ),
    "stock Trainer": Contestant(
        "bf16 weights, gradient_checkpointing=True, batches of 8 sentences as they come, SDPA,"
        " fused AdamW", _stock,
    ),
    "tuned": Contestant(_TUNED.format("4096"), _stock, (("rows", 1),)),
    "ours, prompts apart": Contestant(
        "the same, prompts computed for every sentence", _ours,
        (("frozen", "bf16"), ("placement", "device"), ("head", "bf16"), ("shared", False)),
        once=True,
    ),
    "ours, fp8 frozen": Contestant(
        "as the first, frozen layers and head in FP8", _ours,
        (("frozen", "fp8"), ("placement", "device"), ("head", "fp8")), "fp8", 0.02,
    ),
    "ours, 24 GB": Contestant(
        "planned for 24 GB, and capped to them", _ours, (("budget", 24 * 10**9),), loose=0.01,
        once=True,
    ),
    "ours, 16 GB": Contestant(
        "planned for 16 GB, and capped to them", _ours, (("budget", 16 * 10**9),), loose=0.01,
        once=True,
    ),
    "tuned + compile": Contestant(
        _TUNED.format("4096") + "; torch.compile of each layer", _stock,
        (("rows", 1), ("compiled", True)),
    ),
    "LoRA r64": Contestant(
        "PEFT on all linears of all layers; else as tuned", _stock, (("rows", 1), ("rank", 64)),
        alike=False,
    ),
    "full fine-tuning": Contestant(
        "every parameter trains, bf16 weights and states, as in torchtune's single-device recipe"
        " (its release 0.6.1 has no Qwen3); else as tuned", _stock,
        (("rows", 1), ("whole", True)), alike=False,
    ),
    "ours, int8 frozen": Contestant(
        "as the first, frozen layers in INT8", _ours, (("frozen", "int8"), ("placement", "device")),
        loose=0.01,
    ),
    "ours, nf4 frozen": Contestant(
        "as the first, frozen layers in NF4", _ours, (("frozen", "nf4"), ("placement", "device")),
        loose=0.05,
    ),
    "Unsloth": Contestant(
        "full_finetuning=True in bf16, its loader, kernels and gradient checkpointing; batches of"
        " 8 sentences as they come, fused AdamW", _unsloth, first="unsloth",
    ),
}  # fmt: skip
