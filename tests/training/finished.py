"""The folder of a made-up finished run, every figure of which can be recomputed by hand."""

import json
import math

NASTY = "Enter a | `value`\nor **nothing** <b>%(name)s</b> [x](y) _z_ $5 & ~~w~~"


def step(stage, i, n):
    return {
        "stage": stage, "step": i, "steps": n, "loss": 2.0 + math.exp(-i), "grad_norm": 1.0,
        "learning_rate": 1e-4 / i, "tokens": 1000,
        "tokens_computed": 700, "supervised": 300, "tokens_seen": 1000 * i,
        "seconds": 2.0, "tokens_per_second": 500.0 if i < n else 9.0,
        "mfu": 0.4 if stage == "top" else None, "memory_bytes": 10**9 * (3 if i == 2 else 1),
    }  # fmt: skip


DATA = {
    "sequences": 900, "tags": {"en-fr": 450, "fr-en": 450}, "tokens": 90_000, "supervised": 9_000,
    "pack_tokens": 1024, "formats": {"x.jsonl": "translation"},
    "files": {}, "left": {}, "unread": [], "shares": {}, "sources": ["pairs"],
    "skipped": {}, "skipped_first": {}, "cut": 0, "heldout": {}, "kept_out": 0, "template": True,
}  # fmt: skip


def measured(factor, gain, tags=("en-fr", "fr-en"), output="out"):
    return {
        "loss": {tag: (i + 2) * factor for i, tag in enumerate(tags)},
        "chrf": {tag: 10.0 * (i + 1) + gain for i, tag in enumerate(tags)},
        "samples": {
            tag: [{"source": f"{tag} {NASTY}", "reference": "ref | x", "output": output}]
            for tag in tags[:2]
        },
        "signature": "nrefs:1|nw:2",
        "retention": {"loss": 4.0 + gain / 100, "tokens": 77},
        "off_length": {tag: {"empty": int(gain == 0), "truncated": 0} for tag in tags[:1]},
    }


def make_run(folder):
    """A run of two stages, 40 steps each, with all its files."""
    (folder / "evaluation").mkdir(parents=True)
    lines = [step(stage, i, 40) for stage in ("bottom", "top") for i in range(1, 41)]
    write_steps(folder, lines)
    stages = [
        {
            "name": name, "layers": layers, "also": also, "steps": 40,
            "trained_parameters": 14_000_000, "total_parameters": 135_000_000,
            "tensors": [f"model.layers.{i}.mlp.down_proj.weight" for i in layers] + extra,
            "data": DATA,
        }
        for name, layers, also, extra in (
            ("bottom", [0, 1, 2, 3], [], []),
            ("top", [9, 22, 23], ["final_norm"], ["model.norm.weight"]),
        )
    ]  # fmt: skip
    about = {
        "stages": stages,
        "device": "CPU, 2 threads", "dtype": "float32", "versions": {"torch": "2.13.0"},
        "seconds": 400.0,
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(about))
    (folder / "recipe.yaml").write_text('model: here\nprompt: "```{text}"\n')
    measure(folder, "before", measured(1.0, 0.0, output=""))
    measure(folder, "after-bottom", measured(0.9, 4.0))
    measure(folder, "after-top", measured(0.75, 9.0, output="* a | b\n# c"))
    return folder


def write_steps(folder, lines):
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)


def measure(folder, name, value):
    (folder / "evaluation" / f"{name}.json").write_text(json.dumps(value))
