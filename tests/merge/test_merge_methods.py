"""Merge methods against numbers worked by hand, what mergekit 0.1.5 made of the same input, and each other."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy import stats

from psacpo.errors import InputError
from psacpo.merge import combine, methods, sparsify, stored
from psacpo.merge.arithmetic import Factors, dense_delta
from psacpo.merge.combine import combined_delta, method_producer
from psacpo.merge.mergekit import read_mergekit
from psacpo.merge.methods import METHODS, merge_tensors
from psacpo.merge.models import ModelDirectory, read_model
from psacpo.merge.parameters import Arguments, MethodSettings, count_layers, method_settings, settings_at
from psacpo.merge.shards import write_shards
from psacpo.merge.signatures import DELTA_METHODS, SIGNATURES
from psacpo.merge.sparsify import draws

GOLDEN = Path(__file__).parent / "golden"
STORED = GOLDEN / "mergekit-0.1.5.safetensors"
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
LAYERS = {"model.layers": 3}


def merged(method: str, tensors: Sequence[torch.Tensor], models: Sequence[Mapping[str, Any]], **shared: Any) -> Any:
    """One tensor by a method, as nested lists."""
    arguments = method_settings(method, models, shared).resolve("x", {})
    return merge_tensors(method, tensors, arguments, partial(draws, 0, "x")).tolist()


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


# --- by hand


def test_linear_by_hand() -> None:
    a, b = vector(1, 2), vector(3, -2)
    assert merged("linear", [a, b], [{"weight": 3}, {"weight": 1}]) == [1.5, 1.0]
    assert merged("linear", [a, b], [{"weight": 3}, {"weight": 1}], normalize=False) == [6.0, 4.0]


def test_task_arithmetic_by_hand() -> None:
    # 1 * [1, 0] - 0.5 * [0, 4] = [1, -2]; times lambda 2; the weights' sum is 0.5
    deltas, models = [vector(1, 0), vector(0, 4)], [{"weight": 1.0}, {"weight": -0.5}]
    assert merged("task_arithmetic", deltas, models, **{"lambda": 2}) == [2.0, -4.0]
    assert merged("task_arithmetic", deltas, models, normalize=True) == [2.0, -4.0]
    # Weights that cancel divide by 1.
    assert merged("task_arithmetic", deltas, [{"weight": 1}, {"weight": -1}], normalize=True) == [1.0, -4.0]


def test_slerp_by_hand() -> None:
    # At a right angle t of the way is cos and sin of t * 90 degrees.
    a, b = vector(1, 0), vector(0, 2)
    thirty = [math.cos(math.pi / 6), 2 * math.sin(math.pi / 6)]
    assert merged("slerp", [a, b], [{}, {}], t=1 / 3) == pytest.approx(thirty)
    # Within the threshold of parallel it is the straight line, and just outside it is not.
    for cosine, straight in ((0.9996, True), (0.9994, False)):
        near = vector(cosine, math.sqrt(1 - cosine**2)) * 3
        found = merged("slerp", [a, near], [{}, {}], t=0.25)
        assert (found == pytest.approx((0.75 * a + 0.25 * near).tolist(), abs=1e-7)) is straight
    # A zero tensor has cosine 0 with any other.
    assert merged("slerp", [torch.zeros(2), b], [{}, {}], t=1 / 3) == pytest.approx([0, 1])


def test_nuslerp_by_hand() -> None:
    # Rows at right angles to each other: t = 1/4 of a right angle, row by row.
    a = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    b = torch.tensor([[0.0, 1.0], [3.0, 0.0]])
    models = [{"weight": 3}, {"weight": 1}]
    cos, sin = math.cos(math.pi / 8), math.sin(math.pi / 8)
    assert merged("nuslerp", [a, b], models, nuslerp_flatten=False) == [
        pytest.approx([cos, sin]),
        pytest.approx([3 * sin, 2 * cos]),
    ]
    # Along the first axis: columns [1, 0], [0, 3] and [0, 2], [1, 0].
    down = merged("nuslerp", [a, b], models, nuslerp_flatten=False, nuslerp_row_wise=True)
    assert down == [pytest.approx([cos, sin]), pytest.approx([3 * sin, 2 * cos])]
    # No threshold: 2 degrees apart is still an arc.
    small = vector(math.cos(0.03), math.sin(0.03))
    assert merged("nuslerp", [vector(1, 0), small], models) == pytest.approx(
        [math.cos(0.0075), math.sin(0.0075)], abs=1e-7
    )
    # Weights that cancel meet in the middle; equal and opposite tensors lie on a line.
    assert merged("nuslerp", [vector(1, 0), vector(0, 1)], [{"weight": 1}, {"weight": -1}]) == pytest.approx(
        [0.5**0.5] * 2
    )
    assert merged("nuslerp", [vector(1, 1), vector(-1, -1)], models) == [0.5, 0.5]


def test_nuslerp_rows_and_columns_differ() -> None:
    a, b = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[2.0, 0.0], [1.0, 1.0]])
    models = [{"weight": 1}, {"weight": 1}]
    along = torch.tensor(merged("nuslerp", [a, b], models, nuslerp_flatten=False))
    down = torch.tensor(merged("nuslerp", [a, b], models, nuslerp_flatten=False, nuslerp_row_wise=True))
    across = torch.tensor(merged("nuslerp", [a.T, b.T], models, nuslerp_flatten=False)).T
    assert torch.allclose(down, across)
    assert not torch.allclose(down, along, atol=1e-2)


def test_model_stock_by_hand() -> None:
    # cos 60 degrees: t = 2 * 0.5 / (1 + 0.5) = 2/3 of the mean.
    a, b = vector(1, 0), vector(0.5, math.sqrt(3) / 2)
    assert merged("model_stock", [a, b], [{}, {}]) == pytest.approx(((a + b) / 3).tolist())
    # Row by row: cosines 1 (t = 1) and 0 (t = 0).
    one, other = torch.tensor([[1.0, 1.0], [1.0, 0.0]]), torch.tensor([[3.0, 3.0], [0.0, 1.0]])
    assert merged("model_stock", [one, other], [{}, {}], filter_wise=True) == [pytest.approx([2, 2]), [0, 0]]
    # Opposed: the denominator is 0 and the base stays.
    assert merged("model_stock", [vector(1, 2), vector(-1, -2)], [{}, {}]) == [0, 0]


def test_ties_by_hand() -> None:
    # Trimmed to the two largest: [4, 0, -3, 0] and [0, 2, 5, 0].  Weighted by 1 and 0.5 their sum is [4, 1, -0.5, 0],
    # so the third is minus: only the first source counts there.
    deltas = [vector(4, 1, -3, 0.5), vector(1, 2, 5, -0.5)]
    models = [{"weight": 1, "density": 0.5}, {"weight": 0.5, "density": 0.5}]
    assert merged("ties", deltas, models) == [4.0, 2.0, -3.0, 0.0]
    assert merged("ties", deltas, models, normalize=False) == [4.0, 1.0, -3.0, 0.0]
    # Whole: [4.5, 2, -0.5, 0.25] elects + + - +; divided by 1.5, 1.5, 1, 1.
    dense = [{"weight": 1.0}, {"weight": 0.5}]
    assert merged("ties", deltas, dense) == pytest.approx([3.0, 4 / 3, -3.0, 0.5])
    # A tie is plus; at least one element is kept.
    assert merged("ties", [vector(2, 0), vector(-2, 1)], [{"weight": 1}, {"weight": 1}]) == [2.0, 1.0]
    assert merged("ties", [vector(2, 3)], [{"weight": 1, "density": 0.01}]) == [0.0, 3.0]
    assert merged("ties", [vector(2, 3)], [{"weight": 1, "density": 0}]) == [0.0, 0.0]


def test_rescaling_restores_the_sum_of_sizes() -> None:
    # Kept: 4 of sizes 4 + 1 + 3 + 2 = 10.
    assert merged("ties", [vector(4, 1, -3, 2)], [{"weight": 1, "density": 0.25}], rescale=True) == [10.0, 0, 0, 0]


def test_breadcrumbs_by_hand() -> None:
    # In order of size 1 2 3 4 5 6 7 8 9 10: gamma drops 10, density keeps the next three.
    delta = vector(3, -10, 9, 1, -8, 2, 7, 6, -5, 4)
    found = merged("breadcrumbs", [delta], [{"weight": 1, "density": 0.3, "gamma": 0.1}])
    assert found == [0, 0, 9, 0, -8, 0, 7, 0, 0, 0]
    # Where both do not fit, density wins: nine of ten are kept, the smallest nine.
    found = merged("breadcrumbs", [delta], [{"weight": 1, "density": 0.9, "gamma": 0.5}])
    assert found == [3, 0, 9, 1, -8, 2, 7, 6, -5, 4]


def test_equal_sizes_count_in_order() -> None:
    assert merged("ties", [vector(1, -1, 1, 1)], [{"weight": 1, "density": 0.5}]) == [1, -1, 0, 0]
    assert sparsify.trim_outliers(vector(1, -1, 1, 1), density=0.5, gamma=0.25).tolist() == [0, -1, 1, 0]


def always(value: float) -> sparsify.Draw:
    return lambda start, count: torch.full((count,), value, dtype=torch.float64)


def test_della_keeps_by_rank() -> None:
    # Sizes 1..5 along each row are kept with 0.3, 0.4, 0.5, 0.6, 0.7: a draw of 0.45 keeps the largest three.
    delta = torch.tensor([[5.0, -4.0, 3.0, -2.0, 1.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
    draw = always(0.45)
    found = sparsify.magprune(delta, density=0.5, epsilon=0.2, draw=draw, rescale=False)
    assert found.tolist() == [[5, -4, 3, 0, 0], [0, 0, 3, 4, 5]]
    # The ends are density - epsilon and density + epsilon, and one element alone has density.
    for value, kept in ((0.29, 5), (0.31, 4), (0.69, 1), (0.71, 0)):
        row = sparsify.magprune(delta[0], density=0.5, epsilon=0.2, draw=always(value))
        assert int((row != 0).sum()) == kept
        column = sparsify.magprune(delta[:, :1], density=0.5, epsilon=0.2, draw=always(value))
        assert bool((column != 0).all() if value < 0.5 else (column == 0).all())


def test_dare_keeps_what_is_drawn_below_the_density() -> None:
    def draw(start: int, count: int) -> torch.Tensor:
        return torch.tensor([0.1, 0.6, 0.49, 0.5], dtype=torch.float64)[start : start + count]

    found = sparsify.drop(vector(1, 2, 3, 4), density=0.5, draw=draw, rescale=False)
    assert found.tolist() == [1, 0, 3, 0]
    # 10 before, 4 after
    assert sparsify.drop(vector(1, 2, 3, 4), density=0.5, draw=draw).tolist() == [2.5, 0, 7.5, 0]


def test_every_method_is_there_with_what_it_takes() -> None:
    assert METHODS.keys() == SIGNATURES.keys()
    for name, method in METHODS.items():
        assert method.signature is SIGNATURES[name]
        assert method.elects == (name in ("ties", "dare_ties", "breadcrumbs_ties", "della"))


# --- properties

numbers = st.floats(-4, 4, width=32)
pairs = st.integers(1, 12).flatmap(
    lambda n: st.lists(st.lists(numbers, min_size=n, max_size=n), min_size=2, max_size=2)
)


@given(pairs, st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_merging_a_policy_with_itself_gives_it_back(values: list[list[float]], ratio: float) -> None:
    tensor = torch.tensor(values[0])
    for method in ("linear", "slerp", "nuslerp", "task_arithmetic", "ties", "dare_ties", "dare_linear", "breadcrumbs"):
        arguments = settings_at(method, ratio).resolve("x", {})
        found = merge_tensors(method, [tensor, tensor.clone()], arguments, partial(draws, 0, "x"))
        assert torch.allclose(found, tensor, rtol=1e-5, atol=1e-6), method


@given(pairs, st.sampled_from(sorted(name for name in METHODS if SIGNATURES[name].ratio)), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_no_source_is_changed(values: list[list[float]], method: str, ratio: float) -> None:
    tensors = [torch.tensor(row) for row in values]
    copies = [tensor.clone() for tensor in tensors]
    more = {"density": 0.5} if "density" in SIGNATURES[method].per_model else {}
    arguments = settings_at(method, ratio, more).resolve("x", {})
    found = merge_tensors(method, tensors, arguments, partial(draws, 0, "x"))
    assert found.dtype == torch.float32
    assert found.shape == tensors[0].shape
    assert all(torch.equal(one, other) for one, other in zip(tensors, copies, strict=True))


@given(st.integers(1, 300), st.floats(0, 1), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_trimming_keeps_the_largest(count: int, density: float, seed: int) -> None:
    delta = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    kept = sparsify.trim(delta, density=density)
    expected = max(1, int(density * count)) if density > 0 else 0
    assert int((kept != 0).sum()) == expected
    threshold = delta.abs().sort(descending=True).values[expected - 1] if expected else math.inf
    assert torch.equal(kept, torch.where(delta.abs() >= threshold, delta, torch.zeros(())))


# --- draws


def test_draws_are_uniform() -> None:
    values = draws(3, "model.layers.0.mlp.up_proj.weight", 1)(0, 200_000).numpy()
    assert values.min() >= 0
    assert values.max() < 1
    assert stats.kstest(values, "uniform").pvalue > 1e-3
    assert stats.chisquare(np.histogram(values, bins=256, range=(0, 1))[0]).pvalue > 1e-3
    # Pairs of neighbours fill the square evenly too.
    square = np.histogram2d(values[:-1:2], values[1::2], bins=16, range=[[0, 1], [0, 1]])[0]
    assert stats.chisquare(square.reshape(-1)).pvalue > 1e-3


def test_draws_are_independent_of_neighbours_names_sources_and_seeds() -> None:
    count = 100_000
    values = draws(0, "a.weight", 0)(0, count).numpy()
    limit = 4.5 / math.sqrt(count)
    for lag in (1, 2, 3, 4, 5, 8, 16, 64, 4096):
        assert abs(np.corrcoef(values[:-lag], values[lag:])[0, 1]) < limit
    others = [draws(0, "b.weight", 0), draws(0, "a.weight", 1), draws(1, "a.weight", 0), draws(0, "a.weight0", 0)]
    for other in others:
        assert abs(np.corrcoef(values, other(0, count).numpy())[0, 1]) < limit


@given(st.integers(0, 5000), st.integers(1, 300))
@settings(max_examples=40, deadline=None)
def test_draws_go_by_place(start: int, count: int) -> None:
    draw = draws(0, "x", 0)
    assert torch.equal(draw(start, count), draw(0, start + count)[start:])


def test_draws_stay_what_they_are() -> None:
    # A change of these numbers changes what every stored seed means.
    assert draws(0, "model.embed_tokens.weight", 0)(0, 3).tolist() == pytest.approx(PINNED, abs=1e-15)


PINNED = [0.06509764174175348, 0.1027868615667018, 0.4783314140256032]


# --- against mergekit


@dataclass(frozen=True)
class Golden:
    """What the stored file holds, and its checkpoints on disk in both dtypes."""

    values: Mapping[str, torch.Tensor]
    about: Mapping[str, Any]
    full: Path
    half: Path


with safe_open(STORED, framework="pt") as stored_file:
    ABOUT = stored_file.metadata()
    HALF = sorted(name.removeprefix("half/") for name in stored_file.keys() if name.startswith("half/"))  # noqa: SIM118
CASES: dict[str, dict[str, Any]] = json.loads(ABOUT["cases"])
RANDOM: dict[str, dict[str, Any]] = json.loads(ABOUT["random"])
SHAPES: dict[str, list[int]] = json.loads(ABOUT["shapes"])


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Golden:
    with safe_open(STORED, framework="pt") as handle:
        values = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    places = {}
    for dtype in (torch.float32, torch.bfloat16):
        places[dtype] = tmp_path_factory.mktemp("golden")
        for name in ("base", "a", "b", "c"):
            directory = places[dtype] / name
            directory.mkdir()
            tensors = {key: value.to(dtype) for key, value in unflattened(values[f"input/{name}"]).items()}
            save_file(tensors, directory / "model.safetensors")
            (directory / "config.json").write_text(ABOUT["config"])
    return Golden(values, ABOUT, places[torch.float32], places[torch.bfloat16])


def unflattened(flat: torch.Tensor) -> dict[str, torch.Tensor]:
    sizes = [math.prod(SHAPES[name]) for name in sorted(SHAPES)]
    ends = np.cumsum(sizes).tolist()
    parts = [flat[end - size : end] for size, end in zip(sizes, ends, strict=True)]
    return {name: part.reshape(SHAPES[name]).clone() for name, part in zip(sorted(SHAPES), parts, strict=True)}


def run_file(place: Path, case: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """What a mergekit file makes of the models beside it."""
    (place / "merge.yaml").write_text(yaml.safe_dump(dict(case)))
    spec = read_mergekit(place / "merge.yaml")
    models = [read_model(Path(model.name)) for model in spec.models]
    base = read_model(Path(spec.base.name)) if spec.base else None
    [outputs] = produced(models, base, [spec.settings], dtype=spec.dtype)
    return outputs


def produced(
    models: Sequence[ModelDirectory],
    base: ModelDirectory | None,
    mixes: Sequence[MethodSettings],
    *,
    dtype: str | None = None,
    seed: int = 0,
) -> list[dict[str, torch.Tensor]]:
    """All tensors of each output, put together from the producer's blocks."""
    produce = method_producer(models, base, mixes, dtype=dtype, seed=seed)
    names = {safetensors: torch_dtype for torch_dtype, safetensors in DTYPES.items()}
    outputs: list[dict[str, torch.Tensor]] = [{} for _ in mixes]
    layout = base or models[0]
    for _, entries in layout.shards.values():
        for name, entry in entries.items():
            blocks = produce(name, entry)
            if blocks is None:
                continue
            data = [bytearray() for _ in mixes]
            for offset, buffers in blocks:
                assert all(len(one) == offset for one in data), "blocks are in order and leave nothing out"
                for one, buffer in zip(data, buffers, strict=True):
                    one += memoryview(buffer).cast("B")
            for output, one in zip(outputs, data, strict=True):
                output[name] = torch.frombuffer(one, dtype=names[dtype or entry.dtype]).reshape(entry.shape)
    return outputs


@pytest.mark.parametrize("case", CASES)
def test_as_mergekit_in_float32(golden: Golden, case: str) -> None:
    found = run_file(golden.full, {**CASES[case], "dtype": "float32"})
    expected = unflattened(golden.values[f"output/{case}"])
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        # mergekit sums in float32; less than a part in a million of weights of size 1.
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=8e-7, msg=f"{name} differs")


@pytest.mark.parametrize("case", HALF)
def test_as_mergekit_in_bfloat16(golden: Golden, case: str) -> None:
    """mergekit works in bfloat16 here, with a rounding a step; ours is rounded once."""
    found = run_file(golden.half, {**CASES[case], "dtype": "bfloat16"})
    expected = unflattened(golden.values[f"half/{case}"])
    base = {name: tensor.bfloat16().float() for name, tensor in unflattened(golden.values["input/base"]).items()}
    if case in ("linear", "slerp"):  # which mergekit computes in float32 too
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        scale = torch.maximum(expected[name].float().abs(), base[name].abs()).clamp(min=0.05)
        off = (tensor.float() - expected[name].float()).abs() > 6 / 256 * scale
        # What is kept of a difference goes by its size, rounded to bfloat16 by mergekit: only at the edge of what is
        # kept, where sizes are equal or become so, may the two have kept different elements.
        for model, own in model_settings(case).items() if bool(off.any()) else ():
            delta = unflattened(golden.values[f"input/{model}"])[name].bfloat16().float() - base[name]
            ordered, count = delta.abs().reshape(-1).sort().values, delta.numel()
            kept = int(own["density"] * count)
            low = max(0, count - kept - int(own.get("gamma", 0) * count))
            for rank in (max(0, low - 1), low, low + kept - 1, min(low + kept, count - 1)):
                off &= (delta.abs() - ordered[rank]).abs() > ordered[rank] / 128
        assert not off.any(), name


def model_settings(case: str) -> dict[str, dict[str, float]]:
    return {model["model"]: model["parameters"] for model in CASES[case]["models"]}


@pytest.mark.parametrize("method", RANDOM)
def test_random_methods_agree_with_mergekit_in_distribution(golden: Golden, method: str) -> None:
    """Mean, variance and kept share of each of 192 elements, ours over 600 seeds and mergekit's over 4000 runs."""
    tensors = [golden.values["random/a"], golden.values["random/b"]]
    more = dict(RANDOM[method])
    per_model = zip(more.pop("weight"), more.pop("density"), strict=True)
    models = [{"weight": weight, "density": density} for weight, density in per_model]
    arguments = method_settings(method, models, more).resolve("x", {})
    runs, theirs = 600, int(ABOUT["runs"])
    outcomes = torch.stack(
        [merge_tensors(method, tensors, arguments, partial(draws, seed, "x")) for seed in range(runs)]
    ).double()
    kept, expected_kept = (outcomes != 0).double().mean(0), golden.values[f"random/{method}/kept"].double()
    variance, expected_variance = outcomes.var(0), golden.values[f"random/{method}/variance"].double()
    errors = {
        "mean": (outcomes.mean(0) - golden.values[f"random/{method}/mean"].double())
        / (variance / runs + expected_variance / theirs).sqrt(),
        "kept": (kept - expected_kept) / (kept * (1 - kept) * (1 / runs + 1 / theirs)).sqrt(),
    }
    for name, z in errors.items():
        # 192 standard normal numbers: none beyond 4.5, and their mean square is 1 +- 5 * sqrt(2 / 192).
        assert float(z.abs().max()) < 4.5, name
        assert 0.5 < float(z.square().mean()) < 1.5, name
    assert float((variance.sum() / expected_variance.sum()).log().abs()) < 0.05


def mergekit_python() -> str | None:
    """The Python of an environment with mergekit: this one, or what MERGEKIT names (its bin/python)."""
    return sys.executable if find_spec("mergekit") else os.environ.get("MERGEKIT")


@pytest.mark.peer
@pytest.mark.skipif(mergekit_python() is None, reason="mergekit is not here; MERGEKIT can name a Python that has it")
def test_mergekit_makes_the_goldens_again(golden: Golden, tmp_path: Path) -> None:
    python = mergekit_python()
    assert python is not None
    target = tmp_path / STORED.name
    subprocess.run([python, str(GOLDEN / "make_goldens.py"), str(target)], check=True, capture_output=True)
    with safe_open(target, framework="pt") as handle:
        assert json.loads(handle.metadata()["cases"]) == CASES
        again = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    assert again.keys() == golden.values.keys()
    for name, tensor in again.items():
        if not name.startswith("random/"):
            torch.testing.assert_close(tensor, golden.values[name], rtol=1e-6, atol=1e-6, msg=f"{name} differs")


def test_goldens_stay_small() -> None:
    assert sum(file.stat().st_size for file in GOLDEN.iterdir() if file.is_file()) < 300_000


# --- checkpoints


WriteModel = Callable[..., ModelDirectory]


@pytest.fixture
def write_model(tmp_path: Path) -> WriteModel:
    """Write random tensors as a model directory: `write_model("a", seed=1, dtype=..., shards=2)`."""

    def write(
        name: str,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.bfloat16,
        shards: int = 1,
        change: Callable[[dict[str, torch.Tensor]], None] | None = None,
    ) -> ModelDirectory:
        draw = torch.Generator().manual_seed(seed)
        shapes = {
            "model.embed_tokens.weight": (11, 6),
            "model.layers.0.mlp.up_proj.weight": (7, 6),
            "model.layers.1.mlp.up_proj.weight": (7, 6),
            "model.layers.2.conv.weight": (3, 2, 5),
            "model.norm.weight": (6,),
            "scalar": (),
        }
        tensors = {key: torch.randn(shape, generator=draw).to(dtype) for key, shape in shapes.items()}
        tensors["counter"] = torch.tensor([1, 2, 3])
        tensors["model.norm.weight"][0] = -0.0
        if change:
            change(tensors)
        path = tmp_path / name
        path.mkdir()
        (path / "config.json").write_text("{}")
        parts = [dict(list(tensors.items())[start::shards]) for start in range(shards)]
        if shards == 1:
            save_file(tensors, path / "model.safetensors")
        else:
            files = {f"model-{i + 1:05d}-of-{shards:05d}.safetensors": part for i, part in enumerate(parts)}
            for file, part in files.items():
                save_file(part, path / file)
            index = {"weight_map": {key: file for file, part in files.items() for key in part}}
            (path / "model.safetensors.index.json").write_text(json.dumps(index))
        return read_model(path)

    return write


def at(method: str, *ratios: float, **more: Any) -> list[MethodSettings]:
    takes = SIGNATURES[method]
    if takes.ratio is None:
        return [method_settings(method, [{}, {}], more)] * len(ratios)
    if "density" in takes.per_model:
        more["density"] = 0.6
    return [settings_at(method, ratio, more) for ratio in ratios]


def under(method: str, base: ModelDirectory) -> ModelDirectory | None:
    return base if SIGNATURES[method].base == "required" else None


@pytest.mark.parametrize(
    ("method", "more"),
    [
        *((method, {}) for method in METHODS),
        ("nuslerp", {"nuslerp_flatten": False}),
        ("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
        ("model_stock", {"filter_wise": True}),
    ],
)
def test_layout_blocks_threads_and_passes_change_no_bit(
    write_model: WriteModel, monkeypatch: pytest.MonkeyPatch, method: str, more: dict[str, Any]
) -> None:
    models = [write_model("a", seed=1), write_model("b", seed=2)]
    base = write_model("base", seed=3)
    split = [write_model("a3", seed=1, shards=3), write_model("b2", seed=2, shards=2)]
    mixes = at(method, 0.3, 0.8, **more)
    whole = produced(models, under(method, base), mixes, seed=5)
    assert whole[0].keys() == {*count_names(base)} - {"counter"}
    singly = [produced(split, under(method, base), [one], seed=5)[0] for one in mixes]
    monkeypatch.setattr(stored, "BLOCK", 7)
    monkeypatch.setattr(methods, "_PART", 7)
    threads = torch.get_num_threads()
    torch.set_num_threads(4 if threads == 1 else 1)
    try:
        blocked = produced(split, under(method, base), mixes, seed=5)
    finally:
        torch.set_num_threads(threads)
    for one, other, third in zip(whole, singly, blocked, strict=True):
        for name, tensor in one.items():
            assert torch.equal(tensor, other[name]), name
            assert torch.equal(tensor, third[name]), name


def count_names(model: ModelDirectory) -> list[str]:
    return [name for _, entries in model.shards.values() for name in entries]


@pytest.mark.parametrize("method", [name for name in METHODS if SIGNATURES[name].random])
def test_the_seed_decides_what_is_drawn(write_model: WriteModel, method: str) -> None:
    models, base = [write_model("a", seed=1), write_model("b", seed=2)], write_model("base", seed=3)
    [one], [same], [other] = (produced(models, base, at(method, 0.3), seed=seed) for seed in (1, 1, 2))
    name = "model.embed_tokens.weight"
    assert torch.equal(one[name], same[name])
    assert not torch.equal(one[name], other[name])


@pytest.mark.parametrize("method", ["linear", "slerp", "nuslerp", "task_arithmetic"])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_the_ends_give_the_bits_back(write_model: WriteModel, method: str, dtype: torch.dtype) -> None:
    def spread(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"][0] *= 1e-4

    models = [write_model("a", seed=1, dtype=dtype, change=spread), write_model("b", seed=2, dtype=dtype)]
    base = write_model("base", seed=3, dtype=dtype)
    for model, output in zip(models, produced(models, under(method, base), at(method, 0.0, 1.0)), strict=True):
        for name, tensor in output.items():
            original = model.read(name)
            assert original is not None
            assert tensor.reshape(-1).view(torch.uint8).equal(original.reshape(-1).view(torch.uint8)), name


@pytest.mark.parametrize("dtype", [None, "F32"])
def test_written_to_files(write_model: WriteModel, tmp_path: Path, dtype: str | None) -> None:
    models = [write_model("a", seed=1, shards=2), write_model("b", seed=2)]
    base = write_model("base", seed=3, shards=3)
    mixes = at("della", 0.3, 0.8)
    outputs = [tmp_path / "one", tmp_path / "two"]
    for output in outputs:
        output.mkdir()
    write_shards(outputs, base, method_producer(models, base, mixes, dtype=dtype), threads=2, dtype=dtype)
    for output, expected in zip(outputs, produced(models, base, mixes, dtype=dtype), strict=True):
        written = {name: value for file in base.shards for name, value in load_file(output / file).items()}
        assert written.pop("counter").tolist() == [1, 2, 3]
        assert written.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in written.items())


def test_computed_in_float32_and_rounded_once(write_model: WriteModel) -> None:
    models, base = [write_model("a", seed=1), write_model("b", seed=2)], write_model("base", seed=3)
    for method in ("linear", "task_arithmetic", "ties"):
        [output] = produced(models, under(method, base), [settings_at(method, 0.3)])
        [wide] = produced(models, under(method, base), [settings_at(method, 0.3)], dtype="F32")
        for name, tensor in output.items():
            assert torch.equal(tensor, wide[name].bfloat16())
    exact = 0.7 * reading(models[0]) + 0.3 * reading(models[1])
    [output] = produced(models, None, [settings_at("linear", 0.3)], dtype="F64")
    assert float((output["model.embed_tokens.weight"] - exact).abs().max()) < 1e-6


def reading(model: ModelDirectory) -> torch.Tensor:
    tensor = model.read("model.embed_tokens.weight")
    assert tensor is not None
    return tensor.double()


def test_settings_go_by_layer_and_name(write_model: WriteModel) -> None:
    models = [write_model("a", seed=1, dtype=torch.float64), write_model("b", seed=2, dtype=torch.float64)]
    t = [{"filter": "mlp", "value": [0, 1]}, {"value": 0.25}]
    [output] = produced(models, None, [method_settings("linear", [{"weight": 1}, {"weight": t}], {"normalize": False})])
    weights = {"model.layers.0.mlp.up_proj.weight": 0.0, "model.layers.1.mlp.up_proj.weight": 0.5, "scalar": 0.25}
    for name, weight in weights.items():
        one, other = models[0].read(name), models[1].read(name)
        assert one is not None
        assert other is not None
        torch.testing.assert_close(output[name], one + weight * other)


@pytest.mark.parametrize("method", ["linear", "ties"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_not_finite_is_named(
    write_model: WriteModel, monkeypatch: pytest.MonkeyPatch, method: str, value: float
) -> None:
    monkeypatch.setattr(stored, "BLOCK", 7)

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][5, 2] = value

    models = [write_model("a", seed=1), write_model("b", seed=2, change=spoil)]
    base = write_model("base", seed=3)
    with pytest.raises(
        InputError,
        match=r"b/model\.safetensors: model\.layers\.1\.mlp\.up_proj\.weight holds (nan|inf) at index \[5, 2\]",
    ):
        produced(models, under(method, base), at(method, 0.5))


def test_a_result_that_overflows_is_named(write_model: WriteModel) -> None:
    def large(tensors: dict[str, torch.Tensor]) -> None:
        tensors["scalar"] *= 0
        tensors["scalar"] += 60_000

    models = [write_model(name, seed=1, dtype=torch.float16, change=large) for name in ("a", "b")]
    settings = method_settings("linear", [{"weight": 1}, {"weight": 1}], {"normalize": False})
    with pytest.raises(InputError, match="merged weight scalar is not finite in float16"):
        produced(models, None, [settings])


def drop_norm(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.norm.weight"]


def widen(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.embed_tokens.weight"] = torch.zeros(12, 6, dtype=torch.bfloat16)


def count_on(tensors: dict[str, torch.Tensor]) -> None:
    tensors["counter"] = torch.tensor([1, 2, 4])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop_norm, r"b lacks model\.norm\.weight, which .*/a has"),
        (widen, r"shape mismatch at model\.embed_tokens\.weight: \[11, 6\] in .*/a, \[12, 6\] in .*/b"),
        (count_on, r"counter holds other values \(I64\)"),
    ],
)
def test_models_that_do_not_fit_are_refused_before_the_work(
    write_model: WriteModel, change: Callable[[dict[str, torch.Tensor]], None], words: str
) -> None:
    models = [write_model("a", seed=1), write_model("b", seed=2, change=change)]
    with pytest.raises(InputError, match=words):
        method_producer(models, None, at("linear", 0.5))


def test_dtypes_that_differ_need_one_for_the_output(write_model: WriteModel) -> None:
    models = [write_model("a", seed=1), write_model("b", seed=2, dtype=torch.float32)]
    with pytest.raises(InputError, match="dtype mismatch at .*: BF16 in .*/a, F32 in .*/b"):
        method_producer(models, None, at("linear", 0.5))
    [output] = produced(models, None, at("linear", 1.0), dtype="F32")
    assert torch.equal(output["scalar"], models[1].read("scalar") or torch.zeros(()))


def test_bases_are_there_where_they_are_needed(write_model: WriteModel) -> None:
    models = [write_model("a", seed=1), write_model("b", seed=2)]
    with pytest.raises(InputError, match="ties merges differences from a base, and none was given"):
        method_producer(models, None, at("ties", 0.5))
    with pytest.raises(InputError, match="slerp merges weights and takes no base"):
        method_producer(models, models[0], at("slerp", 0.5))
    with pytest.raises(InputError, match="the settings are for 2 models; given: 1 models"):
        method_producer(models[:1], None, at("linear", 0.5))


def test_a_file_that_shrinks_meanwhile_is_named(write_model: WriteModel) -> None:
    models = [write_model("a", seed=1), write_model("b", seed=2)]
    produce = method_producer(models, None, at("linear", 0.5))
    os.truncate(models[1].path / "model.safetensors", 700)
    found = models[0].find("scalar")
    assert found is not None
    with pytest.raises(InputError, match=r"b/model\.safetensors was changed while it was in use"):
        list(produce("scalar", found[1]) or ())


# --- deltas of adapters


@pytest.mark.parametrize("method", DELTA_METHODS)
def test_deltas_of_adapters_are_merged_like_those_of_checkpoints(write_model: WriteModel, method: str) -> None:
    def nothing(tensors: dict[str, torch.Tensor]) -> None:
        for tensor in tensors.values():
            if tensor.is_floating_point():
                tensor.zero_()

    models = [write_model("a", seed=1, dtype=torch.float32), write_model("b", seed=2, dtype=torch.float32)]
    zero = write_model("zero", dtype=torch.float32, change=nothing)
    name = "model.layers.1.mlp.up_proj.weight"
    [settings] = at(method, 0.3)
    [output] = produced(models, zero, [settings], seed=4)
    deltas = [model.read(name) for model in models]
    layers = count_layers(count_names(zero))
    assert torch.equal(combined_delta(name, deltas, settings, seed=4, layers=layers), output[name])


def test_factors_and_missing_deltas_count() -> None:
    draw = torch.Generator().manual_seed(0)
    factors = Factors(A=torch.randn(2, 5, generator=draw), B=torch.randn(4, 2, generator=draw), scale=1.5)
    found = combined_delta("x.weight", [factors, None], settings_at("task_arithmetic", 0.25), layers={})
    assert torch.allclose(found, 0.75 * dense_delta(factors, torch.float32))
    with pytest.raises(InputError, match="slerp works on weights, not on the deltas of adapters"):
        combined_delta("x.weight", [factors, factors], settings_at("slerp", 0.5), layers={})
    with pytest.raises(ValueError, match="no adapter"):
        combined_delta("x.weight", [None, None], settings_at("ties", 0.5), layers={})


def test_the_draws_of_two_sources_differ() -> None:
    delta = torch.ones(64, 64)
    settings = method_settings("dare_linear", [{"weight": 1}, {"weight": 1}], {"density": 0.5, "rescale": False})
    merged_delta = combined_delta("x", [delta, delta], settings, layers={}).numpy()
    values, counts = np.unique(merged_delta, return_counts=True)
    assert values.tolist() == [0, 1, 2]  # one mask for both would leave 0 and 2
    assert stats.chisquare(counts, [1024, 2048, 1024]).pvalue > 1e-3


def test_sparsifying_is_done_once_for_many_ratios(write_model: WriteModel, monkeypatch: pytest.MonkeyPatch) -> None:
    models, base = [write_model("a", seed=1), write_model("b", seed=2)], write_model("base", seed=3)
    calls: list[int] = []
    real = methods.sparsified

    def counting(method: str, tensor: torch.Tensor, source: int, *rest: Any) -> torch.Tensor:
        calls.append(source)
        return real(method, tensor, source, *rest)

    monkeypatch.setattr(combine, "sparsified", counting)
    outputs = produced(models, base, at("ties", 0.1, 0.5, 0.9))
    assert len(calls) == 2 * len(outputs[0])


def test_arguments_may_be_made_by_hand() -> None:
    arguments = Arguments(per_model={"weight": (0.5, 0.5)}, shared={"normalize": False})
    assert merge_tensors("linear", [vector(2), vector(4)], arguments).tolist() == [3.0]
    with pytest.raises(ValueError, match="dare_linear draws random numbers"):
        merge_tensors("dare_linear", [vector(2)], settings_arguments("dare_linear"))


def settings_arguments(method: str) -> Arguments:
    return method_settings(method, [{"weight": 1, "density": 0.5}]).resolve("x", {})


def test_no_torch_is_needed_to_read_settings() -> None:
    code = (
        "import sys, psacpo.merge.mergekit, psacpo.merge.parameters, psacpo.merge.signatures; "
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
