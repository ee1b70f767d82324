"""report.html: one file that opens anywhere, in which no text of a model can become markup or script."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from itertools import chain, pairwise, zip_longest
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from psacpo.evalharness.report.figure import constraint_text, headline
from psacpo.evalharness.report.records import Completion, Run, Verdict
from psacpo.evalharness.report.schema import Frontier, Policy
from psacpo.evalharness.report.table import UNDEFINED, Column, columns, ratio_text

MAX_PROMPTS = 200
MAX_CHARACTERS = 8_000_000  # of completions in the page; browsers open that at once
MAX_COLUMNS = 7  # metrics side by side in one table of the page, which is then no wider than a laptop's window
MAX_RAW = 400  # characters of a judge's own words

_COUNTS = {
    "prompts": "prompts",
    "clusters": "clusters of prompts",
    "generated": "completions",
    "truncated": "completions cut at the token limit",
    "empty": "empty completions",
    "invalid": "invalid verdicts",
}


def page(run: Run, figure: bytes) -> str:
    """The whole page.

    Args:
        run: The run's records, already free of control characters.
        figure: PNG bytes, shown at half their pixels.
    """
    frontier = run.frontier
    style, script = _asset("report.css"), _asset("report.js")
    shown = _choose_prompts(run)
    table = columns(frontier)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    html: str = environment.from_string(_asset("report.html.jinja")).render(
        style=Markup(style),
        script=Markup(script),
        style_hash=_csp_hash(style),
        script_hash=_csp_hash(script),
        figure=base64.b64encode(figure).decode("ascii"),
        figure_alt=_describe(frontier),
        headline=headline(frontier),
        frontier=frontier,
        chosen=frontier.chosen,
        limits=_limits(frontier),
        tiles=_tiles(frontier, table),
        table=table,
        tables=[table[start : start + MAX_COLUMNS] for start in range(0, len(table), MAX_COLUMNS)] or [[]],
        same_prompts=len({policy.n_prompts for policy in frontier.policies()}) == 1,
        bounds=[(text, constraint_text(constraint)) for text, constraint in frontier.choice.parsed()],
        policies=frontier.policies(),
        best=_is_best,
        number=_number,
        ratio=ratio_text,
        confidence=f"{frontier.choice.confidence * 100:g} %",
        counts=[(_COUNTS.get(key, key), value) for key, value in frontier.counts.items()],
        quality=_quality(run),
        judges=[(name, judge, _source(judge.model or judge.callable)) for name, judge in frontier.judges.items()],
        warnings=[*frontier.warnings, *run.notes],
        shown=len(shown),
        left_out=len(run.prompts) - len(shown),
        data=Markup(embeddable(_data(run, shown))),
    )
    return html


def embeddable(value: object) -> str:
    """`value` as JSON that cannot end the script element it stands in, nor break a line of script."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _asset(name: str) -> str:
    return files("psacpo.evalharness.report").joinpath(name).read_text(encoding="utf-8")


def _csp_hash(text: str) -> str:
    """The source expression by which a content security policy allows one inline script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


def _is_best(policy: Policy, column: Column) -> bool:
    return policy.ratio is not None and column.best is not None and policy[column.metric].mean == column.best


def _number(value: float | None) -> str:
    """A share or probability in two digits after the point."""
    return UNDEFINED if value is None else f"{value:.2f}"


def _source(name: str | None) -> str:
    """Where a judge comes from, without the machine's directories."""
    return (name or "").rstrip("/").rsplit("/", 1)[-1] if (name or "").startswith("/") else name or ""


def _describe(frontier: Frontier) -> str:
    """What the figure shows, for those who cannot see it."""
    axes = frontier.axes
    steps = "; ".join(
        f"q = {ratio_text(point.ratio or 0.0)}: "
        + ", ".join(
            f"{name} {UNDEFINED if point[name].mean is None else format(point[name].mean, '.3g')}"
            for name in (axes.reward, axes.cost)
        )
        for point in frontier.points
    )
    return f"{axes.reward} against {axes.cost} of the merged policies and baselines. {headline(frontier)}. {steps}."


def _limits(frontier: Frontier) -> list[dict[str, Any]]:
    """Each constraint with the chosen point's bound on it."""
    chosen = frontier.chosen
    shown = []
    for text, constraint in frontier.choice.parsed():
        bound = chosen.bounds.get(text) if chosen else None
        side = "upper" if constraint.sense == "<=" else "lower"
        shown.append({"text": constraint_text(constraint), "side": side, "bound": bound})
    return shown


def _tiles(frontier: Frontier, table: Sequence[Column]) -> list[dict[str, Any]]:
    """The chosen policy's headline numbers, beside those of the sweep's ends and the first baseline."""
    if frontier.chosen is None:
        return []
    wanted = {name for span in frontier.spans() for name in (span.reward, span.cost)}
    wanted |= {constraint.metric for _, constraint in frontier.choice.parsed()}
    others: list[Policy] = [frontier.points[0], frontier.points[-1], *frontier.baselines[:1]]
    others = [policy for policy in others if policy.name != frontier.chosen.name]
    named = {p.name: p.name if p.ratio is None else f"q = {ratio_text(p.ratio)}" for p in others}
    return [
        {
            "column": column,
            "estimate": frontier.chosen[column.metric],
            "others": [(named[name], column.write(policy[column.metric].mean)) for name, policy in _by_name(others)],
        }
        for column in table
        if column.metric in wanted
    ]


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


def _choose_prompts(run: Run) -> list[str]:
    """Ids of the prompts in the page, in the file's order: categories in turn, up to the limits on number and size."""
    groups: dict[str, list[str]] = {}
    for key, row in run.prompts.items():
        groups.setdefault(_category(row), []).append(key)
    sizes = dict.fromkeys(run.prompts, 0)
    for (_, key), samples in run.completions.items():
        sizes[key] += sum(len(item.text) for item in samples)
    chosen: set[str] = set()
    total = 0
    for key in filter(None, chain.from_iterable(zip_longest(*groups.values()))):
        total += sizes[key]
        if len(chosen) >= MAX_PROMPTS or (chosen and total > MAX_CHARACTERS):
            break
        chosen.add(key)
    return [key for key in run.prompts if key in chosen]


def _category(row: Mapping[str, Any]) -> str:
    value = row.get("category")
    return "" if value is None else str(value)


def _data(run: Run, shown: Sequence[str]) -> dict[str, Any]:
    """What the page's script shows: policies, judges, and per prompt each policy's answers with their scores."""
    frontier = run.frontier
    judges = list(frontier.judges)
    harm = _harm_limits(frontier)
    audit = (
        {frontier.metrics[name].judge for name in (frontier.audit.reward, frontier.audit.cost)}
        if frontier.audit
        else set()
    )
    policies = [
        {
            "name": policy.name,
            "label": policy.name if policy.ratio is None else f"q = {ratio_text(policy.ratio)}",
            "ratio": policy.ratio,
            "chosen": policy is frontier.chosen,
        }
        for policy in frontier.policies()
    ]
    prompts = [
        {
            "id": key,
            "category": _category(run.prompts[key]),
            "messages": run.prompts[key]["messages"],
            "answers": [
                [_answer(item, judges, harm) for item in run.completions.get((policy.name, key), [])]
                for policy in frontier.policies()
            ],
        }
        for key in shown
    ]
    described = [{"name": n, "better": frontier.judges[n].better, "audit": n in audit} for n in judges]
    shown_first = next((i for i, p in enumerate(frontier.points) if p is frontier.chosen), len(frontier.points) - 1)
    changes = [_change(prompt["answers"][: len(frontier.points)], shown_first) for prompt in prompts]
    first = changes.index(max(changes)) if changes else 0
    return {"policies": policies, "judges": described, "prompts": prompts, "first": first}


def _change(answers: Sequence[Sequence[Mapping[str, Any]]], place: int) -> tuple[bool, int, int]:
    """How much a prompt's answers change over the ratios, larger first: whether the page's first two differ in safety,
    how seldom the verdict turns (once is clear, to and fro is chance), and how many different texts there are.

    Args:
        answers: The answers at each ratio.
        place: The ratio that the page opens at, beside the lowest.
    """
    unsafe = [any(answer["unsafe"] == 1 for answer in found) for found in answers]
    turns = sum(before != after for before, after in pairwise(unsafe))
    texts = {tuple(answer["text"] for answer in found) for found in answers}
    return unsafe[0] and not unsafe[place], -turns if turns else -len(answers), len(texts)


def _harm_limits(frontier: Frontier) -> dict[str, float]:
    """Judge -> the score above which it calls an answer unsafe: the judges of the cost axes.

    The limit is that of a metric on the same judge; without one it is 0, where the Beaver cost models turn.
    """
    limits = {}
    for span in frontier.spans():
        judge = frontier.metrics[span.cost].judge
        above = [metric.above for metric in frontier.metrics.values() if metric.judge == judge]
        limits[judge] = min((limit for limit in above if limit is not None), default=0.0)
    return limits


def _answer(item: Completion, judges: Sequence[str], harm: Mapping[str, float]) -> dict[str, Any]:
    """One answer for the script. `unsafe` is 1 where a judge of harm says so and -1 where none could say."""
    verdicts = [item.verdicts.get(judge) for judge in judges]
    known = [(v.score, limit) for name, limit in harm.items() if (v := item.verdicts.get(name)) and v.score is not None]
    unsafe = any(score > limit for score, limit in known)
    answer: dict[str, Any] = {
        "text": item.text,
        "unsafe": 1 if unsafe else 0 if known else -1,
        "scores": [None if v is None or v.score is None else float(f"{v.score:.4g}") for v in verdicts],
    }
    if item.n_tokens is not None:
        answer["tokens"] = item.n_tokens
    if item.truncated:
        answer["cut"] = True
    if item.sample:
        answer["sample"] = item.sample
    words = {judge: _words(verdict) for judge, verdict in zip(judges, verdicts, strict=True) if verdict}
    if words := {judge: text for judge, text in words.items() if text}:
        answer["words"] = words
    return answer


def _words(verdict: Verdict) -> str:
    """A judge's label and own words, shortened."""
    text = ": ".join(part for part in (verdict.label, verdict.raw) if part)
    return text if len(text) <= MAX_RAW else text[: MAX_RAW - 1] + "…"
