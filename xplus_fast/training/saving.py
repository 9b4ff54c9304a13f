"""Checkpoints of a `Trainer`: what may have changed, exactly, and nothing else.

A checkpoint holds every tensor that the optimizer may change, whether it trains at the moment or
not, the state of optimizer, scheduler and scaler (`lossless.py`), and the random state. Resuming
from it is exact, whatever moment it was cut at.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer
from transformers.trainer_callback import ExportableState

from xplus_fast.errors import UserError
from xplus_fast.model.families import layer_of
from xplus_fast.model.prepare import (
    changed_tensors,
    layer_ids,
    load_tensors,
    named_tensors,
    note_changes,
    trained_tensors,
)
from xplus_fast.planning.selection import describe_layers
from xplus_fast.training.checkpoints import (
    Checkpoint,
    read_checkpoint,
    rng_state,
    rotate,
    set_rng_state,
    write_checkpoint,
)
from xplus_fast.training.lossless import decode, encode
from xplus_fast.training.optimizer import AdamW
from xplus_fast.training.throughput import Meter
from xplus_fast.training.unpacked import Unpacked, named


class SavingTrainer(Trainer):
    """A Trainer that saves and loads checkpoints of this kind; the model is a prepared one."""

    meter: Meter
    _unpacked: Unpacked | None = None  # what another optimizer than ours is made of
    _resumed: Checkpoint | None = None  # while its parts are loaded, one after another

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with self.meter.paused():
            self._save_and_rotate(trial)

    def _save_and_rotate(self, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        self.store_flos()
        if self.state.best_global_step:
            best_folder = folder.with_name(f"checkpoint-{self.state.best_global_step}")
            if best_folder == folder or best_folder.exists():
                self.state.best_model_checkpoint = str(best_folder)
        states = _gather(rng_state(), self.args.world_size)
        if self.args.should_save:
            self._write(folder, states)
            if self.args.save_total_limit:
                best = self.state.best_model_checkpoint
                spare = None if best is None else Path(best).name
                rotate(folder.parent, self.args.save_total_limit, spare=spare)
        self.accelerator.wait_for_everyone()

    def _write(self, folder: Path, rng_states: list[Any]) -> None:
        model: Any = self.accelerator.unwrap_model(self.model)
        tensors = {"trained": self._changed_tensors()}
        documents: dict[str, Any] = {
            "selection": {
                "layers": layer_ids(model),
                "base": model.config._name_or_path,
                "trains": sorted(trained_tensors(model)),
                "held": sorted(self._held_tensors()),
            },
        }
        if not self.args.save_only_model:
            assert self.lr_scheduler is not None
            scaler = self.accelerator.scaler
            state = {
                "optimizer": self._optimizer_state(),
                "scheduler": self.lr_scheduler.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
            }
            documents["training"] = {"rng": rng_states, "tokens_seen": self.meter.seen}
            for name, value in state.items():
                documents["training"][name], tensors[name] = encode(value, name)
        callbacks: Any = self.state.stateful_callbacks  # a dict, whatever its annotation says
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                callbacks[type(callback).__name__] = callback.state()
        documents["trainer_state"] = dataclasses.asdict(self.state)
        write_checkpoint(folder, {k: v for k, v in tensors.items() if v}, documents)

    def _held_tensors(self, instead: Mapping[int, Tensor] = {}) -> dict[str, Tensor]:
        """What the optimizer may change, whether it trains at this moment or not."""
        model: Any = self.accelerator.unwrap_model(self.model)
        whole = {} if self._unpacked is None else self._unpacked.packed()
        groups = bare_optimizer(self.optimizer).param_groups
        held = [whole.get(id(p), p) for group in groups for p in group["params"]]
        return named_tensors(model, held, instead)

    def _changed_tensors(self) -> dict[str, Tensor]:
        """What may differ from the base model: flags may change while training goes on."""
        model: Any = self.accelerator.unwrap_model(self.model)
        note_changes(model, self._held_tensors())
        return changed_tensors(model)

    def _named_parameters(self) -> dict[int, tuple[str, Tensor]]:
        """id of a parameter that an optimizer may hold -> its name and itself."""
        return named(self.accelerator.unwrap_model(self.model), self._unpacked)

    def _settled(self) -> torch.optim.Optimizer:
        """The optimizer, when its states in host memory are what the last step made them."""
        if (ours := our_adamw(self.optimizer)) is not None:
            ours.synchronize()
        return bare_optimizer(self.optimizer)

    def _optimizer_state(self) -> dict[str, Any]:
        """Its states by parameter name, and its groups with their parameters' names."""
        optimizer = self._settled()
        known = self._named_parameters()
        if strange := [key for key in optimizer.state if id(key) not in known]:
            raise UserError(
                f"optimizer: {type(optimizer).__name__} keeps a state that belongs to no parameter"
                f" of the model ({str(strange[0])[:60]!r}); it cannot be saved"
            )
        names = {key: name for key, (name, _) in known.items()}
        return {
            "states": {names[id(p)]: dict(state) for p, state in optimizer.state.items()},
            "groups": [
                {**group, "params": [names[id(p)] for p in group["params"]]}
                for group in optimizer.param_groups
            ],
        }

    def final_tensors(self) -> dict[str, Tensor]:
        """What was trained, by Hugging Face name: its fp32 masters where it has them."""
        masters: dict[int, Tensor] = {}
        if isinstance(optimizer := self._settled(), AdamW):
            states = optimizer.state.items()
            masters = {id(p): state["master"] for p, state in states if "master" in state}
        return self._held_tensors(masters)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        model = self.accelerator.unwrap_model(self.model if model is None else model)
        self._resumed = read_checkpoint(Path(resume_from_checkpoint))
        selection, trained = self._resumed.documents["selection"], self._resumed.tensors["trained"]
        now = sorted(trained_tensors(model))
        if now not in (selection["held"], selection["trains"]):
            held = sorted({i for name in selection["held"] if (i := layer_of(name)) is not None})
            raise UserError(
                f"{resume_from_checkpoint}: holds layers {describe_layers(held) or 'none'}, and"
                f" this run trains {describe_layers(layer_ids(model)) or 'none'}"
                + ("" if held != layer_ids(model) else " (other tensors of them, or beside them)")
            )
        load_tensors(model, trained)
        note_changes(model, trained)

    def go_back(self, step: int) -> None:
        """Take weights and optimizer from the checkpoint of an earlier step of this training."""
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{step}"
        self._settled()
        found = read_checkpoint(folder)
        load_tensors(self.accelerator.unwrap_model(self.model), found.tensors["trained"])
        saved = found.documents["training"]["optimizer"]
        state = decode(saved, found.tensors.get("optimizer", {}))
        self._restore_optimizer(state, str(folder))

    def _load_best_model(self) -> None:
        folder = self.state.best_model_checkpoint
        best = read_checkpoint(Path(str(folder))).tensors["trained"]
        if late := sorted(self._changed_tensors().keys() - best.keys()):
            raise UserError(
                f"{folder}: the best model cannot be put back: {late[0]} ({len(late)} tensors in"
                " all) began to train later, so the checkpoint does not hold it; it had the base's"
                " value then"
            )
        load_tensors(self.accelerator.unwrap_model(self.model), best)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        assert self._resumed is not None and self.lr_scheduler is not None
        saved = self._resumed.documents.get("training")
        if saved is None:
            raise UserError(f"{checkpoint}: was saved with save_only_model and cannot be resumed")
        state = {
            name: decode(saved[name], self._resumed.tensors.get(name, {}))
            for name in ("optimizer", "scheduler", "scaler")
        }
        # as they were then: what changes them may do so at some steps only
        model: Any = self.accelerator.unwrap_model(self.model)
        trains = set(self._resumed.documents["selection"]["trains"])
        for p in model.parameters():
            if p.is_floating_point():
                p.requires_grad_(bool(trains & named_tensors(model, [p]).keys()))
        self._restore_optimizer(state["optimizer"], checkpoint)
        self.lr_scheduler.load_state_dict(state["scheduler"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.meter.seen = saved["tokens_seen"]

    def _restore_optimizer(self, saved: dict[str, Any], where: str) -> None:
        optimizer = bare_optimizer(self.optimizer)
        known = self._named_parameters()
        names = {key: name for key, (name, _) in known.items()}
        ours = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
        theirs = [group["params"] for group in saved["groups"]]
        if ours != theirs:
            raise UserError(
                f"{where}: its optimizer has {sum(map(len, theirs))} parameters in {len(theirs)}"
                f" groups, and this run's has {sum(map(len, ours))} in {len(ours)}, or others;"
                " an optimizer that is made in another way cannot go on from it"
            )
        if isinstance(optimizer, AdamW):
            optimizer.check_saved(saved["groups"], where)
        parameters = {name: p for name, p in known.values()}
        for group, then in zip(optimizer.param_groups, saved["groups"], strict=True):
            for key in then.keys() - {"params"}:
                now = group.get(key)
                at = now.device if torch.is_tensor(now) else None
                group[key] = then[key] if at is None else to_device(then[key], at)
            for name in then["params"]:
                state = saved["states"].get(name)
                if not state:
                    continue
                p = parameters[name]
                if isinstance(optimizer, AdamW):
                    optimizer.restore(p, state)
                    continue
                beside = group.get("fused") or group.get("capturable")
                optimizer.state[p] = {
                    k: v if k == "step" and not beside else to_device(v, p.device)
                    for k, v in state.items()
                }

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Loaded with the optimizer's state."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None or self._resumed is None:
            return
        states = self._resumed.documents["training"]["rng"]
        set_rng_state(states[min(self.args.process_index, len(states) - 1)])
        self._resumed = None  # the last of the loads; let its tensors go


def bare_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it


def our_adamw(optimizer: Any) -> AdamW | None:
    bare = bare_optimizer(optimizer)
    return bare if isinstance(bare, AdamW) else None


def to_device(value: Any, device: torch.device) -> Any:
    """A state's tensors, in lists and dicts too, on a device."""
    if torch.is_tensor(value):
        return value.to(device)
    if isinstance(value, dict):
        return {k: to_device(v, device) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_device(v, device) for v in value)
    return value


def _gather(value: Any, processes: int) -> list[Any]:
    if processes == 1:
        return [value]
    gathered: list[Any] = [None] * processes
    torch.distributed.all_gather_object(gathered, value)
    return gathered
