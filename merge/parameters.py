"""The settings of a merge method: numbers, gradients over the layers, and values by tensor name. No torch here.

The rules for gradients and filters are mergekit's (release 0.1.5); what each method takes is in `signatures`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer, ValidationInfo, field_validator, model_validator

from psacpo.config import Strict, validate
from psacpo.errors import InputError, unknown_name
from psacpo.merge.signatures import SIGNATURES, Parameter, signature

__all__ = [
    "SIGNATURES",
    "Arguments",
    "Case",
    "MethodSettings",
    "Setting",
    "count_layers",
    "method_settings",
    "settings_at",
    "signature",
]

# What holds a model's layers, in the names of its tensors: model.layers.3.mlp..., transformer.h.3.attn...
_LAYER = re.compile(r"(?P<prefix>(?:^|.*?\.)(?:layers|layer|blocks|block|h))\.(?P<index>\d+)\.")


class Case(Strict):
    """One value, or a gradient of values over the layers, for the tensors whose name holds `filter`."""

    filter: str | None = None
    values: tuple[bool | float, ...]

    def matches(self, tensor: str) -> bool:
        return self.filter in (None, "*") or str(self.filter) in tensor


def _read_setting(value: Any) -> tuple[Case, ...]:
    """A number or flag, a list of them, {filter, value}, or a list of {filter, value}."""
    if isinstance(value, tuple) and all(isinstance(case, Case) for case in value):
        return value
    if isinstance(value, Mapping):
        return (_read_case(value),)
    if isinstance(value, list | tuple) and value and all(isinstance(item, Mapping) for item in value):
        return tuple(map(_read_case, value))
    return (Case(values=_read_values(value)),)


def _read_case(value: Mapping[str, Any]) -> Case:
    for key in value:
        if key not in ("filter", "value"):
            raise unknown_name("key", str(key), ("filter", "value"))
    if "value" not in value:
        raise InputError("a filter without a value", allowed="{filter: part of a tensor's name, value: ...}")
    pattern = value.get("filter")
    if pattern is not None and not (isinstance(pattern, str) and pattern):
        raise InputError("a filter that is no text", given=pattern, allowed="part of a tensor's name")
    return Case(filter=pattern, values=_read_values(value["value"]))


def _read_values(value: Any) -> tuple[bool | float, ...]:
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not values:
        raise InputError("an empty list", allowed="a number, or one number or more over the layers")
    return tuple(map(_read_scalar, values))


def _read_scalar(value: Any) -> bool | float:
    if isinstance(value, bool):
        return value
    try:
        # YAML 1.1 takes 1e-3 for text.
        number = float(value) if isinstance(value, int | float | str) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"'{value}' is not a number", allowed="a finite number, true or false")
    return number


def _show_setting(cases: tuple[Case, ...]) -> Any:
    """The setting as a file would have it."""

    def show(values: Sequence[bool | float]) -> Any:
        return values[0] if len(values) == 1 else list(values)

    if len(cases) == 1 and cases[0].filter is None:
        return show(cases[0].values)
    return [({"filter": case.filter} if case.filter else {}) | {"value": show(case.values)} for case in cases]


Setting = Annotated[tuple[Case, ...], BeforeValidator(_read_setting), PlainSerializer(_show_setting)]
"""A setting as it was given; `resolve` makes it a plain number for one tensor."""


@dataclass(frozen=True)
class Arguments:
    """A method's settings for one tensor, as plain numbers; defaults filled in, inert ones left out."""

    per_model: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    shared: Mapping[str, float | bool] = field(default_factory=dict)


class MethodSettings(Strict):
    """A merge method and its settings: what one output is made with.

    Attributes:
        method: Its name.
        models: The settings of each source, in the sources' order (the base is not one of them).
        shared: The settings that hold for all; a setting of the sources given here holds where theirs does not apply.
    """

    method: str
    models: tuple[dict[str, Setting], ...]
    shared: dict[str, Setting] = Field(default_factory=dict)

    @field_validator("method")
    @classmethod
    def _known(cls, name: str) -> str:
        signature(name)
        return name

    @field_validator("models")
    @classmethod
    def _models_fit(
        cls, models: tuple[dict[str, tuple[Case, ...]], ...], info: ValidationInfo
    ) -> tuple[dict[str, tuple[Case, ...]], ...]:
        if "method" not in info.data:
            return models  # the method is refused first
        name = info.data["method"]
        takes = SIGNATURES[name]
        low, high = takes.sources
        if len(models) < low or (high is not None and len(models) > high):
            wanted = f"exactly {low}" if low == high else f"at least {low}"
            raise InputError(f"{name} merges {wanted} models besides a base", given=len(models))
        for index, settings in enumerate(models):
            for key, cases in settings.items():
                if key not in takes.per_model:
                    raise _unknown_setting(name, key, takes.per_model, f"model {index + 1}")
                _require_in_range(f"{key} of model {index + 1}", takes.per_model[key], cases)
        return models

    @field_validator("shared")
    @classmethod
    def _shared_fit(cls, shared: dict[str, tuple[Case, ...]], info: ValidationInfo) -> dict[str, tuple[Case, ...]]:
        if "method" not in info.data:
            return shared
        name = info.data["method"]
        known = {**SIGNATURES[name].per_model, **SIGNATURES[name].shared}
        for key, cases in shared.items():
            if key not in known:
                raise _unknown_setting(name, key, known)
            _require_in_range(key, known[key], cases)
        return shared

    @model_validator(mode="after")
    def _complete(self) -> MethodSettings:
        takes = SIGNATURES[self.method]
        for key, parameter in takes.shared.items():
            if parameter.default is None and key not in self.shared:
                raise InputError(f"{self.method} needs {key}")
        for key, parameter in takes.per_model.items():
            for index, settings in enumerate(self.models):
                if parameter.default is None and key not in settings and key not in self.shared:
                    raise InputError(f"{self.method} needs a {key} for each model", given=f"none for model {index + 1}")
        return self

    def resolve(self, tensor: str, layers: Mapping[str, int]) -> Arguments:
        """The settings for one tensor.

        A filter holds where it is part of the tensor's name; the first case that holds decides, and one given for a
        model comes before one given for all. A gradient is a polyline over the layers, its first value at the first
        layer and its last at the last (of one layer: at that one); flags take the value at or before the place. Tensors
        outside the layers (embeddings, final norm, output head) have the first value: these are mergekit's rules.

        Args:
            tensor: Its name.
            layers: From `count_layers`.

        Raises:
            InputError: No case holds for a setting that has no default, or the values do not fit each other.
        """
        takes = SIGNATURES[self.method]
        place = _place(tensor, layers)

        def value(key: str, parameter: Parameter, *given: Mapping[str, tuple[Case, ...]]) -> float | bool:
            for settings in given:
                for case in settings.get(key, ()):
                    if case.matches(tensor):
                        return _along(case.values, place)
            if parameter.default is None:
                raise InputError(f"{self.method} has no {key} for {tensor}", allowed="a value without a filter, last")
            return parameter.default

        arguments = Arguments(
            per_model={
                key: tuple(float(value(key, parameter, model, self.shared)) for model in self.models)
                for key, parameter in takes.per_model.items()
                if key not in takes.inert
            },
            shared={
                key: value(key, parameter, self.shared)
                for key, parameter in takes.shared.items()
                if key not in takes.inert
            },
        )
        _require_sound(self.method, tensor, arguments)
        return arguments


def settings_at(method: str, ratio: float, given: Mapping[str, Any] | None = None) -> MethodSettings:
    """The settings for two sources, reward and safety, at the ratio q.

    - Methods with a `weight` (linear, task_arithmetic, ties, dare_*, breadcrumbs*, della*, nuslerp): 1-q and q. So for
      those that work on deltas q shares out one whole delta; `lambda` makes more or less of it. `ties`, `della` and other
      ones with `normalize` divide by the weights that took part: where only one source has a say it counts in full.
    - slerp: t = q, from reward (0) to safety (1).
    - model_stock finds its own ratio, layer by layer, and takes none.

    Args:
        method: Its name.
        ratio: q. Outside [0, 1] it extrapolates where the method allows that (not slerp).
        given: Further settings (density, lambda, ...), each a number, a gradient or {filter, value} cases.

    Raises:
        InputError: An unknown method or setting, a value out of range, a method that takes no ratio.
    """
    takes = signature(method)
    more = dict(given or {})
    if takes.ratio is None:
        raise InputError(f"{method} takes no ratio: it finds its own", allowed="--method " + ", ".join(_with_ratio()))
    if takes.ratio in more:
        raise InputError(f"{method} takes its {takes.ratio} from the ratio", allowed=f"--ratio, and no {takes.ratio}")
    models: list[dict[str, float]] = [{}, {}]
    if takes.ratio == "t":
        more["t"] = ratio
    else:
        models = [{"weight": 1.0 - ratio}, {"weight": ratio}]
    return method_settings(method, models, more)


def method_settings(
    method: str, models: Sequence[Mapping[str, Any]], shared: Mapping[str, Any] | None = None, *, where: str = "merge"
) -> MethodSettings:
    """`MethodSettings` of checked values; whatever is wrong is one `InputError` that begins with `where`."""
    return validate(
        MethodSettings,
        {"method": method, "models": [dict(model) for model in models], "shared": dict(shared or {})},
        where=where,
    )


def count_layers(tensors: Iterable[str]) -> dict[str, int]:
    """How many layers there are, by what holds them: {"model.layers": 32}; several for models of several towers."""
    counts: dict[str, int] = {}
    for tensor in tensors:
        found = _LAYER.match(tensor)
        if found:
            counts[found["prefix"]] = max(counts.get(found["prefix"], 0), int(found["index"]) + 1)
    return counts


def _place(tensor: str, layers: Mapping[str, int]) -> float:
    """Where on a gradient a tensor lies, from 0 to 1."""
    found = _LAYER.match(tensor)
    if not found or found["prefix"] not in layers:
        return 0.0
    index, last = int(found["index"]), layers[found["prefix"]] - 1
    if index > last:
        raise InputError(f"{tensor} is in a layer that the model does not have", allowed=f"layers 0 to {last}")
    return index / last if last else 1.0


def _along(values: Sequence[bool | float], place: float) -> bool | float:
    scaled = place * (len(values) - 1)
    low = int(scaled)
    if isinstance(values[0], bool):
        return values[low]
    high, part = min(len(values) - 1, low + 1), scaled - low
    return (1 - part) * values[low] + part * values[high]


def _require_in_range(what: str, parameter: Parameter, cases: Sequence[Case]) -> None:
    flag = isinstance(parameter.default, bool)
    for value in (value for case in cases for value in case.values):
        if isinstance(value, bool) != flag:
            raise InputError(f"{what} is wrong", given=value, allowed="true or false" if flag else "a number")
        if not parameter.low <= value <= parameter.high:
            raise InputError(
                f"{what} is out of range", given=value, allowed=f"from {parameter.low:g} to {parameter.high:g}"
            )


def _require_sound(method: str, tensor: str, arguments: Arguments) -> None:
    """Refuse values that are each in range and make no sense together."""
    weights = arguments.per_model.get("weight", ())
    if method == "linear" and arguments.shared["normalize"]:
        try:
            total = math.fsum(weights)
        except OverflowError:
            raise InputError(f"the weights of {tensor} are too large to be summed", given=list(weights)) from None
        # By the largest of them: weights that are all tiny are as good as any.
        if abs(total) < 1e-8 * max(map(abs, weights), default=0.0) or total == 0:
            raise InputError(f"the weights of {tensor} sum to zero and cannot be normalised", given=list(weights))
    for density, epsilon in zip(
        arguments.per_model.get("density", ()), arguments.per_model.get("epsilon", ()), strict=False
    ):
        if 0 < density < 1 and not (density - epsilon > 0 and density + epsilon < 1):
            raise InputError(
                f"{method} keeps elements of {tensor} with probabilities from density - epsilon to density + epsilon",
                given=f"density {density:g}, epsilon {epsilon:g}",
                allowed="both ends between 0 and 1",
            )


def _unknown_setting(method: str, key: str, valid: Mapping[str, Parameter], of: str = "all models") -> InputError:
    if not valid:
        return InputError(f"{method} takes no settings for {of}", given=key)
    return unknown_name(f"setting of {method} for {of}", key, valid)


def _with_ratio() -> list[str]:
    return sorted(name for name, takes in SIGNATURES.items() if takes.ratio)
