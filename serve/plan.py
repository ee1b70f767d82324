"""What the launcher has checked and settled, as the server's process gets it: JSON in one environment variable."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from pydantic import Field

from psacpo.config import Strict
from psacpo.serve.ratios import Dial

VARIABLE = "PSACPO_SERVE"


class Plan(Strict):
    """The policies that a server process answers with.

    Attributes:
        base: What the adapters' configurations name as their base.
        reward: The reward adapter's directory.
        safety: The safety adapter's.
        reward_content: Digest of what the adapter does; if the directory changes under the server it notices.
        safety_content: The same of the other.
        key: Of the two adapters' policies in the cache.
        names: Under which the base answers.
        ratios: The only ones allowed; empty allows all from 0 to 1.
        steps: Of the grid that ratios are moved to.
        capacity: Policies held at once, beside the fixed ones.
        policy_bytes: That one policy takes on disk at most.
        cache_dir: Where built policies are kept.
        cache_size: Bytes that they may take together.
        watch: A descriptor that reaches its end when the launcher is gone.
        probe: A secret by which the launcher's own requests are told from a client's.
    """

    base: str
    reward: Path
    safety: Path
    reward_content: str
    safety_content: str
    key: str
    names: list[str]
    ratios: list[float] = Field(default_factory=list)
    steps: int | None = None
    capacity: int
    policy_bytes: int
    cache_dir: Path
    cache_size: int
    watch: int | None = None
    probe: str | None = None

    @property
    def dial(self) -> Dial:
        """What model names are answered."""
        return Dial(bases=tuple(self.names), pins=tuple(self.ratios), steps=self.steps)

    @classmethod
    def find(cls, environment: Mapping[str, str] = os.environ) -> Plan | None:
        """The plan in the environment; None in a process that psacpo did not start."""
        text = environment.get(VARIABLE)
        return cls.model_validate_json(text) if text else None
