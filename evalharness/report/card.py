"""A section for the model card of the chosen policy: what was measured, in Hugging Face's `model-index` and in words."""

from __future__ import annotations

import re
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from psacpo.evalharness.report.names import constraint_text, headline, label, words
from psacpo.evalharness.report.records import Run
from psacpo.evalharness.report.schema import Policy
from psacpo.evalharness.report.table import UNDEFINED, Column, columns


def model_card(run: Run) -> str:
    """Front matter with a `model-index` and a section in Markdown, to be put in the chosen policy's README.md.

    What the model is made of (`base_model`) is said by the card that `psacpo merge` writes.

    Without a chosen policy it is a comment that says so.
    """
    frontier = run.frontier
    chosen = frontier.chosen
    if chosen is None:
        return f"<!-- {_plain(headline(frontier))}: there is no policy to write a card for. -->\n"
    table = [column for column in columns(frontier) if chosen[column.metric].mean is not None]
    front = ModelCardData(
        model_name=chosen.name,
        tags=["psacpo", "merge", "safety"],
        eval_results=[_result(run, chosen, column) for column in table],
    ).to_yaml()
    others = {p.name: p for p in (chosen, frontier.points[0], frontier.points[-1], *frontier.baselines)}
    heads = [label(p) if p.swept else _plain(name) for name, p in others.items()]
    lines = [
        "---",
        front,
        "---",
        "",
        f"## How the {words(frontier).kind} was chosen",
        "",
        f"{_plain(headline(frontier))}. {_plain(frontier.choice.why)}".rstrip(),
        "",
        (
            f"{'' if frontier.mixed else words(frontier).note + ' '}"
            f"Mean and {frontier.choice.confidence * 100:g} % interval over {_count(chosen)} prompts; "
            "↑ higher is better, ↓ lower is better."
        ),
        "",
        "| metric | " + " | ".join([f"**{heads[0]}** (this model)", *heads[1:]]) + " |",
        "|---|" + "---|" * len(heads),
        *(_row(column, list(others.values())) for column in table),
        "",
        *(
            f"* Constraint: {_plain(constraint_text(c))}, {_bound(chosen, text)}"
            for text, c in frontier.choice.parsed()
        ),
        *(f"* Judge {_plain(name)}: {_judge(run, name)}" for name in frontier.judges),
        *(f"* Warning: {_plain(warning)}" for warning in frontier.warnings),
        f"* Measured with psacpo {_plain(str(run.manifest.get('psacpo', 'unknown')))}"
        + (f": `{_code(frontier.command)}`" if frontier.command else ""),
    ]
    return "\n".join(lines) + "\n"


def _result(run: Run, chosen: Policy, column: Column) -> EvalResult:
    digests = run.manifest.get("inputs")
    path = str(run.config.get("prompts") or "")
    found = chosen[column.metric]
    args: dict[str, Any] = {"prompts": found.n or chosen.n_prompts, "confidence": run.frontier.choice.confidence}
    args |= {"low": found.low, "high": found.high, "ratio": chosen.ratio, "weights": chosen.weights or None}
    revision = digests.get("prompts") if isinstance(digests, dict) else None
    return EvalResult(
        task_type="text-generation",
        dataset_type="psacpo-prompts",
        dataset_name=re.split(r"[\\/]", path)[-1] or "prompts",
        dataset_revision=str(revision) if revision else None,
        metric_type=column.metric,
        metric_name=f"{column.metric} ({column.meaning}; {column.better} is better)",
        metric_value=found.mean,
        metric_args={key: value for key, value in args.items() if value is not None},
    )


def _row(column: Column, policies: list[Policy]) -> str:
    cells = []
    for policy in policies:
        found = policy[column.metric]
        text = column.write(found.mean)
        if found.low is not None and found.high is not None:
            text += f" [{column.write(found.low)}, {column.write(found.high)}]"
        cells.append(text)
    arrow = "↑" if column.better == "higher" else "↓"
    return f"| {_plain(column.metric)} {arrow} | " + " | ".join(cells) + " |"


def _count(policy: Policy) -> str:
    return UNDEFINED if policy.n_prompts is None else str(policy.n_prompts)


def _bound(chosen: Policy, text: str) -> str:
    bound = chosen.bounds.get(text)
    return "met" if bound is None else f"met with a confidence bound of {bound:.3g}"


def _judge(run: Run, name: str) -> str:
    judge = run.frontier.judges[name]
    words = [judge.kind, judge.source or judge.model or judge.callable, judge.licence and f"licence {judge.licence}"]
    if judge.non_commercial:
        words.append("NOT for commercial use")
    return ", ".join(_plain(re.sub(r"^/.*/", "", word)) for word in words if word)


def _plain(text: str) -> str:
    """`text` as Markdown that is nothing but text, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>#|!~$&])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    """`text` for a code span: no backtick may end it."""
    return " ".join(text.split()).replace("`", "'")
