"""`psacpo merge --verify`: an output is read again and held against its sources."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from psacpo.config import validate
from psacpo.errors import InputError
from psacpo.files import digest_model, read_manifest
from psacpo.merge.adapters import WEIGHTS, Adapter, read_adapter
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
    manifest = read_manifest(directory)
    if manifest is None or manifest.get("kind") != "policy" or "outputs" not in manifest:
        raise InputError(f"{directory} is not an output of psacpo merge (no psacpo.json of one in it)")
    said = manifest["config"] | {"out": directory}
    said |= {name: value for name, value in (("base", base), ("reward", reward), ("safety", safety)) if value}
    for name, place in manifest.get("sources", {}).items():
        if name in ("reward", "safety") and not {"reward": reward, "safety": safety}[name]:
            said[name] = place  # a hub id was fetched to there
    config = validate(MergeConfig, said, where=str(directory / "psacpo.json"))
    _require_files(directory, manifest)
    [mix] = config.mixes()
    if (directory / ADAPTER_CONFIG).is_file():
        found = _verify_adapter(directory, config, mix, manifest)
    else:
        found = _verify_checkpoint(directory, config, mix, manifest, random.Random(seed))
    return {"verified": str(directory), "files": len(manifest["outputs"]), **found}


def _require_files(directory: Path, manifest: Mapping[str, Any]) -> None:
    for name, wanted in manifest["outputs"].items():
        if not (directory / name).is_file():
            raise InputError(f"{directory / name} is missing")
        found = digest_shard(directory / name)
        if found != wanted:
            raise InputError(f"{directory / name} is not what was written", given=f"digest {found}", allowed=wanted)


def _require_source(name: str, found: str, manifest: Mapping[str, Any]) -> None:
    wanted = manifest["inputs"].get(name)
    if wanted is not None and wanted != found:
        raise InputError(f"the source {name} is not what it was", given=f"digest {found}", allowed=wanted)


def _place(name: str, where: str, manifest: Mapping[str, Any]) -> Path:
    """Where a source is: what the settings say, or where it lay in the hub's cache."""
    path = Path(where).expanduser()
    return path if path.exists() else Path(manifest["sources"].get(name, where))


def _adapters(config: MergeConfig, manifest: Mapping[str, Any]) -> list[Adapter]:
    adapters = []
    for name, where in config.sources.items():
        adapter = read_adapter(_place(name, where, manifest))
        _require_source(name, adapter.digest, manifest)
        adapters.append(adapter)
    return adapters


def _verify_adapter(directory: Path, config: MergeConfig, mix: Mix, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Every module's whole delta, by the Frobenius norm of what it differs by."""
    adapters, written = _adapters(config, manifest), read_adapter(directory)
    weights = mix.weights or ()
    modules = {name for adapter, w in zip(adapters, weights, strict=True) if w for name in adapter.modules}
    if modules != set(written.modules) and any(weights):
        other = min(modules ^ set(written.modules))
        raise InputError(f"{directory / WEIGHTS} and its sources do not change the same modules", given=other)
    errors, worst = manifest.get("truncation", {}), 0.0
    for name in sorted(written.modules):
        parts = [(a.modules[name], w) for a, w in zip(adapters, weights, strict=True) if name in a.modules]
        wanted = _norm([factors for factors, _ in parts], [weight for _, weight in parts])
        apart = _norm([written.modules[name], *(f for f, _ in parts)], [1.0, *(-w for _, w in parts)])
        relative = apart / wanted if wanted else apart
        allowed = errors.get(name, 0.0) + _STACK_TOLERANCE
        worst = max(worst, abs(relative - errors.get(name, 0.0)))
        if not relative <= allowed:
            raise InputError(
                f"{directory / WEIGHTS}: the delta of {name} is not the merge of its sources",
                given=f"relative error {relative:.2e}",
                allowed=f"{allowed:.1e}",
            )
    return {"modules": len(written.modules), "largest relative error": f"{worst:.1e}"}


def _norm(factors: Sequence[Factors], weights: Sequence[float]) -> float:
    """Frobenius norm of sum_i weights[i] * delta_i, by ||B A||^2 = tr(B^T B A A^T), in float64."""
    A = torch.cat([update.A.double() for update in factors])
    B = torch.cat([update.B.double() * (w * update.scale) for update, w in zip(factors, weights, strict=True)], dim=1)
    # By QR: squares of norms would lose half of the digits where terms cancel.
    _, r_b = torch.linalg.qr(B)
    _, r_a = torch.linalg.qr(A.T)
    return float(torch.linalg.norm(r_b @ r_a.T))


def _verify_checkpoint(
    directory: Path, config: MergeConfig, mix: Mix, manifest: Mapping[str, Any], rng: random.Random
) -> dict[str, Any]:
    """Some rows of every tensor, or some tensors whole where a method needs them whole."""
    output = read_model(directory)
    of_adapters = any((Path(where) / ADAPTER_CONFIG).is_file() for where in config.sources.values())
    layout, expected, whole = (
        _from_adapters(config, mix, manifest) if of_adapters else _from_models(config, mix, manifest)
    )
    names = {name: entry for _, entries in layout.shards.values() for name, entry in entries.items()}
    written = {name: entry for _, entries in output.shards.values() for name, entry in entries.items()}
    for name, entry in names.items():
        if name not in written or written[name].shape != entry.shape:
            raise InputError(f"{directory} does not hold {name} as {layout.path} does")
    chosen = sorted(name for name, entry in names.items() if entry.dtype in FLOATING)
    if whole:
        chosen = sorted(rng.sample(chosen, min(_WHOLE_TENSORS, len(chosen))))
    count, worst = 0, 0.0
    for name in chosen:
        stored = stored_in(output, name)
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


def _from_models(config: MergeConfig, mix: Mix, manifest: Mapping[str, Any]) -> tuple[ModelDirectory, Expected, bool]:
    from psacpo.merge.combine import method_producer

    models = {name: read_model(_place(name, where, manifest)) for name, where in config.sources.items()}
    for name, model in models.items():
        _require_source(name, read_digest(model), manifest)
    base = read_model(Path(config.base)) if config.base else None
    if base is not None:
        _require_source("base", read_digest(base), manifest)
    layout = read_model(Path(config.layout)) if config.layout else base or next(iter(models.values()))
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
        blocks = produce(name, found[1])
        assert blocks is not None
        data = b"".join(bytes(memoryview(next(iter(buffers))).cast("B")) for _, buffers in blocks)
        values = torch.frombuffer(bytearray(data), dtype=torch.float32).double().view(found[1].shape or (1,))
        return values, values.abs() * 64

    return layout, whole, True


def _from_adapters(config: MergeConfig, mix: Mix, manifest: Mapping[str, Any]) -> tuple[ModelDirectory, Expected, bool]:
    assert config.base is not None
    if mix.weights is None:
        raise InputError(f"the method {config.method} on adapters cannot be verified", allowed="linear")
    weights, adapters = mix.weights, _adapters(config, manifest)
    base = read_model(Path(config.base))
    if "base" in manifest["inputs"]:
        _require_source("base", digest_model(base.path), manifest)
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
