"""The page as text: complete and inert.  And as a browser shows it: silent, offline, sortable."""

import base64
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from test_report import MODELS, add_openvino, add_reference, edit, make_run, write_json

from toolchain.errors import ArtifactError
from toolchain.report.collect import collect
from toolchain.report.curves import read_curve
from toolchain.report.html_tables import FILTERS
from toolchain.report.page import Point, render_page
from toolchain.report.write import write_report

CHROMIUM = shutil.which("chromium")
PHONE, DESKTOP = {"width": 400, "height": 800}, {"width": 1280, "height": 900}
TIMEOUT_MS = 120_000  # Plotly is 5 MB of source: seconds to parse where other work keeps every core busy
HOSTILE = """</script><script>document.title = "broken"</script>'"<b>&amp;%{x}"""


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "quickstart")


class Page(HTMLParser):
    """Tags with their attributes, and the text outside of scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags, self.text, self.scripts, self._inside = [], "", [], None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._inside = tag
            if tag == "script":
                self.scripts.append("")

    def handle_endtag(self, tag):
        if tag == self._inside:
            self._inside = None

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside is None:
            self.text += data


PIXEL = (
    "data:image/png;base64,"
    + base64.b64encode(
        b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x00\x01\x00\x00\x00\x01\x08\x00\x00\x00\x00:~\x9bU"
        b"\x00\x00\x00\nIDATx\x9cc`\x00\x00\x00\x02\x00\x01H\xaf\xa4q\x00\x00\x00\x00IEND\xaeB`\x82"
    ).decode()
)


def add_examples(run: Path, wrong: dict[str, set[int]], count: int = 16, answer: str = "another name") -> None:
    """Answers on `count` pictures, of which a model gets `wrong` wrong."""
    for folder in run.glob("measured/*/cpu"):
        images = []
        for index in range(count):
            is_wrong = index in wrong.get(folder.parent.name, set())
            images.append(
                {
                    **{"index": index, "true": [f"name {index}"], "top1": answer if is_wrong else f"name {index}"},
                    **{"cosine": 0.25, "right": not is_wrong, "picture": PIXEL},
                }
            )
        write_json(folder / "examples.json", {"set": "stix", "images": images})


def shown_examples(html: str) -> list[str]:
    return re.findall(r'<img src="[^"]*" alt="([^"]*)"', html)


def test_the_page_refers_to_nothing_outside_itself(run):
    add_examples(run, {})
    page = Page(render_page([run], collect([run]), title=run.name))
    for tag, attributes in page.tags:
        assert tag not in ("iframe", "object", "embed", "base", "form")
        assert attributes.get("src", "data:image/png;").startswith("data:image/png;")
        assert attributes.get("href", "data:,") == "data:,"
    policies = [tag["content"] for _, tag in page.tags if tag.get("http-equiv") == "Content-Security-Policy"]
    assert [policy.split(";")[0] for policy in policies] == ["default-src 'none'"]
    assert any(tag.get("name") == "viewport" for _, tag in page.tags)


def test_the_page_can_be_read_without_its_script(run):
    text = Page(render_page([run], collect([run]), title=run.name)).text
    for expected in (
        "quickstart",
        "0.480 [0.466, 0.499]",
        "69.5 [67.5, 71.6]",
        "+12.0 points",
        "Example CPU <2>",
        "0123456789ab",
        "# a <comment> & an ampersand",
    ):
        assert expected in text


def test_the_script_gets_the_numbers_of_the_report(run):
    report = collect([run])
    data = json.loads(Page(render_page([run], report, title=run.name)).scripts[0])
    (front,) = data["fronts"]
    assert [(point["name"], point["p50_ms"], point["top1"]) for point in front["points"]] == [
        (row["name"], row["p50_ms"], row["top1"]) for row in report["rows"]
    ]
    assert front["line"] == sorted([row["p50_ms"], 100 * row["top1"]] for row in report["rows"] if row["pareto"])
    assert [curve["stage"] for curve in data["curves"]] == ["student", "baseline"]
    assert list(data["curves"][0]["terms"]) == ["task", "crd", "fd", "icl"]


def test_points_can_be_filtered_as_rows_are():
    assert set(FILTERS) <= set(Point.__annotations__)


def test_eight_pictures_are_shown_those_first_on_which_models_part(run):
    add_examples(run, {"teacher-onnxruntime-fp32": {3, 12}, "baseline-onnxruntime-fp32": {3, 9}})
    html = render_page([run], collect([run]), title=run.name)
    assert shown_examples(html) == [f"name {index}" for index in (0, 1, 2, 3, 4, 5, 9, 12)]
    third = html.split('alt="name 3"')[1].split("</figure>")[0]
    right, wrong = third.split("<li class=")[1:]
    assert right.startswith("right><b>name 3</b>")
    assert re.findall(r">([^<>]+) 0\.25</span>", right) == ["student fp32", "student int8"]
    assert wrong.startswith("wrong><b>another name</b>")
    assert re.findall(r">([^<>]+) 0\.25</span>", wrong) == ["teacher fp32", "baseline fp32"]
    assert "8 of 16 images spaced evenly over stix" in html


def test_a_report_without_pictures_has_no_such_section(run):
    assert "Sample predictions" not in render_page([run], collect([run]), title=run.name)
    add_examples(run, {}, count=0)
    assert "Sample predictions" not in render_page([run], collect([run]), title=run.name)


def test_only_pictures_are_embedded(run):
    add_examples(run, {}, count=1)
    path = run / "measured" / "student-onnxruntime-int8" / "cpu" / "examples.json"
    path.write_text(path.read_text().replace("data:image/png;base64,", "https://example.org/"))
    with pytest.raises(ArtifactError, match="expected an image as a data URI, got 'https://example"):
        render_page([run], collect([run]), title=run.name)


def make_hostile(run: Path) -> None:
    """Markup wherever a run holds text of its own."""
    for path in run.glob("measured/*/cpu/examples.json"):
        path.write_text(path.read_text().replace("name 0", json.dumps(HOSTILE)[1:-1]).replace("stix", "a<b>"))
    for path in run.glob("exported/*/manifest.json"):
        summary = json.loads(path.read_text())["summary"]
        edit(path, summary=summary | {"runtime": HOSTILE, "role": f"{summary['role']}{HOSTILE}"}, revision=HOSTILE)
    for path in run.glob("measured/*/cpu/profile.json"):
        edit(path, flags=[HOSTILE], machine={"name": HOSTILE, HOSTILE: HOSTILE})
    for path in run.glob("measured/*/cpu/evaluation.json"):
        evaluation = json.loads(path.read_text())
        edit(path, headline=HOSTILE, sets={HOSTILE: evaluation["sets"]["stix"]})
    lines = [{"step": 0, "loss": 1.0, "terms": {HOSTILE: {"weighted": 1.0}, "b": {"weighted": 1.0}}}]
    (run / "student" / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "recipe.yaml").write_text(HOSTILE)


def test_text_of_a_run_stays_text(run):
    add_examples(run, {})
    plain = Page(render_page([run], collect([run]), title=run.name))
    make_hostile(run)
    page = Page(render_page([run], collect([run]), title=run.name))
    assert len(page.scripts) == len(plain.scripts) == 3
    assert {tag for tag, _ in page.tags} == {tag for tag, _ in plain.tags}
    assert HOSTILE in page.text
    json.loads(page.scripts[0])


def test_a_run_without_curves_recipe_or_measurements_has_a_page(tmp_path):
    run = make_run(tmp_path / "bare", models={("adopted", "fp32"): (1.0, 1000, 1)})
    for name in ("student", "baseline", "teacher", "student-int8", "measured"):
        shutil.rmtree(run / name)
    (run / "recipe.yaml").unlink()
    text = Page(render_page([run], collect([run]), title=run.name)).text
    assert "not measured" in text
    assert "No model has both a latency and an accuracy yet." in text
    assert "Training" not in text


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_curve_has_what_the_log_has(tmp_path):
    lines = [
        {"step": 0, "loss": 3.0, "images_per_s": 10.0, "terms": {"task": {"unweighted": 1.0, "weighted": 2.0}}},
        {"step": 5, "loss": 2.0, "terms": {"task": {"weighted": 1.5}, "fd": {"weighted": 0.5}}},
    ]
    assert read_curve(write_lines(tmp_path / "train.jsonl", lines)) == {
        "step": [0, 5],
        "loss": [3.0, 2.0],
        "images_per_s": [10.0, None],
        "terms": {"task": [2.0, 1.5], "fd": [None, 0.5]},
    }


def test_a_long_curve_is_averaged_and_keeps_its_end(tmp_path):
    lines = [{"step": step, "loss": float(step)} for step in range(10_000)]
    curve = read_curve(write_lines(tmp_path / "train.jsonl", lines))
    assert len(curve["step"]) <= 600
    assert curve["step"][-1] == 9999
    stretch = curve["step"][0] + 1
    assert curve["loss"][0] == sum(range(stretch)) / stretch


def test_a_diverged_loss_is_a_gap(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"step": 0, "loss": NaN}\n{"step": 1, "loss": Infinity}\n')
    assert read_curve(tmp_path / "train.jsonl")["loss"] == [None, None]


def test_an_empty_curve_is_no_error(run):
    (run / "student" / "train.jsonl").write_text("")
    assert "Training loss of baseline" in render_page([run], collect([run]), title=run.name)


@pytest.mark.parametrize("line", ["{", "[]", "3", '{"loss": 1}', '{"step": "x"}'])
def test_a_damaged_curve_is_named_with_its_line(tmp_path, line):
    (tmp_path / "train.jsonl").write_text('{"step": 0}\n' + line + "\n")
    with pytest.raises(ArtifactError) as raised:
        read_curve(tmp_path / "train.jsonl")
    assert str(raised.value) == f"{tmp_path / 'train.jsonl'}:2: expected a JSON object with a step, got {line!r}"


# --- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("needs chromium: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


class Visit:
    """A page opened from its file, with everything it said and asked for."""

    def __init__(self, browser, path: Path, viewport=DESKTOP, color_scheme="light") -> None:
        self.page = browser.new_context(viewport=viewport, color_scheme=color_scheme).new_page()
        self.page.set_default_timeout(TIMEOUT_MS)
        self.said, self.requested = [], []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.requested.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("#front-0 .point")


@pytest.fixture
def visit(browser):
    """Opens pages that are closed after the test: forgotten ones would go on drawing beside the next."""
    yield lambda *args: Visit(browser, *args)
    for context in browser.contexts:
        context.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("page") / "quickstart")
    write_report([run], run)
    return run / "report.html"


@pytest.mark.browser
@pytest.mark.parametrize(("viewport", "color_scheme"), [(PHONE, "dark"), (DESKTOP, "light")], ids=["phone", "desktop"])
def test_the_page_is_silent_asks_for_nothing_and_fits(visit, written, viewport, color_scheme):
    visited = visit(written, viewport, color_scheme)
    visited.page.locator("summary").click()
    assert visited.said == []
    assert visited.requested == [written.as_uri()]
    assert visited.page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    assert visited.page.locator("#front-0 .point").count() == len(MODELS)
    assert visited.page.locator("#loss-0 .scatterlayer .js-line").count() == 5  # the loss and its four terms
    assert visited.page.locator("#speed .scatterlayer .js-line").count() == 2


@pytest.mark.browser
def test_the_policy_stops_a_request(visit, written, tmp_path):
    damaged = tmp_path / "damaged.html"
    damaged.write_text(written.read_text().replace("</main>", "<img src='https://example.invalid/x.png'></main>"))
    visited = visit(damaged)
    assert any("Content Security Policy" in said for said in visited.said)


@pytest.mark.browser
def test_a_run_full_of_markup_runs_nothing(visit, run):
    make_hostile(run)
    write_report([run], run)
    visited = visit(run / "report.html")
    assert visited.said == []
    assert visited.page.title() == "quickstart - clipkd report"
    assert f"teacher{HOSTILE} fp32" in visited.page.locator("#front-0 .textpoint").all_text_contents()


@pytest.mark.browser
@pytest.mark.parametrize("viewport", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_labels_do_not_cover_each_other(visit, written, viewport):
    page = visit(written, viewport).page
    boxes = [label.bounding_box() for label in page.locator("#front-0 .textpoint text").all()]
    assert len(boxes) == len(MODELS)
    for place, a in enumerate(boxes):
        assert a["x"] >= 0
        assert a["x"] + a["width"] <= viewport["width"]
        for b in boxes[:place]:
            apart_x = a["x"] + a["width"] <= b["x"] or b["x"] + b["width"] <= a["x"]
            # the box of an SVG text has some empty pixels above and below its letters
            apart_y = a["y"] + a["height"] <= b["y"] + 4 or b["y"] + b["height"] <= a["y"] + 4
            assert apart_x or apart_y


@pytest.mark.browser
def test_hovering_a_point_shows_its_numbers(visit, written):
    page = visit(written).page
    box = page.locator("#front-0 .point").last.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    hover = page.locator("#front-0 .hoverlayer .hovertext")
    hover.wait_for()
    for expected in ("student int8", "p50 ms: 0.480 [0.466, 0.499]", "stix top-1 %: 69.5 [67.5, 71.6]"):
        assert expected in hover.text_content()


def column(page, header):
    headers = [re.sub(r"\s+", " ", text).strip() for text in page.locator("table.models thead th").all_text_contents()]
    place = headers.index(header) + 1
    button = page.locator(f"table.models thead th:nth-child({place}) button")
    return button, lambda: page.locator(f"table.models tbody tr > :nth-child({place})").all_text_contents()


@pytest.mark.browser
def test_a_click_sorts_and_another_reverses(visit, written):
    page = visit(written).page
    button, cells = column(page, "images/s")
    assert cells() == ["469", "1,630", "1,648", "3,125"]
    button.click()
    assert cells() == ["469", "1,630", "1,648", "3,125"]
    button.click()
    assert cells() == ["3,125", "1,648", "1,630", "469"]  # by number: as text, 469 would come first
    assert page.locator("table.models th[aria-sort=descending]").count() == 1
    button, cells = column(page, "name")
    button.focus()
    page.keyboard.press("Enter")
    assert cells() == ["baseline fp32", "student fp32", "student int8", "teacher fp32"]
    assert page.locator("table.models th[aria-sort]").count() == 1


@pytest.mark.browser
def test_filters_hide_points_and_rows_and_show_them_again(visit, written):
    visited = visit(written)
    page = visited.page
    assert page.locator(".filters select").count() == 1, "rows differ in precision alone"
    rows, points = page.locator("table.models tbody tr:visible"), page.locator("#front-0 .point")
    page.locator("select[data-field=precision]").select_option("int8")
    assert [text.split("\u2605")[0][:12] for text in rows.all_text_contents()] == ["student int8"]
    assert points.count() == 1
    assert page.locator("table.sets tbody tr:visible").count() == 3
    page.locator("select[data-field=precision]").select_option("*")
    assert rows.count() == points.count() == len(MODELS)
    assert visited.said == []


@pytest.mark.browser
@pytest.mark.parametrize("viewport", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_pictures_load_and_fit_and_their_answers_follow_the_filters(visit, run, viewport):
    add_openvino(run)
    add_reference(run)
    assert render_page([run], collect([run]), title="x").count("<td>measured/student-pytorch-eager/cpu</td>") == 1
    long_name = "mathematical bold fraktur capital letter with a diaeresis and a macron below " * 2
    add_examples(run, {"student-onnxruntime-int8": {0}}, answer=long_name)
    write_report([run], run)
    visited = visit(run / "report.html", viewport)
    page = visited.page
    assert page.locator(".example img").count() == 8
    assert page.evaluate("[...document.querySelectorAll('.example img')].every(image => image.naturalWidth === 1)")
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    first = page.locator(".example").first
    assert first.locator("li:visible").count() == 2
    page.locator("select[data-field=precision]").select_option("int8")
    assert first.locator("li:visible span:visible").all_text_contents() == [
        *("student int8 openvino 0.25", "student int8 onnxruntime 0.25")
    ]
    page.locator("select[data-field=precision]").select_option("fp32")
    assert first.locator("li:visible").count() == 1
    assert visited.said == []


@pytest.mark.browser
def test_a_front_without_a_row_left_is_hidden(visit, tmp_path):
    run = make_run(tmp_path / "two")
    for folder in (run / "measured").iterdir():
        shutil.copytree(folder / "cpu", folder / "orin")
        edit(folder / "orin" / "profile.json", device="orin", machine={"name": "Orin"})
    write_report([run], run)
    page = visit(run / "report.html").page
    assert page.locator("figure:visible .plot[id^=front]").count() == 2
    page.locator("select[data-field=device]").select_option("orin")
    assert page.locator("figure:visible .plot[id^=front]").count() == 1
    assert page.locator("table.models tbody tr:visible").count() == len(MODELS)


@pytest.mark.browser
def test_stages_and_histograms_are_drawn_where_they_were_kept(visit, run):
    random = np.random.default_rng(0)
    for folder in run.glob("measured/*/cpu"):
        stages_ms = {"decode": 0.1, "preprocess": 0.2, "image_tower": 0.3, "match": 0.01}
        edit(folder / "profile.json", e2e_stages_ms=stages_ms)
        np.savez(folder / "samples.npz", image_ms=random.gamma(4, 0.2, 500).astype(np.float32))
    write_report([run], run)
    visited = visit(run / "report.html")
    page = visited.page
    cells = page.locator("table.stages tbody tr").first.locator("td").all_text_contents()
    assert cells[:4] == ["0.1", "0.2", "0.3", "0.01"]
    assert page.locator("#histogram-0 .scatterlayer .js-line").count() == len(MODELS)
    page.locator("select[data-field=precision]").select_option("int8")
    assert page.locator("#histogram-0 .scatterlayer .js-line").count() == 1
    assert page.locator("table.stages tbody tr:visible").count() == 1
    assert visited.said == []


def test_a_histogram_counts_every_latency_that_is_not_an_outlier(run):
    (folder,) = run.glob("measured/student-onnxruntime-int8/cpu")
    np.savez(folder / "samples.npz", image_ms=np.full(1000, 0.48, np.float32))
    (histogram,) = json.loads(Page(render_page([run], collect([run]), title=run.name)).scripts[0])["histograms"]
    assert [row["name"] for row in histogram["rows"]] == ["student int8"]
    assert sum(histogram["rows"][0]["share"]) == pytest.approx(1, abs=0.01)


@pytest.mark.browser
def test_what_is_unknown_sorts_last_both_ways(visit, run):
    write_json(run / "exported" / "a-model" / "manifest.json", {"summary": {}})
    write_report([run], run)
    page = visit(run / "report.html").page
    button, cells = column(page, "p50 ms")
    for _ in range(2):
        button.click()
        assert cells()[-1] == "-"
    assert cells()[0].startswith("3.20")
