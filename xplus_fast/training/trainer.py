"""`XPlusTrainer`: transformers' Trainer whose model is run by the engine.

A script that says `from xplus_fast import XPlusTrainer as Trainer` needs no other change. What
differs from the library's class: the model is prepared (`layers=` selects, else the parameters' own
`requires_grad`); AdamW computes in fp32 whatever the weights are; a checkpoint holds what trains
and nothing else, in safetensors and JSON, and resuming from it is exact; a step that cannot be
right stops the run with its reason.
"""

import copy
import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.training_args import OptimizerNames, ParallelMode

from xplus_fast.data.collate import PackCollator, whole_sequences
from xplus_fast.errors import UserError
from xplus_fast.model.families import shape_of
from xplus_fast.model.layout import UpdateLayout
from xplus_fast.model.prepare import layer_ids, note_changes, prepare_model, trained_beside
from xplus_fast.model.sums import Sums, only_in_backward, summed
from xplus_fast.planning.selection import resolve_layers
from xplus_fast.training.arguments import OUR_ADAMW, asks_for_checkpointing, check_arguments
from xplus_fast.training.checkpoints import latest_checkpoint
from xplus_fast.training.optimizer import AdamW
from xplus_fast.training.reading import Reading
from xplus_fast.training.reporting import describe_selection
from xplus_fast.training.saving import SavingTrainer, bare_optimizer, our_adamw
from xplus_fast.training.shortage import twice
from xplus_fast.training.throughput import Meter
from xplus_fast.training.unpacked import ELEMENTWISE, Unpacked, check_given

ON_DEVICE = UpdateLayout()  # fp32 states and masters, all on the device


class XPlusTrainer(SavingTrainer):
    """A Trainer for selected layers.

    Args:
        model: a stock or prepared causal language model (or `model_init`, as for Trainer).
        layers: which decoder layers train, e.g. "bottom:4" or [0, 1]; None: the parameters' flags.
        also: what trains beside them: "embedding", "final_norm", "head".
        activations: what blocks keep for the backward, see `prepare_model`.
        update: how AdamW keeps its states, and where; seeded by the arguments' `seed`.
        data_collator: as Trainer's; a `PackCollator` that leaves it open computes tokens that
            sequences begin with in common once.
        Everything else goes to `transformers.Trainer`.

    Raises:
        UserError: nothing trains, or options that the engine cannot honour.
    """

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *positional: Any,
        layers: str | Sequence[int] | None = None,
        also: Iterable[str] = (),
        activations: str | None = None,
        update: UpdateLayout = ON_DEVICE,
        **options: Any,
    ) -> None:
        self._selection = (layers, tuple(also), activations)
        self._update = update
        self._norm: Any = None  # of the gradients, until it is read
        self._reading: Reading | None = None  # of what is `_wanted`
        self._numbers: list[float] = []  # which it gave
        if args is not None:
            check_arguments(args)
            if args.n_gpu > 1:
                args._n_gpu = 1  # DataParallel would cut packed batches; torchrun takes several
        if model is not None:
            self._prepare(model)
        super().__init__(model, args, *positional, **options)
        if isinstance(self.data_collator, PackCollator):
            self._share_prefixes(self.data_collator)
        self._check_update()
        self.meter = Meter(shape_of(self.model.config))  # type: ignore[union-attr]
        self.add_callback(_Begin(self))
        if self.optimizer is not None:
            mine = {id(p) for p in self.model.parameters()}  # type: ignore[union-attr]
            bare = bare_optimizer(self.optimizer)
            if any(id(p) not in mine for group in bare.param_groups for p in group["params"]):
                raise UserError(
                    "optimizers: made from parameters that are not the prepared model's; call"
                    " prepare_model(model) before making it, or use optimizer_cls_and_kwargs"
                )
            check_given(bare)

    def _prepare(self, model: Any) -> None:
        layers, also, activations = self._selection
        ids = None if layers is None else resolve_layers(layers, shape_of(model.config).layers)
        prepare_model(model, ids, also=also, activations=activations)
        if not any(p.requires_grad for p in model.parameters()):
            raise UserError("nothing trains: every parameter is frozen and no layers are selected")

    def _share_prefixes(self, collator: PackCollator) -> None:
        """Let a collator of ours share first tokens, if it leaves that to us.

        Not where a loss is made of logits, nor where noise makes tokens differ in each sequence.
        """
        args = self.args
        apart = args.label_smoothing_factor or args.neftune_noise_alpha or self.compute_loss_func
        if collator.shared_prefixes is None:
            self.data_collator = collator = copy.copy(collator)  # the caller's stays as it is
            collator.shared_prefixes = not apart

    def call_model_init(self, trial: Any = None) -> nn.Module:
        model = super().call_model_init(trial)
        self._prepare(model)
        return model

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: list[str] = self._signature_columns  # type: ignore[assignment]
        for name in getattr(self.data_collator, "columns", ()):
            if name not in columns:  # what the collator reads is used, though not by the model
                columns.append(name)

    # The optimizer, made of the arguments as they are when training begins

    def _is_ours(self) -> bool:
        """Whether the arguments ask for our AdamW."""
        free = self.optimizer is None and self.optimizer_cls_and_kwargs is None
        return free and self.args.optim in OUR_ADAMW

    def _check_update(self) -> None:
        if self._update == ON_DEVICE or self._is_ours():
            return
        own = self.optimizer is not None or self.optimizer_cls_and_kwargs is not None
        given = "one of its own" if own else f"optim={OptimizerNames(self.args.optim).value}"
        raise UserError(
            f"update: {self._update} is for the AdamW that optim=adamw_torch makes, and this run"
            f" has {given}"
        )

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is not None:
            return self.optimizer
        check_arguments(self.args)  # a search or a script may have changed them
        self._check_update()
        stock: Any = self.accelerator.unwrap_model(self.model if model is None else model)
        asked = self.optimizer_cls_and_kwargs
        if self._is_ours():
            betas = (self.args.adam_beta1, self.args.adam_beta2)
            options = dict(
                lr=self.args.learning_rate, betas=betas, eps=self.args.adam_epsilon,
                seed=self.args.seed, **dataclasses.asdict(self._update),
            )  # fmt: skip
            self.optimizer_cls_and_kwargs = (AdamW, options)
        elif asked is None or not _is_elementwise(asked[0]):
            self._unpacked = Unpacked(stock)
        try:
            optimizer = super().create_optimizer(self._unpacked or stock)
        finally:
            self.optimizer_cls_and_kwargs = asked
        if self._unpacked is not None:
            self._unpacked.attach(optimizer)
        adamw = our_adamw(optimizer)
        if adamw is not None and adamw.gradients == "host":
            if self.accelerator.scaler is not None:
                raise UserError(
                    "gradients: fp16 rescales them, for which they must be on the device"
                )
            if self.args.world_size > 1:
                raise UserError("gradients: on the host they are not summed over processes")
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        narrow = {p.dtype for p in trained} & {torch.bfloat16, torch.float16}
        if narrow and self._update.sums == 32 and self.args.world_size > 1:
            raise UserError(
                "sums: 32 is for one process; several exchange gradients in the weights' own dtype"
            )
        bare = bare_optimizer(optimizer)
        if narrow and not isinstance(bare, AdamW) and self.is_world_process_zero():
            print(
                f"warning: {type(bare).__name__} updates {narrow.pop()} weights in"
                " place: steps smaller than their spacing are lost; optim=adamw_torch keeps an"
                " fp32 master copy"
            )
        return optimizer

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint is False:
            resume_from_checkpoint = None
        if resume_from_checkpoint is True:
            folder = str(self.args.output_dir)
            resume_from_checkpoint = latest_checkpoint(Path(folder))
            if resume_from_checkpoint is None:
                raise UserError(f"{folder}: no whole checkpoint to resume from")
        if asks_for_checkpointing(self.args) and self.is_world_process_zero():
            print(
                "gradient_checkpointing: not needed, blocks keep what `activations` says",
                flush=True,
            )
        path = None if resume_from_checkpoint is None else str(resume_from_checkpoint)
        if self.model_init is not None:
            self._unpacked = None  # of a model that is about to be made again
        self.meter.seen = 0
        try:
            return super().train(path, *args, **kwargs)
        finally:
            self._resumed = None  # where no epoch was left to run

    def begin(self) -> None:
        """Before the first step: say what trains, and see what the device can do."""
        model: Any = self.accelerator.unwrap_model(self.model)
        if self.is_world_process_zero():
            print(describe_selection(model), flush=True)
        held = self._held_tensors()  # some of which may be frozen at the moment
        note_changes(model, held)
        dtype = next(iter(held.values())).dtype
        self.meter.measure_peak(self.args.device, dtype)
        self.meter.start()

    # A step, watched

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            # resumed where it had ended: the library would make one step more
            self.control.should_training_stop = True
            return [], None
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        unknown = samples and not any(map(_supervises, samples))
        if unknown and items is not None and int(items) == 0:
            raise UserError(
                f"step {self.state.global_step + 1}: nothing is supervised in its"
                f" {len(samples)} batch(es): every label is -100"
            )
        return samples, items

    def training_step(
        self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        loss = self._forward_backward(model, inputs, *args, **kwargs)
        self.meter.add(inputs)
        return loss

    def _forward_backward(self, *args: Any, **kwargs: Any) -> Tensor:
        stock: Any = self.accelerator.unwrap_model(self.model)
        optimizer = our_adamw(self.optimizer)
        if self.args.world_size > 1:  # others wait for each gradient that autograd adds
            return super().training_step(*args, **kwargs)
        sums = Sums() if optimizer is None else optimizer.sums
        with summed(stock.model.layers, sums), only_in_backward(self.accelerator, sums):
            return super().training_step(*args, **kwargs)

    def _clip_grad_norm(self, model: Any) -> Any:
        """The norm before clipping, which our AdamW does in its one pass over the gradients."""
        optimizer = our_adamw(self.optimizer)
        if optimizer is None:
            if self._unpacked is not None:
                self._unpacked.share_gradients()  # fp16's scaler looks at the optimizer's
            return super()._clip_grad_norm(model)
        return self._measure(optimizer, self.args.max_grad_norm)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Of our AdamW on the device still: to wait for it here would leave the device idle.

        A step that cannot be right changes nothing, and `read_norm` stops the run after it.
        """
        optimizer = our_adamw(self.optimizer)
        if grad_norm is None and optimizer is not None:  # max_grad_norm=0: nothing clips
            grad_norm = self._measure(optimizer, math.inf)
        self._norm = norm = super()._get_grad_norm(model, grad_norm)
        if optimizer is None:
            self.read_norm()
        else:
            self._reading = twice(lambda: Reading(self._wanted(norm)))
        return norm

    def _wanted(self, norm: Tensor) -> list[Tensor]:
        """What the host asks of a step: its norm and, outside a process group, its loss."""
        # a group, of one process too, gathers the loss where its backend can: on the device
        alone = self.args.parallel_mode == ParallelMode.NOT_PARALLEL
        return [norm, self._tr_loss] if alone else [norm]

    def _measure(self, optimizer: AdamW, most: float) -> Tensor:
        """The norm of the gradients, and for the update the scale that clips it to `most`.

        The scale is no number where the step must change nothing. Both are left on the device.
        """
        self.accelerator.unscale_gradients()

        def measured() -> tuple[Tensor, Tensor]:
            norm = optimizer.grad_norm()
            sound = norm.isfinite()
            if self.state.global_step == 0:
                sound = sound & (norm > 0)
            # as torch.nn.utils.clip_grad_norm_ has it
            scale = (most / (norm + 1e-6)).clamp(max=1.0)
            return norm, scale.where(sound, math.nan)

        norm, optimizer.gradient_scale = twice(measured)
        return norm

    def read_norm(self) -> None:
        """See, once the step is enqueued, that it could be right. Raises `UserError`.

        Until the update is done the host gets the next batch ready.
        """
        reading, self._reading = self._reading, None
        self._numbers = [float(self._norm)] if reading is None else reading.read()
        self._norm = norm = self._numbers[0]
        step = self.state.global_step + 1
        why = ""
        if not math.isfinite(norm) and self.accelerator.scaler is None:  # fp16's scaler skips it
            why = (
                f"step {step}: the gradient norm is {norm}: the loss is not finite, or the"
                " learning rate too high; the weights are as they were before this step"
            )
        elif norm == 0 and step == 1:
            why = "step 1: every gradient is zero: nothing that trains reaches the loss"
        if why:
            if (optimizer := our_adamw(self.optimizer)) is not None:
                optimizer.take_back()
            raise UserError(why)

    def _maybe_log_save_evaluate(self, tr_loss: Any, grad_norm: Any, *args: Any, **kw: Any) -> None:
        known = self._norm if isinstance(grad_norm, Tensor) else grad_norm  # asked for once
        before, read = self._globalstep_last_logged, self._numbers[1:2]
        loss = tr_loss.new_tensor(read[0], device="cpu") if read else tr_loss
        super()._maybe_log_save_evaluate(loss, known, *args, **kw)
        if read and self._globalstep_last_logged != before:
            tr_loss.zero_()
        self._numbers = []  # at an epoch's end the loss may have a part of another step

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            model: Any = self.accelerator.unwrap_model(self.model)
            also = trained_beside(model)
            if shape_of(model.config).tied and "embedding" in also:
                also.append("head")
            logs = {**logs, **self.meter.read(self.args.device, layer_ids(model), also)}
        super().log(logs, start_time)

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if not prediction_loss_only:  # compute_metrics wants logits, which the engine never makes
            inputs = {**inputs, "return_logits": True}
        return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)

    def evaluation_loop(
        self, dataloader: Any, description: str, prediction_loss_only: bool | None = None,
        *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        loss_only = prediction_loss_only
        loss_only = self.args.prediction_loss_only if loss_only is None else loss_only
        collator = None if loss_only else self.data_collator  # logits are of whole sequences
        with self.meter.paused(), whole_sequences(collator):
            return super().evaluation_loop(
                dataloader, description, prediction_loss_only, *args, **kwargs
            )


def _supervises(batch: dict[str, Any]) -> bool:
    """Whether a batch is known, without asking the device, to have a token that counts."""
    return batch.get("layout") is not None and bool(batch["layout"].predicts.any())


def _is_elementwise(made: Any) -> bool:
    """Whether an optimizer's class (or what makes one) is known to update element by element."""
    return isinstance(made, type) and issubclass(made, (AdamW, *ELEMENTWISE))


class _Begin(TrainerCallback):
    """Tells the trainer when training begins, whoever made model and optimizer in between, and when
    an update is enqueued.

    Trainer also zeroes the model's gradients then, and after each step, which does not reach those
    on the host.
    """

    def __init__(self, trainer: XPlusTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *_: Any, optimizer: Any = None, **__: Any) -> None:
        self.on_step_end(optimizer=optimizer)
        self.trainer.begin()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.trainer.read_norm()

    def on_step_end(self, *_: Any, optimizer: Any = None, **__: Any) -> None:
        adamw = our_adamw(optimizer)
        if adamw is not None:
            adamw.zero_grad()
