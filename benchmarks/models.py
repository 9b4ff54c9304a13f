"""Models of real sizes, and a toy, from random weights: speed and memory are those of real ones."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3Config

from xplus_fast.model.families import Shape

CONFIGS: dict[str, dict[str, int]] = {
    "8B": dict(num_hidden_layers=36, hidden_size=4096, num_attention_heads=32,
               num_key_value_heads=8, head_dim=128, intermediate_size=12288, vocab_size=151936),
    "14B": dict(num_hidden_layers=40, hidden_size=5120, num_attention_heads=40,
                num_key_value_heads=8, head_dim=128, intermediate_size=17408, vocab_size=151936),
    "tiny": dict(num_hidden_layers=6, hidden_size=64, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=16, intermediate_size=96, vocab_size=256),
}  # fmt: skip


def make_config(model: str) -> Any:
    return Qwen3Config(
        **CONFIGS[model], rms_norm_eps=1e-6, tie_word_embeddings=False,  # type: ignore[arg-type]
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip


class RandomWeights:
    """What `load_model` asks of a checkpoint: tensors by name, made where they are asked for."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.folder = Path("/nonexistent")  # no generation_config.json
        self._shapes, self._device = shape.tensor_shapes(), device

    def read(self, names: tuple[str, ...], dtype: torch.dtype, *, staged: bool = False) -> Tensor:
        """Matrices normal with deviation 0.02, stacked along axis 0; norms are ones."""
        shapes = [self._shapes[name] for name in names]
        whole = (sum(s[0] for s in shapes), *shapes[0][1:])
        if len(whole) == 1:
            return torch.ones(whole, dtype=dtype, device=self._device)
        return torch.empty(whole, dtype=dtype, device=self._device).normal_(0, 0.02)

    def close(self) -> None:
        pass
