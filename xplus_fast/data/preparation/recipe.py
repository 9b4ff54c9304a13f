"""Every option of `xplus-fast prepare`, in one dataclass tree."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from xplus_fast.config import Path_, Seed
from xplus_fast.data.languages import canonical
from xplus_fast.data.preparation.scripts import check_conversion
from xplus_fast.data.records import check_columns
from xplus_fast.data.steps.clean import CleanOptions
from xplus_fast.data.steps.decontaminate import DecontaminateOptions
from xplus_fast.data.steps.dedup import DedupOptions
from xplus_fast.data.steps.format import FormatOptions
from xplus_fast.data.steps.identify import IdentifyOptions
from xplus_fast.data.steps.instruct import InstructOptions
from xplus_fast.data.steps.quality import QualityOptions
from xplus_fast.errors import UserError
from xplus_fast.options import Amount, Count, Range, check_fields, load_options, overlaid

Format = Literal[
    "auto", "lines", "moses", "nllb", "translation", "tmx", "xliff", "gettext", "hub"
]  # fmt: skip
OWN_STEPS = ("format", "clean", "identify", "quality")  # whose options a corpus may have of its own


@dataclass(frozen=True)
class Corpus:
    """Where pairs come from. Corpora that stand first in a recipe win over later duplicates."""

    path: Path_ | list[Path_]  # a file, a folder, the two files of a pair, or a data set's hub id
    name: str = ""  # in the report; default: the path
    format: Format = "auto"
    languages: list[str] = field(default_factory=list)  # where names and records do not tell
    scores: Path_ | None = None  # of line-aligned files: a file with a score a line
    subset: str | None = None  # of a hub data set or folder: en-fr; of a zip: one of its corpora
    split: str = "train"  # of a hub data set or folder
    # which of the records' keys or a table's columns is what, such as {src: source, tgt: target,
    # score: laser}; numbers, from 1, where a table has no header
    columns: dict[str, str | int] = field(default_factory=dict)
    convert: dict[str, str] = field(default_factory=dict)  # scripts, such as {sr_Latn: sr}
    # its own options of steps, laid over the recipe's: {quality: {threshold: 0.5}}
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)
    limit: Count | None = None  # first pairs only


@dataclass(frozen=True)
class BalanceOptions:
    tokens: Count | None = 800_000_000  # of all conversations together; None: everything
    # 1: in proportion to what there is; larger: more even; the share is tokens^(1/temperature)
    temperature: Annotated[float, Range(1)] = 3.0
    floor: Amount = 0  # tokens that every direction gets where it has them
    cap: Count | None = None  # tokens that a direction gets at most
    directions: Literal["both", "forward", "backward"] = "both"  # forward: from the first language
    tokenizer: Path_ | None = None  # a model's folder; None: by characters a token of each language


@dataclass(frozen=True)
class EvaluationSets:
    """Whose sentences must not be trained on."""

    # plain or gzip text, a sentence a line; patterns are allowed
    files: list[Path_] = field(default_factory=list)
    # where FLORES may lie; empty: not looked for
    flores: list[Path_] = field(
        default_factory=lambda: ["flores*/**/*.dev*", "data/flores*/**/*.dev*"]
    )


@dataclass(frozen=True)
class PrepareRecipe:
    output: Path_
    corpora: list[Corpus]
    format: FormatOptions = field(default_factory=FormatOptions)
    clean: CleanOptions = field(default_factory=CleanOptions)
    identify: IdentifyOptions = field(default_factory=IdentifyOptions)
    evaluation: EvaluationSets = field(default_factory=EvaluationSets)
    decontaminate: DecontaminateOptions = field(default_factory=DecontaminateOptions)
    dedup: DedupOptions = field(default_factory=DedupOptions)
    quality: QualityOptions = field(default_factory=QualityOptions)
    balance: BalanceOptions = field(default_factory=BalanceOptions)
    instruct: InstructOptions = field(default_factory=InstructOptions)
    engine: Literal["local", "ray"] = "local"
    workers: Annotated[int, Range(1, 4096)] | None = None  # processes; None: one a core
    part_pairs: Count = 20_000  # of a piece of work: what a kill can cost
    shard_conversations: Count = 250_000  # of an output file
    on_error: Literal["stop", "skip"] = "stop"
    seed: Annotated[int, Seed] = 0


def load_prepare_recipe(path: str | Path, overrides: Sequence[str] = ()) -> PrepareRecipe:
    """Read a YAML recipe with `key=value` overrides. Raises `UserError` for what is wrong in it."""
    recipe = load_options(PrepareRecipe, path, overrides)
    if not recipe.corpora:
        raise UserError("corpora: at least one is wanted")
    names = [corpus_name(c) for c in recipe.corpora]
    for i, corpus in enumerate(recipe.corpora):
        if names.count(names[i]) > 1:
            raise UserError(f"corpora.{i}.name: '{names[i]}' is taken already")
        for code in corpus.languages:
            try:
                canonical(code)
            except UserError as e:
                raise UserError(f"corpora.{i}.languages: {e}") from None
        check_columns(corpus.columns, f"corpora.{i}.columns")
        for code, into in corpus.convert.items():
            check_conversion(code, into, f"corpora.{i}.convert")
    for i, own in enumerate([recipe, *(of_corpus(recipe, i) for i in range(len(names)))]):
        quality, at = own.quality, f"corpora.{i - 1}.steps." if i else ""
        if quality.margin is not None and quality.method not in ("auto", "e5"):
            raise UserError(
                f"{at}quality.margin: goes with method auto or e5, not {quality.method}"
            )
        if quality.best is not None and quality.method in ("auto", "none"):
            raise UserError(
                f"{at}quality.best: goes with score, e5 or cometkiwi, not {quality.method}"
            )
    if not recipe.instruct.prompts:
        raise UserError("instruct.prompts: at least one template is wanted")
    for i, prompt in enumerate(recipe.instruct.prompts):
        check_fields(prompt, f"instruct.prompts.{i}", ("src", "tgt", "text"), "text")
    return recipe


def of_corpus(recipe: PrepareRecipe, index: int) -> PrepareRecipe:
    """The recipe with a corpus's own options of steps. Raises `UserError` for what is none."""
    made = {}
    for step, options in recipe.corpora[index].steps.items():
        at = f"corpora.{index}.steps.{step}"
        if step not in OWN_STEPS:
            raise UserError(f"{at}: not a step of one corpus; known: {', '.join(OWN_STEPS)}")
        made[step] = overlaid(getattr(recipe, step), options, at)
    return replace(recipe, **made)


def corpus_name(corpus: Corpus) -> str:
    path = corpus.path if isinstance(corpus.path, str) else " + ".join(corpus.path)
    return corpus.name or (f"{path} {corpus.subset}" if corpus.subset else path)
