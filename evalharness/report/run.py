"""The job: read a run, draw the figure, write the table and the page."""

from __future__ import annotations

from pathlib import Path

from psacpo.evalharness.report.figure import draw_frontier
from psacpo.evalharness.report.page import page
from psacpo.evalharness.report.records import read_run
from psacpo.evalharness.report.table import points_csv
from psacpo.files import write_atomically

FIGURE = "frontier.png"
TABLE = "points.csv"
PAGE = "report.html"


def report(run: Path) -> Path:
    """Rebuild RUN/frontier.png, RUN/points.csv and RUN/report.html from RUN's stored records.

    The same records give the same bytes. Nothing is written before all of it could be made.

    Raises:
        InputError: RUN is not a finished run, or one of its files is damaged.
    """
    run = Path(run)
    records = read_run(run)
    figure = draw_frontier(records.frontier)
    table = points_csv(records.frontier)
    html = page(records, figure)
    write_atomically(run / FIGURE, figure)
    write_atomically(run / TABLE, table)
    write_atomically(run / PAGE, html)
    return run / PAGE
