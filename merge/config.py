"""The settings of `merge`: which sources, in which mixes, by which method, as what."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from psacpo.config import Strict
from psacpo.errors import InputError
from psacpo.merge.parameters import MethodSettings, Setting, method_settings, settings_at
from psacpo.merge.signatures import SIGNATURES, signature

OutputKind = Literal["adapter", "checkpoint"]
# A directory or a hub id; a Path is taken too.
Location = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value)]
OutputDtype = Literal["float64", "float32", "float16", "bfloat16"]
SAFETENSORS_DTYPES: dict[str, str] = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
# What a manifest calls other inputs than sources.
_RESERVED = ("base", "layout")
# How far the weights of several policies may be from 1 in sum: what decimal fractions leave.
_SUM_TOLERANCE = 1e-6


class Model(Strict):
    """One source of a merge by a method, with the settings that are its own (weight, density, ...)."""

    path: Location
    parameters: dict[str, Setting] = Field(default_factory=dict)


@dataclass(frozen=True)
class Mix:
    """What one output is made of.

    Attributes:
        name: `policy@0.30`, or "policy" where no ratio is meant.
        ratio: Weight of the safety policy, None where there are not those two.
        weights: One number a source where the mix is a weighted sum of the same numbers for every tensor, else None.
        settings: The method and its settings, which say all.
    """

    name: str
    ratio: float | None
    weights: tuple[float, ...] | None
    settings: MethodSettings


class MergeConfig(Strict):
    """W(q) = W_base + (1-q) * delta_reward + q * delta_safety for each ratio q; or the same of other sources.

    Attributes:
        reward: The reward policy: an adapter, or a full model where there is no base to take adapters on.
        safety: The safety policy, of the same kind.
        ratios: Weights of the safety policy, each in [0, 1] unless `extrapolate`.
        policies: In the place of reward, safety and ratios: any number of sources, each with its weight; their sum is
            1 unless `unnormalised`.
        models: In the place of all those: sources with settings of their own, as a mergekit file has them.
        out: The output directory; with several ratios each goes to a directory in it, named policy@q.
        base: Model directory or hub id; None takes what adapters name.
        layout: The full model whose shards and side files an output of full models has; None is the base, or the first.
        method: How the sources become one; what each is, is in `psacpo.merge.parameters`.
        parameters: Settings of the method, by mergekit's names.
        as_: A PEFT adapter, or full weights; None is an adapter of adapters and full weights of full models.
        rank: Recompress an adapter output to this rank.
        dtype: Of full weights; None keeps that of the base, or of the first source.
        seed: Of methods that draw.
        unnormalised: Take weights that do not sum to 1.
        extrapolate: Take ratios outside [0, 1] (ExPO, arXiv 2404.16792).
        allow_different_base: Merge adapters that were made on another base than the one given.
        layers: How many layers full models are said to have, which is then checked.
        one_vocabulary: Refuse full models whose tokenizers differ.
        push_to_hub: Upload the outputs to this repository, a folder each where there are several.
        private: Whether a repository that this makes is private.
    """

    out: Path
    reward: Location | None = None
    safety: Location | None = None
    ratios: list[float] = Field(default_factory=list)
    policies: dict[Location, float] = Field(default_factory=dict)
    models: list[Model] = Field(default_factory=list)
    base: Location | None = None
    layout: Location | None = None
    method: str = "linear"
    parameters: dict[str, Setting] = Field(default_factory=dict)
    as_: OutputKind | None = Field(None, alias="as")
    rank: int | None = Field(None, ge=1)
    dtype: OutputDtype | None = None
    seed: int = Field(0, ge=0)
    unnormalised: bool = False
    extrapolate: bool = False
    allow_different_base: bool = False
    overwrite: bool = False
    layers: int | None = None
    one_vocabulary: bool = False
    push_to_hub: str | None = None
    private: bool = False

    @model_validator(mode="after")
    def _one_way_to_say_it(self) -> MergeConfig:
        pair = self.reward is not None or self.safety is not None
        if sum((pair, bool(self.policies), bool(self.models))) != 1:
            raise ValueError("say the sources in one way: reward and safety, or policies, or models")
        if pair and (self.reward is None or self.safety is None):
            raise ValueError(f"{'reward' if self.reward is None else 'safety'} is missing")
        if pair and not self.ratios:
            raise ValueError("ratios is missing; allowed: one number from 0 to 1 or more")
        if not pair and self.ratios:
            raise ValueError("ratios belong to reward and safety; other sources have weights")
        for ratio in self.ratios:
            if not math.isfinite(ratio) or not (self.extrapolate or 0 <= ratio <= 1):
                raise ValueError(f"ratio {ratio:g} is out of range; allowed: a number from 0 to 1, or extrapolate")
        if len(set(map(policy_name, self.ratios))) != len(self.ratios):
            raise ValueError(f"two ratios are the same: {self.ratios}")
        total = _sum(self.policies.values())
        if self.policies and not self.unnormalised and not abs(total - 1) <= _SUM_TOLERANCE:
            raise ValueError(f"the weights of the policies sum to {total:g}; allowed: 1, or unnormalised")
        takes = signature(self.method)
        if self.rank is not None and self.as_ == "checkpoint":
            raise ValueError("rank is of adapters; allowed: as: adapter")
        if pair and takes.ratio is None:
            settings_at(self.method, 0.5, self.parameters)
        return self

    @property
    def sources(self) -> dict[str, str]:
        """What to call each source -> its directory or hub id, in the order of the weights."""
        if self.reward is not None and self.safety is not None:
            return {"reward": self.reward, "safety": self.safety}
        paths = list(self.policies) or [model.path for model in self.models]
        return dict(zip(_short_names(paths), paths, strict=True))

    def mixes(self) -> list[Mix]:
        """One for each output.

        Raises:
            InputError: The method cannot be had with these sources, weights or settings.
        """
        if self.ratios:
            return [
                Mix(
                    policy_name(ratio),
                    ratio,
                    (1.0 - ratio, ratio) if self.method == "linear" else None,
                    _linear([1.0 - ratio, ratio], self.parameters)
                    if self.method == "linear"
                    else settings_at(self.method, ratio, self.parameters),
                )
                for ratio in (given + 0.0 for given in self.ratios)  # -0.0 is 0
            ]
        if self.policies:
            weights = tuple(self.policies.values())
            if self.method == "linear":
                return [Mix("policy", None, weights, _linear(weights, self.parameters))]
            takes = SIGNATURES[self.method]
            if "weight" not in takes.per_model:
                raise InputError(
                    f"{self.method} takes no weights", allowed="reward and safety at a ratio, or models in a YAML file"
                )
            models: list[dict[str, Any]] = [{"weight": weight} for weight in weights]
            return [Mix("policy", None, None, method_settings(self.method, models, self.parameters))]
        settings = method_settings(self.method, [model.parameters for model in self.models], self.parameters)
        return [Mix("policy", None, _plain_weights(settings), settings)]


def _linear(weights: Any, parameters: dict[str, Setting]) -> MethodSettings:
    """A weighted sum as it stands: the ratios and weights have been checked, so nothing is divided by their sum."""
    if parameters:
        raise InputError(f"linear takes no setting {next(iter(parameters))}: the weights are in the ratio or policies")
    return method_settings("linear", [{"weight": weight} for weight in weights], {"normalize": False})


def _plain_weights(settings: MethodSettings) -> tuple[float, ...] | None:
    """The weights of a linear merge that are the same for all tensors, normalised as its settings say."""
    constant = (*settings.models, settings.shared)
    plain = all(len(c) == 1 and c[0].filter is None and len(c[0].values) == 1 for m in constant for c in m.values())
    if settings.method != "linear" or not plain:
        return None
    found = settings.resolve("all tensors", {})
    weights = found.per_model["weight"]
    total = math.fsum(weights) if found.shared["normalize"] else 1.0
    return tuple(weight / total for weight in weights)


def _sum(weights: Iterable[float]) -> float:
    """Their sum, infinite where it is too large to be held."""
    try:
        return math.fsum(weights)
    except OverflowError:
        return math.inf


def _short_names(paths: list[str]) -> list[str]:
    """The last part of each path, with a number where that would be said twice, or means something else."""
    ends = [Path(path).name or path for path in paths]
    names: list[str] = []
    for place, end in enumerate(ends, 1):
        name, number = end, place
        if ends.count(end) > 1 or end in _RESERVED:
            name = f"{end}-{number}"
            while name in ends or name in names:
                number += 1
                name = f"{end}-{number}"
        names.append(name)
    return names


def policy_name(ratio: float) -> str:
    """`policy@0.30`: the name of the policy at one ratio, with as many digits (two at least) as tell it exactly."""
    ratio += 0.0  # -0.0 is 0
    text = f"{ratio:.2f}"
    return f"policy@{text if float(text) == ratio else repr(float(ratio))}"


def parse_policies(texts: list[str]) -> dict[str, float]:
    """`DIR=weight` texts as sources and weights.

    Raises:
        InputError: A text has no weight, or a directory is there twice.
    """
    policies: dict[str, float] = {}
    for text in texts:
        path, _, weight = text.rpartition("=")
        try:
            value = float(weight)
        except ValueError:
            value = math.nan
        if not path or not math.isfinite(value):
            raise InputError(f"policy '{text}' cannot be read", allowed="DIR=WEIGHT such as helpful=0.7")
        if path in policies:
            raise InputError(f"policy {path} is there twice")
        policies[path] = value
    return policies


def parse_parameters(texts: list[str]) -> dict[str, Any]:
    """`NAME=VALUE` texts as settings of a method; values are read as YAML (numbers, true/false, lists)."""
    import yaml

    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        try:
            found[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            equals = ""
        if not name.strip() or not equals or not value.strip():
            raise InputError(f"parameter '{text}' cannot be read", allowed="NAME=VALUE such as density=0.5")
    return found


def parse_ratios(texts: list[str], *, extrapolate: bool = False) -> list[float]:
    """Ratios from text: numbers (`0.3`), and grids START:STOP:STEP from START up to STOP at most (`0:1:0.125`).

    Raises:
        InputError: A text is neither, or a ratio is not from 0 to 1.
    """
    ratios: list[float] = []
    for text in texts:
        parts = [_number(part, text) for part in text.split(":")]
        if len(parts) == 1:
            ratios += parts
        elif len(parts) == 3 and parts[2] > 0 and parts[1] >= parts[0]:
            start, stop, step = parts
            count = round(min((stop - start) / step, 1e9))
            if count > 1000:
                raise InputError(f"ratio grid '{text}' has {count + 1} ratios", allowed="at most 1001")
            # Rounded to what was typed: 3 * 0.1 is not 0.3, and a policy's name shows it.
            ratios += [
                round(start + index * step, 10) for index in range(count + 1) if start + index * step <= stop + 1e-9
            ]
        else:
            raise InputError(f"ratio grid '{text}' cannot be read", allowed="START:STOP:STEP such as 0:1:0.1")
    for ratio in ratios:
        if not extrapolate and not 0 <= ratio <= 1:
            raise InputError(f"ratio {ratio:g} is out of range", allowed="a number from 0 to 1, or --extrapolate")
    return ratios


def _number(text: str, whole: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(
            f"ratio '{whole}' is not a number", allowed="a number from 0 to 1, or START:STOP:STEP such as 0:1:0.1"
        )
    return value
