"""The settings of `psacpo judge`, and the judges that its flags name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from psacpo.config import Strict, read_yaml, validate
from psacpo.errors import InputError
from psacpo.evalharness.judges.presets import PRESETS
from psacpo.evalharness.judges.settings import Judge
from psacpo.evalharness.judging.places import PLACES

_YAML = (".yaml", ".yml", ".json")
# Kinds that need no setting, and so are judges by their name alone.
_PLAIN = ("refusal", "length", "truncated", "repetition")


class JudgeConfig(Strict):
    """Judges and the stored completions that they score.

    Attributes:
        source: Rows with prompt and completion, or the directory of a `psacpo frontier`.
        judges: By name. For a run: to be added to its own, or in place of its own of that name.
        out: The file of verdicts; None in a run, which holds its own.
        cache: A directory of verdicts shared with other runs and files.
        calibrate: Rows with human labels of the same answers.
        threshold: A score above it counts as the label 1; None is 0.5 for scores from 0 to 1, else 0.
    """

    source: Path
    judges: dict[str, Judge] = Field(default_factory=dict)
    out: Path | None = None
    cache: Path | None = None
    calibrate: Path | None = None
    threshold: float | None = None
    max_invalid: float = Field(0.02, ge=0, le=1)
    confidence: float = Field(0.95, gt=0.5, lt=1)
    resamples: int = Field(2000, ge=100, le=1_000_000)
    seed: int = Field(0, ge=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    allow_code: bool = False


def judge_settings(source: Path | None, judges: Sequence[str], **flags: Any) -> JudgeConfig:
    """The settings of `judge`; flags that are not None win. Without a source the gold rows are judged, else frontier."""
    given = {name: value for name, value in flags.items() if value is not None}
    if source is None and "calibrate" not in given and not Path("frontier").is_dir():
        raise InputError(
            "nothing to judge: no file was named, and there is no run in frontier", allowed="a file of rows, or a run"
        )
    values = given | {"source": source or given.get("calibrate") or Path("frontier"), "judges": parse_judges(judges)}
    return validate(JudgeConfig, values, where="psacpo judge")


class _Judges(Strict):
    judges: dict[str, Judge]


def parse_judges(texts: Sequence[str]) -> dict[str, Judge]:
    """The judges of `--judge` flags: a preset's name, a YAML file of one judge or of several, or NAME= one of these.

    A file of one judge holds its settings, and its judge has the file's name; one of several holds them by name, at its
    top or under `judges` as in a recipe. Models and files in it are relative to the file.

    Raises:
        InputError: A name that is no preset, a file that holds no judges, or two judges of one name.
    """
    found: dict[str, Any] = {}
    wheres: dict[str, str] = {}
    for text in texts:
        name, equals, what = text.partition("=")
        if not equals:
            name, what = "", text
        elif not name:
            raise InputError(f"--judge {text}: no name before =", allowed=f"--judge NAME={what}, --judge {what}")
        named = _from_file(Path(what)) if what.endswith(_YAML) else {what: _by_name(what)}
        if name and len(named) > 1:
            raise InputError(f"--judge {text}: {what} holds {len(named)} judges", allowed=f"--judge {what}")
        for own, settings in named.items():
            given = name or own
            if not isinstance(given, str):
                raise InputError(f"--judge {text}: judge name {given} is no text", allowed="a name in quotes")
            if not re.fullmatch(r"[\w.@+-]{1,64}", given):
                raise InputError(f"judge name '{given}' is not letters, digits and _ . @ + - (at most 64)")
            if given in found:
                raise InputError(f"--judge {text}: there is a judge '{given}' already", allowed="--judge NAME=...")
            found[given], wheres[given] = settings, text
    return {
        name: validate(_Judges, {"judges": {name: one}}, where=f"--judge {wheres[name]}").judges[name]
        for name, one in found.items()
    }


def _by_name(name: str) -> dict[str, Any]:
    if name in PRESETS:
        return {"preset": name} | dict(PRESETS[name].settings)
    if name in _PLAIN:
        return {"kind": name}
    from psacpo.errors import unknown_name

    error = unknown_name("judge", name, {*PRESETS, *_PLAIN})
    raise InputError(f"--judge: {error}, or a file of judges that ends in {', '.join(_YAML)}")


def _from_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"no file of judges at {path}", allowed="a YAML file, or a preset: psacpo judge --list")
    loaded = read_yaml(path)
    if "kind" in loaded or "preset" in loaded:
        named: Mapping[str, Any] = {path.name.split(".")[0]: loaded}
    else:
        named = loaded.get("judges", loaded)
    if not isinstance(named, Mapping) or not named or not all(isinstance(one, Mapping) for one in named.values()):
        raise InputError(
            f"{path} holds no judges", allowed="one judge's settings with their `kind`, or several by name"
        )
    return {name: _placed(dict(one), path.parent) for name, one in named.items()}


def _placed(settings: dict[str, Any], root: Path) -> dict[str, Any]:
    """A judge's settings with the places that its file gives relative to itself."""
    for key in PLACES:
        place = settings.get(key)
        if isinstance(place, str) and (root / place).exists():
            settings[key] = str(root / place)
    return settings
