"""Fine-tune selected layers of Qwen3, Qwen2 and Llama models on one GPU, at full rank."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xplus_fast.model.prepare import prepare_model
    from xplus_fast.training.optimizer import AdamW
    from xplus_fast.training.trainer import XPlusTrainer

__all__ = ["AdamW", "XPlusTrainer", "prepare_model"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # imported where used: the command line must answer --help without loading torch
    if name == "XPlusTrainer":
        from xplus_fast.training.trainer import XPlusTrainer

        return XPlusTrainer
    if name == "AdamW":
        from xplus_fast.training.optimizer import AdamW

        return AdamW
    if name == "prepare_model":
        from xplus_fast.model.prepare import prepare_model

        return prepare_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
