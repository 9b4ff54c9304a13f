"""What is killed: a two-stage run, `--restart`, export, `evaluate RUN`, `prepare`; all tiny."""

import gc
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests import assets
from tests.faults.injected import Ran, run

COMPUTED = ("stage", "step", "loss", "grad_norm", "learning_rate", "tokens", "supervised")
# Whose contents say how long something took, or that do not change what comes out
TIMED = ("run.json", "report.md", "report.html", ".log")
PAIRS = [
    ("The old house stands near the river.", "La vieille maison se trouve près de la rivière."),
    ("My sister reads a book every evening.", "Ma sœur lit un livre tous les soirs."),
    ("We will travel to the mountains tomorrow.", "Nous partirons demain pour les montagnes."),
    ("The children are playing in the garden.", "Les enfants jouent dans le jardin."),
    ("He bought fresh bread this morning.", "Il a acheté du pain frais ce matin."),
    ("The train arrives at the station at noon.", "Le train arrive à la gare à midi."),
    ("She wrote a long letter to her mother.", "Elle a écrit une longue lettre à sa mère."),
    ("The weather was cold during the winter.", "Le temps était froid pendant l'hiver."),
    ("They cooked dinner for all their friends.", "Ils ont préparé le dîner pour leurs amis."),
    ("The teacher explained the difficult lesson.", "Le professeur a expliqué la leçon difficile."),
    ("Our neighbours have a very large dog.", "Nos voisins ont un très grand chien."),
    ("The museum is closed on Monday.", "Le musée est fermé le lundi."),
    ("I forgot my umbrella at the office.", "J'ai oublié mon parapluie au bureau."),
    ("The doctor works at the hospital at night.", "Le médecin travaille la nuit à l'hôpital."),
    ("They are building a new bridge here.", "Ils construisent ici un nouveau pont."),
    ("The farmer sells vegetables at the market.", "Le fermier vend des légumes au marché."),
]


@dataclass(frozen=True)
class Scenario:
    """A command, again and again until it is done, in a folder as `after` left it."""

    name: str
    arguments: tuple[str, ...]
    after: str = ""  # the scenario that made the state it begins with
    then: tuple[str, ...] = ()  # the command that goes on; empty: the same
    kinds: tuple[str, ...] = ("kill", "torn", "EIO", "ENOSPC")  # of faults


SCENARIOS = {
    s.name: s
    for s in (
        Scenario("train", ("train", "recipe.yaml")),
        Scenario("train-hidden", ("train", "hidden.yaml")),
        Scenario("restart", ("train", "recipe.yaml", "--restart", "stages.0.name=deep", "seed=1"),
                 after="train"),
        # a restart that was killed, gone on with as a run: it is the new one or, thrown away before
        # anything began, one that was never begun
        Scenario("restart-then-train", ("train", "recipe.yaml", "--restart"), after="train",
                 then=("train", "recipe.yaml"), kinds=("kill",)),
        Scenario("export", ("export", "run", "exported"), after="train"),
        Scenario("evaluate", ("evaluate", "run", "evaluate.yaml", "--base", "{model}"),
                 after="train"),
        Scenario("prepare", ("prepare", "prepare.yaml")),
        Scenario("prepare-restart", ("prepare", "prepare.yaml", "--restart"), after="prepare"),
    )
}  # fmt: skip


class Stage:
    """The folder in which scenarios are played; one object a process.

    shared: the model, the data and the states that scenarios begin with, made once.
    """

    def __init__(self, shared: Path, root: Path) -> None:
        self.shared, self.root = shared, root

    def set(self, scenario: Scenario) -> None:
        """Put the state there that the scenario begins with."""
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(self.shared / "states" / scenario.after, self.root)

    def play(self, arguments: tuple[str, ...], fault: Any = None) -> Ran:
        from xplus_fast import cli

        model = str(self.shared / "model")
        return run(lambda: cli.main([a.format(model=model) for a in arguments]), self.root, fault)

    def results(self) -> dict[str, bytes]:
        """What came out, by file: a killed command gone on with gives it byte for byte."""
        found = {}
        for file in sorted(p for p in self.root.rglob("*") if p.is_file()):
            name = str(file.relative_to(self.root))
            if file.parent.name.startswith("checkpoint-"):
                continue  # which of them are left says only when the rest was removed
            if file.relative_to(self.root).parts[0] == "hidden":
                continue  # what is in it is what there was time and room for
            # an old run names the folder in which its state was made
            places = rb"/(stage(-\d+)?|shared/making)"
            stages = re.escape(str(self.root.parent).encode()) + places
            content = re.sub(stages, b"ROOT", file.read_bytes())
            if file.name in TIMED:
                content = b""
            elif file.name == "metrics.jsonl":
                lines = [json.loads(line) for line in content.splitlines()]
                content = json.dumps([[x[key] for key in COMPUTED] for x in lines]).encode()
            found[name] = content
        return found


def make_shared(shared: Path) -> None:
    """The model, the data and the states, each of a command that nothing disturbs."""
    shared.mkdir(parents=True)
    assets.SMALL_VOCABULARY = 600
    assets.save_small_tokenizer(shared / "tokenizer")
    _save_model(shared / "model", shared / "tokenizer")
    for file, pairs, end in (("pairs", PAIRS[:10], ""), ("more", PAIRS[8:], "not JSON\n")):
        lines = [json.dumps({"translation": {"en": e, "fr": f}}) + "\n" for e, f in pairs]
        (shared / f"{file}.jsonl").write_text("".join(lines) + end)
    for side, code in enumerate(("en", "fr")):
        (shared / f"set.{code}").write_text("\n".join(p[side] for p in PAIRS[:3]) + "\n")
    begin = shared / "states" / ""
    begin.mkdir(parents=True)
    for name, tree in _recipes(shared).items():
        (begin / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    for name in ("train", "prepare"):
        stage = Stage(shared, shared / "making")
        shutil.copytree(begin, stage.root, ignore=shutil.ignore_patterns("train", "prepare"))
        ran = stage.play(SCENARIOS[name].arguments)
        assert ran.code == 0, ran.said
        os.rename(stage.root, shared / "states" / name)


def _recipes(shared: Path) -> dict[str, Any]:
    pairs = str(shared / "pairs.jsonl")
    data = {"sources": [{"path": pairs}], "heldout": 2, "pack_tokens": 128, "cache": "cache"}
    return {
        "recipe": {
            "model": str(shared / "model"),
            "output": "run",
            "data": data,
            "stages": [
                {"layers": "bottom:1", "name": "low", "learning_rate": 1e-3, "steps": 2},
                {"layers": "top:1", "name": "high", "learning_rate": 1e-3, "steps": 3},
            ],
            "training": {"tokens_per_step": 128, "save_steps": 1, "save_total_limit": 2},
            "evaluation": {"translate": 1, "samples": 1, "max_new_tokens": 2, "every": 2, "few": 1},
        },
        "hidden": {  # the first epoch keeps what enters the trained layer, the others take it
            "model": str(shared / "model"),
            "output": "run",
            "data": {**data, "heldout": 0, "cache_hidden": "hidden"},
            "stages": [{"layers": "top:1", "learning_rate": 1e-3, "epochs": 2}],
            "training": {"tokens_per_step": 1024, "save_steps": 2},
        },
        "evaluate": {
            "output": "verdict",
            "translation": {
                "sets": [{
                    "name": "mine", "files": str(shared / "set.{lang}"), "directions": ["en-fr"],
                }],
                "metrics": ["chrf"], "max_new_tokens": 2,
            },
            "bootstrap": 5, "batch_size": 2,
        },
        "prepare": {
            "output": "prepared",
            "quality": {"method": "none"},
            "corpora": [
                {"path": pairs, "name": "pairs"},
                {"path": str(shared / "more.jsonl"), "name": "more"},
            ],
            "evaluation": {"files": [], "flores": []},
            "on_error": "skip", "part_pairs": 10, "shard_conversations": 20, "workers": 1,
        },
    }  # fmt: skip


def _save_model(folder: Path, tokenizer_folder: Path) -> None:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = assets.load_tokenizer(tokenizer_folder)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=1024,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    for file in tokenizer_folder.iterdir():
        shutil.copy(file, folder)


def warm() -> None:
    """Import what the commands import, once for all forked processes; leave out what is slow and
    writes nothing: drawing, and measuring this machine's speed."""
    import sacrebleu  # noqa: F401
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401

    import xplus_fast.data.preparation.report
    import xplus_fast.data.preparation.run  # noqa: F401
    import xplus_fast.evaluation.evaluate
    import xplus_fast.training.export  # noqa: F401
    import xplus_fast.training.report
    import xplus_fast.training.run  # noqa: F401
    from xplus_fast.data.languages import language_name
    from xplus_fast.files import write_bytes

    def draw(*given: Any) -> bool:
        write_bytes(next(path for path in given if isinstance(path, Path)), b"a picture")
        return True

    def draw_all(out: Path, manifest: Any) -> list[str]:
        for name in ("funnel.png", "lengths.png"):
            draw(out / name)
        return ["funnel.png", "lengths.png"]

    xplus_fast.training.report._draw_loss = draw
    xplus_fast.training.report._draw_quality = draw
    xplus_fast.evaluation.evaluate.verdict.draw = draw
    xplus_fast.data.preparation.report._draw = draw_all
    xplus_fast.training.throughput.gemm_rate = lambda *_, **__: 1e12
    language_name("fr")
    gc.collect()
    gc.freeze()  # a collection in a forked process would look at all of it, and copy its pages
