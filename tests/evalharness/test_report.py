"""report(run): the page of a synthetic run with hostile text everywhere a text can stand."""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import image

from psacpo.errors import InputError
from psacpo.evalharness.report import content as content_module
from psacpo.evalharness.report import page as page_module
from psacpo.evalharness.report import report
from psacpo.evalharness.report import run as run_module
from psacpo.evalharness.report.figure import DPI, HEIGHT, HEIGHT_AUDIT, WIDTH


def _world() -> Any:
    """report_world.py of this directory, which is no package."""
    spec = importlib.util.spec_from_file_location("report_world", Path(__file__).with_name("report_world.py"))
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


world = _world()
make_run, synthetic, prompt_rows, lines = world.make_run, world.synthetic, world.prompt_rows, world.lines
FORMULA, HOSTILE, RATIOS = world.FORMULA, world.HOSTILE, world.RATIOS
MakeRun = Callable[..., Path]
MADE = {
    "report.html",
    "frontier.png",
    "frontier.svg",
    "frontier.csv",
    "records.parquet",
    "model-card.md",
    "lm-eval",
}


class Page(HTMLParser):
    """A parsed page: its elements with their attributes, the text of each script and style, and the table's cells."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inline: dict[str, str] = {}
        self.text = ""
        self.rows: dict[str, list[float]] = {}
        self._row: str | None = None
        self._in: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if tag in ("script", "style"):
            self._in.append(f"{tag} {attributes.get('type', '')}".strip())
        if tag == "th" and attributes.get("scope") == "row":
            self._row = ""
            self._in.append("head")
        if tag == "data" and self._row is not None:
            self.rows.setdefault(self._row, []).append(float(attributes["value"] or "nan"))

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style") or (tag == "th" and self._in and self._in[-1] == "head"):
            self._in.pop()
        if tag == "tr":
            self._row = None

    def handle_data(self, data: str) -> None:
        if self._in and self._in[-1] == "head":
            self._row = (self._row or "") + data
        elif self._in:
            self.inline[self._in[-1]] = self.inline.get(self._in[-1], "") + data
        else:
            self.text += data

    def names(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def data(self) -> Any:
        return json.loads(self.inline["script application/json"])


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A figure of one pixel: for tests of the page and the table."""
    pixel = io.BytesIO()
    image.imsave(pixel, np.zeros((1, 1, 3)), format="png")
    monkeypatch.setattr(run_module, "draw_frontier", lambda frontier: {"png": pixel.getvalue(), "svg": b"<svg/>"})


def open_page(run: Path) -> Page:
    return Page(report(run).read_text(encoding="utf-8"))


def cleaned(text: str) -> str:
    """What must become of a text: control and bidirectional characters and lone surrogates replaced."""
    return re.sub("[\x1b\u202e\ud800]", "\N{REPLACEMENT CHARACTER}", text).replace("\r\n", "\n")


def test_writes_the_files_and_gives_the_page(make_run: MakeRun) -> None:
    run = make_run()
    before = {path.name for path in run.iterdir()}
    assert report(run) == run / "report.html"
    assert {path.name for path in run.iterdir()} - before == MADE
    assert len(list((run / "lm-eval").iterdir())) == len(RATIOS) + 2
    shape = image.imread(run / "frontier.png").shape
    assert shape[:2] == (round(HEIGHT_AUDIT * DPI), round(WIDTH * DPI))
    assert (run / "frontier.csv").read_bytes() == (run / "frontier.csv").read_bytes()


def test_the_same_records_give_the_same_bytes(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    other = Path(shutil.copytree(run, tmp_path / "elsewhere" / "copy"))
    report(run)
    report(other)
    made = [path.relative_to(run) for path in run.rglob("*") if path.is_file()]
    assert len(made) > 30
    for name in made:
        assert (run / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.usefixtures("quick")
def test_no_element_or_handler_comes_from_hostile_text(make_run: MakeRun) -> None:
    run = make_run()
    page = open_page(run)
    assert not page.names("img")
    marks = {"svg", "circle", "rect", "line"}  # those of the legend
    assert len(page.names("svg")) == 5  # its constraint is on no axis, so the legend has no limit line
    assert {tag for tag, _ in page.elements} & {"svg", "circle", "rect", "line", "path", "image", "use"} == marks
    assert len(page.names("script")) == 2
    assert len(page.names("style")) == 1
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") or name == "style" for name in attributes), tag
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith("#")
    html = (run / "report.html").read_text(encoding="utf-8")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", html)
    assert "49" not in page.text.split("Warnings")[1].split("By the judges")[0]  # {{ 7*7 }} is text, not a template


@pytest.mark.usefixtures("quick")
def test_the_policy_allows_exactly_the_inlined_script_and_style(make_run: MakeRun) -> None:
    page = open_page(make_run())
    (policy,) = [meta["content"] or "" for meta in page.names("meta") if meta.get("http-equiv")]
    allowed = dict(part.strip().split(" ", 1) for part in policy.split(";"))

    def source(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    assert allowed["default-src"] == "'none'"
    assert set(allowed) == {"default-src", "script-src", "style-src", "base-uri", "form-action"}
    assert allowed["script-src"] == source(page.inline["script"])
    assert allowed["style-src"] == source(page.inline["style"])


def test_the_scripts_are_small_and_make_no_markup_from_text() -> None:
    folder = Path(page_module.__file__).parent
    script = "".join((folder / name).read_text(encoding="utf-8") for name in ("plots.js", "report.js"))
    assert len(script) < 40_000
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval|Function\(|setAttribute\(.on", script
    )


@pytest.mark.usefixtures("quick")
def test_completions_survive_the_trip_into_the_page(make_run: MakeRun) -> None:
    page = open_page(make_run())
    raw = page.inline["script application/json"]
    assert not set("<>&\u2028\u2029") & set(raw)
    data = page.data
    names = [policy["name"] for policy in data["policies"]]
    assert names == [*(f"policy@{q:g}" for q in RATIOS), FORMULA, cleaned(HOSTILE)]
    assert [policy["name"] for policy in data["policies"] if policy["chosen"]] == ["policy@0.5"]
    assert [prompt["id"] for prompt in data["prompts"]] == [cleaned(row["id"]) for row in prompt_rows()]
    assert data["prompts"][0]["messages"] == [["system", cleaned(HOSTILE)], ["user", f"a\nb {cleaned(HOSTILE)}"]]
    for place, prompt in enumerate(data["prompts"]):
        for name, (answer,) in zip(names, prompt["answers"], strict=True):
            assert answer["text"] == f"{name} answers {place} {cleaned(HOSTILE)} \N{REPLACEMENT CHARACTER}"
            assert answer.get("cut", False) == ((name, place) == ("policy@0.25", 3))
    scores = data["prompts"][2]["answers"][0][0]
    assert scores["scores"] == [None, -1.5, -1.5, -1.5, -1.5]
    assert scores["words"] == {"reward": cleaned(HOSTILE)}


@pytest.mark.usefixtures("quick")
def test_the_page_opens_at_the_prompt_whose_answers_change_most(make_run: MakeRun) -> None:
    run = make_run()
    place = {
        row["key"]: (row["policy"], row["prompt_id"])
        for row in map(json.loads, (run / "completions.jsonl").read_text(encoding="utf-8").splitlines())
    }
    # p3 turns to and fro, p7 once: both are unsafe at q = 0 and safe at the chosen 0.5.
    unsafe = {("policy@0", "p3"), ("policy@0.25", "p3"), ("policy@0", "p7"), ("policy@0.125", "p7")}
    verdicts = [json.loads(line) for line in (run / "verdicts.jsonl").read_text(encoding="utf-8").splitlines()]
    for verdict in verdicts:
        if verdict["judge"] == "cost":
            verdict["score"] = 0.75 if place[verdict["completion"]] in unsafe else -1.5
    (run / "verdicts.jsonl").write_text(lines(verdicts), encoding="utf-8")
    data = open_page(run).data
    assert data["prompts"][data["first"]]["id"] == "p7"


@pytest.mark.usefixtures("quick")
def test_many_metrics_are_more_tables_side_by_side_in_none(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = open_page(make_run())
    monkeypatch.setattr(page_module, "MAX_COLUMNS", 3)
    page = open_page(make_run(name="split"))
    assert len(page.names("table")) == len(whole.names("table")) + 2
    for head, numbers in page.rows.items():
        assert sorted(numbers) == sorted(whole.rows[head])


@pytest.mark.usefixtures("quick")
def test_the_command_is_shown_and_none_where_there_was_none(make_run: MakeRun) -> None:
    typed = open_page(make_run(lambda frontier: frontier.update(command="psacpo frontier --samples 4")))
    assert "psacpo frontier --samples 4" in typed.text
    python = open_page(make_run(lambda frontier: frontier.update(command=""), name="python"))
    assert "The measurement was started from Python" in python.text


@pytest.mark.usefixtures("quick")
def test_unsafe_goes_by_the_limit_of_the_metric_on_the_cost_judge(make_run: MakeRun) -> None:
    data = open_page(make_run()).data
    unsafe = {
        (prompt["id"], policy["name"])
        for prompt in data["prompts"]
        for policy, answers in zip(data["policies"], prompt["answers"], strict=True)
        if answers[0]["unsafe"] == 1
    }
    assert unsafe == {("p0", "policy@0")}  # 0.75 > 0.5; 0.25 is not


@pytest.mark.usefixtures("quick")
def test_an_answer_without_a_verdict_on_harm_is_not_taken_for_safe(make_run: MakeRun) -> None:
    run = make_run()
    kept = [
        line
        for line in (run / "verdicts.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        if json.loads(line)["judge"] not in ("cost", "oracle_harm")
    ]
    (run / "verdicts.jsonl").write_text("".join(kept), encoding="utf-8")
    assert open_page(run).data["prompts"][0]["answers"][0][0]["unsafe"] == -1


@pytest.mark.usefixtures("quick")
def test_stale_records_are_not_used(make_run: MakeRun) -> None:
    page = open_page(make_run())
    assert "STALE COMPLETION" not in page.inline["script application/json"]
    assert "987.5" not in page.inline["script application/json"]


@pytest.mark.usefixtures("quick")
def test_judges_with_equal_settings_share_their_verdicts(make_run: MakeRun) -> None:
    def twin(frontier: dict[str, Any]) -> None:
        frontier["judges"]["again"] = frontier["judges"]["cost"]

    assert open_page(make_run(twin)).data["prompts"][0]["answers"][0][0]["scores"] == [
        0.75 if i in (1, 5) else -1.5 for i in range(6)
    ]


@pytest.mark.usefixtures("quick")
def test_missing_and_foreign_completions_are_told(make_run: MakeRun) -> None:
    run = make_run()
    rows = (run / "completions.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    foreign = json.loads(rows[1]) | {"policy": "policy@0.99"}
    (run / "completions.jsonl").write_text("".join([lines([foreign]), *rows[2:]]), encoding="utf-8")
    text = open_page(run).text
    assert "1 of 132 planned completions have no record" in text
    assert "1 completions are of policies or prompts" in text


@pytest.mark.usefixtures("quick")
def test_table_and_csv_hold_the_numbers_of_the_input(make_run: MakeRun) -> None:
    run = make_run()
    page = open_page(run)
    order = ["reward", "oracle_help", "cost", "oracle_harm", "unsafe_rate", "refusal", "over_refusal"]
    with (run / "frontier.csv").open(encoding="utf-8", newline="") as handle:
        table = list(csv.DictReader(handle))
    frontier = synthetic()
    policies = [*frontier["points"][::-1], *frontier["baselines"]]
    assert [row["ratio"] for row in table] == [*map(str, RATIOS), "", ""]
    for row, policy in zip(table, policies, strict=True):
        expected = [policy[name][part] for name in order for part in ("mean", "low", "high")]
        assert [float(row[f"{name}_{part}"]) for name in order for part in ("mean", "low", "high")] == expected
        ratio = policy.get("ratio")
        # A row's head as a person reads it, with its tag.
        tag = " chosen" if ratio == 0.5 else " baseline" if ratio is None else ""
        head = cleaned(policy["name"]) if ratio is None else f"q = {ratio:g}"
        bounds = list(policy.get("bounds", {}).values())
        assert page.rows[head + tag] == expected + bounds
    first = table[2]
    assert (first["name"], first["n_prompts"], first["certified"], first["nondominated"]) == (
        "policy@0.25",
        "12",
        "false",
        "false",
    )
    assert float(first["p_on_frontier"]) == pytest.approx(1 - 0.25 / 3)


@pytest.mark.usefixtures("quick")
def test_no_cell_of_the_csv_is_a_formula(make_run: MakeRun) -> None:
    def rename(frontier: dict[str, Any]) -> None:
        for name, policy in zip(["@SUM(1)", "+1"], frontier["baselines"], strict=True):
            policy["name"] = name
        frontier["metrics"]["=HYPERLINK()"] = frontier["metrics"]["reward"]

    for run in (make_run(), make_run(rename, name="renamed")):
        report(run)
        cells = list(csv.reader(io.StringIO((run / "frontier.csv").read_text(encoding="utf-8"))))
        for cell in (cell for row in cells for cell in row):
            assert not re.match(r"[=+@\t\r]|-(?![\d.])", cell)
    assert [row[0] for row in cells[-2:]] == ["'@SUM(1)", "'+1"]
    assert "'=HYPERLINK()_mean" in cells[0]
    assert any(cell.startswith("-") for cell in cells[1])  # a negative number stays a number


@pytest.mark.usefixtures("quick")
def test_the_verdict_names_ratio_constraint_bound_and_count(make_run: MakeRun) -> None:
    text = " ".join(open_page(make_run()).text.split())
    assert "Chosen ratio q = 0.5 policy@0.5" in text
    assert "unsafe_rate ≤ 0.05 upper bound 0.21" in re.sub(r"(?<=\d)upper", " upper", text)
    assert "first warning" in text


def test_no_ratio_meets_the_constraint(make_run: MakeRun) -> None:
    def refuse(frontier: dict[str, Any]) -> None:
        frontier["choice"] |= {"ratio": None, "policy": None, "why": "the lowest bound is 0.41"}

    page = open_page(make_run(refuse))
    assert "No ratio meets unsafe_rate ≤ 0.05 at 95 % confidence" in page.text
    assert "the lowest bound is 0.41" in page.text
    assert not any(policy["chosen"] for policy in page.data["policies"])
    assert not [a for a in page.names("tr") if a.get("class") == "chosen"]


def test_no_constraint_no_audit_no_hypervolume_no_baselines(make_run: MakeRun) -> None:
    def bare(frontier: dict[str, Any]) -> None:
        frontier |= {"audit": None, "hypervolume": None, "baselines": [], "warnings": [], "counts": {}}
        frontier["choice"] = {
            "ratio": None,
            "policy": None,
            "constraints": [],
            "confidence": 0.9,
            "method": "none",
            "why": "",
        }
        for point in frontier["points"]:
            point |= {"certified": None, "bounds": {}}

    run = make_run(bare)
    page = open_page(run)
    assert "No ratio was chosen" in page.text
    assert "certified" not in page.text
    assert "audit" not in page.text
    assert image.imread(run / "frontier.png").shape[0] == round(HEIGHT * DPI)


@pytest.mark.parametrize("undefined", [None, float("nan")])
def test_an_undefined_mean_is_a_dash(make_run: MakeRun, undefined: float | None) -> None:
    def blank(frontier: dict[str, Any]) -> None:
        for policy in (*frontier["points"], *frontier["baselines"]):
            for name in ("reward", "over_refusal"):
                policy[name] = {"mean": undefined, "low": undefined, "high": undefined, "n": 0}

    run = make_run(blank)
    page = open_page(run)
    html = (run / "report.html").read_text(encoding="utf-8")
    assert len(page.rows["q = 0"]) == 5 * 3 + 1
    assert len(re.findall(r"<td>–</td>", html)) >= 22
    assert 'class="' + " best" + '">–' not in html
    assert "nan" not in (run / "frontier.csv").read_text(encoding="utf-8").lower()


@pytest.mark.usefixtures("quick")
def test_prompts_over_the_limit_are_left_out_and_told(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content_module, "MAX_PROMPTS", 4)
    page = open_page(make_run())
    # Three categories in turn: two of the first, one of each other, in the file's order.
    assert [prompt["id"] for prompt in page.data["prompts"]] == ["p0", cleaned(HOSTILE), "p2", "p3"]
    assert "4 of 12 prompts are in this page. The other 8 are left out" in page.text


@pytest.mark.usefixtures("quick")
def test_categories_over_the_limit_are_left_out_and_told(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content_module, "MAX_CATEGORIES", 2)
    page = open_page(make_run())
    assert len(page.data["heat"]["cost"]) == 2
    assert "1 smaller categories are left out" in page.text


@pytest.mark.usefixtures("quick")
def test_long_completions_leave_prompts_out(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content_module, "MAX_CHARACTERS", 10)
    page = open_page(make_run())
    assert [prompt["id"] for prompt in page.data["prompts"]] == ["p0"]
    assert "The other 11 are left out" in page.text


@pytest.mark.usefixtures("quick")
def test_quality_counts_what_was_cut_and_what_has_no_verdict(make_run: MakeRun) -> None:
    run = make_run()
    html = report(run).read_text(encoding="utf-8")
    rows = re.findall(
        r"<tr[^>]*><th scope=\"row\">(?:<span[^>]*>)?(q = [\d.]+).*?</th>((?:<td>[^<]*</td>)+)</tr>", html
    )
    cells = {head: re.findall("<td>([^<]*)</td>", row) for head, row in rows}
    assert cells["q = 0"] == ["12", "10.0", "0", "0", "1", "0", "0", "0", "0"]
    assert cells["q = 0.25"] == ["12", "10.0", "1", "0", "0", "0", "0", "0", "0"]


@pytest.mark.usefixtures("quick")
def test_a_record_that_an_interruption_cut_short_is_not_read(make_run: MakeRun) -> None:
    run = make_run()
    with (run / "verdicts.jsonl").open("a", encoding="utf-8") as handle:
        handle.write('{"key": "half')
    report(run)


def damage(name: str, content: str | None) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        if content is None:
            (run / name).unlink()
        else:
            (run / name).write_text(content, encoding="utf-8")

    return change


def edit(**values: Any) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        frontier = json.loads((run / "frontier.json").read_text(encoding="utf-8"))
        (run / "frontier.json").write_text(json.dumps(frontier | values), encoding="utf-8")

    return change


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damage("frontier.json", None), "holds no frontier.json"),
        (damage("frontier.json", "{"), "frontier.json is damaged"),
        (damage("frontier.json", "[]"), "frontier.json is damaged"),
        (edit(schema=2), "another schema; given: 2; allowed: 1"),
        (edit(points=[]), "points"),
        (edit(points=[{"ratio": 0.0, "policy": "x", "reward": {"mean": 1e308}}]), "1e+308 is out of range"),
        (edit(choice={"ratio": 0.3}), "the chosen ratio 0.3 is not among the points"),
        (edit(choice={"ratio": None, "constraints": ["unsafe"]}), "constraint 'unsafe' cannot be read"),
        (edit(axes={"reward": "charm", "cost": "cost"}), "the axis 'charm' is not among the metrics"),
        (damage("plan.json", None), "holds no plan.json"),
        (damage("plan.json", '{"completions": 3}'), "plan.json is damaged"),
        (damage("prompts.jsonl", None), "holds no prompts.jsonl"),
        (damage("prompts.jsonl", '{"id": "p0", "prompt": 3}\n'), "prompt 'p0' is damaged"),
        (damage("completions.jsonl", '{"key"\n'), "completions.jsonl line 1 is damaged"),
        (damage("completions.jsonl", "3\n"), "completions.jsonl line 1 is damaged"),
        (damage("verdicts.jsonl", '{"judge_digest": "a"}\n'), "line 1 is damaged: 'completion' is missing"),
    ],
)
def test_what_is_no_run_is_refused_in_one_line(make_run: MakeRun, change: Callable[[Path], None], message: str) -> None:
    run = make_run()
    report(run)
    before = {name: (run / name).read_bytes() for name in ("report.html", "frontier.png", "frontier.csv")}
    change(run)
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        report(run)
    assert "\n" not in str(caught.value)
    assert {name: (run / name).read_bytes() for name in before} == before


def test_a_path_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no frontier\.json"):
        report(tmp_path / "nowhere")


def test_needs_neither_torch_nor_pyplot(make_run: MakeRun) -> None:
    code = (
        "import sys; from pathlib import Path; from psacpo.evalharness.report import report;"
        "assert 'matplotlib' not in sys.modules; report(Path(sys.argv[1]));"
        "found = {'torch', 'transformers', 'matplotlib.pyplot'} & set(sys.modules); assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code, str(make_run())], check=True, timeout=300)
