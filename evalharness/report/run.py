"""The job: read a run, draw the figures, write the tables, the page and what other tools read."""

from __future__ import annotations

from pathlib import Path

from psacpo.evalharness.report.card import model_card
from psacpo.evalharness.report.exports import LM_EVAL, lm_eval_files, records_parquet
from psacpo.evalharness.report.figure import draw_frontier
from psacpo.evalharness.report.page import page
from psacpo.evalharness.report.records import read_run
from psacpo.evalharness.report.table import frontier_csv
from psacpo.files import write_atomically

FIGURE = "frontier.png"
DRAWING = "frontier.svg"
TABLE = "frontier.csv"
RECORDS = "records.parquet"
CARD = "model-card.md"
PAGE = "report.html"
# What the table was called before it was frontier.csv.
_FORMERLY = "points.csv"


def report(run: Path) -> Path:
    """Rebuild from RUN's stored records all that is made for people and other tools; gives the path of report.html.

    RUN/frontier.png and .svg, frontier.csv, records.parquet, model-card.md, report.html and lm-eval/POLICY/. The same
    records give the same bytes. Nothing is written before all of it could be made.

    Raises:
        InputError: RUN is not a finished run, or one of its files is damaged.
    """
    run = Path(run)
    records = read_run(run)
    pictures = draw_frontier(records.frontier)
    made: dict[str, str | bytes] = {
        FIGURE: pictures["png"],
        DRAWING: pictures["svg"],
        TABLE: frontier_csv(records.frontier),
        CARD: model_card(records),
    }
    if records.texts:
        made[RECORDS] = records_parquet(records)
    made |= lm_eval_files(records)
    made[PAGE] = page(records)
    for name, data in made.items():
        write_atomically(run / name, data)
    _remove_others(run, {run / name for name in made})
    return run / PAGE


def _remove_others(run: Path, made: set[Path]) -> None:
    """Remove the exports of policies and settings that the run no longer has."""
    found = [*run.glob(f"{LM_EVAL}/*/results_*.json"), *run.glob(f"{LM_EVAL}/*/samples_*.jsonl"), run / RECORDS]
    found.append(run / _FORMERLY)
    for path in found:
        if path not in made and path.is_file():
            path.unlink()
            if path.parent != run and not any(path.parent.iterdir()):
                path.parent.rmdir()
