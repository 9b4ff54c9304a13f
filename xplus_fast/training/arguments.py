"""What of transformers' `TrainingArguments` the engine cannot honour, and why.

Everything else is honoured: tests/training/test_arguments.py says so of every field, by name.
"""

from collections.abc import Callable
from typing import Any

from transformers.training_args import OptimizerNames

from xplus_fast.errors import UserError

OUR_ADAMW = ("adamw_torch", "adamw_torch_fused")  # what Trainer's defaults ask for
# They update a parameter as soon as its gradient is there, and q, k, v have one gradient here.
IN_BACKWARD = ("lomo", "adalomo")
ON_TARGETS = ("galore", "apollo")  # kinds that read `optim_target_modules`


def _optimizer(args: Any) -> str:
    return OptimizerNames(args.optim).value


# argument -> (whether its value is refused, what to do instead)
REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "use_liger_kernel": (
        lambda a: bool(a.use_liger_kernel),
        "the engine has its own kernels; leave it off",
    ),
    "torch_compile": (
        lambda a: bool(a.torch_compile),
        "the engine's blocks are fused already; leave it off",
    ),
    "deepspeed": (
        lambda a: bool(a.deepspeed),
        "the engine places weights and states itself; torchrun takes several GPUs",
    ),
    "fsdp": (
        lambda a: bool(a.fsdp),
        "the engine places weights and states itself; torchrun takes several GPUs",
    ),
    "parallelism_config": (
        lambda a: getattr(a, "parallelism_config", None) is not None,
        "a model is not cut over devices here; torchrun takes several GPUs",
    ),
    "debug": (
        lambda a: "underflow_overflow" in str(a.debug),
        "it hooks modules that the engine does not call",
    ),
    "optim": (
        lambda a: _optimizer(a) in IN_BACKWARD or _optimizer(a).endswith("_layerwise"),
        "it updates weights during the backward, which the engine's packed weights do not allow",
    ),
    "optim_args": (
        lambda a: bool(a.optim_args) and _optimizer(a) in OUR_ADAMW,
        "AdamW reads none of them: learning_rate, weight_decay and adam_* are its options",
    ),
    "optim_target_modules": (
        lambda a: bool(a.optim_target_modules) and not _optimizer(a).startswith(ON_TARGETS),
        "only GaLore and APOLLO read it",
    ),
    "push_to_hub": (
        lambda a: bool(a.push_to_hub) and getattr(a.hub_strategy, "value", "") != "end",
        "a checkpoint holds what trained and no model, so only the end's can be pushed:"
        " hub_strategy='end'",
    ),
}


def check_arguments(args: Any) -> None:
    """Raises `UserError` for the first argument that would not be honoured."""
    for name, (refused, why) in REFUSED.items():
        if refused(args):
            value = getattr(args, name)
            raise UserError(f"{name}={getattr(value, 'value', value)}: not supported: {why}")


def asks_for_checkpointing(args: Any) -> bool:
    """Whether activations are to be computed again, under either of its names."""
    names = ("activation_checkpointing", "gradient_checkpointing")
    return any(getattr(args, name, None) for name in names)
