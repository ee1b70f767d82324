"""Writes the demo as a project directory: the shipped models, seeded data and the recipe."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from importlib.resources import as_file, files
from pathlib import Path

from psacpo.demo import data
from psacpo.files import atomic_directory, write_manifest

MODELS = {"model": "base", "judges/reward": "reward", "judges/cost": "cost"}  # in the project: in weights/


def write_project(out: Path, seed: int = 0) -> Path:
    """Writes a whole project to `out`, or nothing, and returns the path of its psacpo.yaml.

    `seed` decides the preference data and the recipe's seed; models and prompts are the same for every seed.
    """
    with atomic_directory(out) as partial, as_file(files("psacpo.demo")) as package:
        for place, name in MODELS.items():
            shutil.copytree(package / "weights" / name, partial / place)
        (partial / "data").mkdir()
        _write_rows(partial / "data" / "reward.jsonl", data.reward_pairs(seed))
        _write_rows(partial / "data" / "safety.jsonl", data.safety_pairs(seed))
        _write_rows(partial / "data" / "prompts.jsonl", data.eval_prompts())
        write_manifest(partial, kind="demo", config={}, inputs={}, seeds={"seed": seed})
        recipe = (package / "psacpo.yaml").read_text(encoding="utf-8")
        (partial / "psacpo.yaml").write_text(recipe.replace("\nseed: 0\n", f"\nseed: {seed}\n"), encoding="utf-8")
    return out / "psacpo.yaml"


def _write_rows(path: Path, rows: Iterable[data.Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
