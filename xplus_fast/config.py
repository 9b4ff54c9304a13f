"""Every option of a training recipe, in one dataclass tree.

`load_recipe("recipe.yaml", ["stages.0.learning_rate=1e-5"])` reads a file and lays `key=value`
overrides over it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from xplus_fast.data.records import check_columns
from xplus_fast.errors import UserError
from xplus_fast.files import resolve
from xplus_fast.model.hub import is_hub_id
from xplus_fast.model.layout import FORMATS
from xplus_fast.options import (
    FOLDER_NAME,
    PATH,
    Amount,
    AtLeast0,
    Count,
    Positive,
    Range,
    check_fields,
    load_options,
    parse_bytes,
)
from xplus_fast.planning.selection import Rotation

PROMPT = (
    "Translate the following text from {src} to {tgt}.\n\n"
    "{src} source: {text}\n\n{tgt} translation:"
)
Path_ = Annotated[str, PATH]
Seed = Range(0, 2**32 - 1)  # that numpy takes
STAGES = 100  # of a recipe at most
# Of a run's folder, beside its stages' folders
RESERVED = (
    "evaluation", "recipe.yaml", "metrics.jsonl", "run.json", "report.md", "report.html",
    "loss.png", "quality.png",
)  # fmt: skip
Format = Literal[
    "auto", "messages", "sharegpt", "prompt", "alpaca", "translation", "lines", "gettext", "text"
]  # fmt: skip


_FILE = re.compile(r"\.(jsonl?|parquet|[ct]sv|txt|po|[gx]z|bz2|zst|zip)$")


@dataclass(frozen=True)
class Source:
    """Where examples come from.

    A file, a folder, a data set of the hub (org/name), or the two files of a line-aligned pair.
    """

    path: Path_ | list[Path_]
    split: str | None = None  # of a folder or a data set of the hub; None: the training split
    subset: str | None = None  # its configuration, such as en-fr; None: the only one
    # names of the records' keys or a table's columns: {src: source, tgt: target},
    # {user: question, assistant: answer}; numbers, from 1, where a table has no header
    columns: dict[str, str | int] = field(default_factory=dict)
    format: Format = "auto"
    languages: list[str] = field(default_factory=list)  # of line-aligned files, in their order;
    # of gettext catalogs: the language of the msgids, then those to read; empty: by file name
    directions: Literal["both", "forward", "backward"] = "both"
    limit: Count | None = None  # first examples only (pairs, for parallel text)
    ignore: list[str] = field(default_factory=list)  # keys of records to leave unread, e.g. tools
    # of the supervised tokens over any stretch of steps; a source that is too small is repeated.
    # None: read once an epoch; all such sources together get the share that the others leave
    share: Annotated[float, Range(0, 1)] | None = None


@dataclass(frozen=True)
class DataConfig:
    sources: list[Source] = field(default_factory=list)
    heldout: Amount = 0  # pairs per language pair kept out of training for before/after figures
    validation: list[Source] = field(default_factory=list)  # held out instead, all of it
    retention: list[Source] = field(default_factory=list)  # plain text whose loss should not change
    prompt: str = PROMPT  # how a translation pair becomes an instruction
    system: str | None = None  # system message put before every pair
    think: Literal["masked", "loss", "absent"] = "masked"  # Qwen3's empty think block
    pack_tokens: Annotated[int, Range(2, 1 << 24)] = 4096  # of one row, and of the longest sequence
    shared_prompts: bool = True  # compute common prompts only once
    on_error: Literal["stop", "skip"] = "stop"
    # where hidden states are kept for later epochs and stages, those that leave the frozen layers
    # below the lowest trained one: off, host (in memory), or a folder
    cache_hidden: Path_ = "off"
    cache: Path_ = "~/.cache/xplus-fast"


@dataclass(frozen=True)
class Stage:
    """One round of training: which layers, how fast, how long, on what."""

    layers: str | int | list[int] | Rotation  # Rotation: {rotate: 2 of 0-35, every: 20}
    name: Annotated[str, FOLDER_NAME] = ""  # default: stage-1, stage-2, ...
    also: list[Literal["embedding", "final_norm", "head"]] = field(default_factory=list)
    # one for all, or by layers (and embedding, ...): {"21-28": 1e-5, "29-35": 2e-5}
    learning_rate: Annotated[float, Positive] | dict[str, Annotated[float, Positive]] = 1e-5
    # each trained layer's rate is this times that of the next trained layer above it
    layer_decay: Annotated[float, Range(0, 1, above=True)] = 1.0
    # where the cosine of the highest rate ends; lower rates end in proportion
    min_learning_rate: Annotated[float, AtLeast0] = 2e-6
    warmup: Annotated[float, Range(0, 1, below=True)] = 0.03  # share of the steps
    epochs: Annotated[float, Positive] | None = None  # epochs or steps, not both; neither: 1 epoch
    steps: Count | None = None
    sources: list[Source] | None = None  # used instead of data.sources


@dataclass(frozen=True)
class TrainingConfig:
    tokens_per_step: Count = 65536  # of one optimizer step, before common prompts are shared
    weight_decay: Annotated[float, AtLeast0] = 0.01
    max_grad_norm: Annotated[float, AtLeast0] = 1.0
    adam_beta1: Annotated[float, Range(0, 1, below=True)] = 0.9
    adam_beta2: Annotated[float, Range(0, 1, below=True)] = 0.999
    adam_epsilon: Annotated[float, Positive] = 1e-8
    save_steps: Count = 100
    save_total_limit: Count = 2
    report_to: list[str] = field(default_factory=list)  # "tensorboard", "wandb", ...


@dataclass(frozen=True)
class MemoryConfig:
    """What may lie where while a stage trains; "auto" is chosen by `xplus-fast plan`.

    Without a GPU, "auto" is: unquantized, on the device, everything kept.
    """

    budget: str = "auto"  # device memory, such as 24GB (10^9 bytes) or 24GiB; auto: the card's
    host: str = "auto"  # limit of pinned host memory; auto: 80 % of what is free here
    card: str = ""  # to plan for: rtx4090, or as nvidia-smi names it; empty: the one here
    # frozen layers' matrices: auto, bf16 (as they are), int8, fp8, nf4; or by layers: {"0-20": nf4}
    frozen: str | dict[str, str] = "auto"
    placement: Literal["auto", "device", "host"] = "auto"  # of frozen layers
    head: Literal["auto", "bf16", "fp8"] = "auto"
    embedding: Literal["auto", "device", "host"] = "auto"
    gradients: Literal["auto", "device", "host"] = "auto"
    states: Literal["auto", "device", "host"] = "auto"  # of the optimizer, the master too
    bits: Literal[32, 8] = 32  # of exp_avg and exp_avg_sq
    master: bool = True  # fp32 copy of bf16 weights; without it, stochastic rounding
    sums: Literal[16, 32] = (
        16  # bits in which gradients of bf16 weights are summed over micro-batches
    )
    activations: Literal["auto", "keep", "recompute_mlp", "recompute", "offload"] = "auto"
    micro_batch_tokens: str | int = "auto"  # of one forward: a multiple of data.pack_tokens


@dataclass(frozen=True)
class EvaluationConfig:
    samples: Amount = 4  # translations shown in the report, per direction
    translate: Amount = 32  # held-out sentences translated per direction for chrF++; 0: none
    max_new_tokens: Count = 128
    batch_size: Count = 16
    every: Amount = 0  # steps between evaluations while a stage trains; 0: none
    few: Count = 8  # held-out examples of each direction in such an evaluation
    # a stage ends when this many evaluations in a row found nothing better
    patience: Count | None = None
    keep: Literal["last", "best"] = "last"  # the step whose weights a stage ends with
    by: Literal["loss", "chrf", "retention"] = "loss"  # what is better: held-out loss or chrF++
    # (the mean of directions), or the loss of data.retention


@dataclass(frozen=True)
class Recipe:
    model: Path_  # local folder or hub id
    output: Path_  # the run's folder
    stages: list[Stage]
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on a GPU, else float32
    device: str = "auto"
    seed: Annotated[int, Seed] = 0


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe, apply `key=value` overrides, check everything.

    Raises `UserError` for a missing or malformed file, an unknown key, a wrong type or value.
    """
    recipe = load_options(Recipe, path, overrides)
    _check(recipe)
    return resolved(recipe)


def resolved(recipe: Recipe) -> Recipe:
    """The recipe with absolute paths: they mean the same wherever the run is gone on with."""

    def known(source: Source) -> Source:
        if isinstance(source.path, str):
            on_hub = is_hub_data(source.path)
            return source if on_hub else replace(source, path=str(resolve(source.path)))
        return replace(source, path=[str(resolve(path)) for path in source.path])

    hidden = recipe.data.cache_hidden
    data = replace(
        recipe.data,
        sources=[known(s) for s in recipe.data.sources],
        validation=[known(s) for s in recipe.data.validation],
        retention=[known(s) for s in recipe.data.retention],
        cache=str(resolve(recipe.data.cache)),
        cache_hidden=hidden if hidden in ("off", "host") else str(resolve(hidden)),
    )
    stages = [
        replace(stage, sources=stage.sources and [known(s) for s in stage.sources])
        for stage in recipe.stages
    ]
    return replace(
        recipe,
        model=recipe.model if is_hub_id(recipe.model) else str(resolve(recipe.model)),
        output=str(resolve(recipe.output)),
        data=data,
        stages=stages,
    )


def is_hub_data(path: str) -> bool:
    """Whether a source's path is a data set's id on the hub: pairs/x.jsonl is a file not there."""
    return is_hub_id(path) and not _FILE.search(path)


def _check(recipe: Recipe) -> None:
    """What types cannot say."""
    if not recipe.stages:
        raise UserError("stages: at least one stage is wanted")
    if len(recipe.stages) > STAGES:
        raise UserError(f"stages: at most {STAGES} are carried out, found {len(recipe.stages):,}")
    names = set()
    for i, s in enumerate(recipe.stages):
        at = f"stages.{i}"
        if s.epochs is not None and s.steps is not None:
            raise UserError(f"{at}: epochs and steps are both given; one of them is wanted")
        rates = s.learning_rate if isinstance(s.learning_rate, dict) else {"": s.learning_rate}
        if not rates:
            raise UserError(f"{at}.learning_rate: a number or some by layers is wanted")
        if s.layer_decay != 1 and len(rates) > 1:
            raise UserError(f"{at}.layer_decay: goes with one learning_rate, not with several")
        if s.min_learning_rate > max(rates.values()):
            raise UserError(
                f"{at}.min_learning_rate: {s.min_learning_rate} is not between 0 and"
                f" learning_rate {max(rates.values())}"
            )
        # some file systems do not tell a from A
        name = stage_name(recipe, i).casefold()
        if name in names or name in RESERVED:
            raise UserError(f"{at}.name: '{stage_name(recipe, i)}' is taken already")
        names.add(name)
        _check_shares(s.sources or [], f"{at}.sources")
    if recipe.training.tokens_per_step < recipe.data.pack_tokens:
        raise UserError(
            f"training.tokens_per_step: {recipe.training.tokens_per_step} is less than one row of"
            f" data.pack_tokens, {recipe.data.pack_tokens}"
        )
    _check_shares(recipe.data.sources, "data.sources")
    for name in ("retention", "validation"):
        for i, source in enumerate(getattr(recipe.data, name)):
            if source.share is not None:
                raise UserError(f"data.{name}.{i}.share: nothing is trained on it")
    if recipe.data.validation and recipe.data.heldout:
        raise UserError("data.heldout and data.validation are both given; one of them is wanted")
    _check_evaluation(recipe)
    if not recipe.data.cache_hidden:
        raise UserError("data.cache_hidden: off, host or a folder is wanted")
    _check_memory(recipe)
    for at, sources in _all_sources(recipe).items():
        for i, source in enumerate(sources):
            check_columns(source.columns, f"{at}.{i}.columns")
    check_fields(recipe.data.prompt, "data.prompt", ("src", "tgt", "text"), "text")


def _all_sources(recipe: Recipe) -> dict[str, list[Source]]:
    names = ("sources", "retention", "validation")
    found = {f"data.{name}": getattr(recipe.data, name) for name in names}
    stages = {f"stages.{i}.sources": stage.sources or [] for i, stage in enumerate(recipe.stages)}
    return found | stages


def _check_evaluation(recipe: Recipe) -> None:
    """That what is asked of evaluation while a stage trains can be had."""
    e, data = recipe.evaluation, recipe.data
    asked = {"patience": e.patience is not None, "keep": e.keep != "last"}
    if e.by != "loss" and not any(asked.values()):
        raise UserError("evaluation.by: decides nothing without evaluation.patience or keep: best")
    for name in (name for name, there in asked.items() if there):
        if not e.every:
            raise UserError(f"evaluation.{name}: goes with evaluation.every, which is 0")
        if e.by == "retention" and not data.retention:
            raise UserError(f"evaluation.{name}: by retention, and data.retention is empty")
        if e.by != "retention" and not data.heldout and not data.validation:
            raise UserError(
                f"evaluation.{name}: by {e.by}, and nothing is held out: data.heldout or"
                " data.validation"
            )
        if e.by == "chrf" and not e.translate:
            raise UserError(f"evaluation.{name}: by chrf, and evaluation.translate is 0")


def _check_shares(sources: Sequence[Source], at: str) -> None:
    shares = [s.share for s in sources if s.share is not None]
    if 0 in shares:
        i = [s.share for s in sources].index(0)
        raise UserError(f"{at}.{i}.share: 0 would train on none of it; leave the source out")
    whole, rest = sum(shares), len(shares) < len(sources)
    if shares and (whole > 1 + 1e-9 or (whole > 1 - 1e-9) == rest):
        wanted = (
            "less than 1, for the sources without one" if rest else "1, as every source has one"
        )
        raise UserError(f"{at}: the shares add up to {whole:g}; {wanted}, is wanted")


def _check_memory(recipe: Recipe) -> None:
    m = recipe.memory
    for key in ("budget", "host"):
        if getattr(m, key) != "auto":
            parse_bytes(getattr(m, key), f"memory.{key}")
    frozen = {"": m.frozen} if isinstance(m.frozen, str) else m.frozen
    for layers, form in frozen.items():
        if form not in ("auto", *FORMATS):
            raise UserError(
                f"memory.frozen{'.' + layers if layers else ''}: one of auto, {', '.join(FORMATS)}"
                f" is wanted, found {form!r}"
            )
    tokens, rows = m.micro_batch_tokens, recipe.data.pack_tokens
    if tokens != "auto" and (isinstance(tokens, str) or tokens < rows or tokens % rows):
        raise UserError(
            f"memory.micro_batch_tokens: auto or a multiple of data.pack_tokens ({rows}) is"
            f" wanted, found {tokens!r}"
        )
    if tokens != "auto" and int(tokens) > recipe.training.tokens_per_step:
        raise UserError(
            f"memory.micro_batch_tokens: {tokens} is more than training.tokens_per_step,"
            f" {recipe.training.tokens_per_step}"
        )


def stage_name(recipe: Recipe, index: int) -> str:
    return recipe.stages[index].name or f"stage-{index + 1}"
