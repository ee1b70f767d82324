"""A finished run as one HTML page, a figure and a table: rebuilt from the stored records, with no model."""

from __future__ import annotations

from pathlib import Path


def report(run: Path) -> Path:
    """Rebuild frontier.png, points.csv and report.html of a run directory; gives the path of report.html."""
    from psacpo.evalharness.report.run import report as job

    return job(run)


__all__ = ["report"]
