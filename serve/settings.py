"""The settings of `serve` out of a project's recipe and the command line. No torch here."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psacpo.config import validate
from psacpo.errors import InputError
from psacpo.serve.config import ServeConfig

if TYPE_CHECKING:
    from psacpo.recipe import Project

_FLAGS = {"reward": "--reward", "safety": "--safety"}


def serve_settings(project: Project, **flags: Any) -> ServeConfig:
    """The settings of `serve`: base, adapters, dtype and seed as the recipe has them; flags that are not None win.

    Args:
        project: Where the recipe is, if there is one.
        flags: Fields of `ServeConfig`.

    Raises:
        InputError: An adapter is named neither way, or a value is not allowed.
    """
    values: dict[str, Any] = {}
    recipe = project.recipe
    if recipe is not None:
        values = {"base": project.resolve(recipe.base), "seed": recipe.seed}
        values |= {end: project.root / Path(path) for end, path in recipe.adapters.items() if end in _FLAGS}
        if "dtype" in recipe.model_fields_set:  # what the frontier was measured in; unsaid, the base's own is cheaper
            values["dtype"] = recipe.dtype
    values |= {name: value for name, value in flags.items() if value is not None}
    for name, flag in _FLAGS.items():
        if not values.get(name):
            where = "there is no psacpo.yaml here" if recipe is None else f"{project.name} does not say it"
            raise InputError(f"'{name}' is missing: {where}", allowed=f"{flag}, or a recipe with it")
    return validate(ServeConfig, values, where=project.name)


def split_arguments(text: str | None) -> list[str] | None:
    """Arguments in one string, as a shell would split them.

    Raises:
        InputError: A quotation mark has no partner.
    """
    try:
        return None if text is None else shlex.split(text)
    except ValueError as error:
        raise InputError(
            f"--engine-args cannot be split: {error}", given=text, allowed="arguments as a shell reads them"
        ) from None
