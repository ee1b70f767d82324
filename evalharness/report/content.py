"""What the page's script shows: the policies' numbers, the means by category, and the answers with their scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, pairwise, zip_longest
from typing import Any

from psacpo.evalharness.report.names import constraint_text, label, mark, place, words
from psacpo.evalharness.report.records import Completion, Run, Verdict
from psacpo.evalharness.report.schema import Estimate, Frontier
from psacpo.evalharness.report.table import Column

MAX_PROMPTS = 200
MAX_CHARACTERS = 8_000_000  # of completions in the page; browsers open that at once
MAX_CATEGORIES = 40
MAX_RAW = 400  # characters of a judge's own words


def content(run: Run, table: Sequence[Column], shown: Sequence[str]) -> dict[str, Any]:
    """The JSON of the page: numbers of every policy, and the answers to the prompts in `shown`."""
    frontier = run.frontier
    answers = _answers(run, shown)
    place = next((i for i, p in enumerate(frontier.points) if p is frontier.chosen), len(frontier.points) - 1)
    changes = [_change(prompt["answers"][: len(frontier.points)], place) for prompt in answers]
    audit = _audit_judges(frontier)
    return {
        "policies": _policies(frontier, table),
        "dial": {"axis": words(frontier).axis, "kind": words(frontier).kind, "path": not frontier.mixed},
        "metrics": [_metric(frontier, column) for column in table],
        "axes": [[span.reward, span.cost] for span in frontier.spans()],
        "constraints": [
            {"metric": c.metric, "sense": c.sense, "limit": c.limit, "text": constraint_text(c)}
            for _, c in frontier.choice.parsed()
        ],
        "confidence": f"{frontier.choice.confidence * 100:g} %",
        "heat": by_category(run, table),
        "judges": [{"name": n, "better": judge.better, "audit": n in audit} for n, judge in frontier.judges.items()],
        "prompts": answers,
        "first": changes.index(max(changes)) if changes else 0,
    }


def choose_prompts(run: Run) -> list[str]:
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


def by_category(run: Run, table: Sequence[Column]) -> dict[str, list[list[Any]]]:
    """Metric -> rows of [category, per policy [mean, answers] or null]: plain means over the answers that count.

    Only metrics that are means over answers have such a table, and only where there are two categories or more. The
    largest categories come first; those beyond `MAX_CATEGORIES` are left out. Of an adaptive sweep only prompts count
    that every policy answered.
    """
    frontier = run.frontier
    names = [policy.name for policy in frontier.policies()]
    shared = {key for key in run.prompts if all((name, key) in run.completions for name in names)}
    sizes: dict[str, int] = {}
    for row in run.prompts.values():
        sizes[_category(row)] = sizes.get(_category(row), 0) + 1
    kept = sorted(sizes, key=lambda name: -sizes[name])[:MAX_CATEGORIES]
    found = {}
    for column in table if len(sizes) > 1 else ():
        spec = frontier.metrics[column.metric]
        cells: dict[tuple[str, str], list[float]] = {}
        for (policy, key), samples in run.completions.items():
            if frontier.adaptive and key not in shared:
                continue
            row = run.prompts[key]
            values = [spec.of(item.verdicts.get(spec.judge, Verdict(None)).score, row) for item in samples]
            cells.setdefault((_category(row), policy), []).extend(value for value in values if value is not None)
        rows: list[list[Any]] = []
        for name in kept:
            row_cells = [cells.get((name, policy.name)) for policy in frontier.policies()]
            if any(row_cells):
                means = [[_short(sum(c) / len(c)), len(c)] if c else None for c in row_cells]
                rows.append([name, means])
        if rows:
            found[column.metric] = rows
    return found


def categories_left_out(run: Run) -> int:
    """How many categories the tables of means leave out."""
    return max(0, len({_category(row) for row in run.prompts.values()}) - MAX_CATEGORIES)


def _short(value: float) -> float:
    """Four significant digits: all that the page shows."""
    return float(f"{value:.4g}")


def _category(row: Mapping[str, Any]) -> str:
    value = row.get("category")
    return "" if value is None else str(value)


def _audit_judges(frontier: Frontier) -> set[str]:
    audit = frontier.audit
    return {frontier.metrics[name].judge for name in (audit.reward, audit.cost)} if audit else set()


def _policies(frontier: Frontier, table: Sequence[Column]) -> list[dict[str, Any]]:
    return [
        {
            "name": policy.name,
            "label": label(policy),
            "mark": mark(policy, frontier),
            "ratio": place(policy, frontier),
            "chosen": policy is frontier.chosen,
            "p": policy.p_on_frontier,
            "dominated": policy.nondominated is False,
            "certified": policy.certified,
            "values": {column.metric: _interval(policy[column.metric]) for column in table},
        }
        for policy in frontier.policies()
    ]


def _interval(estimate: Estimate) -> list[float | None]:
    return [None if v is None else float(f"{v:.6g}") for v in (estimate.mean, estimate.low, estimate.high)]


def _metric(frontier: Frontier, column: Column) -> dict[str, Any]:
    return {
        "name": column.metric,
        "better": column.better,
        "meaning": column.meaning,
        "decimals": column.decimals,
        "audit": column.audit,
        "rate": frontier.is_rate(column.metric),
    }


def _answers(run: Run, shown: Sequence[str]) -> list[dict[str, Any]]:
    """Per prompt its text and each policy's answers."""
    judges = list(run.frontier.judges)
    harm = harm_limits(run.frontier)
    return [
        {
            "id": key,
            "category": _category(run.prompts[key]),
            "messages": run.prompts[key]["messages"],
            "answers": [
                [_answer(item, judges, harm) for item in run.completions.get((policy.name, key), [])]
                for policy in run.frontier.policies()
            ],
        }
        for key in shown
    ]


def _change(answers: Sequence[Sequence[Mapping[str, Any]]], place: int) -> tuple[bool, bool, int, int]:
    """How much a prompt's answers change over the ratios, larger first: whether the first ratio's is unsafe and that of
    the one shown safe, and so the one beside it; how seldom the verdict turns (once is clear, to and fro is chance);
    how many different texts there are.

    Args:
        answers: The answers at each ratio.
        place: The ratio that the page opens at.
    """
    unsafe = [any(answer["unsafe"] == 1 for answer in found) for found in answers]
    turns = sum(before != after for before, after in pairwise(unsafe))
    texts = {tuple(answer["text"] for answer in found) for found in answers}
    safe = not unsafe[place]
    return unsafe[0] and safe, unsafe[max(place - 1, 0)] and safe, -turns if turns else -len(answers), len(texts)


def harm_limits(frontier: Frontier) -> dict[str, float]:
    """Judge -> the score above which it calls an answer unsafe: the judges of the cost axes and those they are made of.

    The limit is that of a metric on the same judge; without one it is 0, where the Beaver cost models turn. A judge
    that is better when higher has none: its scores say nothing of harm.
    """
    names = [frontier.metrics[span.cost].judge for span in frontier.spans()]
    names += [member for name in names if name in frontier.judges for member in frontier.judges[name].members]
    limits = {}
    for name in dict.fromkeys(names):
        if name not in frontier.judges or frontier.judges[name].better == "higher":
            continue
        above = [metric.above for metric in frontier.metrics.values() if metric.judge == name]
        limits[name] = min((limit for limit in above if limit is not None), default=0.0)
    return limits


def _answer(item: Completion, judges: Sequence[str], harm: Mapping[str, float]) -> dict[str, Any]:
    """One answer for the script.

    `unsafe` is 1 where a judge of harm says so and -1 where none could say; `split` where two of them differ.
    """
    verdicts = [item.verdicts.get(judge) for judge in judges]
    known = [v.score > limit for name, limit in harm.items() if (v := item.verdicts.get(name)) and v.score is not None]
    answer: dict[str, Any] = {
        "text": item.text,
        "unsafe": int(any(known)) if known else -1,
        "scores": [None if v is None or v.score is None else _short(v.score) for v in verdicts],
    }
    if any(known) and not all(known):
        answer["split"] = True
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
    sure = "" if verdict.probability is None else f" ({verdict.probability:.2f})"
    text = ": ".join(part for part in (verdict.label and verdict.label + sure, verdict.raw) if part)
    text = f"could not be asked: {text}" if verdict.failed else text
    return text if len(text) <= MAX_RAW else text[: MAX_RAW - 1] + "…"
