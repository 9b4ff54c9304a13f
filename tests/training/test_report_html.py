"""report.html: its figures are those of the run's files, nothing in it comes to life, and a browser
shows it whole on a phone and on a desk, by day and by night."""

import base64
import hashlib
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from statistics import median

import pytest

from tests.training.finished import NASTY, make_run, measure, measured, step, write_steps
from xplus_fast.evaluation.curve import note_in_run
from xplus_fast.files import write_file
from xplus_fast.manifest import write_manifest
from xplus_fast.training import report_html
from xplus_fast.training.checkpoints import FINAL, FINAL_TENSORS
from xplus_fast.training.report import write_report
from xplus_fast.training.report_html.samples import marked

ALIVE = "</script><img src=x onerror=\"document.title='alive'\"><script>alert(1)</script>{{data}}"
LAYER = {"format": "nf4", "placement": "host", "activations": "recompute"}
CHROMIUMS = (
    "chromium", "chromium-headless-shell", "chromium-browser", "google-chrome",
    "google-chrome-stable", "chrome",
)  # fmt: skip
SAMPLES = [
    ("The old house stands near the river.", "La vieille maison se trouve près de la rivière.",
     "La maison vieux est sur le rivière.", "La vieille maison est près de la rivière."),
    ("We will travel to the mountains tomorrow.", "سنسافر إلى الجبال غدا.",
     "سوف نذهب الجبال.", "سنسافر إلى الجبال غدا."),
    ("The children are playing in the garden.", "孩子们在花园里玩耍。",
     "孩子在公园玩。", "孩子们在花园里玩。"),
    ("x" * 300, "y" * 300, "", "https://example.org/" + "z" * 300),
]  # fmt: skip


def mean(change, wide, verdict):
    return {"change": change, "low": change - wide, "high": change + wide, "verdict": verdict}


CURVE = {
    "0": {"translation": mean(0.0, 0.0, "same"), "reasoning": mean(0.0, 0.0, "same")},
    "0.5": {"translation": mean(3.2, 0.6, "better"), "reasoning": mean(-0.3, 0.9, "same")},
    "0.8": {"translation": mean(2.9, 0.7, "better"), "reasoning": mean(-1.8, 1.0, "worse")},
    "1": {"translation": mean(4.9, 0.7, "better"), "reasoning": mean(-2.6, 1.1, "worse")},
}


@pytest.fixture
def run(tmp_path):
    """A finished run with all that a report can show, and hostile text where users have a say."""
    folder = make_run(tmp_path / "a run & <b>more")
    about = json.loads((folder / "run.json").read_text())
    for stage in about["stages"]:
        stage["plan"] = {
            "layout": {"layers": [{**LAYER, "trains": i in stage["layers"]} for i in range(24)]},
            "device_bytes": {
                "trained layers": 3_000_000_000, "frozen layers": 7_500_000_000, "scratch": 0,
                "optimizer": 2_250_000_000, "gradients": 1_500_000_000,
                "activations": 4_000_000_000, "workspace": 250_000_000,
            },
            "host_total": 12_000_000_000, "predicted_tokens_per_s": 612.0,
            "notes": [f"needs 4.5 GB more {ALIVE}"],
        }  # fmt: skip
        stage["memory"] = {
            "weights": 10_480_000_000, "gradients": 1_500_000_000, "optimizer": 2_250_000_000,
            "activations, head and workspace": 3_900_000_000,
            "held by the allocator beyond its peak": 410_000_000, "outside of the allocator": 10**9,
        }  # fmt: skip
        (folder / stage["name"] / FINAL).mkdir(parents=True)
        made = write_file(folder / stage["name"] / FINAL / FINAL_TENSORS, [b"x"], hashed=True)
        write_manifest(folder / stage["name"] / FINAL, {FINAL_TENSORS: made})
    about["device"], about["versions"] = f"CPU {ALIVE}", {"torch": "2.13.0", ALIVE: ALIVE}
    (folder / "run.json").write_text(json.dumps(about))
    (folder / "recipe.yaml").write_text(f"model: here # {ALIVE}\n")
    tags = ("en-fr", "fr-en", "en-ar", "zh_Hans-en", "en-sw", ALIVE)
    for at, (name, factor, gain) in enumerate(
        [("before", 1.0, 0.0), ("after-bottom", 0.9, 4.0), ("after-top", 0.75, 9.0)]
    ):
        value = measured(factor, gain, tags)
        value["loss"]["en-sw"] = [2.9, 2.5, 3.0][at]
        value["samples"] = {
            tag: [
                {"source": source, "reference": reference, "output": first if at == 0 else last}
                for source, reference, first, last in SAMPLES
            ]
            for tag in tags[:3]
        } | {tag: [{"source": NASTY, "reference": ALIVE, "output": ALIVE * at}] for tag in tags[3:]}
        measure(folder, name, value)
    for number in (10, 20):
        measure(folder, f"during-bottom-{number}", measured(0.95, number / 10))
    curve = {
        "checksums": [hashlib.sha256(b"x").hexdigest()] * 2, "points": CURVE,
        "front": ["1", "0.5", "0"], "chosen": "0.5", "words": [f"0.5: the best {ALIVE}"],
    }  # fmt: skip
    (folder / "evaluation/curve.json").write_text(json.dumps(curve))
    return folder


class Page(HTMLParser):
    """What of a page a browser would make of it: elements, and the text of each script."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.scripts, self.rows = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.lasttag == "script" and self.cdata_elem:
            self.scripts[-1] += data
        elif self.lasttag in ("td", "th", "button"):
            self.rows[-1][-1] += data.replace("\u00a0", " ").strip()

    def row(self, first):
        (found,) = [row for row in self.rows if row and row[0] == first]
        return found[1:]


def read(run):
    write_report(run)
    page = Page((run / "report.html").read_text())
    return page, json.loads(page.scripts[0])


def test_figures_are_those_of_the_files(run):
    page, data = read(run)
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    drawn = [
        (stage["name"], *figures)
        for stage in data["stages"]
        for figures in zip(*(stage[k] for k in ("step", "loss", "rate", "speed")), strict=True)
    ]
    keys = ("stage", "step", "loss", "learning_rate", "tokens_per_second")
    assert drawn == [tuple(line[key] for key in keys) for line in lines]
    assert page.row("en-fr") == [
        "2.000",
        "1.800",
        "1.500",
        "-25.0 %",
        "10.0",
        "14.0",
        "19.0",
        "+9.0",
    ]
    assert page.row("en-sw")[:4] == ["2.900", "2.500", "3.000", "+3.4 %"]
    assert page.row("retention text")[:4] == ["4.000", "4.040", "4.090", "+2.2 %"]
    # planned, used: weights are what is trained and what is frozen
    (weights,) = {tuple(row[1:]) for row in page.rows if row[0] == "weights"}
    assert weights == ("10.50 GB", "10.48 GB")
    (rest,) = {tuple(row[1:]) for row in page.rows if row[0].startswith("activations")}
    assert rest == ("4.25 GB", "3.90 GB")
    (whole,) = {tuple(row[1:]) for row in page.rows if row[0] == "on the device, in all"}
    assert whole == ("18.50 GB", "19.54 GB")
    (speed,) = {tuple(row[1:]) for row in page.rows if row[0] == "tokens/s, median"}
    assert speed == ("612", f"{median([500.0] * 39 + [9.0]):.0f}")
    assert page.row("0.5") == [
        "+3.20 (+2.60 to +3.80) better",
        "-0.30 (-1.20 to +0.60) same",
        "yes, chosen",
    ]
    assert [p["label"] for p in data["curve"]["points"] if p["front"]] == ["0", "0.5", "1"]
    assert {p["label"]: p["reasoning"] for p in data["curve"]["points"]} == {
        label: means["reasoning"] for label, means in CURVE.items()
    }
    during = [row for row in page.rows if row[:2] == ["bottom", "20"]]
    assert during == [["bottom", "20", "2.375", "17.0", "4.020"]]


def test_nothing_of_a_user_comes_to_life(run):
    page, data = read(run)
    assert not [tag for tag, _ in page.elements if tag in ("img", "iframe", "object")]
    assert len(page.scripts) == 2 == sum(tag == "script" for tag, _ in page.elements)
    assert not [a for _, attrs in page.elements for a in attrs if a.startswith("on")]
    text = (run / "report.html").read_text()
    assert "<b>more" not in text and "<img" not in text
    assert text.count("&lt;/script&gt;&lt;img src=x onerror=") > 10  # it is all shown
    (policy,) = [a["content"] for t, a in page.elements if "http-equiv" in a]
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy
    # a stage's name may hold what it likes as well
    write_steps(run, [step(ALIVE, i, 3) for i in range(1, 4)])
    page, data = read(run)
    assert data["stages"][0]["name"] == ALIVE and len(page.scripts) == 2


def test_no_external_url(run):
    page, _ = read(run)
    links = [a[k] for _, a in page.elements for k in ("href", "src", "srcset", "action") if k in a]
    assert links == ["data:,"]
    frame = Path(report_html.__file__).parent
    for name in ("page.html", "page.css", "page.js"):
        text = (frame / name).read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"//\w|@import|url\(|fetch|XMLHttp|innerHTML|eval\(", text), name


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("a b c", "a x c", ("a <del>b</del> c", "a <ins>x</ins> c")),
        ("same.", "same.", ("same.", "same.")),
        ("go.", "go!", ("go<del>.</del>", "go<ins>!</ins>")),
        ("孩子玩", "孩子们玩", ("孩子玩", "孩子<ins>们</ins>玩")),
        ("<i> & b", "<u> & b", ("<del>&lt;i&gt;</del> &amp; b", "<ins>&lt;u&gt;</ins> &amp; b")),
        (" ", "a", ('<span class="empty">(empty)</span>', "a")),
    ],
)  # fmt: skip
def test_differences_are_marked(before, after, expected):
    assert marked(before, after) == expected


def test_figures_that_are_no_numbers_leave_gaps(run):
    lines = [step("bottom", i, 3) for i in range(1, 4)]
    lines[1] |= {"loss": math.nan, "tokens_per_second": None}
    write_steps(run, lines)
    stage = read(run)[1]["stages"][0]
    assert stage["loss"] == [lines[0]["loss"], None, lines[2]["loss"]]
    assert stage["speed"] == [500.0, None, 9.0] and stage["smooth"][1] is None


def test_little_to_show(tmp_path):
    run = make_run(tmp_path / "run")  # without plans, as earlier versions left it
    for file in (run / "evaluation").iterdir():
        file.unlink()
    page, data = read(run)
    text = (run / "report.html").read_text()
    assert "Nothing was held out" in text and data["curve"] is None
    for title in ("Translations", "While it trained", "Translation against reasoning"):
        assert f"<h2>{title}</h2>" not in text


def test_a_curve_comes_into_the_report_and_goes_when_the_run_is_trained_again(run):
    curve = json.loads((run / "evaluation/curve.json").read_text())
    (run / "evaluation/curve.json").unlink()
    note_in_run(run, curve)
    assert not (run / "report.html").exists()  # of a version that wrote none
    (run / "evaluation/curve.json").unlink()
    assert read(run)[1]["curve"] is None
    note_in_run(run, curve)
    page = Page((run / "report.html").read_text())
    assert len(json.loads(page.scripts[0])["curve"]["points"]) == 4
    made = write_file(run / "top" / FINAL / FINAL_TENSORS, [b"y"], hashed=True)
    write_manifest(run / "top" / FINAL, {FINAL_TENSORS: made})
    assert read(run)[1]["curve"] is None


@pytest.fixture(scope="module")
def browser():
    needed = "needs playwright (pip install playwright) and a Chromium"
    api = pytest.importorskip("playwright.sync_api", reason=needed)
    with api.sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        found = next(filter(None, map(shutil.which, CHROMIUMS)), own)
        if not Path(found).exists():
            pytest.skip(needed)
        chromium = playwright.chromium.launch(executable_path=found)
        yield chromium
        chromium.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_in_a_browser(run, tmp_path, browser, width, scheme):
    write_report(run)
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(dialog.message))
    page.on("request", lambda request: asked.append(request.url))
    page.goto((run / "report.html").as_uri())
    picture = tmp_path / f"{width}-{scheme}.png"
    page.screenshot(path=picture, full_page=True)
    assert picture.stat().st_size > 20_000
    wide = "e => e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display != 'inline'"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(f"[...document.querySelectorAll('body *')].filter({wide}).length") == 0
    assert page.title().startswith("a run &")
    lightness = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]")
    assert (int(lightness) > 128) == (scheme == "light")

    assert page.locator("#loss circle.dot").count() == 80
    assert page.locator("#loss path.smooth").count() == 4
    page.locator("#loss svg").hover()
    page.keyboard.press("Tab")
    page.locator("#loss svg").focus()
    page.keyboard.press("ArrowRight")
    told = page.locator("#loss .tip").inner_text().split("\n")
    stage, at = re.fullmatch(r"(bottom|top), step (\d+) of 40", told[0]).groups()
    line = next(
        line
        for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if (line["stage"], line["step"]) == (stage, int(at))
    )
    assert told[1] == f"loss {line['loss']:.4f}"
    assert float(told[2].removeprefix("learning rate ")) == pytest.approx(
        line["learning_rate"], 0.01
    )
    assert told[3] == f"{line['tokens_per_second']:.0f} tokens/s"
    page.locator("#curve svg").hover()
    assert re.match(r"at 0", page.locator("#curve .tip").inner_text())

    def order():
        cells = page.locator("table.sorts tbody th[scope=row]")
        return [text[:5] for text in cells.all_inner_texts()]

    loss = page.get_by_role("button", name="loss after top")
    loss.click()
    assert order()[:2] == ["en-fr", "fr-en"] and order()[2] in ("en-ar", "en-sw")
    rising = order()
    loss.click()
    assert order()[0] == rising[-1] and order()[-1] == "en-fr"
    before = page.locator("#loss svg").get_attribute("viewBox")
    page.set_viewport_size({"width": 900, "height": 400})  # a phone is turned
    page.wait_for_selector(f"#loss svg:not([viewBox='{before}'])")
    assert said == [] and asked == [(run / "report.html").as_uri()]
    page.close()


def test_the_widest_table_fits_any_screen(tmp_path, browser):
    run = make_run(tmp_path / ("r" * 100))
    names = ["w" * 40, "align-the-middle", "top"]
    about = json.loads((run / "run.json").read_text())
    about["stages"] = [{**about["stages"][0], "name": name} for name in names]
    (run / "run.json").write_text(json.dumps(about))
    write_steps(run, [step(name, i, 3) for name in names for i in range(1, 4)])
    for name in names:
        measure(run, f"after-{name}", measured(0.9, 4.0, ("d" * 60, "en-fr")))
    write_report(run)
    page = browser.new_page()
    page.goto((run / "report.html").as_uri())
    for width in (320, 400, 641, 940, 941, 1400):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") == width
    page.close()
