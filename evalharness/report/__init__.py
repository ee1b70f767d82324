"""A finished run as one HTML page, a figure, tables and other tools' formats: from its records, with no model."""

from __future__ import annotations

from pathlib import Path


def report(run: Path) -> Path:
    """Rebuild what a run directory holds for people and other tools; gives the path of report.html."""
    from psacpo.evalharness.report.run import report as job

    return job(run)


__all__ = ["report"]
