"""A project directory: how each command's settings come out of its psacpo.yaml and of flags.

What one command needs is imported by that command alone: `psacpo merge` with flags is to start at once.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from psacpo.config import Strict, read_yaml, validate
from psacpo.console import say
from psacpo.errors import InputError
from psacpo.files import write_atomically
from psacpo.merge.config import SAFETENSORS_DTYPES, MergeConfig, policy_name

if TYPE_CHECKING:
    from psacpo.align.config import AlignConfig
    from psacpo.evalharness.config import FrontierConfig
    from psacpo.recipe_keys import Recipe

RECIPE = "psacpo.yaml"
_HEAD = "# Written by psacpo align. docs/align.md says what each key is, and which others there are.\n"
# How far above its own directory a recipe still writes a path as relative.
_MOST_UPS = 1


class Project:
    """A recipe and the directory that its relative paths start from.

    Attributes:
        recipe: The validated recipe, or None where there is none and flags say everything.
        root: The directory that relative paths start from.
        name: What error lines call it.
    """

    def __init__(self, recipe: Recipe | None, root: Path, name: str) -> None:
        self.recipe, self.root, self.name = recipe, root, name

    @classmethod
    def find(cls, given: Path | None) -> Project:
        """The recipe named on the command line (a file, or a directory that holds psacpo.yaml), else the one here."""
        path = given
        if path is None:
            path = Path(RECIPE)
            if not path.is_file():
                return cls(None, Path(), "the command line")
        elif path.is_dir():
            path = path / RECIPE
        from psacpo.recipe_keys import Recipe

        return cls(validate(Recipe, read_yaml(path), where=str(path)), path.parent, str(path))

    def align(self, **flags: Any) -> AlignConfig:
        """The settings of `align`; flags that are not None win."""
        from psacpo.align.config import AlignConfig

        values: dict[str, Any] = {}
        if self.recipe is not None:
            values = _dump(self.recipe, AlignConfig)
            values |= {"base": self.resolve(self.recipe.base), "out": self.root / self.recipe.out}
            values["stages"] = [stage | {"data": self.resolve(stage["data"])} for stage in values["stages"]]
            # One file can be held against the training data; several are sets of others' prompts.
            if isinstance(self.recipe.prompts, str):
                values["evaluation_prompts"] = self.root / self.recipe.prompts
        values |= _said(flags)
        self._require(values, base="--base", stages="--reward-data and --safety-data", out="--out")
        return validate(AlignConfig, values, where=self.name)

    def merge(self, **flags: Any) -> MergeConfig:
        """The settings of `merge`; flags that are not None win. Policies given by flags leave the recipe's aside."""
        values: dict[str, Any] = {}
        if self.recipe is not None:
            values = {"base": self.resolve(self.recipe.base), "as": self.recipe.as_}
            if not flags.get("policies"):
                values |= {end: path for end, path in self._adapters().items() if end in ("reward", "safety")}
        given = _said(flags)
        named = ""
        if given.get("policies"):
            given["policies"], named = self._weighed(given["policies"])
        values |= given
        sources = [values[end] for end in ("reward", "safety") if end in values] or list(given.get("policies", {}))
        if "base" not in given and any(_is_full_model(source) for source in sources):
            # They are merged with each other; the recipe's base is that of its adapters.
            values.pop("base", None)
        if not values.get("policies"):
            self._require(values, reward="--reward", safety="--safety", ratios="--ratio")
        if "out" not in values:
            policies, ratios = self.root / "policies", values.get("ratios") or []
            if not ratios and not named:
                raise InputError("'out' is missing: several policies have no name of their own", allowed="--out")
            values["out"] = policies if len(ratios) > 1 else policies / (named or policy_name(ratios[0]))
        return validate(MergeConfig, values, where=self.name)

    def frontier(self, **flags: Any) -> FrontierConfig:
        """The settings of `frontier`; flags that are not None win, adapters and judges one by one."""
        from psacpo.evalharness.command import command_line
        from psacpo.evalharness.config import FrontierConfig
        from psacpo.evalharness.prompt_sets import with_places

        values: dict[str, Any] = {"adapters": {}, "judges": {}, "out": self.root / "frontier"}
        if self.recipe is not None:
            values |= _dump(self.recipe, FrontierConfig)
            values |= {
                "base": self.resolve(self.recipe.base),
                "out": self.root / self.recipe.frontier,
                "adapters": self._adapters(),
                "judges": {name: self._judge(judge) for name, judge in values["judges"].items()},
                "baselines": {name: self._baseline(one) for name, one in values["baselines"].items()},
                "metrics": {name: self._metric(metric) for name, metric in values["metrics"].items()},
            }
            values["adapters"] |= self._trained(
                {name for one in self.recipe.baselines.values() for name in _weighs(one)}
            )
            values.pop("prompts", None)
            if self.recipe.prompts is not None:
                values["prompts"] = with_places(self.recipe.prompts, lambda path: self.root / path)
        flags = _said(flags)
        values["command"] = command_line(self._as_seen_from_home(flags), self._recipe_argument())
        if "baselines" in flags:
            values.setdefault("baselines", {"base": {}})
        if "ratios" in flags:
            if "weights" in flags:
                raise InputError("--ratio and --weights are two kinds of sweep", allowed="one of these")
            values["weights"] = None
        for name in ("adapters", "judges", "baselines", "vllm", "openai", "ray"):
            if name in values or name in flags:
                values[name] = values.get(name, {}) | flags.pop(name, {})
        values |= flags
        self._require(values, base="--base", prompts="--prompts", judges="--reward-model and --cost-model")
        return validate(FrontierConfig, values, where=self.name)

    def resolve(self, name: str) -> str:
        """A path relative to the recipe if there is such a file or directory, else `name` itself (a hub id)."""
        local = self.root / name
        if not (local.exists() or name.startswith(("./", "../"))):
            return name
        plain = Path(os.path.normpath(local))
        # Past a symbolic link, a/../b need not be b.
        return str(plain if plain.exists() and plain.samefile(local) else local)

    def leave(self, config: AlignConfig) -> None:
        """Leave the recipe that `config` came from in its output directory, so that the commands work there as typed.

        Paths are written relative to that directory where they lie in it or beside it, and absolute elsewhere.
        """
        from psacpo.align.config import AlignConfig, spelled_out
        from psacpo.evalharness.prompt_sets import with_places

        home = config.out / RECIPE
        if self.recipe is not None and home.exists() and home.samefile(self.name):
            return
        said: dict[str, Any] = (
            self.recipe.model_dump(by_alias=True, exclude_unset=True, mode="json") if self.recipe else {}
        )
        said = {"base": config.base} | said | spelled_out(config)
        said["base"] = _seen_from(config.out, config.base)
        for stage in said["stages"]:
            stage["data"] = _seen_from(config.out, stage["data"])
        said["adapters"] = {stage.name: stage.name for stage in config.runs}
        if self.recipe is not None and "adapters" in self.recipe.model_fields_set:
            # What the recipe's own stages once left is not this output's; what its owner added from elsewhere is kept.
            left = self.root / self.recipe.out
            more = {
                name: path
                for name, path in self._adapters().items()
                if name not in said["adapters"] and os.path.normpath(path) != os.path.normpath(left / name)
            }
            said["adapters"] |= {name: _seen_from(config.out, str(path)) for name, path in more.items()}
        said.pop("out", None)
        if self.recipe is not None:
            for name, one in said.get("baselines", {}).items():
                place = self._baseline(one).get("model")
                if isinstance(place, str):
                    said["baselines"][name]["model"] = _seen_from(config.out, place)
            if self.recipe.prompts is not None:
                said["prompts"] = with_places(
                    self.recipe.prompts, lambda path: _seen_from(config.out, str(self.root / path))
                )
            for name, judge in said.get("judges", {}).items():
                found = self._judge(said["judges"][name])
                judge.update({key: _seen_from(config.out, str(found[key])) for key in _paths_of(found)})
        if home.exists():
            before = _left_before(home)
            if before is None:
                say(f"{home} was not written by psacpo align and stays as it is")
                return
            # What frontier was told, and whatever else its owner added, is not align's to forget.
            said |= {name: value for name, value in before.items() if name not in (*said, *AlignConfig.model_fields)}
            if said == before:
                return
        write_atomically(home, _HEAD + yaml.safe_dump(said, sort_keys=False, allow_unicode=True))

    def remember(self, config: FrontierConfig) -> str | None:
        """Add to the project's psacpo.yaml what `frontier` cannot be without and the file does not say.

        These are prompts, judges and constraints: with them a plain `psacpo frontier` or `psacpo run` measures the same
        thing again. Other flags hold for one run, and what the file says is never changed: its owner wrote it, with
        comments, and a flag may be meant for once.

        Returns:
            A line for the user, None where there is nothing to say.
        """
        home = Path(self.name)
        if self.recipe is None or home.name != RECIPE:
            return None
        added = self._missing(config)
        if not added:
            return None
        block = yaml.safe_dump(added, sort_keys=False, allow_unicode=True)
        names = ", ".join(added)
        try:
            before = home.read_text(encoding="utf-8")
            after = (
                before + ("" if before.endswith("\n") else "\n") + f"\n# From the flags of psacpo frontier.\n{block}"
            )
            # A file in YAML's flow style, or one that was edited meanwhile, cannot be added to at its end.
            if yaml.safe_load(after) == (yaml.safe_load(before) or {}) | added:
                write_atomically(home.resolve(), after)
                return f"{home} now says {names}: psacpo frontier needs no flags for them here"
        except (OSError, ValueError, yaml.YAMLError):
            pass
        return f"for psacpo frontier to need no flags here, add to {home}:\n{block.rstrip()}"

    def _missing(self, config: FrontierConfig) -> dict[str, Any]:
        """Prompts, judges and constraints of `config` as psacpo.yaml would say them, but for those that it says."""
        from psacpo.evalharness.prompt_sets import with_places

        assert self.recipe is not None
        judges = {name: judge.model_dump(exclude_unset=True, mode="json") for name, judge in config.judges.items()}
        for judge in judges.values():
            judge.update({key: _seen_from(self.root, judge[key]) for key in _paths_of(judge)})
        found: dict[str, Any] = {
            "prompts": with_places(config.prompts, lambda path: _seen_from(self.root, path)),
            "judges": judges,
            "constraints": [str(constraint) for constraint in config.constraints],
        }
        return {name: value for name, value in found.items() if value and name not in self.recipe.model_fields_set}

    def _recipe_argument(self) -> str | None:
        name = Path(self.name).name
        return name if self.recipe is not None and name != RECIPE else None

    def _as_seen_from_home(self, flags: Mapping[str, Any]) -> dict[str, Any]:
        """Flags whose paths lead on from the project's directory, where they were given from another one."""
        seen = dict(flags)
        if self.root.resolve() == Path.cwd():
            return seen
        for name in ("base", "prompts", "out"):
            if name in seen:
                seen[name] = _seen_from(self.root, str(seen[name]), new=name == "out")
        seen["adapters"] = {n: _seen_from(self.root, str(path)) for n, path in seen.get("adapters", {}).items()}
        seen["baselines"] = {
            n: one | {"model": _seen_from(self.root, one["model"])} for n, one in seen.get("baselines", {}).items()
        }
        seen["judges"] = {
            n: judge | {key: _seen_from(self.root, str(judge[key])) for key in _paths_of(judge)}
            for n, judge in seen.get("judges", {}).items()
        }
        return seen

    def _weighed(self, policies: Mapping[str, float]) -> tuple[dict[str, float], str]:
        """Policies of `merge` with the recipe's adapters, by whose names they may be called, as paths.

        Returns:
            Them, and what a sweep would call their mixture; "" where one is none of the recipe's adapters.
        """
        from psacpo.evalharness.weights import weights_name

        adapters = self._adapters() if self.recipe is not None else {}
        places = {name if name not in adapters else str(adapters[name]): w for name, w in policies.items()}
        own = {path.resolve(): name for name, path in adapters.items()}
        names = {own.get(Path(place).resolve()): weight for place, weight in places.items()}
        ordered = {name: names[name] for name in adapters if name in names}
        return places, weights_name(ordered) if len(ordered) == len(places) else ""

    def _adapters(self) -> dict[str, Path]:
        assert self.recipe is not None
        return {name: self.root / path for name, path in self.recipe.adapters.items()}

    def _judge(self, judge: dict[str, Any]) -> dict[str, Any]:
        return judge | {key: self.resolve(str(judge[key])) for key in _paths_of(judge)}

    def _trained(self, names: set[str]) -> dict[str, Path]:
        """Of the adapters that baselines weigh and `adapters` does not name, those that the recipe's stages leave."""
        assert self.recipe is not None
        wanted = names - set(self.recipe.adapters)
        if not wanted or not self.recipe.stages:
            return {}
        return {run.name: self.root / self.recipe.out / run.name for run in self.align().runs if run.name in wanted}

    def _baseline(self, one: dict[str, Any]) -> dict[str, Any]:
        place = one.get("model")
        return one | {"model": self.resolve(place)} if isinstance(place, str) else one

    def _metric(self, metric: dict[str, Any]) -> dict[str, Any]:
        file = metric.get("calibration")
        return metric | {"calibration": self.root / file} if file else metric

    def _require(self, values: Mapping[str, Any], **flags: str) -> None:
        for name, flag in flags.items():
            if not values.get(name):
                where = "there is no psacpo.yaml here" if self.recipe is None else f"{self.name} does not say it"
                raise InputError(f"'{name}' is missing: {where}", allowed=f"{flag}, or a recipe with it")


def _weighs(one: object) -> list[str]:
    """The adapters of a baseline."""
    return list(one) if isinstance(one, dict) else []


def _left_before(home: Path) -> dict[str, Any] | None:
    """The settings in a recipe that `Project.leave` wrote; None where it is somebody else's."""
    try:
        text = home.read_text(encoding="utf-8")
        return read_yaml(home) if text.startswith(_HEAD) else None
    except (OSError, UnicodeDecodeError, InputError):
        return None


def _dump(recipe: Recipe, settings: type[Strict]) -> dict[str, Any]:
    """The fields of the recipe that `settings` has too."""
    values = recipe.model_dump(by_alias=True)
    return {key: values[key] for key in (f.alias or n for n, f in settings.model_fields.items()) if key in values}


def _said(flags: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in flags.items() if value is not None}


def _paths_of(judge: Mapping[str, Any]) -> list[str]:
    """The settings of a judge that may be paths; a language model's name is its endpoint's business."""
    keys = ("rubric_file",) if judge.get("kind") == "llm" else ("model", "path", "spec", "template_file")
    return [key for key in keys if judge.get(key)]


def _seen_from(directory: Path, name: str, *, new: bool = False) -> str:
    """A local path as a recipe in `directory` writes it; a hub id as it stands.

    Relative where it lies in the directory or beside it, as such a place is moved as a whole; not past the root.

    Args:
        new: Whether it is a path although nothing is there yet.
    """
    path = Path(name)
    if not new and not path.exists():
        return name
    target, home = path.resolve(), directory.resolve()
    shared = next(place for place in (home, *home.parents) if target.is_relative_to(place))
    ups = len(home.relative_to(shared).parts)
    if ups > _MOST_UPS or (ups and len(shared.parts) == 1):
        return str(target)
    return os.path.relpath(target, home)


def merge_settings(given: Path | None, **flags: Any) -> MergeConfig:
    """The settings of `merge` from flags and from what is named on the command line: a recipe, or a mergekit file."""
    if given is None or not given.is_file():
        return Project.find(given).merge(**flags)
    from psacpo.merge.mergekit import is_mergekit, read_mergekit

    if not is_mergekit(read_yaml(given)):
        return Project.find(given).merge(**flags)
    spec = read_mergekit(given)
    models = [
        {"path": str(model), "parameters": own} for model, own in zip(spec.models, spec.settings.models, strict=True)
    ]
    values: dict[str, Any] = {
        "models": models,
        "method": spec.settings.method,
        "parameters": spec.settings.shared,
        "base": str(spec.base) if spec.base else None,
        "layout": str(spec.layout),
        "dtype": next((name for name, stored in SAFETENSORS_DTYPES.items() if stored == spec.dtype), None),
        "layers": spec.layers,
        "one_vocabulary": spec.tokenizer_source is not None,
        "as": "checkpoint",
    }
    said = _said(flags)
    clash = sorted(set(said) & {"reward", "safety", "ratios", "policies", "method", "parameters"})
    if clash:
        raise InputError(f"{given} is a mergekit file, which says the models and their weights", given=f"--{clash[0]}")
    if "out" not in said:
        raise InputError("'out' is missing: a mergekit file does not say it", allowed="--out")
    return validate(MergeConfig, values | said, where=str(given))


def stages_from_flags(
    project: Project, reward_data: str | None, safety_data: str | None
) -> list[dict[str, Any]] | None:
    """The stages that --reward-data and --safety-data ask for: the recipe's with that data, or the two default ones."""
    given = {"reward": reward_data, "safety": safety_data}
    if not any(given.values()):
        return None
    known: list[dict[str, Any]] = []
    if project.recipe is not None:
        known = [stage.model_dump(by_alias=True) for stage in project.recipe.stages]
        for stage in known:
            stage["data"] = project.resolve(stage["data"])
    if not known:
        if not all(given.values()):
            raise InputError(
                "one of --reward-data and --safety-data is missing", allowed="both, or a recipe with stages"
            )
        known = [{"name": name, "data": None} for name in given]
    for stage in known:
        stage["data"] = given.get(stage["name"]) or stage["data"]
    return known


def _is_full_model(place: str | Path) -> bool:
    path = Path(place)
    return (path / "config.json").is_file() and not (path / "adapter_config.json").exists()
