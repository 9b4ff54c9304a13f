"""One loaded model, its trained weights set to any part of what a run changed.

Every point gives the answers of the folder that `export --scale` would make, and has that folder's
digest, so that what one of the two has answered the other finds again.
"""

import io
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from functools import cache
from typing import Any

import torch

from xplus_fast.errors import UserError
from xplus_fast.evaluation.generate import Subject, digest_of, load
from xplus_fast.evaluation.recipe import EvaluateRecipe
from xplus_fast.model.checkpoint_files import CheckpointFiles
from xplus_fast.model.headers import CODES
from xplus_fast.model.prepare import is_prepared, load_tensors
from xplus_fast.model.quantized import plain_code
from xplus_fast.training.changes import Changes
from xplus_fast.training.export import contents

HARNESS_MODEL = "in_place"  # what lm-evaluation-harness calls it


class InPlace:
    """A run's base model, loaded once, when the first answer is wanted."""

    def __init__(self, changes: Changes, recipe: EvaluateRecipe) -> None:
        """Raises `UserError` for what cannot be evaluated in place."""
        base = changes.base
        self._files = CheckpointFiles.open(base)
        codes = any(entry.scale is not None for entry in self._files.entries.values())
        if recipe.engine == "vllm":
            raise UserError(
                "--scales: weights are changed in one loaded model, which vLLM does not let us do:"
                " engine=generate, or `export --scale` and evaluate the folder"
            )
        if recipe.reasoning.tasks and (codes or recipe.reasoning.python is not None):
            why = "the base is in FP8" if codes else "reasoning.python names another Python"
            raise UserError(
                f"--scales: {why}: reasoning.tasks cannot be asked of weights that change in place;"
                " `export --scale` and evaluate the folder"
            )
        self._changes, self._recipe = changes, recipe
        self._model: Any = None
        self._now: Changes | None = None  # whose weights the model has
        self.loaded = 0  # times

    def subject(self, at: Changes) -> Subject:
        """A point's model. at: the run's changes at its scales."""
        made = contents(self._files, at)
        return Subject(
            self._changes.base,
            digest_of((str(name), pieces) for name, pieces in made),
            load=lambda: self._at(at),
            harness=lambda options, environment: self._ask(at, options, environment),
        )

    def _at(self, at: Changes) -> Any:
        if self._model is None:
            self._model = load(self._changes.base, self._recipe.dtype, self._recipe.device)
            self.loaded += 1
        if self._now is not at:
            with torch.no_grad():
                for name in self._changes.trained:
                    self._set(name, at)
            self._now = at
        return self._model

    def _set(self, name: str, at: Changes) -> None:
        """A tensor as it would be stored, and read again."""
        if name in at:
            code = plain_code(self._files.config, self._files.entries[name])
            value = at[name].to(getattr(torch, CODES[code][0]))
            if not torch.isfinite(value).all():
                raise UserError(f"--scales: {name!r} is not finite in {code}")
        else:
            value = at.base_tensor(name)
        if is_prepared(self._model):
            load_tensors(self._model, {name: value})
        else:
            self._model.get_parameter(name).copy_(value)

    def _ask(
        self, at: Changes, options: Sequence[str], environment: Mapping[str, str]
    ) -> tuple[int, str]:
        """lm-evaluation-harness's own command, in this process, with the model that is here."""
        from lm_eval._cli import HarnessCLI

        _harness_model().loaded = self._at(at)
        model = options.index("--model") + 1
        before, told = sys.argv, {key: os.environ.get(key) for key in environment}
        said = io.StringIO()
        with ExitStack() as held:
            held.enter_context(redirect_stdout(said))  # ours is for what was asked of us
            if not sys.stderr.isatty():
                held.enter_context(redirect_stderr(said))
            try:
                sys.argv = ["lm_eval", *options[:model], HARNESS_MODEL, *options[model + 1 :]]
                os.environ |= environment
                cli = HarnessCLI()
                cli.execute(cli.parse_args())
            except SystemExit as e:
                return int(e.code or 0), said.getvalue()
            except (UserError, torch.OutOfMemoryError):
                raise
            except Exception:  # whatever a task's code can raise: that task was not measured
                return 1, traceback.format_exc()
            finally:
                sys.argv = before
                for key, value in told.items():
                    os.environ.pop(key) if value is None else os.environ.update({key: value})
        return 0, said.getvalue()


@cache
def _harness_model() -> Any:
    """The harness's own model of transformers, around `loaded`; a name is registered once."""
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM

    @register_model(HARNESS_MODEL)
    class Here(HFLM):
        loaded: Any = None

        def __init__(self, pretrained: str, **given: Any) -> None:
            super().__init__(self.loaded, tokenizer=pretrained, **given)

    return Here
