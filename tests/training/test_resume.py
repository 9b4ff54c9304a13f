"""Resuming is exact: schedulers, flags that change, optimizers of others, a run that had ended."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as schedulers
from transformers import Trainer, TrainerCallback

from tests.training.alike import CLOSE, sentences, trained
from xplus_fast import AdamW, XPlusTrainer
from xplus_fast.errors import UserError
from xplus_fast.training.checkpoints import read_checkpoint

SAVED = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 1}


def rates(trainer: Any) -> list[tuple[float, float]]:
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return [(line["loss"], line["learning_rate"]) for line in lines]


def assert_same(a: Any, b: Any) -> None:
    assert rates(a) == rates(b)
    there = b.model.state_dict()
    assert all(torch.equal(value, there[name]) for name, value in a.model.state_dict().items())


# --- schedulers

SCHEDULERS: dict[str, Any] = {
    "multistep": lambda o: schedulers.MultiStepLR(o, [2, 4], 0.1),
    "onecycle": lambda o: schedulers.OneCycleLR(o, 1e-3, total_steps=8),
    "restarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3),
    "cyclic": lambda o: schedulers.CyclicLR(o, 1e-4, 1e-3, 2, cycle_momentum=False),
    "sequential": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o), schedulers.MultiStepLR(o, [1, 2])], [2]
    ),
    "chained": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.5), schedulers.MultiStepLR(o, [3])]
    ),
    "lambda": lambda o: schedulers.LambdaLR(o, lambda step: 0.5**step),
    "polynomial": lambda o: schedulers.PolynomialLR(o, 5),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_goes_on(name: str, tmp_path: Path) -> None:
    def given(model: Any) -> Any:
        optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        return optimizer, SCHEDULERS[name](optimizer)

    arguments = {**SAVED, "max_steps": 6}
    whole = trained(XPlusTrainer, tmp_path, arguments, optimizers=given)
    resume = str(tmp_path / "checkpoint-2")
    assert_same(trained(XPlusTrainer, tmp_path, arguments, optimizers=given, resume=resume), whole)


# --- optimizers of others


class Momenta(torch.optim.Optimizer):
    """Keeps tensors in lists, tensors in its groups, and a state under an integer."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr, "scales": [torch.ones(()), torch.ones(())]})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["scales"][0].mul_(0.9)
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(past=[torch.zeros_like(p), torch.zeros_like(p)], seen={0: 0})
                first, second = state["past"]
                second.copy_(first)
                first.copy_(p.grad)
                state["seen"][0] += 1
                step = (first + second / state["seen"][0]) * group["scales"][0]
                p.sub_(step, alpha=group["lr"])


@pytest.mark.parametrize(
    "made",
    [(Momenta, {"lr": 1e-2}), (torch.optim.Adafactor, {"lr": 1e-2}), (torch.optim.ASGD, {})],
    ids=lambda m: m[0].__name__,
)
def test_an_optimizers_state_goes_on(made: Any, tmp_path: Path) -> None:
    options = {"optimizer_cls_and_kwargs": made}
    arguments = {**SAVED, "max_steps": 4}
    whole = trained(XPlusTrainer, tmp_path, arguments, **options)
    resume = str(tmp_path / "checkpoint-2")
    assert_same(trained(XPlusTrainer, tmp_path, arguments, **options, resume=resume), whole)


class Whole(torch.optim.Optimizer):
    """A step along each matrix's own direction: what is one matrix matters."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad / (p.grad.norm() + 1e-12), alpha=group["lr"])


@pytest.mark.parametrize("made", [(Whole, {}), (torch.optim.Adafactor, {"lr": 1e-2})])
def test_matrices_are_apart_for_who_looks_at_them_whole(made: Any, tmp_path: Path) -> None:
    stock, ours = (
        trained(cls, tmp_path / cls.__name__, {}, optimizer_cls_and_kwargs=made)
        for cls in (Trainer, XPlusTrainer)
    )
    weights = ours.model.state_dict()
    for name, value in stock.model.state_dict().items():
        assert (weights[name] - value).abs().max() <= CLOSE, name


def test_one_made_by_hand_of_packed_matrices_is_refused(tmp_path: Path) -> None:
    def given(model: Any) -> Any:
        return torch.optim.Adafactor([p for p in model.parameters() if p.requires_grad]), None

    with pytest.raises(UserError, match="optimizer_cls_and_kwargs=\\(Adafactor"):
        trained(XPlusTrainer, tmp_path, {}, optimizers=given)


def test_a_state_of_no_parameter_is_refused_when_saved(tmp_path: Path) -> None:
    class Odd(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            super().step()
            self.state["all"] = {"count": 1}  # type: ignore[index]

    with pytest.raises(UserError, match="Odd keeps a state that belongs to no parameter"):
        trained(XPlusTrainer, tmp_path, SAVED, optimizer_cls_and_kwargs=(Odd, {"lr": 1e-3}))
    assert not list(tmp_path.glob("*checkpoint*"))


# --- flags that change


class Rotate(TrainerCallback):
    """LISA: all at first, so that the optimizer knows them, then one layer every two steps."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for i in (1, 2, 3):
            kwargs["model"].model.layers[i].requires_grad_(False)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = 1 + (state.global_step // 2) % 3
        for i in (1, 2, 3):
            kwargs["model"].model.layers[i].requires_grad_(i == now)


class Unfreeze(TrainerCallback):
    """Gradual unfreezing, from the top: set once only, not at every step."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            for i in (1, 2):
                kwargs["model"].model.layers[i].requires_grad_(False)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in (1, 3):
            kwargs["model"].model.layers[3 - (state.global_step + 1) // 2].requires_grad_(True)


@pytest.mark.parametrize("callback", [Rotate, Unfreeze])
@pytest.mark.parametrize("step", [2, 4])
def test_flags_that_change_go_on(callback: Any, step: int, tmp_path: Path) -> None:
    arguments = {**SAVED, "max_steps": 6, "save_total_limit": 9}
    options = {"layers": [1, 2, 3]}
    whole = trained(XPlusTrainer, tmp_path, arguments, **options, callbacks=[callback()])
    stock = trained(Trainer, tmp_path / "stock", arguments, **options, callbacks=[callback()])
    assert [x for x, _ in rates(whole)] == pytest.approx([x for x, _ in rates(stock)], abs=CLOSE)
    resume = str(tmp_path / f"checkpoint-{step}")
    again = trained(
        XPlusTrainer, tmp_path, arguments, **options, callbacks=[callback()], resume=resume
    )
    assert_same(again, whole)


def test_the_best_model_is_one_state(tmp_path: Path) -> None:
    best = {
        **SAVED, "max_steps": 6, "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1,
        "learning_rate": 0.05, "load_best_model_at_end": True,
    }  # fmt: skip
    options = {"layers": [1, 2, 3], "eval_dataset": sentences(6, seed=2)}
    trainer = trained(XPlusTrainer, tmp_path, best, **options, callbacks=[Rotate()])
    evaluated = [x["eval_loss"] for x in trainer.state.log_history if "eval_loss" in x]
    assert trainer.state.best_global_step < 6 and min(evaluated) == trainer.state.best_metric
    assert trainer.evaluate()["eval_loss"] == trainer.state.best_metric


def test_a_best_model_without_what_trained_later_is_refused(tmp_path: Path) -> None:
    class Grow(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                layer = kwargs["model"].model.layers[4].requires_grad_(True)
                kwargs["optimizer"].param_groups[0]["params"].extend(layer.parameters())

    arguments = {
        **SAVED, "max_steps": 4, "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1,
        "load_best_model_at_end": True, "metric_for_best_model": "first", "save_total_limit": 1,
    }  # fmt: skip
    count = iter(range(9, 0, -1))
    with pytest.raises(UserError, match="cannot be put back: model.layers.4"):
        trained(
            XPlusTrainer, tmp_path, {**arguments, "greater_is_better": True},
            eval_dataset=sentences(4), compute_metrics=lambda _: {"first": float(next(count))},
            callbacks=[Grow()],
        )  # fmt: skip


def test_other_layers_than_the_checkpoints_are_refused(tmp_path: Path) -> None:
    trained(XPlusTrainer, tmp_path, SAVED)
    with pytest.raises(UserError, match="holds layers 1-2, and this run trains 1"):
        trained(XPlusTrainer, tmp_path, SAVED, layers=[1], resume=str(tmp_path / "checkpoint-2"))


def test_a_second_trainers_checkpoint_holds_what_the_first_changed(tmp_path: Path) -> None:
    first = trained(XPlusTrainer, tmp_path / "a", {}, layers=[0])
    second = trained(XPlusTrainer, tmp_path / "b", SAVED, layers=[4], model=first.model)
    saved = read_checkpoint(tmp_path / "b" / "checkpoint-2").tensors["trained"]
    assert {name.split(".")[2] for name in saved} == {"0", "4"}
    fresh = trained(
        XPlusTrainer, tmp_path / "b", SAVED, layers=[4], resume=str(tmp_path / "b/checkpoint-2")
    )
    assert_same(fresh, second)


# --- a run that had ended


@pytest.mark.parametrize(
    "arguments",
    [{"max_steps": 3}, {"max_steps": -1, "num_train_epochs": 1.5}, {"max_steps": 6}],
    ids=["steps", "part of an epoch", "a whole epoch"],
)
def test_resumed_where_it_had_ended_it_makes_no_step(arguments: dict, tmp_path: Path) -> None:
    arguments = {**SAVED, "save_steps": 1, "gradient_accumulation_steps": 1, **arguments}
    whole = trained(XPlusTrainer, tmp_path, arguments)
    resume = str(tmp_path / f"checkpoint-{whole.state.global_step}")
    for _ in range(2):
        again = trained(XPlusTrainer, tmp_path, arguments, resume=resume)
        assert again.state.global_step == whole.state.global_step
        assert_same(again, whole)
        assert again._resumed is None


def test_training_draws_no_random_number_of_its_own(tmp_path: Path) -> None:
    stock = trained(Trainer, tmp_path / "stock", {"max_steps": 2})
    after_stock = torch.get_rng_state()
    ours = trained(
        XPlusTrainer, tmp_path / "ours", {"max_steps": 2},
        before=lambda trainer: setattr(trainer.meter, "peak", None),
    )  # fmt: skip
    assert torch.equal(torch.get_rng_state(), after_stock)
    assert ours.meter.peak > 0 and stock.state.global_step == 2
