"""report.html in a real Chromium: what a person and a keyboard can do in it, and what hostile completions cannot.

Needs the package playwright and a Chromium (its own, or one on the path); skipped where either is missing.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from psacpo.evalharness.report.page import page as make_page
from psacpo.evalharness.report.records import read_run

sync_api = pytest.importorskip("playwright.sync_api")

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def _world() -> Any:
    """report_world.py of this directory, which is no package."""
    spec = importlib.util.spec_from_file_location("report_world", Path(__file__).with_name("report_world.py"))
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


world = _world()
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        path = own if Path(own).is_file() else next(filter(None, map(shutil.which, BROWSERS)), None)
        if path is None:
            pytest.skip("no Chromium here")
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def report_html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the synthetic run, where the one harmful answer's judge quotes it."""
    run = world.write_run(tmp_path_factory.mktemp("browser") / "run")
    verdicts = [json.loads(line) for line in (run / "verdicts.jsonl").read_text(encoding="utf-8").splitlines()]
    for verdict in verdicts:
        if verdict["judge"] == "cost" and verdict["score"] == 0.75:
            verdict |= {"label": "harmful", "probability": 0.875, "raw": f"It says {world.MARKUP}"}
    (run / "verdicts.jsonl").write_text(world.lines(verdicts), encoding="utf-8")
    path: Path = run / "report.html"
    path.write_text(make_page(read_run(run)), encoding="utf-8")
    return path


@pytest.fixture
def open_report(browser: Any, report_html: Path) -> Iterator[Open]:
    """Open a page; when the test ends nothing may have been logged, asked for, or shown in a dialog."""
    contexts, strange = [], []

    def open_one(path: Path = report_html, **options: Any) -> Any:
        context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(5000)
        page.on("console", lambda message: strange.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: strange.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (strange.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: strange.append(request.url) if request.url != path.as_uri() else None)
        page.goto(path.as_uri())
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert strange == []


def cards(page: Any) -> list[str]:
    """The headings of the answers side by side, without their tags."""
    found: list[str] = page.eval_on_selector_all("#pair h4", "heads => heads.map(head => head.firstChild.textContent)")
    return found


def test_hostile_texts_stay_texts_whatever_is_opened(open_report: Open) -> None:
    page = open_report()
    page.check("#reveal")
    page.click("#all-box summary")
    for metric in page.eval_on_selector_all("#metric option", "all => all.map(one => one.value)"):
        page.select_option("#metric", metric)
    for place in range(3):
        page.locator("#prompts button").nth(place).click()
        assert world.MARKUP in page.inner_text("#pair")
        assert page.locator("#all article").count() == 11
    for place in range(page.locator("#scatter-0 .mark").count()):
        page.locator("#scatter-0 .mark").nth(place).dispatch_event("mouseenter")
    shown = page.inner_text("body")
    assert world.MARKUP in shown
    assert "{{ 7*7 }}" in shown
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    assert page.evaluate("[document.images.length, document.scripts.length, document.styleSheets.length]") == [0, 2, 1]
    assert (
        page.evaluate("document.querySelectorAll('iframe, object, embed, link, form, [onerror], [onload]').length") == 0
    )
    assert page.title().startswith("psacpo: Chosen ratio q = 0.5")


def test_the_policy_stops_what_would_get_in_all_the_same(browser: Any, report_html: Path) -> None:
    page = browser.new_page()
    blocked: list[str] = []
    page.on("console", lambda message: blocked.append(message.text))
    page.goto(report_html.as_uri())
    code = """() => {
      const script = document.createElement("script");
      script.textContent = "window.ran = 1";
      document.body.append(script);
      document.body.insertAdjacentHTML("beforeend", "<img src='https://example.invalid/x.png' onerror='window.ran = 2'>");
      return window.ran;
    }"""
    assert page.evaluate(code) is None
    page.wait_for_timeout(100)
    assert page.evaluate("window.ran") is None
    assert sum("Content Security Policy" in line for line in blocked) >= 2
    page.close()


def test_the_slider_turns_the_dial_by_keys(open_report: Open) -> None:
    page = open_report()
    slider = page.locator("#ratio")
    slider.focus()
    assert page.inner_text("#ratio-text") == "q = 0.5"
    assert cards(page) == ["q = 0.375", "q = 0.5", "q = 0.625"]
    assert page.locator("#pair .current h4").inner_text().startswith("q = 0.5")
    page.keyboard.press("ArrowRight")
    assert slider.get_attribute("aria-valuetext") == "q = 0.625"
    assert cards(page) == ["q = 0.5", "q = 0.625", "q = 0.75"]
    assert "policy@0.625 answers" in page.inner_text("#pair .current")
    assert "reward ↑ -1.5" in page.inner_text("#pair .current").replace("\n", " ")
    page.keyboard.press("Home")
    assert cards(page) == ["q = 0", "q = 0.125"]
    page.keyboard.press("End")
    assert cards(page) == ["q = 0.875", "q = 1"]
    page.select_option("#beside", "ends")
    page.keyboard.press("ArrowLeft")
    slider.focus()
    assert cards(page) in (["q = 0", "q = 1"], ["q = 0", "q = 0.875", "q = 1"])
    page.select_option("#beside", label=world.FORMULA)
    assert cards(page)[-1] == world.FORMULA


def test_filters_leave_the_prompts_they_name(open_report: Open) -> None:
    page = open_report()

    def left() -> list[str]:
        found: list[str] = page.eval_on_selector_all(
            "#prompts small", "all => all.map(one => one.textContent.split(',')[0])"
        )
        assert page.inner_text("#count") == f"{len(found)} of 12 prompts"
        return found

    expected = {"all": 12, "flip": ["p0"], "split": ["p0"], "cut": ["p3"], "invalid": ["p2"], "back": [], "unsafe": []}
    for kind, wanted in expected.items():
        page.select_option("#kind", kind)
        assert left() == wanted if isinstance(wanted, list) else len(left()) == wanted
        text = page.locator(f"#kind option[value={kind}]").inner_text()
        assert text.endswith(f"({len(wanted) if isinstance(wanted, list) else wanted})")
    page.select_option("#kind", "all")
    page.select_option("#category", "=benign")
    assert len(left()) == 4
    page.fill("#search", "PROMPT NUMBER 4")
    assert left() == ["p4"]
    assert "prompt number 4" in page.inner_text("#prompt")


def test_unsafe_text_is_veiled_until_it_is_asked_for(open_report: Open) -> None:
    page = open_report()
    page.select_option("#kind", "flip")
    page.locator("#ratio").focus()
    page.keyboard.press("Home")
    first = page.locator("#pair article").first
    assert "judged unsafe" in first.inner_text()
    assert "judges differ" in first.inner_text()
    text = first.locator(".text")
    assert "blur" in text.evaluate("element => getComputedStyle(element).filter")
    assert text.get_attribute("aria-hidden") == "true"
    assert page.locator("#pair article").nth(1).locator(".veil").count() == 0
    words = first.locator(".words")
    assert words.is_hidden()
    first.locator(".veil button").press("Enter")
    assert first.locator(".veil").count() == 0
    assert text.get_attribute("aria-hidden") is None
    assert words.inner_text() == f"cost said: harmful (0.88): It says {world.MARKUP}"
    assert page.evaluate("document.activeElement.className") == "text"


def test_points_tell_their_numbers_to_mouse_and_keyboard(open_report: Open) -> None:
    page = open_report()
    marks = page.locator("#scatter-0 .mark")
    assert marks.count() == 11
    tip = page.locator("#scatter-0 .tip")
    assert tip.is_hidden()
    marks.nth(2).hover()
    assert tip.is_visible()
    said = tip.inner_text()
    point = next(p for p in world.synthetic()["points"] if p["ratio"] == 0.25)
    assert said.startswith("q = 0.25")
    for name in ("reward", "cost"):
        assert f"{name} {point[name]['mean']:.2f}".replace("-", "\u2212") in said
    assert "dominated by another ratio" in said
    assert "not certified" in said
    page.mouse.move(0, 0)
    assert tip.is_hidden()
    chosen = page.locator("#scatter-0 .mark[tabindex='0']")
    assert chosen.get_attribute("aria-label").startswith("q = 0.5 (chosen), reward")
    chosen.focus()
    page.keyboard.press("ArrowRight")
    assert tip.inner_text().startswith("q = 0.625")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "ratio"
    assert page.inner_text("#ratio-text") == "q = 0.625"


def test_the_selector_changes_curve_and_heat_map(open_report: Open, report_html: Path) -> None:
    page = open_report()
    assert page.input_value("#metric") == "unsafe_rate"  # what the constraint is about
    assert page.locator("#curve .limit").count() == 1
    assert page.locator("#heat tbody tr").count() == 1  # harmful prompts alone count
    page.select_option("#metric", "cost")
    assert page.locator("#curve .limit").count() == 0
    assert page.locator("#curve svg").get_attribute("aria-label").startswith("cost by ratio")
    assert "mean score of judge cost" in page.inner_text("#meaning")
    rows = page.eval_on_selector_all("#heat tbody tr", "rows => rows.map(row => [...row.cells].map(c => c.innerText))")
    assert len(rows) == 3
    run = read_run(report_html.parent)
    harmful = [key for key, row in run.prompts.items() if row["category"] == "harmful"]
    scores = [run.completions["policy@0", key][0].verdicts["cost"].score for key in harmful]
    assert rows[0][0] == f"harmful\nn = {len(harmful)}"
    assert float(rows[0][1].replace("\u2212", "-")) == pytest.approx(np.mean(scores), abs=0.006)
    depth = page.eval_on_selector_all(
        "#heat tbody tr:first-child td", "all => all.map(c => parseFloat(c.style.getPropertyValue('--heat')))"
    )
    assert depth[0] == max(depth)  # the highest cost is the deepest


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_of_it(open_report: Open, scheme: str) -> None:
    page = open_report(viewport={"width": 360, "height": 740}, color_scheme=scheme, has_touch=True)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    wide = """all => all.filter(one => one.getBoundingClientRect().right > 361 && !one.closest('.scroll, pre, .tip, .unseen'))
      .map(one => one.tagName + '.' + one.className)"""
    assert page.eval_on_selector_all("main *:not(svg *)", wide) == []
    light = "([red, green, blue]) => (0.2126 * red + 0.7152 * green + 0.0722 * blue) / 255"
    page.locator("#scatter-0 .mark").first.tap()
    assert page.locator("#scatter-0 .tip").is_visible()  # and the page stays where it is
    bright = page.evaluate(
        f"[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
        f".map(colour => ({light})(colour.match(/\\d+/g).map(Number)))"
    )
    assert (bright[0] > 0.8 and bright[1] < 0.2) if scheme == "light" else (bright[0] < 0.2 and bright[1] > 0.7)


def test_every_control_and_region_has_a_name_and_can_be_reached(open_report: Open) -> None:
    page = open_report()
    nameless = """all => all.filter(one => !(one.getAttribute('aria-label') ||
      (one.matches('input, select') ? one.labels.length : one.innerText))).map(one => one.outerHTML)"""
    controls = "input, select, button, summary, [role=button], [role=region], svg[role]"
    assert page.eval_on_selector_all(controls, nameless) == []
    levels = page.eval_on_selector_all("h1, h2, h3, h4", "all => all.map(one => Number(one.tagName[1]))")
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in zip([1, *levels], levels, strict=False)) or levels[0] == 1
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.getAttribute('class')"))
    assert {"metric", "heat", "category", "kind", "search", "reveal", "ratio", "beside", "mark chosen"} <= reached


def test_without_scripts_and_without_texts(open_report: Open, report_html: Path, tmp_path: Path) -> None:
    page = open_report(java_script_enabled=False)
    assert page.locator("#figure noscript p").is_visible()
    assert page.locator("table.points").first.is_visible()
    assert not page.locator("#viewer").is_visible()
    run = Path(shutil.copytree(report_html.parent, tmp_path / "scores"))
    for name in ("completions.jsonl", "verdicts.jsonl"):
        (run / name).write_text("", encoding="utf-8")
    (run / "plan.json").write_text(json.dumps({"completions": []}), encoding="utf-8")
    ids = [json.loads(line)["id"] for line in (run / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    (run / "prompts.jsonl").write_text(world.lines([{"id": key} for key in ids]), encoding="utf-8")
    path = run / "report.html"
    path.write_text(make_page(read_run(run)), encoding="utf-8")
    page = open_report(path)
    assert "scores without texts" in page.inner_text("#completions")
    assert page.locator("#scatter-0 .mark").count() == 11
    page.locator("#scatter-0 .mark").first.press("Enter")


def test_mixtures_of_three_adapters_have_a_page_too(open_report: Open, tmp_path: Path) -> None:
    """More of them than ticks fit: each has its marks, its name in percent, and its place under the slider."""

    def mixtures(frontier: dict[str, Any]) -> None:
        old = frontier["points"]
        frontier["points"] = [json.loads(json.dumps(old[number % len(old)])) for number in range(15)]
        for number, point in enumerate(frontier["points"]):
            share = number / 14
            point |= {"ratio": None, "policy": f"policy@{number}"}
            point["weights"] = {"reward": 1 - share, "safety": share / 2, "honesty": share / 2}
        frontier["choice"] |= {"ratio": None, "policy": "policy@7", "weights": frontier["points"][7]["weights"]}

    run = world.write_run(tmp_path / "run", mixtures)
    path = run / "report.html"
    path.write_text(make_page(read_run(run)), encoding="utf-8")
    page = open_report(path)
    assert page.inner_text("#ratio-text") == "reward 0.5, safety 0.25, honesty 0.25"
    assert page.locator("#scatter-0 .mark").count() == 15 + 2
    assert page.locator("#scatter-0 polyline.sweep").count() == 0
    curve = page.locator("#curve").text_content()
    assert "50/25/25" in curve
    assert "mixtures by rising weight of safety (reward/safety/honesty in %)" in curve
    page.focus("#ratio")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#ratio-text") == "reward 0.4286, safety 0.2857, honesty 0.2857"
