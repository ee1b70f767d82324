"""Policies, prompts and judges in; a measured frontier out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from psacpo.evalharness.config import FrontierConfig

__all__ = ["frontier"]


def frontier(config: FrontierConfig) -> Path:
    """Sweep the ratios, judge the answers and trace the frontier. See `psacpo.evalharness.sweep.frontier`."""
    from psacpo.evalharness.sweep import frontier as job

    return job(config)
