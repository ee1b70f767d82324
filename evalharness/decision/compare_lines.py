"""What a terminal shows of two runs' differences, 100 columns wide."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from psacpo.evalharness.summary import WIDTH
from psacpo.evalharness.weights import weights_name


def compare_lines(found: Mapping[str, Any]) -> list[str]:
    """The comparison as a table of at most `summary.WIDTH` columns: B minus A, * where the interval leaves 0 out."""
    metrics = _fitting(list(found["metrics"]), max([18, *(len(_called(one)) for one in found["ratios"])]))
    rows = [["B - A", *metrics]]
    chosen = found["chosen"]
    if chosen is not None:
        ends = [chosen["a"], chosen["b"]]
        both = ", ".join(
            _short(name) if q is None else f"{q:g}" for q, name in zip(ends, chosen["policies"], strict=True)
        )
        rows.append([f"chosen {both}", *(_cell(chosen["difference"][m]) for m in metrics)])
    rows += [[_called(one), *(_cell(one["difference"][m]) for m in metrics)] for one in found["ratios"]]
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    table.insert(1, "-" * max(map(len, table)))
    lines = [f"A: {found['runs']['A']}", f"B: {found['runs']['B']}", *_verdict(found), "", *table, ""]
    lines += [line for text in found["warnings"] for line in textwrap.wrap(f"warning: {text}", WIDTH)]
    lines.append(
        f"{found['prompts']} prompts of both in {found['clusters']} clusters; {found['confidence']:.0%} intervals of paired "
        "differences, * without 0"
    )
    return lines


def _called(one: Mapping[str, Any]) -> str:
    return weights_name(one["weights"]).removeprefix("policy@") if one["ratio"] is None else f"{one['ratio']:.4g}"


def _short(name: str) -> str:
    return name.removeprefix("policy@")


def _verdict(found: Mapping[str, Any]) -> list[str]:
    volume = found["hypervolume"]
    if volume is None:
        return []
    where = "no difference is shown"
    if volume["low"] > 0:
        where = "B's frontier is the better one"
    elif volume["high"] < 0:
        where = "A's frontier is the better one"
    text = f"hypervolume: {volume['mean']:+.4g} ({volume['low']:+.4g} to {volume['high']:+.4g}): {where}"
    return textwrap.wrap(text, WIDTH)


def _fitting(names: Sequence[str], width: int) -> list[str]:
    fitting: list[str] = []
    for name in names:
        width += max(len(name), 24) + 2
        if width > WIDTH:
            break
        fitting.append(name)
    return fitting


def _cell(value: Mapping[str, Any]) -> str:
    if value["mean"] is None or value["low"] is None:
        return "-"
    star = "*" if value["low"] > 0 or value["high"] < 0 else ""
    return f"{value['mean']:+.3f} ({value['low']:+.3f} {value['high']:+.3f}){star}"
