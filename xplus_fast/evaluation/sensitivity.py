"""Which layers the user's data pull at: gradient norms and a Fisher score, layer by layer.

For every packed row b of the data let g_b be the gradient of its loss (mean over its supervised
tokens) with respect to a tensor w. Over B rows, of a part of a layer (all its tensors together):

    gradient = 1/B sum_b |g_b| / |w|             how strong the pull is, for the size of the weights
    fisher   = 1/B sum_b |g_b|^2                 the trace of the diagonal of the empirical Fisher

The second is F_i = 1/B sum_b g_b,i^2 of FISH Mask (Sung et al. 2021, arXiv 2111.09839),
summed over the part, with one row where they have one example: rows average over many sentences,
so that it is smaller than theirs and weighs what sentences have in common.

One pass, in which all layers train and none keeps its gradient: the backward of a layer makes it,
hooks take its norms, and it is freed before the layer below has one. Embedding and head are left
out, their gradients being larger than a layer's.

Legend: B rows, L layers, P parts of a layer.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from xplus_fast.config import DataConfig, Recipe, Source, load_recipe
from xplus_fast.data.corpus import Corpus, PackCollator, load_corpus
from xplus_fast.errors import UserError
from xplus_fast.model.checkpoint_files import CheckpointFiles, check_against, resolve_model
from xplus_fast.model.families import Shape, shape_of
from xplus_fast.model.layout import LayerLayout, Layout, Policy, UpdateLayout
from xplus_fast.model.load import Weights, load_model
from xplus_fast.model.prepare import is_prepared
from xplus_fast.model.pretrained import load_config, load_tokenizer
from xplus_fast.planning.from_recipe import USABLE, free_memory
from xplus_fast.planning.memory import CONTEXT, account, layer_parameters
from xplus_fast.planning.replay import Batch
from xplus_fast.training.host_state import norms_of
from xplus_fast.training.place import device_name, find_place

PARTS = {
    "attention": ("qkv", "qkv_bias", "o"),
    "mlp": ("gate_up", "down"),
    "norms": ("input_norm", "post_norm", "q_norm", "k_norm"),
}


@dataclass(frozen=True)
class Sensitivity:
    """What one pass saw."""

    squares: np.ndarray  # fp64 [B, L, P]: |g_b|^2
    weights: np.ndarray  # fp64 [L, P]: |w|
    losses: np.ndarray  # fp64 [B], nats per supervised token
    tokens: int
    supervised: int
    seconds: float  # of the pass


def analyse(
    model: str,
    data: Sequence[str],
    overrides: Sequence[str] = (),
    *,
    batches: int,
    show: bool,
) -> tuple[Sensitivity, dict[str, Any]]:
    """Load, pack, and go once over `batches` rows (all, where there are fewer).

    Args:
        model: a folder or hub id.
        data: a recipe (.yaml), whose `data` counts; or a file or folder that a source may name; or
            the two files of a line-aligned pair.
        overrides: `key=value` changes to the recipe.
        batches: packed rows, drawn at random from the training data.
        show: progress, on a terminal.

    Returns what was seen, and about it, JSON-able: model, data, rows, device, dtype, sizes.

    Raises:
        UserError: a model or data that cannot be read, no rows, memory that does not hold the
            model and one layer's gradients.
    """
    if batches < 1:
        raise UserError(f"--batches: at least 1 is wanted, found {batches}")
    recipe = _recipe(model, data, overrides)
    base = resolve_model(model)
    files, config, tokenizer = CheckpointFiles.open(base), load_config(base), load_tokenizer(base)
    shape = shape_of(config)
    check_against(files, shape.tensor_shapes())
    place = find_place(recipe)
    corpus = _corpus(recipe, tokenizer, shape.vocabulary, show)
    rows = len(corpus.train)
    chosen = torch.randperm(rows, generator=torch.Generator().manual_seed(recipe.seed))[:batches]
    element = torch.finfo(place.dtype).bits // 8
    policy = choose_activations(
        shape, recipe.data.pack_tokens, element=element, memory=_memory(place.device),
        cuda=place.device.type == "cuda",
    )  # fmt: skip
    layout = Layout((LayerLayout(trains=True, activations=policy),) * shape.layers)
    kind: dict[str, Any] = {"dtype": place.dtype, "device": place.device}
    try:
        loaded = load_model(Weights(files), config, layout, **kind)
        picked = (corpus.train[int(i)] for i in chosen)
        seen = measure(
            loaded, picked, total=len(chosen), show=show, shared=recipe.data.shared_prompts
        )
    except torch.OutOfMemoryError as e:
        raise UserError(
            f"{str(e).split('. ')[0]}; take smaller rows (data.pack_tokens of a recipe)"
        ) from None
    about = {
        "model": model,
        "data": list(data),
        "rows": {"used": len(seen.losses), "asked": batches, "there": rows},
        "pack_tokens": recipe.data.pack_tokens,
        "tokens": seen.tokens,
        "supervised": seen.supervised,
        "loss": float(seen.losses.mean()),
        "layers": shape.layers,
        "layer_parameters": layer_parameters(shape),
        "activations": policy,
        "device": device_name(place),
        "dtype": str(place.dtype).removeprefix("torch."),
        "seconds": seen.seconds,
    }
    return seen, about


def measure(
    model: Any, rows: Iterator[dict[str, Any]], *, total: int, show: bool, shared: bool = True
) -> Sensitivity:
    """One pass of a prepared model over packed rows (see `PackedDataset`), all layers training.

    shared: whether tokens that sequences begin with in common are computed once.

    Raises `UserError` where no row has a supervised token, and for a gradient that is not finite.
    """
    assert is_prepared(model)
    start, collate = time.perf_counter(), PackCollator(shared_prefixes=shared)
    squares, losses, tokens, supervised = [], [], 0, 0
    bar = tqdm(
        total=total, desc="gradients", unit="row", disable=None if show else True, leave=False,
        ascii=True, dynamic_ncols=True,
    )  # fmt: skip
    with _watching(model) as watch, bar:
        for i, row in enumerate(rows):
            batch = collate([row])
            n = len(batch["supervised_rows"])
            if n:  # a mean over nothing is NaN
                here = {k: v.to(model.device) for k, v in batch.items() if torch.is_tensor(v)}
                loss = model(**{**batch, **here}).loss
                loss.backward()
                losses.append(float(loss.detach()))
                squares.append(watch.take())
                if not (math.isfinite(losses[-1]) and np.isfinite(squares[-1]).all()):
                    raise UserError(f"row {i}: its loss is {losses[-1]}, a gradient not finite")
                tokens, supervised = tokens + batch["layout"].data_tokens, supervised + n
            bar.update()
    if not losses:
        raise UserError(f"no token is supervised in any of {total} rows: nothing pulls at a layer")
    return Sensitivity(
        np.stack(squares), _weight_norms(model), np.array(losses), tokens, supervised,
        time.perf_counter() - start,
    )  # fmt: skip


class _Watch:
    """Takes the norm of every gradient as the backward makes it, and lets the gradient go."""

    def __init__(self, model: Any) -> None:
        self._shape = (len(model.model.layers), len(PARTS))
        self._found: list[tuple[int, int, Tensor]] = []  # layer, part, norm [] on the device
        self.hooks = [
            p.register_post_accumulate_grad_hook(self._hook(layer, part))
            for layer, part, p in _parts(model)
        ]

    def _hook(self, layer: int, part: int) -> Any:
        def take(p: Tensor) -> None:
            assert p.grad is not None
            self._found.append((layer, part, norms_of([p.grad])[0]))
            p.grad = None

        return take

    def take(self) -> np.ndarray:
        """Square sums since the last call, fp64 [L, P]."""
        sums = np.zeros(self._shape)
        norms = torch.stack([norm.double() for _, _, norm in self._found]).cpu().numpy()
        for (layer, part, _), norm in zip(self._found, norms, strict=True):
            sums[layer, part] += norm**2
        self._found.clear()
        return sums


@contextmanager
def _watching(model: Any) -> Iterator[_Watch]:
    """All layers train and nothing else does; put back at the end."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    model.requires_grad_(False)
    for block in model.model.layers:
        block.requires_grad_(True)
    watch = _Watch(model)
    try:
        yield watch
    finally:
        for hook in watch.hooks:
            hook.remove()
        for p, flag in flags:
            p.requires_grad_(flag)


def _parts(model: Any) -> Iterator[tuple[int, int, Tensor]]:
    """Layer, part and parameter of everything in the layers."""
    part_of = {name: i for i, names in enumerate(PARTS.values()) for name in names}
    for layer, block in enumerate(model.model.layers):
        for name in block.packed:
            yield layer, part_of[name], block.weight(name)


def _weight_norms(model: Any) -> np.ndarray:
    squares = np.zeros((len(model.model.layers), len(PARTS)))
    for layer, part, p in _parts(model):
        squares[layer, part] += float(norms_of([p.detach()])[0]) ** 2
    return np.sqrt(squares)


def choose_activations(
    shape: Shape, tokens: int, *, element: int, memory: int | None, cuda: bool
) -> Policy:
    """The least recomputation with which model, activations and one layer's gradients fit.

    tokens: of a row. element: bytes of the dtype. memory: bytes there are; None: unknown.

    Raises `UserError` where nothing fits.
    """
    batch = Batch(tokens, tokens, tokens, element, inside=cuda, suffixes=tokens)
    update = UpdateLayout(gradients="host", states="host")  # none on the device but a layer's
    context = max(CONTEXT.values()) if cuda else 0
    policies: list[Policy] = ["keep", "recompute_mlp", "recompute"]
    if cuda:
        policies.append("offload")  # to the host: a CPU has nowhere else
    need = 0
    for policy in policies:
        layout = Layout((LayerLayout(trains=True, activations=policy),) * shape.layers)
        need = sum(account(shape, layout, update, batch, context=context)[0].values())
        if memory is None or need <= memory:
            return policy
    raise UserError(
        f"{need / 1e9:.1f} GB are wanted for the model, rows of {tokens:,} tokens and one layer's"
        f" gradients, and {(memory or 0) / 1e9:.1f} GB are free: take smaller rows"
        " (data.pack_tokens of a recipe) or a larger device"
    )


def _memory(device: torch.device) -> int | None:
    if device.type != "cuda":
        return free_memory()
    return int(torch.cuda.mem_get_info(device)[0] * USABLE)


def _recipe(model: str, data: Sequence[str], overrides: Sequence[str]) -> Recipe:
    """The data as a recipe has them."""
    if len(data) == 1 and Path(data[0]).suffix in (".yaml", ".yml"):
        recipe = load_recipe(data[0], overrides)
        own = [source for stage in recipe.stages for source in stage.sources or []]
        return replace(recipe, data=replace(recipe.data, sources=recipe.data.sources or own))
    if overrides:
        raise UserError(
            f"'{overrides[0]}': key=value changes a recipe (.yaml), and DATA is not one"
        )
    if not 1 <= len(data) <= 2:
        raise UserError(
            "DATA: a recipe, a file or folder, or two line-aligned files are wanted, found"
            f" {len(data)}; a recipe can name many sources"
        )
    source = Source(data[0] if len(data) == 1 else list(data))
    return Recipe(model, "", [], DataConfig(sources=[source]))


def _corpus(recipe: Recipe, tokenizer: Any, vocabulary: int, show: bool) -> Corpus:
    if not recipe.data.sources:
        raise UserError("no data: neither data.sources nor a stage's own sources are given")
    return load_corpus(
        recipe.data.sources, recipe.data, tokenizer, seed=recipe.seed, show=show,
        vocabulary=vocabulary,
    )  # fmt: skip
