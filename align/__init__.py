"""Preference data to adapters: stepwise alignment, one LoRA adapter a stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from psacpo.align.config import AlignConfig

__all__ = ["AlignConfig", "align", "plan"]


def align(config: AlignConfig) -> Path:
    """Train every stage of `config` in order and give the directory that holds the adapters: `stages.align`."""
    # The command line imports this package for its settings alone; the trainer's libraries take seconds to load.
    from psacpo.align.stages import align as job

    return job(config)


def plan(config: AlignConfig) -> dict[str, Any]:
    """What `align` would do, after all of its checks: `stages.plan`."""
    from psacpo.align.stages import plan as job

    return job(config)
