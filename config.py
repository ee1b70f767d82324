"""Settings read from YAML and checked by pydantic, with errors that name the nearest valid key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from psacpo.errors import InputError, unknown_name


class Strict(BaseModel):
    """Settings in which an unknown key or a number that is not finite is an error, and nothing changes afterwards."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, protected_namespaces=(), allow_inf_nan=False
    )


Settings = TypeVar("Settings", bound=BaseModel)


class _UniqueKeys(yaml.SafeLoader):
    """YAML's safe loader, except that a key which is there twice is an error and not a silent choice of the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen and name != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"the key '{name}' is there twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; anything else is an `InputError` that names file and line."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"no recipe at {path}", allowed="a YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read recipe {path}: {error}") from error
    try:
        loaded = yaml.load(text, Loader=_UniqueKeys)
    except RecursionError as error:
        raise InputError(f"{path} is nested too deeply") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise InputError(f"{path}{line} is not YAML: {getattr(error, 'problem', error)}") from error
    if not isinstance(loaded, dict):
        raise InputError(f"{path} holds no settings", given=type(loaded).__name__, allowed="key: value lines")
    return loaded


def validate(settings: type[Settings], values: Mapping[str, Any], *, where: str) -> Settings:
    """`values` as `settings`; the first thing wrong becomes one line with the path to the key and what is allowed."""
    try:
        return settings.model_validate(dict(values))
    except ValidationError as error:
        raise _first_line(settings, error, where) from error
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: a setting holds half a surrogate pair, which is no text") from error


def _first_line(settings: type[BaseModel], error: ValidationError, where: str) -> InputError:
    # An unknown key explains a missing one, so it is told first.
    problems = sorted(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
    problem = problems[0]
    found, steps = _follow(settings, problem["loc"])
    place = ".".join(steps)
    if problem["type"] == "extra_forbidden":
        inside = f"in {'.'.join(steps[:-1])}: " if steps[1:] else ""
        return InputError(f"{where}: {inside}{unknown_name('key', steps[-1], found)}")
    if problem["type"] == "missing":
        return InputError(f"{where}: '{place}' is missing")
    message = problem["msg"].removeprefix("Value error, ")
    given = problem["input"] if isinstance(problem["input"], str | int | float | bool) else None
    # What a file that the settings name is wrong in says so itself.
    named = "" if message.startswith(where) else f"{where}: "
    return InputError(f"{named}{f'{place}: ' if place else ''}{message}", given=given)


def _follow(settings: type[BaseModel], steps: Sequence[int | str]) -> tuple[list[str], list[str]]:
    """Where an error is: the valid keys beside its last step, and its steps as the YAML file has them.

    Pydantic puts the tag of a union's member among the steps; it is no key of the file.
    """
    candidates = [settings]
    shown: list[str] = []
    keys: list[str] = []
    for step in steps:
        tagged = [one for one in candidates if _tag(one) == step]
        if tagged and len(candidates) > 1:
            candidates = tagged
            continue
        shown.append(str(step))
        keys = list(
            dict.fromkeys(field.alias or name for one in candidates for name, field in one.model_fields.items())
        )
        inside = [
            field.annotation
            for one in candidates
            for name, field in one.model_fields.items()
            if step in (name, field.alias)
        ]
        # A list's index or a mapping's key leads to the same settings as the list or mapping itself.
        if inside:
            candidates = [one for annotation in inside for one in _settings_in(annotation)]
    return keys, shown


def _tag(settings: type[BaseModel]) -> object:
    """The value of a union member's field `kind`, None where it has none."""
    field = settings.model_fields.get("kind")
    values = get_args(field.annotation) if field else ()
    return values[0] if values else None


def _settings_in(annotation: Any) -> list[type[BaseModel]]:
    """All settings classes inside an annotation such as list[Stage] or dict[str, One | Other] | None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for argument in get_args(annotation) for found in _settings_in(argument)]
