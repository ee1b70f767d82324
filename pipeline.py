"""Several jobs in a row: align -> frontier -> merge at the chosen ratio, and the built-in demo of it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from psacpo.align.config import AlignConfig
from psacpo.console import say
from psacpo.errors import InputError
from psacpo.files import read_manifest
from psacpo.recipe import RECIPE, Project


class Clock:
    """Where the time went: seconds by label, in order."""

    def __init__(self) -> None:
        self.spent: list[tuple[str, float]] = []

    @contextmanager
    def __call__(self, label: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.spent.append((label, time.perf_counter() - started))

    def __str__(self) -> str:
        total = sum(seconds for _, seconds in self.spent)
        parts = ", ".join(f"{label} {seconds:.1f} s" for label, seconds in self.spent)
        return f"{parts}; in all {total:.1f} s"


def align(project: Project, config: AlignConfig) -> Path:
    """Train the stages and leave the project's recipe beside the adapters, so that the commands go on from there."""
    from psacpo.align import align as job

    out = job(config)
    project.leave(config)
    return out


def run(project: Project, clock: Clock | None = None) -> Path:
    """align, frontier and, if a ratio was chosen, merge at it; finished parts are not done again.

    Returns:
        The frontier's run directory. The policy is in `policies/policy@RATIO` beside it.
    """
    from psacpo.evalharness import frontier
    from psacpo.evalharness.sweep import check
    from psacpo.merge import merge

    clock = clock or Clock()
    # Everything that can be refused is refused before the first stage trains.
    align_config, frontier_config = project.align(), project.frontier()
    check(frontier_config)
    with clock("align"):
        align(project, align_config)
    with clock("frontier"):
        measured = frontier(frontier_config)
    ratio = json.loads((measured / "frontier.json").read_text(encoding="utf-8"))["choice"]["ratio"]
    if ratio is not None:
        config = project.merge(ratios=[ratio], overwrite=True)
        with clock("merge"):
            merge(config)
    return measured


def demo(out: Path, seed: int) -> Path:
    """The whole main job on the built-in tiny world: data, base and judges are written to `out`, the rest is `run`.

    The same call in the same place goes on where it stopped.
    """
    from psacpo.demo import write_project

    clock = Clock()
    manifest = read_manifest(out)
    if manifest is None:
        if out.is_dir() and any(out.iterdir()):
            raise InputError(f"{out} is in use, and not by the demo", allowed="another --out")
        with clock("write"):
            write_project(out, seed)
    elif manifest.get("kind") != "demo" or manifest.get("seeds") != {"seed": seed}:
        raise InputError(f"{out} holds something else than the demo of seed {seed}", allowed="another --out")
    measured = run(Project.find(out / RECIPE), clock)
    say(f"time: {clock}")
    return measured
