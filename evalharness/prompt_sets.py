"""Which prompts a sweep asks, and what each set of them is for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Tag

from psacpo.config import Strict
from psacpo.files import digest, digest_file

Role = Literal["helpful", "safety", "over-refusal"]
SetName = Literal["sacpo-helpful", "sacpo-safety", "xstest"]


class PromptSet(Strict):
    """A file of prompts and what it is for.

    Attributes:
        path: Rows as `psacpo.rows` reads them, with a column `prompt`.
        role: What the prompts ask for: help, harm, or something harmless that looks harmful. Every row gets it as its
            field `role`, for metrics with `where: {role: safety}`; None leaves the rows' own.
        preset: A published set's columns and roles, of the file at `path`: SACPO's helpful_problem.json and
            safety_problem.json, or XSTest's prompts, whose safe ones are for over-refusal and unsafe ones for safety.
    """

    path: Path
    role: Role | None = None
    preset: SetName | None = None


def _spelled_out(value: Any) -> Any:
    return {"path": value} if isinstance(value, str | Path) else value


OneSet = Annotated[PromptSet, BeforeValidator(_spelled_out)]


def _layout(value: Any) -> str:
    return "sets" if isinstance(value, list) else "file"


# Told apart by what they are, so that an error names the key in a set that is wrong.
_Sets = Annotated[list[OneSet], Tag("sets")]
Prompts = Annotated[Annotated[Path, Tag("file")] | _Sets, Discriminator(_layout)]
RecipePrompts = Annotated[Annotated[str, Tag("file")] | _Sets, Discriminator(_layout)]

_SACPO_ROLES: dict[str, Role] = {"sacpo-helpful": "helpful", "sacpo-safety": "safety"}


def fields_of(one: PromptSet, fields: dict[str, Any]) -> dict[str, Any]:
    """A row's fields with what its set says of them."""
    found = dict(fields)
    if one.preset == "xstest":
        unsafe = str(fields.get("label", "")) == "unsafe" or str(fields.get("type", "")).startswith("contrast_")
        found |= {"role": "safety" if unsafe else "over-refusal", "category": fields.get("type")}
    elif one.preset is not None:
        found["role"] = _SACPO_ROLES[one.preset]
    if one.role is not None:
        found["role"] = one.role
    return found


def roles_of(one: PromptSet) -> set[Role]:
    """The roles that a set says its prompts have; none where the rows may have their own."""
    if one.role is not None:
        return {one.role}
    if one.preset == "xstest":
        return {"safety", "over-refusal"}
    return {_SACPO_ROLES[one.preset]} if one.preset is not None else set()


def prompt_sets(prompts: Prompts) -> list[PromptSet]:
    """The sets, of one file or of several."""
    return [PromptSet(path=prompts)] if isinstance(prompts, Path) else list(prompts)


def digest_prompts(prompts: Prompts) -> str:
    """Of the files and of what is said of them."""
    if isinstance(prompts, Path):
        return digest_file(prompts)
    return digest([one.model_dump(exclude={"path"}) | {"file": digest_file(one.path)} for one in prompts])


def with_places(prompts: Any, place: Callable[[str], Any]) -> Any:
    """The setting `prompts` of a recipe with `place` done to each of its paths."""
    if not isinstance(prompts, list):
        return place(str(prompts))
    given = [_spelled_out(one.model_dump(mode="json") if isinstance(one, PromptSet) else one) for one in prompts]
    return [one | {"path": place(str(one["path"]))} for one in given]
