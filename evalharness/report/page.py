"""report.html: one file that opens anywhere, in which no text of a model can become markup or script."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from psacpo.evalharness.adaptive.settings import account_lines
from psacpo.evalharness.judges.llm_replies import position_report
from psacpo.evalharness.report.content import categories_left_out, choose_prompts, content
from psacpo.evalharness.report.names import chosen_text, constraint_text, headline, label, words
from psacpo.evalharness.report.records import Completion, Run, Verdict
from psacpo.evalharness.report.schema import Estimate, Frontier, Policy
from psacpo.evalharness.report.table import UNDEFINED, Column, columns

MAX_COLUMNS = 7  # metrics side by side in one table of the page, which is then no wider than a laptop's window

_COUNTS = {
    "prompts": "prompts",
    "clusters": "clusters of prompts",
    "generated": "completions",
    "truncated": "completions cut at the token limit",
    "empty": "empty completions",
    "invalid": "invalid verdicts",
    "failed": "verdicts that could not be asked for",
}
_FAILURES = ("truncated", "empty", "invalid", "failed")


def page(run: Run) -> str:
    """The whole page of a run's records, which are free of control characters already."""
    frontier = run.frontier
    style, script = _asset("report.css"), _asset("plots.js") + _asset("report.js")
    shown = choose_prompts(run)
    table = columns(frontier)
    html: str = _template().render(
        style=Markup(style),
        script=Markup(script),
        style_hash=_csp_hash(style),
        script_hash=_csp_hash(script),
        figure_alt=_describe(frontier),
        headline=headline(frontier),
        frontier=frontier,
        chosen=frontier.chosen,
        spans=frontier.spans(),
        dominated=any(point.nondominated is False for point in frontier.points),
        texts=run.texts,
        limits=_limits(frontier),
        held=_held_out(frontier, table),
        naive=_naive(frontier),
        failures=[(_COUNTS[key], value) for key in _FAILURES if (value := frontier.counts.get(key))],
        positions=_positions(run),
        tiles=_tiles(frontier, table),
        table=table,
        tables=[table[start : start + MAX_COLUMNS] for start in range(0, len(table), MAX_COLUMNS)] or [[]],
        account=account_lines(frontier.adaptive) if frontier.adaptive else [],
        bounds=[(text, constraint_text(constraint)) for text, constraint in frontier.choice.parsed()],
        on_axis=any(
            one.metric in (span.reward, span.cost) for span in frontier.spans() for _, one in frontier.choice.parsed()
        ),
        policies=frontier.policies(),
        best=_is_best,
        number=_number,
        label=label,
        words=words(frontier),
        confidence=f"{frontier.choice.confidence * 100:g} %",
        counts=[(_COUNTS.get(key, key), value) for key, value in frontier.counts.items()],
        quality=_quality(run),
        judges=[
            (name, judge, _source(judge.source or judge.model or judge.callable))
            for name, judge in frontier.judges.items()
        ],
        settings=_settings(run),
        inputs=_inputs(run),
        warnings=[*frontier.warnings, *run.notes],
        shown=len(shown),
        categories_left=categories_left_out(run),
        left_out=len(run.prompts) - len(shown),
        data=Markup(embeddable(content(run, table, shown))),
    )
    return html


def embeddable(value: object) -> str:
    """`value` as JSON that cannot end the script element it stands in, nor break a line of script."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_asset("report.html.jinja"))


def _asset(name: str) -> str:
    return files("psacpo.evalharness.report").joinpath(name).read_text(encoding="utf-8")


def _csp_hash(text: str) -> str:
    """The source expression by which a content security policy allows one inline script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


def _is_best(policy: Policy, column: Column) -> bool:
    return policy.swept and column.best is not None and policy[column.metric].mean == column.best


def _number(value: float | None) -> str:
    """A share or probability in two digits after the point."""
    return UNDEFINED if value is None else f"{value:.2f}"


def _source(name: str | None) -> str:
    """What a model is called, without the machine's directories."""
    return re.split(r"[\\/]", name.rstrip("/"))[-1] if name and re.match(r"[\\/~.]|[A-Za-z]:", name) else name or ""


def _describe(frontier: Frontier) -> str:
    """What the figure shows, for those who cannot see it."""
    axes = frontier.axes
    steps = "; ".join(
        f"{chosen_text(point)}: "
        + ", ".join(
            f"{name} {UNDEFINED if point[name].mean is None else format(point[name].mean, '.3g')}"
            for name in (axes.reward, axes.cost)
        )
        for point in frontier.points
    )
    return f"{axes.reward} against {axes.cost} of the merged policies and baselines. {headline(frontier)}. {steps}."


def _limits(frontier: Frontier) -> list[dict[str, Any]]:
    """Each constraint with the chosen point's bound on it and the test behind it."""
    chosen = frontier.chosen
    shown = []
    for text, constraint in frontier.choice.parsed():
        bound = chosen.bounds.get(text) if chosen else None
        side = "upper" if constraint.sense == "<=" else "lower"
        test = chosen.tests.get(text) if chosen else None
        words = [] if test is None or test.p is None else [f"p = {test.p:.2g}" if test.p >= 1e-4 else "p < 0.0001"]
        if test and test.rows is not None:
            words.append(f"{test.rows} answers in {test.clusters} clusters")
        said = "".join(f", {word}" for word in words)
        shown.append({"text": constraint_text(constraint), "side": side, "bound": bound, "test": said})
    return shown


def _held_out(frontier: Frontier, table: Sequence[Column]) -> dict[str, Any] | None:
    """The chosen policy's numbers on prompts that took no part in its choice."""
    held = frontier.choice.holdout
    if held is None or frontier.chosen is None:
        return None
    write = {column.metric: column for column in table}

    def said(metric: str) -> str:
        found = held.metrics.get(metric, Estimate())
        column = write[metric]
        if found.low is None or found.high is None:
            return f"{metric} {column.write(found.mean)}"
        return f"{metric} {column.write(found.mean)} [{column.write(found.low)}, {column.write(found.high)}]"

    limits = [(text, c) for text, c in frontier.choice.parsed() if c.metric in write]
    return {
        "lines": [(constraint_text(c), held.meets.get(text, False), said(c.metric)) for text, c in limits],
        "reward": said(frontier.axes.reward),
        "prompts": UNDEFINED if held.prompts is None else held.prompts,
    }


def _naive(frontier: Frontier) -> dict[str, str] | None:
    """What the best mean alone would have chosen."""
    naive = frontier.choice.naive
    if naive is None or (naive.ratio is None and not naive.weights):
        return None
    same = (frontier.choice.ratio, frontier.choice.weights) == (naive.ratio, naive.weights)
    state = (
        " (the same)"
        if same
        else ""
        if naive.certified is None
        else " (certified)"
        if naive.certified
        else " (not certified)"
    )
    return {"text": chosen_text(naive) + state, "why": naive.why}


def _positions(run: Run) -> list[tuple[str, dict[str, Any]]]:
    """How the verdicts of each judge that compares two answers hang on their order."""
    found = []
    for name in run.frontier.judges:
        said = [
            item.verdicts[name] for samples in run.completions.values() for item in samples if name in item.verdicts
        ]
        if not any(verdict.raw and verdict.raw.startswith("{") for verdict in said):
            continue
        records = [
            {"raw": v.raw, "valid": v.score is not None} | ({} if v.content is None else {"content": v.content})
            for v in said
        ]
        report = position_report(records)
        if report["n"]:
            found.append((name, report))
    return found


def _tiles(frontier: Frontier, table: Sequence[Column]) -> list[dict[str, Any]]:
    """The chosen policy's headline numbers, beside those of the sweep's ends and the first baseline."""
    if frontier.chosen is None:
        return []
    wanted = {name for span in frontier.spans() for name in (span.reward, span.cost)}
    wanted |= {constraint.metric for _, constraint in frontier.choice.parsed()}
    others: list[Policy] = [frontier.points[0], frontier.points[-1], *frontier.baselines[:1]]
    others = [policy for policy in others if policy.name != frontier.chosen.name]
    named = {p.name: label(p) for p in others}
    return [
        {
            "column": column,
            "estimate": frontier.chosen[column.metric],
            "others": [(named[name], column.write(policy[column.metric].mean)) for name, policy in _by_name(others)],
        }
        for column in table
        if column.metric in wanted
    ]


def _settings(run: Run) -> list[tuple[str, str]]:
    """How the answers were made, as far as psacpo.json says it: no directory of the machine is among it."""
    config, engine = run.config, run.manifest.get("engine")
    engine = engine if isinstance(engine, dict) else {}
    generation = config.get("generation")
    rows: list[tuple[str, object]] = [
        ("psacpo", run.manifest.get("psacpo")),
        ("engine", engine.get("version") or engine.get("name")),
        ("numbers", config.get("dtype")),
        ("base", _source(str(config.get("base") or ""))),
        ("samples a prompt", config.get("samples")),
        *((generation if isinstance(generation, dict) else {}).items()),
        ("seed", config.get("seed")),
        ("bootstrap draws", config.get("resamples")),
        ("prompts that begin with a doubled token (a second BOS)", _doubled(run)),
    ]
    return [(name, str(value)) for name, value in rows if value not in (None, "", [])]


def _doubled(run: Run) -> str | None:
    """How many prompts begin with one token twice: a chat template's BOS and the tokenizer's, of which one is too many."""
    tokens = [ids for row in run.prompts.values() if isinstance(ids := row.get("prompt_ids"), list) and len(ids) > 1]
    return f"{sum(ids[0] == ids[1] for ids in tokens)} of {len(tokens)}" if tokens else None


def _inputs(run: Run) -> list[tuple[str, str]]:
    found = run.manifest.get("inputs")
    return [(str(name), str(value)) for name, value in found.items()] if isinstance(found, dict) else []


def _by_name(policies: Sequence[Policy]) -> list[tuple[str, Policy]]:
    return list({policy.name: policy for policy in policies}.items())


def _quality(run: Run) -> list[dict[str, Any]]:
    """Per policy what its completions were like: how many, cut, empty, how long, and without a valid verdict."""
    answers: dict[str, list[Completion]] = {policy.name: [] for policy in run.frontier.policies()}
    for (name, _), samples in run.completions.items():
        answers[name] += samples
    rows = []
    for policy in run.frontier.policies():
        found = answers[policy.name]
        lengths = [item.n_tokens for item in found if item.n_tokens is not None]
        rows.append(
            {
                "policy": policy,
                "count": len(found),
                "truncated": sum(item.truncated for item in found),
                "empty": sum(not item.text.strip() for item in found),
                "tokens": f"{sum(lengths) / len(lengths):.1f}" if lengths else UNDEFINED,
                "invalid": [
                    sum(item.verdicts.get(judge, Verdict(None)).score is None for item in found)
                    for judge in run.frontier.judges
                ],
            }
        )
    return rows
