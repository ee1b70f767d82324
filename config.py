"""Settings read from YAML and checked by pydantic, with errors that name the nearest valid key."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from psacpo.errors import InputError, unknown_name


class Strict(BaseModel):
    """Settings in which an unknown key is an error and nothing changes after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, protected_namespaces=())


Settings = TypeVar("Settings", bound=BaseModel)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; anything else is an `InputError` that names file and line."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"no recipe at {path}", allowed="a YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read recipe {path}: {error}") from error
    try:
        loaded = yaml.safe_load(text)
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


def _first_line(settings: type[BaseModel], error: ValidationError, where: str) -> InputError:
    # An unknown key explains a missing one, so it is told first.
    problems = sorted(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
    problem = problems[0]
    steps = [step for step in problem["loc"] if not (isinstance(step, str) and step.startswith("function-"))]
    place = ".".join(str(step) for step in steps)
    if problem["type"] == "extra_forbidden":
        names = _keys_at(settings, steps[:-1])
        inner = unknown_name("key", place if not names else str(steps[-1]), names)
        return InputError(f"{where}: {f'in {_join(steps[:-1])}: ' if steps[:-1] else ''}{inner}")
    message = problem["msg"].removeprefix("Value error, ")
    given = problem["input"] if isinstance(problem["input"], str | int | float | bool) else None
    if problem["type"] == "missing":
        return InputError(f"{where}: '{place}' is missing")
    return InputError(f"{where}: {f'{place}: ' if place else ''}{message}", given=given)


def _join(steps: list[Any]) -> str:
    return ".".join(str(step) for step in steps)


def _keys_at(settings: type[BaseModel], steps: list[Any]) -> list[str]:
    """The valid keys of the settings found by following `steps` (field names, list indices, mapping keys)."""
    current: Any = settings
    for step in steps:
        if isinstance(current, type) and issubclass(current, BaseModel):
            by_name = {(field.alias or name): field for name, field in current.model_fields.items()}
            by_name |= dict(current.model_fields)
            current = _settings_in(by_name[step].annotation) if step in by_name else None
    if isinstance(current, type) and issubclass(current, BaseModel):
        return [field.alias or name for name, field in current.model_fields.items()]
    return []


def _settings_in(annotation: Any) -> Any:
    """The settings class inside an annotation such as list[Stage] or dict[str, Judge] | None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in get_args(annotation):
        found = _settings_in(argument)
        if found is not None:
            return found
    return None
