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
from psacpo.evalharness.config import FrontierConfig
from psacpo.files import read_manifest, readable_io_errors
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


def frontier(project: Project, config: FrontierConfig) -> Path:
    """Measure the frontier, and leave in the project's recipe what the flags said that it lacks."""
    from psacpo.evalharness import frontier as job

    run = job(config)
    if line := project.remember(config):
        say(line)
    return run


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
    _require_adapters(align_config, frontier_config)
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


def _require_adapters(align_config: AlignConfig, frontier_config: FrontierConfig) -> None:
    """Refuse a sweep over an adapter that is not there and that no stage will make."""
    trained = {(align_config.out / stage.name).resolve(): stage.name for stage in align_config.runs}
    for name, path in frontier_config.adapters.items():
        if path.resolve() not in trained and not path.is_dir():
            raise InputError(
                f"adapter '{name}' is to be at {path}, where nothing is and no stage puts one",
                allowed=f"in adapters, the directory of a stage: {', '.join(trained.values())}",
            )


def demo(out: Path, seed: int) -> Path:
    """The whole main job on the built-in tiny world: data, base and judges are written to `out`, the rest is `run`.

    The same call in the same place goes on where it stopped.
    """
    from psacpo.demo import write_project

    clock = Clock()
    if seed < 0:
        raise InputError("the seed is negative", given=seed, allowed="0 and up")
    with readable_io_errors(out):
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
