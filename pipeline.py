"""Several jobs in a row: align -> frontier -> merge at the chosen ratio, and the built-in demo of it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from psacpo.align.config import AlignConfig
from psacpo.console import say
from psacpo.display import Steps
from psacpo.errors import InputError
from psacpo.evalharness.config import FrontierConfig
from psacpo.evalharness.engines.plan import LORA_RANKS
from psacpo.evalharness.run_files import COMPLETIONS, VERDICTS
from psacpo.files import MANIFEST, read_manifest, readable_io_errors
from psacpo.merge.config import MergeConfig
from psacpo.recipe import RECIPE, Project

ADAPTER_CONFIG = "adapter_config.json"


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


def run(project: Project) -> Path:
    """align, frontier and, if a policy was chosen, merge it; finished parts are not done again.

    Returns:
        The frontier's run directory. The policy is in `policies`, in a directory of its name; `merged` finds it.
    """
    from psacpo.evalharness import frontier
    from psacpo.evalharness.sweep import check
    from psacpo.merge import merge

    align_config, frontier_config = project.align(), project.frontier()
    trained = {f"align {stage.name}": [align_config.out / stage.name / MANIFEST] for stage in align_config.runs}
    answered = [frontier_config.out / name for name in (COMPLETIONS, VERDICTS)]
    with Steps(f"psacpo run {project.name}", ["check", *trained, "frontier", "merge"]) as shown:
        # Everything that can be refused is refused before the first stage trains.
        with shown.step({"check": []}):
            check(frontier_config)
            _require_adapters(align_config, frontier_config)
        with shown.step(trained):
            align(project, align_config)
        with shown.step({"frontier": answered}):
            measured = frontier(frontier_config)
        config = _chosen(project, measured)
        if config is None:
            shown.skip("merge", "nothing, no policy was chosen")
        else:
            with shown.step({"merge": [config.out / MANIFEST]}):
                merge(config)
    return measured


def merged(project: Project, measured: Path) -> dict[str, Any]:
    """Where `run` left the chosen policy, and how to load and serve it; empty where none was chosen.

    Args:
        measured: What `run` returned.

    Returns:
        policy, its directory; load, a line of Python; serve, a command.
    """
    config = _chosen(project, measured)
    if config is None:
        return {}
    place = str(config.out)
    if (config.out / ADAPTER_CONFIG).is_file():
        base, adapter = str(config.base), json.loads((config.out / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        load = f"PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), {place!r})"
        rank = next((allowed for allowed in LORA_RANKS if allowed >= adapter["r"]), adapter["r"])
        words = ["vllm", "serve", base, "--enable-lora", "--max-lora-rank", str(rank)]
        words += ["--lora-modules", f"{config.out.name}={place}"]
    else:
        load, words = f"AutoModelForCausalLM.from_pretrained({place!r})", ["vllm", "serve", place]
    found = {"policy": place, "load": load, "serve": shlex.join(words)}
    if config.ratios and config.reward and (Path(config.reward) / ADAPTER_CONFIG).is_file():
        recipe = "" if Path(project.name) == Path(RECIPE) else f" {shlex.quote(project.name)}"
        found["dial"] = f"psacpo serve{recipe} --ratio {config.ratios[0]:g}"
    return found


def merged_lines(found: Mapping[str, Any]) -> list[str]:
    """`merged` for a person."""
    if not found:
        return []
    lines = [f"policy: {found['policy']}", f"load:   {found['load']}", f"serve:  {found['serve']}"]
    return [*lines, f"        or {found['dial']}"] if "dial" in found else lines


def _chosen(project: Project, measured: Path) -> MergeConfig | None:
    """The merge of the policy that a frontier chose; None where it chose none."""
    choice = json.loads((measured / "frontier.json").read_text(encoding="utf-8"))["choice"]
    if choice["policy"] is None:
        return None
    if choice["ratio"] is not None:
        return project.merge(ratios=[choice["ratio"]], overwrite=True)
    return project.merge(policies=choice["weights"], overwrite=True)


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

    if seed < 0:
        raise InputError("the seed is negative", given=seed, allowed="0 and up")
    with readable_io_errors(out):
        manifest = read_manifest(out)
    if manifest is None:
        if out.is_dir() and any(out.iterdir()):
            raise InputError(f"{out} is in use, and not by the demo", allowed="another --out")
        write_project(out, seed)
    elif manifest.get("kind") != "demo" or manifest.get("seeds") != {"seed": seed}:
        raise InputError(f"{out} holds something else than the demo of seed {seed}", allowed="another --out")
    return run(Project.find(out / RECIPE))
