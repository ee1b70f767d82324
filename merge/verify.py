"""`psacpo merge --verify`: an output is read again and held against its sources."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from psacpo.config import validate
from psacpo.errors import InputError
from psacpo.files import MANIFEST, digest_file, digest_model, other_files, read_manifest
from psacpo.hub import OTHER_WEIGHTS
from psacpo.merge.adapters import WEIGHTS, Adapter, base_tensor, read_adapter
from psacpo.merge.arithmetic import Factors
from psacpo.merge.changes import Change, plan_changes
from psacpo.merge.config import MergeConfig, Mix
from psacpo.merge.jobs import read_digest
from psacpo.merge.models import ADAPTER_CONFIG, ModelDirectory, read_model
from psacpo.merge.shards import digest_shard
from psacpo.merge.stored import DTYPES, StoredTensor, stored_in
from psacpo.merge.tensorfiles import FLOATING

# What float32 may cost a stacked delta, relative to it, in Frobenius norm.
_STACK_TOLERANCE = 1e-6
# Rows of a tensor that are computed again.
_ROWS = 3
_WHOLE_TENSORS = 5


def verify(
    directory: Path, *, base: str | None = None, reward: str | None = None, safety: str | None = None, seed: int = 0
) -> dict[str, Any]:
    """Check the files of a merged output against its manifest, and its numbers against its sources in float64.

    Args:
        directory: What `merge` wrote.
        base: Where the base is now, if not where the manifest says; likewise `reward` and `safety`.
        seed: Of the choice of elements.

    Returns:
        What was checked, and the largest difference found, relative to what rounding allows.

    Raises:
        InputError: It is no output of `merge`, a source is not what it was, or anything differs.
    """
    manifest = _manifest(directory)
    config = validate(MergeConfig, manifest["config"] | {"out": directory}, where=str(directory / MANIFEST))
    mixes = config.mixes()
    if len(mixes) != 1:
        raise _damaged(directory, f"it is of {len(mixes)} ratios")
    places = _places(directory, config, manifest, {"base": base, "reward": reward, "safety": safety})
    _require_files(directory, manifest)
    output = _Output(directory, config, mixes[0], manifest["inputs"], places)
    if (directory / ADAPTER_CONFIG).is_file():
        found = _verify_adapter(output, manifest.get("truncation", {}))
    else:
        found = _verify_checkpoint(output, random.Random(seed))
    return {"verified": str(directory), "files": len(manifest["outputs"]) + len(manifest["files"]), **found}


@dataclass(frozen=True)
class _Output:
    """What is verified: where it is, how it was made, the digests of its inputs, and where these are now."""

    directory: Path
    config: MergeConfig
    mix: Mix
    inputs: Mapping[str, str]
    places: Mapping[str, Path]

    def require(self, name: str, found: str) -> None:
        """Refuse an input of another digest than the one that was read."""
        wanted = self.inputs.get(name)
        if wanted is not None and wanted != found:
            what = name if name == "base" else f"source {name}"
            raise InputError(f"the {what} is not what it was", given=f"digest {found}", allowed=wanted)

    def model(self, name: str) -> ModelDirectory:
        if name not in self.places:
            raise InputError(
                f"where the {name} of {self.directory} is, is not known", allowed=f"--{name} with a directory"
            )
        return read_model(self.places[name])

    def adapters(self) -> list[Adapter]:
        adapters = []
        for name in self.config.sources:
            adapter = read_adapter(self.places[name])
            self.require(name, adapter.digest)
            adapters.append(adapter)
        return adapters


def _manifest(directory: Path) -> dict[str, Any]:
    """psacpo.json of an output of `merge`, of which everything that is used here has its form."""
    manifest = read_manifest(directory)
    if manifest is None or manifest.get("kind") != "policy" or "outputs" not in manifest:
        raise InputError(f"{directory} is not an output of psacpo merge (no {MANIFEST} of one in it)")
    if "files" not in manifest:
        raise InputError(f"{directory} was written by an earlier psacpo, which did not note all of its files")
    if not isinstance(manifest.get("config"), dict):
        raise _damaged(directory, "no config")
    for name in ("inputs", "outputs", "sources", "files", "directories"):
        found = manifest.get(name)
        if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
            raise _damaged(directory, f"{name} is no list of names with a text each")
    errors = manifest.get("truncation", {})
    if not isinstance(errors, dict) or not all(isinstance(value, int | float) for value in errors.values()):
        raise _damaged(directory, "truncation is no list of names with a number each")
    if not manifest["outputs"]:
        raise _damaged(directory, "it names no weights")
    return manifest


def _damaged(directory: Path, what: str) -> InputError:
    return InputError(f"{directory / MANIFEST} is damaged: {what}")


def _places(
    directory: Path, config: MergeConfig, manifest: Mapping[str, Any], given: Mapping[str, str | None]
) -> dict[str, Path]:
    """Where each source, the base and the layout are: where was said now, where they were, or where the settings say."""
    known = {**manifest["directories"], **manifest["sources"]}
    now = {name: place for name, place in given.items() if place}
    # A source, the base and the layout may be one directory: what was moved was moved as all of them.
    moved = {known[name]: place for name, place in now.items() if name in known}
    now = {name: moved[place] for name, place in known.items() if place in moved} | now
    said = {**config.sources, **({"base": config.base} if config.base else {})}
    places = {}
    for name in {**said, **manifest["directories"]}:
        if name in config.sources and name not in known:
            raise _damaged(directory, f"it does not say where {name} was")
        candidates = [now[name]] if name in now else [place for place in (known.get(name), said.get(name)) if place]
        found = [Path(place).expanduser() for place in candidates]
        if name in known or name in now:
            places[name] = next((place for place in found if place.is_dir()), found[0])
    return places


def _require_files(directory: Path, manifest: Mapping[str, Any]) -> None:
    for wanted, digest in ((manifest["outputs"], digest_shard), (manifest["files"], digest_file)):
        for name, value in wanted.items():
            if not (directory / name).is_file():
                raise InputError(f"{directory / name} is missing")
            found = digest(directory / name)
            if found != value:
                raise InputError(f"{directory / name} is not what was written", given=f"digest {found}", allowed=value)
    for name in other_files(directory):
        weights = name.endswith((*OTHER_WEIGHTS, ".safetensors", ".safetensors.index.json"))
        if weights and name not in {**manifest["outputs"], **manifest["files"]}:
            raise InputError(
                f"{directory / name} was not written by psacpo merge, and a reader may take it for the weights"
            )


def _verify_adapter(output: _Output, errors: Mapping[str, float]) -> dict[str, Any]:
    """Every module's whole delta, by the Frobenius norm of what it differs by, and every number beside the factors."""
    adapters, written = output.adapters(), read_adapter(output.directory)
    if "base" in output.places:
        output.require("base", digest_model(output.places["base"]))
    pairs = list(zip(adapters, output.mix.weights or (), strict=True))
    kept = [(adapter, weight) for adapter, weight in pairs if weight] or [(adapters[0], 0.0)]
    for what, wanted, found in (
        ("modules", {name for adapter, _ in kept for name in adapter.modules}, set(written.modules)),
        ("tensors as a whole", {name for adapter, _ in kept for name in adapter.saved}, set(written.saved)),
        (
            "biases of factors",
            set(written.modules) if any(adapter.shifts for adapter, _ in kept) else set(),
            set(written.shifts),
        ),
    ):
        if wanted != found:
            other = min(wanted ^ found)
            raise InputError(f"{output.directory / WEIGHTS} and its sources do not change the same {what}", given=other)
    worst = 0.0
    for name in sorted(written.modules):
        parts = [(a.modules[name], w) for a, w in kept if name in a.modules]
        whole = _norm([factors for factors, _ in parts], [weight for _, weight in parts])
        apart = _norm([written.modules[name], *(f for f, _ in parts)], [1.0, *(-w for _, w in parts)])
        # Where terms cancel, rounding is as large as the terms make it.
        terms = sum(_norm([factors], [weight]) for factors, weight in parts)
        left_out = errors.get(name, 0.0) * whole
        relative = (apart - left_out) / terms if terms else apart
        worst = max(worst, abs(relative))
        if not relative <= _STACK_TOLERANCE:
            raise InputError(
                f"{output.directory / WEIGHTS}: the delta of {name} is not the merge of its sources",
                given=f"relative error {relative:.2e}",
                allowed=f"{_STACK_TOLERANCE:.1e}",
            )
        if name in written.shifts:
            shifts = [a.shifts[name].double() * (w * a.modules[name].scale) for a, w in kept if name in a.shifts]
            exact = torch.zeros(written.shape(name)[0], dtype=torch.float64)
            size = sum((shift.abs() for shift in shifts), exact)
            _require_close(output, f"{name}.lora_B.bias", written.shifts[name], sum(shifts, exact), size)
    model = output.model("base") if written.saved else None
    for name, saved in written.saved.items():
        assert model is not None
        start = base_tensor(model, name)
        for rows in saved.blocks():
            base = start.read(rows).double()
            changes = [w * (a.saved[name].read(rows).double() - base) for a, w in kept if name in a.saved]
            size = sum((change.abs() for change in changes), base.abs())
            _require_close(output, name, saved.read(rows), sum(changes, base), size)
    return {"modules": len(written.modules), "largest relative error": f"{worst:.1e}"}


def _require_close(output: _Output, name: str, values: torch.Tensor, exact: torch.Tensor, size: torch.Tensor) -> None:
    excess = _excess(values.double(), exact, size, torch.float32)
    if not excess <= 1:
        raise InputError(
            f"{output.directory / WEIGHTS}: {name} is not the merge of its sources",
            given=f"{excess:.3g} times what rounding allows",
        )


def _norm(factors: Sequence[Factors], weights: Sequence[float]) -> float:
    """Frobenius norm of sum_i weights[i] * delta_i, by ||B A||^2 = tr(B^T B A A^T), in float64."""
    A = torch.cat([update.A.double() for update in factors])
    B = torch.cat([update.B.double() * (w * update.scale) for update, w in zip(factors, weights, strict=True)], dim=1)
    # By QR: squares of norms would lose half of the digits where terms cancel.
    _, r_b = torch.linalg.qr(B)
    _, r_a = torch.linalg.qr(A.T)
    return float(torch.linalg.norm(r_b @ r_a.T))


def _verify_checkpoint(output: _Output, rng: random.Random) -> dict[str, Any]:
    """Some rows of every tensor, or some tensors whole where a method needs them whole."""
    directory, result = output.directory, read_model(output.directory)
    of_adapters = any((output.places[name] / ADAPTER_CONFIG).is_file() for name in output.config.sources)
    layout, expected, whole = _from_adapters(output) if of_adapters else _from_models(output)
    names = {name: entry for _, entries in layout.shards.values() for name, entry in entries.items()}
    written = {name: entry for _, entries in result.shards.values() for name, entry in entries.items()}
    for name, entry in names.items():
        if name not in written or written[name].shape != entry.shape:
            raise InputError(f"{directory} does not hold {name} as {layout.path} does")
    chosen = sorted(name for name, entry in names.items() if entry.dtype in FLOATING)
    if whole:
        chosen = sorted(rng.sample(chosen, min(_WHOLE_TENSORS, len(chosen))))
    count, worst = 0, 0.0
    for name in chosen:
        stored = stored_in(result, name)
        assert stored is not None
        rows = stored.shape[0]
        for row in sorted(rng.sample(range(rows), min(_ROWS, rows))) if not whole else [None]:
            place = slice(0, rows) if row is None else slice(row, row + 1)
            values = stored.read(place).double()
            exact, size = expected(name, place)
            excess = _excess(values, exact, size, DTYPES[stored.entry.dtype])
            count += values.numel()
            worst = max(worst, excess)
            if not excess <= 1:
                raise InputError(
                    f"{directory}: {name} is not the merge of its sources in rows {place.start} to {place.stop - 1}",
                    given=f"{excess:.3g} times what rounding allows",
                )
    return {"tensors": len(chosen), "elements": count, "largest difference": f"{worst:.2f} of what rounding allows"}


def _excess(values: torch.Tensor, exact: torch.Tensor, size: torch.Tensor, dtype: torch.dtype) -> float:
    """The largest |values - exact|, in units of half a step of `dtype` there plus float32's error on terms of `size`."""
    info = torch.finfo(dtype)
    half_step = (exact.abs() * (info.eps / 2)).clamp(min=info.smallest_normal * info.eps / 2)
    allowed = half_step * 1.01 + size * (16 * torch.finfo(torch.float32).eps)
    return float(((values - exact).abs() / allowed).max()) if values.numel() else 0.0


Expected = Callable[[str, slice], tuple[torch.Tensor, torch.Tensor]]
"""Tensor name, rows -> (its numbers in float64, the sum of the magnitudes of the terms)."""


def _from_models(output: _Output) -> tuple[ModelDirectory, Expected, bool]:
    from psacpo.merge.combine import method_producer

    config, mix = output.config, output.mix
    models = {name: output.model(name) for name in config.sources}
    base = output.model("base") if config.base else None
    for name, model in {**models, **({"base": base} if base else {})}.items():
        output.require(name, read_digest(model))
    layout = output.model("layout")
    weights = mix.weights
    if weights is not None:

        def rows_of(name: str, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
            parts = [w * _read(model, name, rows) for model, w in zip(models.values(), weights, strict=True) if w]
            return sum(parts, torch.zeros(())), sum((part.abs() for part in parts), torch.zeros(()))

        return layout, rows_of, False
    produce = method_producer(list(models.values()), base, [mix.settings], dtype="F32", seed=config.seed)

    def whole(name: str, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        found = layout.find(name)
        assert found is not None
        if 0 in found[1].shape:
            return torch.zeros(found[1].shape, dtype=torch.float64), torch.zeros(found[1].shape, dtype=torch.float64)
        blocks = produce(name, found[1])
        assert blocks is not None
        data = b"".join(bytes(memoryview(next(iter(buffers))).cast("B")) for _, buffers in blocks)
        values = torch.frombuffer(bytearray(data), dtype=torch.float32).double().view(found[1].shape or (1,))
        return values, values.abs() * 64

    return layout, whole, True


def _from_adapters(output: _Output) -> tuple[ModelDirectory, Expected, bool]:
    if output.mix.weights is None:
        raise InputError(f"the method {output.config.method} on adapters cannot be verified", allowed="linear")
    weights, adapters = output.mix.weights, output.adapters()
    base = output.model("base")
    learned = output.inputs.get("base", "").startswith("xxh3:")
    output.require("base", read_digest(base) if learned else digest_model(base.path))
    plan = plan_changes(base, adapters)

    def rows_of(name: str, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        start = _read(base, name, rows)
        total, size = start.clone(), start.abs()
        if name in plan:
            for part in _parts(base, name, rows, plan[name], adapters, weights):
                total += part
                size += part.abs()
        return total, size

    return base, rows_of, False


def _parts(
    base: ModelDirectory, name: str, rows: slice, change: Change, adapters: Sequence[Adapter], weights: Sequence[float]
) -> list[torch.Tensor]:
    """What each adapter adds to some rows of a tensor, in float64."""
    found = []
    for part in change.parts:
        adapter, weight = adapters[part.adapter], weights[part.adapter]
        if weight == 0:
            continue
        start = _read(base, name, rows)
        if part.kind == "saved":
            found.append(weight * (adapter.saved[part.name].read(rows).double() - start))
            continue
        if part.kind == "shift":
            found.append(weight * adapter.modules[part.name].scale * adapter.shifts[part.name].double()[rows])
            continue
        factors = adapter.modules[part.name]
        factors = factors.transposed() if change.transposed else factors
        everything = slice(None) if part.kind == "dora" and change.transposed else rows
        delta = factors.scale * factors.B.double()[everything] @ factors.A.double()
        if part.kind == "dora":
            updated = _read(base, name, everything) + delta
            magnitude = adapter.magnitudes[part.name].double()
            axis = 0 if change.transposed else 1
            ratio = (magnitude if change.transposed else magnitude[rows]) / torch.linalg.norm(updated, dim=axis)
            trained = updated * (ratio if change.transposed else ratio[:, None])
            delta = (trained[rows] if change.transposed else trained) - start
        found.append(weight * delta)
    return found


def _read(model: ModelDirectory, name: str, rows: slice) -> torch.Tensor:
    stored: StoredTensor | None = stored_in(model, name)
    if stored is None:
        raise InputError(f"{model.path} holds no float weight {name}")
    return stored.read(None if rows == slice(None) else rows).double()
