"""A trainer that carries out a plan, and a leaner one where memory runs out all the same."""

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

from xplus_fast.data.collate import split_batch
from xplus_fast.data.packed import PackedDataset, RowSampler
from xplus_fast.errors import UserError
from xplus_fast.model.families import place_of
from xplus_fast.model.load import set_activations
from xplus_fast.model.packing import send
from xplus_fast.planning.flops import below_flops, work_of
from xplus_fast.planning.plan import leaner
from xplus_fast.planning.plan_text import policies
from xplus_fast.planning.search import Plan
from xplus_fast.planning.selection import describe_layers
from xplus_fast.training.hidden_cache import HiddenCache
from xplus_fast.training.memory_log import PeakWatch
from xplus_fast.training.shortage import ran_out
from xplus_fast.training.source_losses import SourceLosses
from xplus_fast.training.trainer import XPlusTrainer, bare_optimizer


def check_plans(plans: Sequence[Plan]) -> None:
    """See that what plans ask for is installed, before anything is loaded."""
    wanted = {layer.format for plan in plans for layer in plan.layout.layers}
    if "nf4" in wanted and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("memory.frozen: nf4 is made by bitsandbytes: pip install bitsandbytes")


def frozen_formats(plan: Plan) -> dict[str, str]:
    """In which format what is frozen is computed with: a run goes on only with the same."""
    layers = plan.layout.layers
    names = sorted({layer.format for layer in layers if not layer.trains})
    found = {
        name: describe_layers(
            [i for i, layer in enumerate(layers) if not layer.trains and layer.format == name]
        )
        for name in names
    }
    return found | {"head": plan.layout.head}


class PlannedTrainer(XPlusTrainer):
    """XPlusTrainer on packed batches, which it splits into the plan's micro-batches.

    When the device's memory runs out during a step (fragmentation, another process), the step is
    begun again from its first micro-batch under the next leaner plan: activation policies and
    the size of micro-batches change, the optimizer step's batch does not, and no batch is skipped.

    Args:
        plan: of this stage; the model has been laid out by it.
        say: takes a line for the user.
        hidden: what enters the lowest trained layer, kept from one epoch to the next.
        rates: the learning rate of each layer and of what trains beside them, as `learning_rates`
            has them; empty: that of the arguments.
        sources: names of the data's sources, where there are several: their losses are logged.
        Everything else goes to `XPlusTrainer`.
    """

    def __init__(
        self, *args: Any, plan: Plan, say: Callable[[str], None] = print,
        hidden: HiddenCache | None = None, sources: Sequence[str] = (),
        rates: Mapping[str, float] = {}, **options: Any,
    ) -> None:  # fmt: skip
        self.plan, self.say, self.hidden, self._rates = plan, say, hidden, rates
        if hidden is not None:
            hidden.store.say = say
        self.memory: dict[str, int] = {}  # bytes by purpose at the peak, where a GPU tells
        self._step_batches: list[Any] = []
        self._spared = 0  # FLOPs, in these
        super().__init__(*args, update=plan.update, **options)
        if hidden is not None:
            self.data_collator = hidden.ahead(self.data_collator)
        set_activations(self.model, plan.layout, plan.micro_batch_tokens)
        several = len(sources) > 1
        self._losses = SourceLosses(sources, self.args.device) if several else None
        self._peak = PeakWatch(self)
        self.add_callback(self._peak)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if fresh and len(set(self._rates.values())) > 1:
            self._split_groups(bare_optimizer(optimizer))
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Of a cosine with a floor: warm-up from 1 / its steps, and then down from the peak.

        The library's own begins at 0, which wastes a step, or, in its other form, after the peak.
        """
        options: Any = self.args.lr_scheduler_kwargs or {}
        if self.args.lr_scheduler_type != "cosine_with_min_lr" or "min_lr" not in options:
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            optimizer = self.optimizer if optimizer is None else optimizer
            least = options["min_lr"] / self.args.learning_rate
            rate = partial(
                _rate, warmup=self.args.get_warmup_steps(num_training_steps),
                steps=num_training_steps, least=least,
            )  # fmt: skip
            self.lr_scheduler = LambdaLR(bare_optimizer(optimizer), rate)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _split_groups(self, optimizer: torch.optim.Optimizer) -> None:
        """A group for each learning rate, the highest first: it is the one that is logged."""
        stock: Any = self.accelerator.unwrap_model(self.model)
        names = {id(p): name for name, p in stock.named_parameters()}
        groups = []
        for group in optimizer.param_groups:
            by_rate: dict[float, list[Tensor]] = {}
            for p in group["params"]:
                by_rate.setdefault(self._rates[place_of(names[id(p)])], []).append(p)
            groups += [{**group, "params": p, "lr": rate} for rate, p in by_rate.items()]
        optimizer.param_groups = sorted(groups, key=lambda group: -group["lr"])

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(rows, PackedDataset):
            return super()._get_train_sampler(train_dataset)
        # shares of a row stay together: each process takes one
        of = len(rows) // rows.shares
        sampler = RowSampler(of, rows.shares, self.args.seed, steady=rows.steady)
        self.add_callback(_Epoch(sampler))
        return sampler

    def get_train_dataloader(self) -> Any:
        """Batches stay on the host, and micro-batches go to the device one by one.

        There is no more room for them in a step that has just run out, and no wait.
        """
        accelerator = self.accelerator
        before, accelerator.device_placement = accelerator.device_placement, False
        try:
            return super().get_train_dataloader()
        finally:
            accelerator.device_placement = before

    def _prepare_input(self, data: Any) -> Any:
        if isinstance(data, Tensor) and data.device.type == "cpu":
            return send(data, self.args.device)
        return super()._prepare_input(data)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        self._step_batches = []
        if self.args.world_size == 1:  # nobody else's are to be added to these
            device = torch.device("cpu")
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        self._step_batches.append(inputs)
        todo = [inputs]
        while True:
            try:
                return self._run(model, todo, num_items_in_batch)
            except RuntimeError as e:
                if not ran_out(e):
                    raise
                said = " ".join(str(e).split(". ")[0].split())
            # out here: the exception's frames would hold the tensors that have to go
            self._step_down(said)
            todo = self._step_batches

    def _run(self, model: Any, batches: list[Any], items: Any) -> Tensor:
        """The last batch's loss, all of them run. items: of the whole step."""
        items = self._prepare_input(items)
        parts = [split_batch(batch, self.plan.micro_batch_tokens) for batch in batches]
        last, losses, self._spared = parts[-1][-1], [], 0
        for part in (part for batch in parts for part in batch):
            # processes may have another number of parts: gradients meet once
            apart = nullcontext() if part is last else self.accelerator.no_sync(model)
            with apart:
                losses.append(self._compute(model, part, items))
        for part in parts[-1]:  # a group that was cut was computed with its prefix in each
            self.meter.add(part)
        self.meter.spare(self._spared)
        # each is its share of the step's mean
        return torch.stack(losses[-len(parts[-1]) :]).sum()

    def _compute(self, model: Any, part: dict[str, Any], items: Any) -> Tensor:
        """A micro-batch's loss, from what its frozen layers gave before if that is there."""
        if self._losses is not None:
            part = part | {"take_losses": self._losses.of(part["layout"])}
        if self.hidden is None:
            return self._forward_backward(model, part, items)
        below = self.hidden.of(part["layout"])
        loss = self._forward_backward(model, part | {"below": below}, items)
        if below.found:
            work = work_of(part["layout"])
            self._spared += below_flops(self.meter.shape, work, below.level)
        below.keep()
        return loss

    def _wanted(self, norm: Tensor) -> list[Tensor]:
        wanted = super()._wanted(norm)
        return [*wanted, self._losses.sums] if self._losses and wanted[1:] else wanted

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._losses is not None:
            logs = {**logs, **self._losses.read(self._numbers[2:] or None)}
        super().log(logs, start_time)

    def _step_down(self, said: str) -> None:
        if self.args.device.type == "cuda":
            torch.cuda.synchronize(self.args.device)  # copies of the step that is given up
        step = self.state.global_step + 1
        found = leaner(self.plan)
        if found is None:
            raise UserError(
                f"step {step}: {said}; the leanest plan is in use already: lower"
                " data.pack_tokens, or plan for less with memory.budget"
            )
        self.plan = found
        model = self.accelerator.unwrap_model(self.model)
        set_activations(model, found.layout, found.micro_batch_tokens)
        bare_optimizer(self.optimizer).zero_grad()
        if self._losses is not None:
            self._losses.restart()
        torch.cuda.empty_cache()
        self._peak.restart()
        self.say(
            f"step {step}: {said}. Going on with a leaner plan:"
            f" micro-batches of {found.micro_batch_tokens:,} tokens, {policies(found)};"
            " the step is repeated, its batch is the same"
        )


def _rate(step: int, *, warmup: int, steps: int, least: float) -> float:
    """What a learning rate is multiplied by in a step, from 0."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return least + (1 - least) * 0.5 * (1 + math.cos(math.pi * done))


class _Epoch(TrainerCallback):
    """Tells the sampler its epoch; accelerate does not in a resumed one of several processes."""

    def __init__(self, sampler: RowSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.sampler.epoch = state.global_step // self.sampler.rows  # a row is a step
