"""The report of a made-up run: every figure recomputed by hand, pictures that show something."""

import math
import re

import numpy as np
import pytest
from matplotlib.image import imread

from tests.training.finished import DATA, NASTY, make_run, measure, measured, step, write_steps
from xplus_fast.data.corpus_text import describe
from xplus_fast.errors import UserError
from xplus_fast.training import report
from xplus_fast.training.report import (
    _escape,
    _fenced,
    _ranges,
    _table,
    write_report,
)
from xplus_fast.training.report_data import mean_of, smooth, span

SHOWN = (
    r"Enter a \| \`value\`<br>or \*\*nothing\*\* &lt;b>%(name)s&lt;/b> \[x\](y) \_z\_ \$5 &amp;"
    r" \~\~w\~\~"
)


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "a run")


def cells(report, first):
    """The cells of the table row that starts with `first`."""
    rows = [text for text in report.splitlines() if text.startswith(f"| {first} |")]
    assert len(rows) == 1, rows
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", rows[0])[2:-1]]


def drawn(path):
    """Share of a picture's pixels that are not white."""
    pixels = imread(path)[..., :3]
    assert pixels.shape[0] > 200 and pixels.shape[1] > 400
    return float((pixels < 0.99).any(axis=-1).mean())


def test_before_and_after(run):
    said = write_report(run)
    report = (run / "report.md").read_text()
    assert cells(report, "en-fr") == [
        "2.000", "1.800", "1.500", "-25.0 %", "10.0", "14.0", "19.0", "+9.0",
    ]  # fmt: skip
    assert cells(report, "mean of 2")[:4] == ["2.500", "2.250", "1.875", "-25.0 %"]
    assert cells(report, "mean of 2")[4:] == ["15.0", "19.0", "24.0", "+9.0"]
    # 4.09 / 4 - 1
    assert cells(report, "retention text") == ["4.000", "4.040", "4.090", "+2.2 %", *[""] * 4]
    assert report.index("| en-fr |") < report.index("## What changed")
    assert "Translations before: en-fr 1 empty, 0 cut at the token limit.\n" in report
    assert "Translations after" not in report
    assert said.splitlines() == [
        "en-fr           loss 2.000 -> 1.500 (-25.0 %)  chrF++ 10.0 -> 19.0 (+9.0)",
        "fr-en           loss 3.000 -> 2.250 (-25.0 %)  chrF++ 20.0 -> 29.0 (+9.0)",
        "mean of 2       loss 2.500 -> 1.875 (-25.0 %)  chrF++ 15.0 -> 24.0 (+9.0)",
        "retention text  loss 4.000 -> 4.090 (+2.2 %)",
        f"report    {run / 'report.md'}, {run / 'report.html'}",
        f"pictures  {run / 'loss.png'}, {run / 'quality.png'}",
    ]


def test_what_changed_and_how_it_went(run):
    write_report(run)
    report = (run / "report.md").read_text()
    rows = [text for text in report.splitlines() if text.startswith("| bottom | 0-3 |")]
    assert rows == ["| bottom | 0-3 | nothing | 14.0M of 135M | 10.4 % | 4 |"]
    assert "| top | 9, 22-23 | final\\_norm | 14.0M of 135M | 10.4 % | 4 |" in report
    assert "  model.layers.*.mlp.down_proj.weight  x 4" in report
    assert "  model.layers.*.mlp.down_proj.weight  x 3\n  model.norm.weight\n" in report
    assert cells(report, "steps") == ["40", "40"]
    first = (2 + math.exp(-1) + 2 + math.exp(-2)) / 2  # the mean of 5 % of 40 steps
    assert (
        cells(report, "training loss, first -> last 5 % of the steps")
        == [f"{first:.3f} -> 2.000"] * 2
    )
    assert cells(report, "tokens") == ["40.0k, 28.0k computed, 12.0k of them supervised"] * 2
    assert cells(report, "tokens/s, median") == ["500", "500"]
    assert cells(report, "MFU, median") == ["unknown", "40.0 %"]
    assert cells(report, "peak memory") == ["3.00 GB", "3.00 GB"]
    assert cells(report, "time in steps") == ["1:20", "1:20"]
    assert "CPU, 2 threads, float32; 6:40 in all." in report
    assert describe(DATA) in report
    assert cells(report, "torch") == ["2.13.0"]
    assert '````yaml\nmodel: here\nprompt: "```{text}"\n````' in report


def test_samples_survive_markdown(run):
    write_report(run)
    report = (run / "report.md").read_text()
    block = report.split("### en-fr\n\n")[1].split("\n\n")[0]
    assert block.splitlines() == [
        f"| source | en-fr {SHOWN} |",
        "|---|---|",
        r"| reference | ref \| x |",
        "| before | (empty) |",
        "| after bottom | out |",
        r"| after top | \* a \| b<br># c |",
    ]


@pytest.mark.parametrize("text", [NASTY, "a\\b", "\\|", "&lt;", "``", "<!-- x -->", "\u2028a\r\nb"])
def test_escaped_text_renders_as_it_was(text):
    parser = pytest.importorskip("markdown_it", reason="needs markdown-it-py")
    html = parser.MarkdownIt("gfm-like", {"linkify": False}).render(_table(["k"], [[text]]))
    cell = re.search(r"<td>(.*?)</td>", html, re.DOTALL)[1]
    assert not re.search(r"<(?!br)", cell.replace("<br>", ""))  # no markup came to life
    plain = cell.replace("<br>", "\n").replace("&lt;", "<").replace("&gt;", ">")
    plain = plain.replace("&quot;", '"').replace("&amp;", "&")
    assert plain == "\n".join(text.strip().splitlines())


def test_pictures(run):
    write_report(run)
    for name in ("loss.png", "quality.png"):
        assert 0.01 < drawn(run / name) < 0.5
        assert f"]({name})" in (run / "report.md").read_text()
    few = (run / "loss.png").read_bytes()
    write_steps(run, [step(stage, i, 2000) for stage in ("a", "b", "c") for i in range(1, 2001)])
    write_report(run)
    assert (run / "loss.png").read_bytes() != few


def test_picture_grows_with_the_directions(run):
    write_report(run)
    small = imread(run / "quality.png").shape
    tags = [f"en-{x}{y}" for x in "abcd" for y in "abcde"]
    for i, name in enumerate(("before", "after-bottom", "after-top")):
        measure(run, name, measured(1 - i / 10, float(i), tags))
    said = write_report(run)
    large = imread(run / "quality.png").shape
    assert large[1] == small[1] and large[0] > small[0] + 18 * 40
    assert said.splitlines()[0].startswith("mean of 20 ")  # not twenty lines
    assert said.splitlines()[1].startswith("retention text ") and len(said.splitlines()) == 4


def test_nothing_held_out(run):
    for file in (run / "evaluation").iterdir():
        file.unlink()
    said = write_report(run)
    report = (run / "report.md").read_text()
    assert "Nothing was held out" in report and said.startswith("nothing was held out")
    assert "quality.png" not in report + said and not (run / "quality.png").exists()
    assert "## Translations" not in report and drawn(run / "loss.png") > 0.01


def test_before_only(run):
    for name in ("after-bottom", "after-top"):
        (run / "evaluation" / f"{name}.json").unlink()
    said = write_report(run)
    report = (run / "report.md").read_text()
    assert "Measured before only: nothing to compare with." in report
    assert cells(report, "en-fr") == ["2.000", "", "10.0", ""]
    assert "quality.png" not in report + said
    assert said.splitlines()[0] == "en-fr           loss 2.000  chrF++ 10.0"


def test_what_was_not_measured_is_not_explained(run):
    note = "Retention text: its loss should not move."
    write_report(run)
    assert note in (run / "report.md").read_text()
    for name in ("before", "after-bottom", "after-top"):
        measure(run, name, {**measured(1.0, 1.0), "retention": None, "chrf": {}})
    write_report(run)
    report = (run / "report.md").read_text()
    assert "etention" not in report and "higher is better" not in report
    assert "held-out examples, lower is better." in report


def test_retention_only_and_no_chrf(run):
    for name, gain in (("before", 0.0), ("after-bottom", 1.0), ("after-top", 2.0)):
        value = measured(1.0, gain)
        empty = {"chrf": {}, "samples": {}, "off_length": {}, "signature": None}
        measure(run, name, {**value, **empty, "loss": {}})
    said = write_report(run)
    assert said.splitlines()[0] == "retention text  loss 4.000 -> 4.020 (+0.5 %)"
    assert drawn(run / "quality.png") > 0.005
    report = (run / "report.md").read_text()
    assert "|  | loss before | loss after bottom | loss after top | change |\n" in report


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", None, "metrics.jsonl: missing; a report needs the folder of a finished"),
        ("metrics.jsonl", "", "metrics.jsonl: empty"),
        ("metrics.jsonl", '{"stage": "a", "st', "metrics.jsonl:1: not a line of metrics"),
        ("metrics.jsonl", "[1]\n", "metrics.jsonl:1: not a line of metrics"),
        ("run.json", None, "run.json: missing"),
        ("run.json", "{\n}}", "run.json:2: not valid JSON"),
        ("evaluation/before.json", "{", "before.json:1: not valid JSON"),
        ("recipe.yaml", b"\xff", "recipe.yaml: cannot be read"),
    ],
)
def test_bad_folder_is_one_line(run, name, content, message):
    path = run / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError) as e:
        write_report(run)
    assert message in str(e.value) and str(path) in str(e.value) and "\n" not in str(e.value)


def test_small_pieces():
    assert _ranges([3, 0, 1, 2, 30]) == "0-3, 30" and _ranges([]) == ""
    assert _escape(" a\r\nb\u2028c ") == "a<br>b<br>c"
    assert _fenced("no ticks\n\n", "x") == "```x\nno ticks\n```"
    # a row with a gap would make the columns' means those of different rows
    assert mean_of([[1.0, 3.0], [5.0, None], [2.0, 5.0]]) == [1.5, 4.0]
    assert mean_of([[None, 1.0], [1.0, None]]) == [None, None]
    y = np.array([1.0, 5.0])
    assert smooth(np.ones(1)).tolist() == [1.0] and smooth(y).shape == (2,)
    flat = smooth(np.full(100, 3.0))
    assert flat == pytest.approx(np.full(100, 3.0))  # no dip at the ends
    ramp = smooth(np.arange(200.0))
    assert ramp == pytest.approx(np.arange(200.0))  # nor one that stops short of the last steps
    for n in (2, 3, 8, 9, 30):
        assert smooth(np.arange(n, dtype=float)) == pytest.approx(np.arange(n))
    y = np.random.default_rng(0).normal(size=50)
    window = np.hanning(11)[1:-1]  # nine steps at least
    assert smooth(y)[20] == pytest.approx((y[16:25] * window).sum() / window.sum())
    assert ramp[50:150] == pytest.approx(np.arange(50.0, 150.0))  # no lag


def figures(run, monkeypatch):
    """The pictures of a run's report, as matplotlib has them."""
    found = {}
    monkeypatch.setattr(
        report, "write_picture", lambda path, figure: found.update({path.name: figure})
    )
    monkeypatch.setattr(report, "write_text", lambda *_: None)
    write_report(run)
    return found


def test_an_axis_is_long_enough_that_no_small_change_looks_large(run, monkeypatch):
    assert span([1.0, 3.0], 1.0, 0.5) == (0.0, 4.0)
    assert span([2.0, 2.1], 0.5, 0.0) == pytest.approx((1.8, 2.3))
    lines = [{**step("bottom", i, 40), "loss": 3.0 + 1e-3 * (i % 2)} for i in range(1, 41)]
    write_steps(run, [*lines, *({**line, "stage": "top"} for line in lines)])
    measure(run, "before", {**measured(1.0, 0.0), "retention": None})
    for name in ("after-bottom", "after-top"):
        measure(run, name, {**measured(0.999, 0.1), "retention": None})
    found = figures(run, monkeypatch)
    low, high = found["loss.png"].axes[0].get_ylim()
    assert low < 3.0 < 3.001 < high and high - low >= 0.2 * 3.0
    for axes, least in zip(found["quality.png"].axes, (0.2 * 3.0, 10.0), strict=True):
        a, b = axes.get_xlim()
        assert b - a >= least


def test_the_legend_says_what_dots_and_lines_are(run, monkeypatch):
    legend = figures(run, monkeypatch)["loss.png"].axes[0].get_legend()
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts == ["bottom", "top", "dot: a step", "line: moving average"]
