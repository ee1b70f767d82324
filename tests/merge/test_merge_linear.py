"""Weighted sums of full models: numbers, what is refused, and that an interrupted merge ends in the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from psacpo.errors import InputError
from psacpo.merge import linear
from psacpo.merge.blend import Blend, NotFinite
from psacpo.merge.floats import STORAGE, first_unfit, fits, narrow, widen
from psacpo.merge.linear import linear_producer, require_same_tensors, write_linear
from psacpo.merge.models import ModelDirectory, read_model
from psacpo.merge.shards import digest_shard

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
Tensors = dict[str, torch.Tensor]


def make_model(
    path: Path, tensors: Tensors, *, shards: int = 1, config: dict[str, Any] | None = None
) -> ModelDirectory:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config or {}))
    if shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return read_model(path)
    weight_map = {}
    for part in range(shards):
        file = f"model-{part + 1:05d}-of-{shards:05d}.safetensors"
        held = dict(list(tensors.items())[part::shards])
        save_file(held, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(held, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return read_model(path)


def random_tensors(seed: int, dtype: torch.dtype = torch.bfloat16, *, length: int = 70_000) -> Tensors:
    """Shapes that end within a block and at one, that are smaller, scalar and empty; and integers."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (3, 5), "long": (length,), "block": (256, 256), "scalar": (), "empty": (0, 4), "b": (7,)}
    found = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    return {name: value.to(dtype) for name, value in found.items()} | {
        "ids": torch.arange(5),
        "on": torch.tensor([True]),
    }


def all_of(directory: Path) -> Tensors:
    return {name: t for file in directory.glob("*.safetensors") for name, t in load_file(file).items()}


def merged(tmp_path: Path, models: Sequence[ModelDirectory], *mixes: Sequence[float], **options: Any) -> list[Tensors]:
    outputs = [tmp_path / f"out-{len(list(tmp_path.iterdir()))}-{place}" for place in range(len(mixes))]
    for output in outputs:
        output.mkdir()
    write_linear(outputs, models, mixes, **options)
    return [all_of(output) for output in outputs]


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and bytes_of(one) == bytes_of(other)


def bytes_of(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def stored(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    out = np.empty(values.shape, STORAGE[dtype])
    narrow(values.copy(), dtype, out, np.empty(values.shape, np.uint32))
    return out


# --- numbers -----------------------------------------------------------------------------------------------------


def test_bfloat16_is_widened_exactly_and_comes_back() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    for working in (np.float32, np.float64):
        wide = np.empty(bits.shape, working)
        widen(bits, "BF16", wide)
        exact = torch.from_numpy(bits.copy()).view(torch.bfloat16).to(torch.float32).numpy().astype(working)
        assert np.array_equal(wide, exact, equal_nan=True)
        finite = np.isfinite(wide)
        assert np.array_equal(rounded(wide[finite], "BF16"), bits[finite])


def test_float32_is_rounded_to_bfloat16_as_torch_does() -> None:
    random = np.random.default_rng(0).integers(0, 1 << 32, 200_000, dtype=np.uint32)
    # Every upper half, with the lower halves around the middle and the ends.
    halves = (np.arange(1 << 16, dtype=np.uint32) << 16)[:, None] + np.array(
        [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32
    )
    values = np.concatenate([random, halves.ravel()]).view(np.float32)
    values = np.ascontiguousarray(values[np.abs(values) < 3.396e38])
    expected = torch.from_numpy(values).bfloat16().view(torch.uint16).numpy()
    assert np.array_equal(rounded(values, "BF16"), expected)


def test_float64_is_rounded_to_bfloat16_once() -> None:
    # 1 + 2^-8 is half a step above 1; what is left of it in float32 would decide for the even neighbour, 1.
    step, tiny = 2.0**-7, 2.0**-40
    values = np.array([1 + step / 2, 1 + step / 2 + tiny, 1 + step / 2 - tiny, 1 + 1.5 * step, 1 + 1.5 * step - tiny])
    expected = np.array([1, 1 + step, 1, 1 + 2 * step, 1 + step])
    for sign in (1, -1):
        back = np.empty(values.shape)
        widen(rounded(sign * values, "BF16"), "BF16", back)
        assert np.array_equal(back, sign * expected)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_what_fits_is_what_rounds_to_a_finite_number(dtype: str) -> None:
    largest = torch.finfo(DTYPES[dtype])
    half = largest.max * (1 + largest.eps / (2 - largest.eps) / 2)  # the largest number and half a step
    for value, fit in (
        (np.nextafter(half, 0), True),
        (half, False),
        (largest.max, True),
        (np.inf, False),
        (np.nan, False),
    ):
        for sign in (1, -1):
            values = np.array([0.0, sign * value])
            assert fits(values, dtype) is fit
            assert first_unfit(values, dtype) == (None if fit else 1)
            if fit:
                back = np.empty(2)
                widen(rounded(values, dtype), dtype, back)
                assert back[1] == sign * largest.max
    assert fits(np.empty(0), dtype)


@settings(max_examples=60, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(list(DTYPES)), min_size=1, max_size=3),
    dtype=st.sampled_from(list(DTYPES)),
    weights=st.lists(st.floats(-2, 2), min_size=3, max_size=3),
    ones=st.booleans(),
    size=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
def test_sums_are_within_half_a_step_of_exact_ones(
    kinds: list[str], dtype: str, weights: list[float], ones: bool, size: int, seed: int
) -> None:
    mix = weights[: len(kinds)]
    if ones:
        mix = [1 - sum(mix[1:]), *mix[1:]]
    generator = torch.Generator().manual_seed(seed)
    sources = [torch.randn(size, generator=generator, dtype=torch.float64).to(DTYPES[kind]) for kind in kinds]
    exact = sum(w * source.double() for w, source in zip(mix, sources, strict=True)).numpy()
    terms = sum(abs(w) * source.double().abs() for w, source in zip(mix, sources, strict=True)).numpy() + 1e-30
    [out] = [result.copy() for result in Blend(kinds, [mix], dtype, size)([stored(source) for source in sources])]
    found = np.empty(size)
    widen(out, dtype, found)
    info = torch.finfo(DTYPES[dtype])
    working = np.finfo(np.float64 if "F64" in (dtype, *kinds) else np.float32).eps
    half_step = np.maximum(np.abs(exact) * info.eps, info.smallest_normal * info.eps) / 2
    anchor = np.abs(sources[0].double().numpy()) * sum(map(abs, mix))
    assert (np.abs(found - exact) <= half_step * 1.01 + 4 * working * (terms + anchor)).all()


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(list(DTYPES)),
    q=st.floats(-1, 2),
    bits=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=9),
)
def test_a_source_merged_with_itself_gives_itself(kind: str, q: float, bits: list[int]) -> None:
    array = np.array(bits, np.uint64).view(STORAGE[kind])
    wide = np.empty(array.shape)
    widen(array, kind, wide)
    array = array[np.isfinite(wide) & (wide != 0)]
    if array.size:
        [out] = Blend([kind, kind], [(1 - q, q)], kind, array.size)([array, array])
        assert out.tobytes() == array.tobytes()


def test_many_sums_in_one_pass_are_the_single_ones() -> None:
    sources = [stored(random_tensors(seed)["long"]) for seed in range(3)]
    mixes = [(0.2, 0.3, 0.5), (1, 0, 0), (0.5, 0.5, 0.5), (0, 0, 1), (0, 0, 0), (2, -1, 0)]
    together = [out.copy() for out in Blend(["BF16"] * 3, mixes, "F16", 70_000)(sources)]
    for mix, out in zip(mixes, together, strict=True):
        [single] = Blend(["BF16"] * 3, [mix], "F16", 70_000)(sources)
        assert single.tobytes() == out.tobytes()
    assert not together[4].any()


def test_a_sum_that_leaves_the_range_on_the_way_only() -> None:
    big = np.float32(3e38)
    one, other = np.array([big, 1], np.float32), np.array([-big, 3], np.float32)
    [out] = Blend(["F32", "F32"], [(0.5, 0.5)], "F32", 2)([one, other])
    assert out.tolist() == [0, 2]
    with pytest.raises(NotFinite) as caught:
        list(Blend(["F32", "F32"], [(0.5, 0.5), (2, -1)], "F32", 2)([one, other]))
    assert (caught.value.source, caught.value.place) == (None, 0)
    assert caught.value.value == pytest.approx(9e38)


@pytest.mark.parametrize("mix", [(0.5, 0.5), (1, 0), (0, 1), (0, 0), (0.25, 0.5)])
@pytest.mark.parametrize("kind", list(DTYPES))
@pytest.mark.parametrize("source", [0, 1])
def test_what_is_not_finite_is_found_whatever_its_weight(kind: str, mix: tuple[float, float], source: int) -> None:
    # All bits of the fraction set: a carry out of it would make a zero of this NaN.
    bits = {"F64": 0x7FFFFFFFFFFFFFFF, "F32": 0x7FFFFFFF, "F16": 0x7FFF, "BF16": 0x7FFF}[kind]
    infinity = {"F64": 0x7FF0000000000000, "F32": 0xFF800000, "F16": 0x7C00, "BF16": 0xFF80}[kind]
    unsigned = {8: np.uint64, 4: np.uint32, 2: np.uint16}[np.dtype(STORAGE[kind]).itemsize]
    for pattern in (bits, infinity):
        arrays = [np.ones(5, np.float32).astype(STORAGE[kind]) for _ in range(2)]
        arrays[source] = np.array([0, 0, 0, pattern, pattern], unsigned).view(STORAGE[kind])
        for dtype in (kind, "BF16"):
            with pytest.raises(NotFinite) as caught:
                list(Blend([kind, kind], [mix], dtype, 5)(arrays))
            assert (caught.value.source, caught.value.place) == (source, 3)


@pytest.mark.parametrize("dtype", ["F32", "F64"])
@pytest.mark.parametrize("weights", [(0.001, 0.999), (0.999, 0.001), (1e-8, 1 - 1e-8), (0.2, 0.5, 0.3)])
def test_rounding_is_that_of_the_terms_and_not_of_the_first_source(dtype: str, weights: tuple[float, ...]) -> None:
    """A source of little weight and large numbers must not cost the others their digits."""
    draw, kind = np.random.default_rng(0), STORAGE[dtype]
    arrays = [(draw.standard_normal(256) * size).astype(kind) for size in (1e3, 1e-3, 1.0)[: len(weights)]]
    (found,) = (out.copy() for out in Blend([dtype] * len(weights), [weights], dtype, 256)(arrays))
    terms = [np.longdouble(weight) * array.astype(np.longdouble) for weight, array in zip(weights, arrays, strict=True)]
    allowed = 4 * np.finfo(kind).eps * sum(abs(term) for term in terms)
    assert (abs(found - sum(terms)) <= allowed).all()


# --- models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, *DTYPES])
@pytest.mark.parametrize("kinds", [("BF16", "BF16"), ("F16", "BF16"), ("F32", "F32"), ("F64", "BF16")])
def test_models_of_any_dtype_and_cut_in_any_way(tmp_path: Path, kinds: tuple[str, str], dtype: str | None) -> None:
    one, other = (random_tensors(seed, DTYPES[kind]) for seed, kind in enumerate(kinds))
    models = [make_model(tmp_path / "one", one, shards=2), make_model(tmp_path / "other", other, shards=3)]
    outputs = [tmp_path / "out"]
    outputs[0].mkdir()
    digests = write_linear(outputs, models, [(0.7, 0.3)], dtype=dtype)
    found, wanted = all_of(outputs[0]), DTYPES[dtype or kinds[0]]
    assert {file.name for file in outputs[0].iterdir()} == set(models[0].shards)
    assert set(found) == set(one)
    for name, tensor in found.items():
        if not one[name].is_floating_point():
            assert same_bits(tensor, one[name])
            continue
        exact = 0.7 * one[name].double() + 0.3 * other[name].double()
        assert tensor.dtype == wanted
        assert tensor.shape == exact.shape
        info = torch.finfo(wanted)
        allowed = exact.abs().clamp(min=info.smallest_normal) * info.eps / 2 * 1.01
        allowed = allowed + (1e-15 if "F64" in (*kinds, dtype) else 8e-7)  # the sum's own rounding, before the output's
        assert ((tensor.double() - exact).abs() <= allowed).all()
    assert digests.outputs == [{name: digest_shard(outputs[0] / name) for name in models[0].shards}]
    assert digests.inputs == [{name: digest_shard(model.path / name) for name in model.shards} for model in models]


def test_ends_are_the_sources_bit_for_bit(tmp_path: Path) -> None:
    for kind, dtype in DTYPES.items():
        one, other = random_tensors(1, dtype), random_tensors(2, dtype)
        one["a"][0, :2] = torch.tensor([-0.0, torch.finfo(dtype).smallest_normal / 2])
        models = [make_model(tmp_path / kind / "one", one), make_model(tmp_path / kind / "other", other)]
        first, second, half = merged(tmp_path, models, (1, 0), (0, 1), (0.5, 0.5))
        for name in one:
            assert same_bits(first[name], one[name])
            assert same_bits(second[name], other[name])
        assert not same_bits(half["a"], one["a"])


def test_ratios_threads_and_shards_do_not_change_a_bit(tmp_path: Path) -> None:
    tensors = [random_tensors(seed) for seed in range(3)]
    models = [make_model(tmp_path / f"m{seed}", part) for seed, part in enumerate(tensors)]
    cut = [make_model(tmp_path / f"c{seed}", part, shards=seed + 2) for seed, part in enumerate(tensors)]
    mixes = [(0.2, 0.3, 0.5), (0, 0, 1), (1.5, -0.5, 0)]
    together = merged(tmp_path, models, *mixes, threads=1)
    for mix, wanted in zip(mixes, together, strict=True):
        for variant in (
            merged(tmp_path, models, mix, threads=1),
            merged(tmp_path, models, mix, threads=4),
            merged(tmp_path, cut, mix, threads=2),
            merged(tmp_path, cut, mix, layout=models[1]),
        ):
            assert all(same_bits(variant[0][name], wanted[name]) for name in wanted)


def test_models_that_do_not_fit_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    one = random_tensors(1) | {"model.embed_tokens.weight": torch.zeros(32000, 2)}
    first = make_model(tmp_path / "one", one)

    def refused(name: str, change: Tensors, message: str, *, drop: str | None = None) -> None:
        other = {key: value for key, value in (one | change).items() if key != drop}
        second = make_model(tmp_path / name, other)
        with pytest.raises(InputError, match=message) as caught:
            require_same_tensors({"reward": first, "safety": second})
        assert "\n" not in str(caught.value)
        out = tmp_path / "out"
        out.mkdir(exist_ok=True)
        with pytest.raises(InputError):
            write_linear([out], [first, second], [(0.5, 0.5)])
        assert not list(out.iterdir())

    refused("1", {}, r"safety \(.*/1\) lacks long, which reward \(.*/one\) has", drop="long")
    refused("2", {"more": torch.zeros(1)}, r"reward \(.*/one\) lacks more, which safety \(.*/2\) has")
    refused("3", {"b": torch.zeros(8)}, r"do not fit together: b is \[7\] in reward, \[8\] in safety$")
    refused("4", {"b": torch.zeros(7, 1)}, r"b is \[7\] in reward, \[7, 1\] in safety$")
    refused(
        "5",
        {"model.embed_tokens.weight": torch.zeros(32007, 2)},
        r"different vocabularies: 32000 tokens in reward, 32007 in safety \(model\.embed_tokens\.weight is",
    )
    refused("6", {"ids": torch.arange(5) + 1}, "ids is of dtype I64, which cannot be mixed, and differs between reward")
    refused("7", {"ids": torch.arange(5).int()}, "ids is of dtype I64 in reward and I32 in safety")
    refused("8", {"ids": torch.arange(5).float()}, "ids is of dtype I64 in reward and F32 in safety")
    refused("9", {"on": torch.tensor([False])}, "on is of dtype BOOL, which cannot be mixed, and differs")
    require_same_tensors({"reward": first})


@pytest.mark.parametrize("place", [0, 65_536, 69_999])
def test_a_number_that_is_not_finite_is_named(tmp_path: Path, place: int) -> None:
    one, other = random_tensors(1), random_tensors(2)
    other["long"] = other["long"].view(700, 100)
    one["long"] = one["long"].view(700, 100)
    other["long"].view(-1)[place] = torch.inf
    models = [make_model(tmp_path / "one", one), make_model(tmp_path / "other", other)]
    index = rf"\[{place // 100}, {place % 100}\]"
    for mix in ((0.5, 0.5), (1, 0), (0, 1)):
        with pytest.raises(InputError, match=rf"other/model\.safetensors: long holds inf at index {index}"):
            merged(tmp_path, models, mix)


def test_a_sum_beyond_the_outputs_dtype_is_named(tmp_path: Path) -> None:
    one = {"w": torch.tensor([[1.0, 2.0], [3.0, 60000.0]])}
    models = [make_model(tmp_path / "one", one), make_model(tmp_path / "two", {"w": 2 * one["w"]})]
    with pytest.raises(
        InputError, match=r"the merged w is not finite in the output's dtype at index \[1, 1\]: .* 90000"
    ):
        merged(tmp_path, models, (0.5, 0.5), dtype="F16")
    assert merged(tmp_path, models, (0.5, 0.5))[0]["w"][1, 1] == 90000


def test_weights_that_make_no_sense(tmp_path: Path) -> None:
    model = make_model(tmp_path / "one", random_tensors(1))
    for mix in ((1.0,), (0.5, float("nan")), (0.5, float("inf"))):
        with pytest.raises(ValueError, match="weights"):
            linear_producer([model, model], [mix])


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=120
    )


def test_memory_does_not_grow_with_the_model_and_torch_stays_out(tmp_path: Path) -> None:
    count = 40 << 20
    for name in ("one", "other"):
        make_model(tmp_path / name, {f"w{place}": torch.zeros(count // 4, dtype=torch.bfloat16) for place in range(4)})
    code = (
        "import re, sys\n"
        "from pathlib import Path\n"
        "from psacpo.merge.linear import write_linear\n"
        "from psacpo.merge.models import read_model\n"
        "root = Path(sys.argv[1])\n"
        "outs = [root / f'out{i}' for i in range(4)]\n"
        "[out.mkdir() for out in outs]\n"
        "write_linear(outs, [read_model(root / 'one'), read_model(root / 'other')], [(1 - i / 8, i / 8) for i in range(4)])\n"
        "assert 'torch' not in sys.modules\n"
        # Not ru_maxrss: that counts the process which started this one, too.
        "print(re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1])\n"
    )
    done = run_python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100 << 10  # KiB; each input is 80 MiB


SLOW_MERGE = """
import sys, time
from pathlib import Path
from psacpo.files import resumable_directory
from psacpo.merge.linear import linear_producer
from psacpo.merge.models import read_model
from psacpo.merge.shards import write_shards
root, delay = Path(sys.argv[1]), float(sys.argv[2])
models = [read_model(root / "one"), read_model(root / "other")]
merge = linear_producer(models, [(0.7, 0.3)])

def slowly(name, entry):
    time.sleep(delay)
    return merge(name, entry)

with resumable_directory(root / "out", key="k") as directory:
    (directory / "config.json").write_text("{}")
    print(write_shards([directory], models[0], slowly, threads=2), merge.input_digests())
"""


def test_a_merge_that_is_killed_at_any_moment_ends_in_the_same_bytes(tmp_path: Path) -> None:
    shards, delay = 5, 0.04
    for seed, name in enumerate(("one", "other")):
        tensors = {f"w{place}": random_tensors(10 * seed + place, length=200_000)["long"] for place in range(10)}
        make_model(tmp_path / name, tensors, shards=shards)
    whole = run_python(SLOW_MERGE, tmp_path, 0)
    assert whole.returncode == 0, whole.stderr
    wanted = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    (tmp_path / "out").rename(tmp_path / "kept")

    def finished_shards() -> int:
        return len([file for part in tmp_path.glob(".out.partial-*") for file in part.glob("*.safetensors")])

    def begun() -> bool:
        return any(tmp_path.glob(".out.partial-*/.progress/*.part"))

    moments: list[Callable[[], bool]] = [begun, lambda: finished_shards() >= 1, lambda: finished_shards() >= 3]
    before = 0
    for moment in moments:
        with subprocess.Popen([sys.executable, "-c", SLOW_MERGE, str(tmp_path), str(delay)]) as process:
            deadline = time.monotonic() + 60
            while not moment() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.001)
            assert process.poll() is None, "it ended before it could be killed"
            os.kill(process.pid, signal.SIGKILL)
        assert not (tmp_path / "out").exists()
        assert finished_shards() >= before
        before = finished_shards()
    assert 3 <= before < shards
    last = run_python(SLOW_MERGE, tmp_path, 0)
    assert last.returncode == 0, last.stderr
    assert last.stdout == whole.stdout
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == wanted
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "one", "other", "out"]


def test_blocks_of_any_length_give_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [make_model(tmp_path / f"m{seed}", random_tensors(seed, torch.float16, length=500)) for seed in range(2)]
    [wanted] = merged(tmp_path, models, (0.7, 0.3))
    monkeypatch.setattr(linear, "_BLOCK", 97)
    [found] = merged(tmp_path, models, (0.7, 0.3))
    assert all(same_bits(found[name], wanted[name]) for name in wanted)
