"""An inspection as a person reads it: a table of the data, then examples in which the trained tokens stand out."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from psacpo.console import printable

# Characters of a text that are shown, at its start and at its end.
_SHOWN = {"prompt": (160, 340), "answer": (340, 160)}
# Fewer than these are not worth leaving out.
_LEAST = 120
_MASKED, _TRAINED, _CUT = "dim", "green", "italic dim"


def show(found: Mapping[str, Any]) -> None:
    """Print what `inspection.inspect` found; as plain text where standard output is no terminal."""
    # Rich takes a pipe to be 80 wide; who reads a file has more.
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 100
    console = Console(highlight=False, width=width)
    with console.capture() as page:
        console.print(rendered(found))
    # Rich fills its lines up with spaces.
    print("\n".join(line.rstrip() for line in page.get().splitlines()))


def rendered(found: Mapping[str, Any]) -> RenderableType:
    parts: list[RenderableType] = [_table(found["data"]), ""]
    legend = Text.assemble(
        "Examples as the model sees them, special tokens included: ",
        ("masked prompt", _MASKED),
        ", ",
        ("⟦tokens that the loss is of⟧", _TRAINED),
        "; ⏎ is a line break.",
    )
    parts += [legend, ""]
    for data in found["data"]:
        for example in data["examples"]:
            parts += [_head(data, example), *_body(example), ""]
    return Group(*parts[:-1])


def _table(data: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("", no_wrap=True)
    for one in data:
        table.add_column(", ".join(one["stages"]), overflow="fold")
    facts = [dict(_facts(one)) for one in data]
    for name in _ordered([list(one) for one in facts]):
        table.add_row(name, *(Text(printable(one.get(name, ""))) for one in facts))
    return table


def _facts(one: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What the table says of one set of rows."""
    counts: Mapping[str, int] = one["counts"]
    used = counts["used"]
    yield "data", Path(one["source"]).name if Path(one["source"]).exists() else one["source"]
    yield "read as", one["kind"] + (f", preset {one['preset']}" if one["preset"] else "")
    yield "rows read", f"{counts['read']:,}"
    for name, count in one["dropped"].items():
        if count or name in ("empty", "identical", "too_long"):
            yield f"  dropped: {name.replace('_', ' ')}", f"{count:,}"
    yield "used", f"{used:,}"
    if "desirable" in counts:
        yield "  desirable", _share(counts["desirable"], used)
    if "swapped" in counts:
        yield "  swapped, safe answer first", _share(counts["swapped"], used)
    yield "  different prompts", f"{one['prompts']:,}"
    if "empty_prompts" in counts:
        yield "  empty prompts", _share(counts["empty_prompts"], used)
    for name in ("duplicates", "contradictory"):
        yield f"  {name}", _share(counts.get(name, 0), used)
    if one["compared"]:
        yield "  asked by the evaluation too", _share(counts.get("overlap", 0), used)
    yield "  truncated", _share(counts["truncated"], used)
    for name in ("truncated_prompts", "truncated_answers"):
        if counts.get(name):
            yield f"    {name.replace('truncated_', '')}", f"{counts[name]:,}"
    yield "tokens: median, p95, max", ""
    for name, spread in one["tokens"].items():
        yield f"  {name} ", ", ".join(f"{value:,}" for value in spread.values())
    if "longer" in one:
        longer = one["longer"]
        yield "chosen answer is longer", _share(longer["chosen"], used)
        yield "both are equally long", _share(longer["equal"], used)
        yield "accuracy by length alone", f"{longer['accuracy']:.3f}"


def _ordered(columns: Sequence[Sequence[str]]) -> list[str]:
    """All names once, each column's own order kept: a name that one column alone has comes behind its predecessor."""
    found: list[str] = []
    for column in columns:
        place = 0
        for name in column:
            if name not in found:
                found.insert(place, name)
            place = found.index(name) + 1
    return found


def _share(count: int, whole: int) -> str:
    return f"{count:,} ({100 * count / whole:.1f} %)" if count else "0"


def _head(data: Mapping[str, Any], example: Mapping[str, Any]) -> Text:
    answers = ", ".join(f"{answer['kind']} {answer['tokens']}" for answer in example["answers"])
    where = f"{', '.join(data['stages'])}, row {example['row']}"
    return Text.assemble((printable(where), "bold"), f"  prompt {example['prompt_tokens']} tokens, {answers}")


def _body(example: Mapping[str, Any]) -> Iterator[RenderableType]:
    yield Padding(_clipped(example["prompt"], "prompt", _MASKED), (0, 0, 0, 2))
    for answer in example["answers"]:
        text = Text.assemble((f"{answer['kind']} ", "bold"), ("⟦", _TRAINED))
        text.append_text(_clipped(answer["text"], "answer", _TRAINED)).append("⟧", _TRAINED)
        yield Padding(text, (0, 0, 0, 2))


def _clipped(text: str, part: str, style: str) -> Text:
    """A text of the model's on one line, its middle left out where it is long."""
    shown = printable(text).replace("\n", "⏎")
    start, end = _SHOWN[part]
    if len(shown) <= start + end + _LEAST:
        return Text(shown, style)
    # Between words, where there are any.
    head = shown[:start].rpartition(" ")[0] or shown[:start]
    tail = shown[-end:].partition(" ")[2] or shown[-end:]
    left = f" … {len(shown) - len(head) - len(tail):,} characters … "
    return Text.assemble((head, style), (left, _CUT), (tail, style))
