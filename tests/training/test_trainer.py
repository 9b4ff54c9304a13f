"""XPlusTrainer as a drop-in: Trainer's curve, exact resume, steps that stop with a reason."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DataCollatorWithFlattening, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

import xplus_kernels as ops
from tests.tiny import VOCABULARY, difference, select, tiny_model
from xplus_fast import XPlusTrainer
from xplus_fast.data.collate import PackCollator
from xplus_fast.errors import UserError
from xplus_fast.model.layout import UpdateLayout
from xplus_fast.training.optimizer import AdamW


def sentences(n=48, seed=1, least=4, most=30):
    g = torch.Generator().manual_seed(seed)
    rows = []
    for length in torch.randint(least, most, (n,), generator=g).tolist():
        ids = torch.randint(0, VOCABULARY, (length,), generator=g).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * 2 + ids[2:]})
    return rows


def pad(rows):
    longest = max(len(r["input_ids"]) for r in rows)

    def column(values, fill):
        return torch.tensor([v + [fill] * (longest - len(v)) for v in values])

    return {
        "input_ids": column([r["input_ids"] for r in rows], 0),
        "labels": column([r["labels"] for r in rows], -100),
        "attention_mask": column([[1] * len(r["input_ids"]) for r in rows], 0),
    }


def arguments(folder, **changes):
    options = dict(
        max_steps=20, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        learning_rate=2e-3, weight_decay=0.1, logging_steps=1, use_cpu=True, report_to=[],
        disable_tqdm=True, save_strategy="no", seed=3,
    )  # fmt: skip
    return TrainingArguments(str(folder), **{**options, **changes})


def losses(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def train(cls, model, folder, *, resume=None, collator=pad, rows=None, callbacks=(), **changes):
    options = {k: changes.pop(k) for k in ("layers", "also") if k in changes}
    trainer = cls(
        model, arguments(folder, **changes), train_dataset=rows or sentences(),
        data_collator=collator, callbacks=list(callbacks), **options,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume) if resume else trainer.train()
    return trainer


@pytest.mark.parametrize("kind", ["qwen3", "qwen3-tied", "llama", "qwen2"])
@pytest.mark.parametrize(
    "collator", [pad, DataCollatorWithFlattening(return_flash_attn_kwargs=True)]
)
def test_twenty_steps_give_the_curve_of_hugging_face(kind, collator, tmp_path):
    """The flags select, as in a script written for Trainer; only the class differs."""
    stock = train(Trainer, select(tiny_model(kind), [1, 2]), tmp_path)
    ours = train(XPlusTrainer, select(tiny_model(kind), [1, 2]), tmp_path, collator=collator)
    assert losses(ours) == pytest.approx(losses(stock), rel=1e-4)
    assert losses(ours)[-1] < losses(ours)[0] - 0.1  # something was learnt
    mine, theirs = ours.model.state_dict(), stock.model.state_dict()
    untouched = tiny_model(kind).state_dict()
    for name, value in theirs.items():
        if ".layers.1." in name or ".layers.2." in name:
            assert difference(mine[name], value) < 1e-4, name
        else:
            assert torch.equal(mine[name], untouched[name]), name


def test_weight_decay_spares_what_trainer_spares(tmp_path):
    stock = Trainer(tiny_model(), arguments(tmp_path))
    ours = XPlusTrainer(tiny_model(), arguments(tmp_path))
    counts = []
    for trainer in (stock, ours):
        groups = trainer.create_optimizer().param_groups
        counts.append([(g["weight_decay"], sum(p.numel() for p in g["params"])) for g in groups])
    assert counts[0] == counts[1]
    assert isinstance(ours.optimizer, AdamW)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resuming_is_exact(dtype, tmp_path):
    whole = train(
        XPlusTrainer, tiny_model().to(dtype), tmp_path / "a", layers="1-2", save_strategy="steps",
        save_steps=7,
    )  # fmt: skip
    names = {p.name for p in (tmp_path / "a" / "checkpoint-7").iterdir()}
    assert names == {
        "manifest.json", "optimizer.safetensors", "selection.json", "trained.safetensors",
        "trainer_state.json", "training.json",
    }  # fmt: skip
    again = train(
        XPlusTrainer, tiny_model().to(dtype), tmp_path / "b", layers="1-2",
        resume=tmp_path / "a" / "checkpoint-7",
    )  # fmt: skip
    assert losses(again) == losses(whole)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name


def test_resuming_another_selection_is_refused(tmp_path):
    train(
        XPlusTrainer,
        tiny_model(),
        tmp_path,
        layers="1-2",
        max_steps=2,
        save_strategy="steps",
        save_steps=2,
    )
    with pytest.raises(UserError, match="holds layers 1-2, and this run trains 3"):
        train(XPlusTrainer, tiny_model(), tmp_path, layers="3", resume=True)
    with pytest.raises(UserError, match="no whole checkpoint"):
        train(XPlusTrainer, tiny_model(), tmp_path / "none", layers="3", resume=True)


def test_bf16_weights_take_steps_smaller_than_their_spacing(tmp_path):
    """Plain bf16 AdamW at this rate would round nearly every update away."""
    model = tiny_model().to(torch.bfloat16)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    ours = train(
        XPlusTrainer, model, tmp_path, layers=[2], learning_rate=1e-5, weight_decay=0.0,
        lr_scheduler_type="constant",
    )  # fmt: skip
    p = ours.model.model.layers[2].mlp.down_proj.weight
    master = ours.optimizer.optimizer.state[p]["master"]
    start = before["model.layers.2.mlp.down_proj.weight"].float()
    moved = (master - start).abs()
    assert 1e-5 < moved.mean() < 2.1e-4  # 20 steps of at most 1e-5 each
    assert torch.equal(p, master.to(torch.bfloat16))


@pytest.mark.parametrize("setting", [{"gradient_checkpointing": True}, {}])
def test_trainer_settings_cannot_change_the_flops(setting, tmp_path):
    class Count(TrainerCallback):
        total = None

        def on_step_begin(self, *_, **__):
            self.counter = FlopCounterMode(display=False)
            self.counter.__enter__()

        def on_pre_optimizer_step(self, *_, **__):
            self.counter.__exit__(None, None, None)
            Count.total = self.counter.get_total_flops()

    train(
        XPlusTrainer,
        tiny_model(),
        tmp_path,
        layers="top:2",
        max_steps=1,
        callbacks=[Count()],
        **setting,
    )
    first = Count.total
    train(XPlusTrainer, tiny_model(), tmp_path, layers="top:2", max_steps=1, callbacks=[Count()])
    assert first == Count.total > 0


def test_metrics_count_real_tokens_and_necessary_work(tmp_path):
    rows = sentences(n=16)
    ours = train(
        XPlusTrainer, tiny_model(), tmp_path, layers="bottom:2", rows=rows, max_steps=2,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    lines = [line for line in ours.state.log_history if "loss" in line]
    assert sum(line["tokens"] for line in lines) == sum(len(r["input_ids"]) for r in rows)
    assert sum(line["supervised"] for line in lines) == sum(len(r["input_ids"]) - 2 for r in rows)
    assert lines[-1]["tokens_seen"] == sum(line["tokens"] for line in lines)
    for line in lines:
        assert 0 < line["mfu"] < 1.5 and line["seconds"] > 0 and line["memory_bytes"] > 1e7


def test_evaluation_and_compute_metrics_work(tmp_path):
    def accuracy(prediction):
        shifted = torch.tensor(prediction.predictions[:, :-1]).argmax(-1)
        labels = torch.tensor(prediction.label_ids[:, 1:])
        return {"accuracy": (shifted == labels)[labels != -100].float().mean().item()}

    results = []
    for cls in (Trainer, XPlusTrainer):
        trainer = cls(
            tiny_model(), arguments(tmp_path, per_device_eval_batch_size=4),
            eval_dataset=sentences(n=8, least=12, most=13), data_collator=pad,
            compute_metrics=accuracy,
        )  # fmt: skip
        results.append(trainer.evaluate())
        trainer.compute_metrics = None
        results[-1]["loss_only"] = trainer.evaluate()["eval_loss"]
    for key in ("eval_loss", "eval_accuracy", "loss_only"):
        assert results[1][key] == pytest.approx(results[0][key], rel=1e-5)


def asked_alike(n=32):
    """Sentences that begin with one of three prompts."""
    g = torch.Generator().manual_seed(2)
    prompts = torch.randint(0, VOCABULARY, (3, 14), generator=g).tolist()
    return [
        {
            "input_ids": prompts[i % 3] + row["input_ids"],
            "labels": [-100] * 14 + row["labels"],
        }
        for i, row in enumerate(sentences(n))
    ]


def test_our_collator_shares_prompts_here_and_nowhere_else(tmp_path):
    rows = asked_alike()
    stock = train(Trainer, select(tiny_model(), [1, 2]), tmp_path, rows=rows)
    collator = PackCollator()
    ours = train(XPlusTrainer, tiny_model(), tmp_path, rows=rows, collator=collator, layers=[1, 2])
    assert losses(ours) == pytest.approx(losses(stock), rel=1e-4)
    for line in ours.state.log_history[:-1]:
        assert line["tokens_computed"] < 0.9 * line["tokens"]
    # a library's own model would read a row with a prefix as something else
    assert not len(collator(rows)["layout"].members)
    apart = PackCollator(shared_prefixes=False)
    plain = train(XPlusTrainer, tiny_model(), tmp_path, rows=rows, collator=apart, layers=[1, 2])
    assert losses(plain) == pytest.approx(losses(stock), rel=1e-4)
    assert all(i["tokens_computed"] == i["tokens"] for i in plain.state.log_history[:-1])


def test_metrics_of_batches_with_shared_prompts(tmp_path):
    """Logits, labels and inputs are those of the sequences as they are, in their order."""
    seen = []

    def metrics(prediction):
        seen.append([prediction.predictions, prediction.label_ids, prediction.inputs])
        return {}

    rows = asked_alike(8)
    for shared in (True, False):
        trainer = XPlusTrainer(
            tiny_model(),
            arguments(
                tmp_path, per_device_eval_batch_size=8, include_for_metrics=["inputs"],
            ),
            eval_dataset=rows, data_collator=PackCollator(shared_prefixes=shared),
            compute_metrics=metrics,
        )  # fmt: skip
        loss = trainer.evaluate()["eval_loss"]
        found = trainer.predict(rows)
        assert found.label_ids[0].tolist() == [
            y for row in rows for y in [-100, *row["labels"][1:]]
        ]
        trainer.compute_metrics = None
        assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-5)
        assert trainer.data_collator.shared_prefixes is shared
    tokens = sum(len(r["input_ids"]) for r in rows)
    for logits, labels, inputs in seen:
        assert logits.shape[1] == labels.shape[1] == inputs.shape[1] == tokens


class Doubling(PackCollator):
    def __call__(self, rows):
        return super().__call__([*rows, *rows])


def test_a_collator_made_of_ours_is_called(tmp_path):
    rows = asked_alike()
    trainer = train(
        XPlusTrainer, tiny_model(), tmp_path, rows=rows, collator=Doubling(), layers=[1]
    )
    first = trainer.state.log_history[0]
    assert first["tokens_computed"] < 0.8 * first["tokens"] and first["tokens"] % 2 == 0


@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing_factor": 0.1}, {"neftune_noise_alpha": 5.0},
        {"compute_loss_func": lambda outputs, labels, num_items_in_batch=None: (
            torch.nn.functional.cross_entropy(
                outputs.logits[0, :-1], labels[0, 1:], reduction="sum"
            ) / num_items_in_batch
        )},
    ],
    ids=lambda o: next(iter(o)),
)  # fmt: skip
def test_prompts_stay_apart_where_sharing_would_change_the_loss(tmp_path, options):
    curves = []
    for shared in (None, False):
        given = {k: v for k, v in options.items() if k == "compute_loss_func"}
        changes = {k: v for k, v in options.items() if k not in given}
        trainer = XPlusTrainer(
            tiny_model(), arguments(tmp_path, max_steps=3, **changes), train_dataset=asked_alike(),
            data_collator=PackCollator(shared_prefixes=shared), layers=[1, 2], **given,
        )  # fmt: skip
        trainer.train()
        curves.append(losses(trainer))
    assert curves[0] == curves[1]


def test_the_best_checkpoint_is_kept_and_loaded(tmp_path):
    rows = sentences()
    trainer = XPlusTrainer(
        tiny_model(),
        arguments(
            tmp_path, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
            load_best_model_at_end=True, save_total_limit=1, max_steps=8, learning_rate=0.5,
        ),
        layers="all", train_dataset=rows, eval_dataset=rows[:8], data_collator=pad,
    )  # fmt: skip
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.exists()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-6)


def test_nothing_supervised_stops_with_the_reason(tmp_path):
    rows = [{**r, "labels": [-100] * len(r["labels"])} for r in sentences()]
    with pytest.raises(UserError, match="step 1: nothing is supervised"):
        train(XPlusTrainer, tiny_model(), tmp_path, layers="1", rows=rows)


def test_a_loss_that_is_not_finite_stops_before_the_step(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[4].mlp.down_proj.weight[0, 0] = float("inf")
    before = model.model.layers[1].mlp.down_proj.weight.clone()
    with pytest.raises(UserError, match="step 1: the gradient norm is nan"):
        train(XPlusTrainer, model, tmp_path, layers="1")
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight, before)


def test_gradients_that_are_all_zero_stop_at_step_one(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    before = model.model.layers[1].mlp.down_proj.weight.clone()
    with pytest.raises(UserError, match="every gradient is zero"):
        train(XPlusTrainer, model, tmp_path, layers="1", weight_decay=0.5)
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight, before)  # no decay either


def test_false_resumes_nothing(tmp_path):
    train(XPlusTrainer, tiny_model(), tmp_path, layers="1", max_steps=1, resume=None)
    trainer = XPlusTrainer(
        tiny_model(), arguments(tmp_path, max_steps=1), layers="1",
        train_dataset=sentences(), data_collator=pad,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=False)
    assert trainer.state.global_step == 1


def test_an_optimizer_of_other_parameters_is_refused(tmp_path):
    model = tiny_model()
    stale = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(UserError, match="not the prepared model's"):
        XPlusTrainer(model, arguments(tmp_path), optimizers=(stale, None))
    fresh = torch.optim.SGD(model.parameters(), lr=1.0)  # prepared by now
    XPlusTrainer(model, arguments(tmp_path), optimizers=(fresh, None))


def test_what_cannot_be_honoured_is_refused(tmp_path):
    with pytest.raises(UserError, match="nothing trains"):
        XPlusTrainer(tiny_model().requires_grad_(False), arguments(tmp_path))
    with pytest.raises(UserError, match="out of range"):
        XPlusTrainer(tiny_model(), arguments(tmp_path), layers="0-9")


def test_its_micro_batches_are_summed_by_the_gemm(tmp_path, monkeypatch):
    added, real = [], ops.weight_gradient

    def seen(dy, x, out, *, add):
        added.append(add)
        return real(dy, x, out, add=add)

    monkeypatch.setattr(ops, "weight_gradient", seen)
    made = arguments(tmp_path, max_steps=1, gradient_accumulation_steps=3)
    options = {"train_dataset": sentences(n=16), "data_collator": pad}
    XPlusTrainer(tiny_model(), made, layers="1-2", **options).train()
    assert added == [False] * 8 + [True] * 16  # four matrices of two layers, three times


def test_sums_in_fp32_are_for_one_process(tmp_path, monkeypatch):
    """DistributedDataParallel wants gradients in the weights' dtype: it would end with a trace."""
    model = tiny_model().to(torch.bfloat16)
    options = {"layers": "1", "update": UpdateLayout(sums=32), "train_dataset": sentences(n=8)}
    trainer = XPlusTrainer(model, arguments(tmp_path), data_collator=pad, **options)
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    with pytest.raises(UserError, match="sums: 32 is for one process"):
        trainer.create_optimizer()
    trainer.model.float()  # whose sums are fp32 whatever is asked for
    trainer.optimizer = None
    assert trainer.create_optimizer() is not None


SCRIPT = """
import json, sys
from tests.tiny import tiny_model
from tests.training.test_trainer import arguments, losses, pad, sentences, XPlusTrainer
folder, accumulation = sys.argv[1], int(sys.argv[2])
trainer = XPlusTrainer(
    tiny_model(), arguments(folder, gradient_accumulation_steps=accumulation, ddp_backend="gloo",
    max_steps=10, save_strategy="steps", save_steps=5), layers="1-2",
    train_dataset=sentences(n=80), data_collator=pad)
trainer.train()
if trainer.is_world_process_zero():
    lines = [l for l in trainer.state.log_history if "loss" in l]
    json.dump([losses(trainer), [l["tokens"] for l in lines]], open(folder + "/losses.json", "w"))
"""


def test_two_processes_give_the_curve_of_one(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    root = str(Path(__file__).parents[2])
    curves = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        run = subprocess.run(
            [
                sys.executable, "-m", "torch.distributed.run", "--standalone",
                f"--nproc-per-node={processes}", str(tmp_path / "script.py"), str(folder),
                str(2 // processes),
            ],
            cwd=root, capture_output=True, text=True, timeout=240,
            env={**os.environ, "PYTHONPATH": f"{root}:{root}/kernels", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert run.returncode == 0, run.stderr[-3000:]
        curves.append(json.loads((folder / "losses.json").read_text()))
        assert (folder / "checkpoint-10" / "manifest.json").exists()
    assert curves[0][1] == curves[1][1]
    assert curves[1][0] == pytest.approx(curves[0][0], rel=1e-5)


def test_trl_sft_trainer_takes_the_prepared_model(tmp_path):
    trl = pytest.importorskip("trl", "1.16")  # older ones want logits for a figure
    from datasets import Dataset

    from xplus_fast import prepare_model

    rows = [{"input_ids": r["input_ids"], "labels": r["labels"]} for r in sentences()]
    curves = []
    for prepare in (False, True):
        model = select(tiny_model(), [1, 2])
        ours = {"optimizer_cls_and_kwargs": (AdamW, {"lr": 2e-3})} if prepare else {}
        if prepare:
            prepare_model(model)
        config = trl.SFTConfig(
            str(tmp_path), max_steps=6, per_device_train_batch_size=4, learning_rate=2e-3,
            logging_steps=1, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no",
            dataset_kwargs={"skip_prepare_dataset": True}, gradient_checkpointing=prepare,
            bf16=False,
        )  # fmt: skip
        trainer = trl.SFTTrainer(
            model, config, train_dataset=Dataset.from_list(rows), data_collator=pad,
            processing_class=_Tokenizer(), **ours,
        )  # fmt: skip
        trainer.train()
        curves.append(losses(trainer))
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)


def _Tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokens = {f"t{i}": i for i in range(VOCABULARY)}
    inner = Tokenizer(models.WordLevel(tokens, unk_token="t0"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="t1", pad_token="t0")


def test_a_loss_may_ask_for_gradients_itself(tmp_path):
    """A gradient penalty: in every micro-batch, and what is trained is what autograd would add."""

    class Penalized(XPlusTrainer):
        def compute_loss(self, model, inputs, *args, **options):
            loss = super().compute_loss(model, inputs, *args, **options)
            trained = [p for p in model.parameters() if p.requires_grad]
            assert all(g.any() for g in torch.autograd.grad(loss, trained, retain_graph=True))
            return loss

    runs = [
        train(kind, tiny_model(), tmp_path / kind.__name__, layers="1-2", max_steps=3,
              gradient_accumulation_steps=3)
        for kind in (XPlusTrainer, Penalized)
    ]  # fmt: skip
    assert losses(runs[0]) == losses(runs[1])
    for name, value in runs[0].model.state_dict().items():
        assert torch.equal(runs[1].model.state_dict()[name], value), name
