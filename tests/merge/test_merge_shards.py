"""The writer of full weights, the digests that it gives, and the files that it must not be fooled by."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from psacpo.errors import InputError
from psacpo.files import PROGRESS, resumable_directory
from psacpo.merge.models import ModelDirectory, read_model
from psacpo.merge.shards import Blocks, digest_shard, write_shards
from psacpo.merge.tensorfiles import Entry, read_header

WriteModel = Callable[..., ModelDirectory]


@pytest.fixture
def write_model(tmp_path: Path) -> WriteModel:
    """Write tensors as a model directory in some shards: `write_model("a", tensors, shards=2)`."""

    def write(name: str, tensors: dict[str, torch.Tensor], *, shards: int = 1) -> ModelDirectory:
        path = tmp_path / name
        path.mkdir()
        (path / "config.json").write_text("{}")
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

    return write


def some_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "flags": torch.tensor([True, False, True]),
        "a": torch.randn(300, 7).bfloat16(),
        "scalar": torch.tensor(2.5, dtype=torch.float16),
        "nothing": torch.zeros(0, 4),
        "b": torch.randn(5, 400),
        "ids": torch.arange(9),
    }


def made(directory: Path, count: int) -> list[Path]:
    paths = [directory / f"out-{place}" for place in range(count)]
    for path in paths:
        path.mkdir()
    return paths


def all_of(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in directory.glob("*.safetensors") for name, t in load_file(file).items()}


def fill(value: int, block: int = 1000) -> Callable[[str, Entry], Blocks]:
    """A producer of the same byte everywhere, plus the output's place, in blocks of a size, all from one memory."""

    def produce(name: str, entry: Entry) -> Blocks:
        size, memory = entry.end - entry.start, np.zeros(block, np.uint8)
        for offset in range(0, size, block):
            yield offset, buffers(memory[: min(block, size - offset)])

    def buffers(memory: np.ndarray) -> Iterator[np.ndarray]:
        for place in range(2):
            memory[:] = value + place
            yield memory

    return produce


def test_what_is_not_produced_is_copied_bit_for_bit(tmp_path: Path, write_model: WriteModel) -> None:
    model = write_model("m", some_tensors(), shards=3)
    outputs = made(tmp_path, 2)
    told: list[int] = []
    digests = write_shards(outputs, model, lambda name, entry: None, done=told.append)
    files = {name: (model.path / name).read_bytes() for name in model.shards}
    for output, found in zip(outputs, digests, strict=True):
        assert {file.name: file.read_bytes() for file in output.iterdir()} == files
        assert list(found) == list(files)
    assert sum(told) == 2 * sum(map(len, files.values()))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("block", [1, 64, 10**6])
def test_produced_bytes_go_where_the_layout_says(
    tmp_path: Path, write_model: WriteModel, threads: int, block: int
) -> None:
    model = write_model("m", some_tensors(), shards=2)
    outputs = made(tmp_path, 2)
    digests = write_shards(outputs, model, fill(7, block), threads=threads)
    for place, output in enumerate(outputs):
        for shard, (begin, _) in model.shards.items():
            before, after = (model.path / shard).read_bytes(), (output / shard).read_bytes()
            assert after == before[:begin] + bytes([7 + place]) * (len(before) - begin)
            assert digests[place][shard] == digest_shard(output / shard)


def test_the_digest_is_what_the_documentation_says(write_model: WriteModel) -> None:
    model = write_model("m", some_tensors())
    path = model.path / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__")
    places = sorted(item["data_offsets"] for item in header.values())
    parts = [xxhash.xxh3_128(data[8 + length + start : 8 + length + end]).digest() for start, end in places]
    assert digest_shard(path) == "xxh3:" + hashlib.sha256(data[: 8 + length] + b"".join(parts)).hexdigest()
    for place in (20, 8 + length, len(data) // 2, len(data) - 1):
        changed = bytearray(data)
        changed[place] ^= 1
        path.write_bytes(changed)
        try:
            assert digest_shard(path) != "xxh3:" + hashlib.sha256(data[: 8 + length] + b"".join(parts)).hexdigest()
        except InputError:
            assert place < 8 + length


def test_another_dtype_makes_a_header_that_everyone_reads(tmp_path: Path, write_model: WriteModel) -> None:
    tensors = some_tensors()
    model = write_model("m", tensors)

    def produce(name: str, entry: Entry) -> Blocks | None:
        if not tensors[name].is_floating_point():
            return None
        assert entry.dtype == "F64"
        return iter([(0, [tensors[name].double().numpy()])])

    outputs = made(tmp_path, 1)
    write_shards(outputs, model, produce, dtype="F64")
    found = all_of(outputs[0])
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        wanted = tensor.double() if tensor.is_floating_point() else tensor
        assert found[name].dtype == wanted.dtype
        assert torch.equal(found[name], wanted)
    begin, entries = read_header(outputs[0] / "model.safetensors")
    sizes = {"F64": 8, "I64": 8, "BOOL": 1}
    assert all((begin + entry.start) % sizes[entry.dtype] == 0 for entry in entries.values())
    with safe_open(outputs[0] / "model.safetensors", framework="pt") as weights:
        assert weights.metadata() == {"format": "pt"}
    with pytest.raises(ValueError, match="nothing is produced for another dtype"):
        write_shards(outputs, model, lambda name, entry: None, dtype="F64")


def test_another_shape(tmp_path: Path, write_model: WriteModel) -> None:
    model = write_model("m", {"a": torch.zeros(4, 2), "b": torch.ones(3)})
    longer = np.arange(10, dtype=np.float32)
    outputs = made(tmp_path, 1)
    write_shards(
        outputs,
        model,
        lambda name, entry: iter([(0, [longer])]) if name == "a" else None,
        entries={"a": Entry("F32", (5, 2), 0, 0), "elsewhere": Entry("F32", (1,), 0, 4)},
    )
    found = all_of(outputs[0])
    assert torch.equal(found["a"], torch.arange(10.0).view(5, 2))
    assert torch.equal(found["b"], torch.ones(3))
    assert set(found) == {"a", "b"}


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([(0, b"1234")], "4 bytes where 8 belong"),
        ([(0, b"1234"), (5, b"678")], "a block at 5 where 4 comes next"),
        ([(0, b"123456789")], "9 bytes where 8 belong"),
        ([], "0 bytes where 8 belong"),
    ],
)
def test_producers_that_do_not_cover_a_tensor(
    tmp_path: Path, write_model: WriteModel, blocks: list[tuple[int, bytes]], message: str
) -> None:
    model = write_model("m", {"a": torch.zeros(2)})
    with pytest.raises(ValueError, match=message):
        write_shards(made(tmp_path, 1), model, lambda name, entry: iter([(at, [data]) for at, data in blocks]))


def test_an_error_leaves_nothing_and_no_file_open(tmp_path: Path, write_model: WriteModel) -> None:
    tensors = {f"t{place:02d}": torch.zeros(1000) for place in range(40)}
    model = write_model("m", tensors, shards=4)
    files = model.shards

    def produce(name: str, entry: Entry) -> Blocks | None:
        if name in ("t09", "t05", "t20"):
            raise InputError(f"no {name}")
        return None

    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else None
    for threads in (1, 3):
        # Of several errors always the same: the first in the first file.
        with (
            pytest.raises(InputError, match="^no t20$"),
            resumable_directory(tmp_path / "out", key="k") as directory,
        ):
            write_shards([directory], model, produce, threads=threads)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]
        assert before is None or len(os.listdir("/proc/self/fd")) == before
    assert len(files) == 4


def test_a_source_that_shrinks_while_it_is_read(tmp_path: Path, write_model: WriteModel) -> None:
    model = write_model("m", {"a": torch.zeros(1000)})
    os.truncate(model.path / "model.safetensors", 2000)
    with pytest.raises(InputError, match=r"model\.safetensors ended early"):
        write_shards(made(tmp_path, 1), model, lambda name, entry: None)
    (model.path / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"^cannot read .*model\.safetensors: No such file"):
        write_shards(made(tmp_path / "m", 1), model, lambda name, entry: None)


def test_finished_shards_are_left_alone(tmp_path: Path, write_model: WriteModel) -> None:
    model = write_model("m", some_tensors(), shards=3)
    shards = list(model.shards)
    wanted = write_shards(made(tmp_path, 2), model, fill(1))
    produced: list[str] = []
    told: list[int] = []

    def produce(name: str, entry: Entry) -> Blocks:
        produced.append(name)
        if name in model.shards[shards[2]][1] and len(told) < 100:
            raise KeyboardInterrupt
        return fill(1)(name, entry)

    outs = [tmp_path / "one", tmp_path / "two"]
    with (
        pytest.raises(KeyboardInterrupt),
        resumable_directory(outs[0], key="k") as one,
        resumable_directory(outs[1], key="k") as two,
    ):
        write_shards([one, two], model, produce, done=told.append)
    partials = [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert [sorted(path.name for path in partial.glob("*.safetensors")) for partial in partials] == [shards[:2]] * 2
    # Of one output a shard is lost: it is made again, that of the other is not.
    lost = next(partial for partial in partials if "one" in partial.name)
    (lost / shards[1]).unlink()
    produced.clear()
    told[:] = [0] * 100
    with resumable_directory(outs[0], key="k") as one, resumable_directory(outs[1], key="k") as two:
        kept = (two / shards[1]).stat().st_ino
        found = write_shards([one, two], model, produce, done=told.append)
    assert set(produced) == set(model.shards[shards[1]][1]) | set(model.shards[shards[2]][1]) - {"nothing"}
    assert (outs[1] / shards[1]).stat().st_ino == kept
    assert found == wanted
    assert sum(told) == 2 * sum((model.path / shard).stat().st_size for shard in shards)
    for place, out in enumerate(outs):
        assert not (out / PROGRESS).exists()
        assert {file.name: file.read_bytes() for file in out.iterdir()} == {
            file.name: file.read_bytes() for file in (tmp_path / f"out-{place}").iterdir()
        }


def raw_file(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def tensor(dtype: Any, shape: Any, start: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


TWICE = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}'


@pytest.mark.parametrize(
    ("header", "size", "message"),
    [
        ({"a": tensor("F32", [2], 0, 4)}, 4, r"tensor a takes 4 bytes, where shape \[2\] of F32 takes 8"),
        ({"a": tensor("F32", [2], 8, 0)}, 0, r"tensor a takes -8 bytes"),
        ({"a": tensor("F99", [2], 0, 8)}, 8, "tensor a: unknown dtype 'F99'"),
        ({"a": tensor("F4", [3], 0, 1)}, 1, "ends within a byte"),
        ({"a": tensor("U8", [-1, -1], 0, 1)}, 1, "does not say what tensor a is"),
        ({"a": tensor("U8", [True], 0, 1)}, 1, "does not say what tensor a is"),
        ({"a": tensor("U8", [1.0], 0, 1)}, 1, "does not say what tensor a is"),
        ({"a": tensor("U8", "1", 0, 1)}, 1, "does not say what tensor a is"),
        ({"a": tensor(["U8"], [1], 0, 1)}, 1, "does not say what tensor a is"),
        ({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 1]}}, 1, "does not say what tensor a is"),
        ({"a": {"dtype": "U8"}}, 1, "does not say what tensor a is"),
        ({"a": 3}, 0, "does not say what tensor a is"),
        ({"a": tensor("U8", [2], 0, 2), "b": tensor("U8", [2], 1, 3)}, 3, "tensor b does not begin where"),
        ({"a": tensor("U8", [2], 1, 3)}, 3, "tensor a does not begin where"),
        ({"a": tensor("U8", [2], 0, 2)}, 1, "bytes long where its header says"),
        ({"a": tensor("U8", [2], 0, 2)}, 3, "bytes long where its header says"),
        ({"a": tensor("U8", [10**30], 0, 10**30)}, 3, "bytes long where its header says"),
        (TWICE, 2, "a is in its header twice"),
        ([], 0, "its header is no JSON object"),
        (b"\xff{}", 0, "codec can't decode"),
        (b"[" * 100_000, 0, "recursion"),
        (b"{ ", 0, "Expecting"),
        (b"", 0, "no safetensors header"),
    ],
)
def test_headers_that_contradict_themselves(tmp_path: Path, header: Any, size: int, message: str) -> None:
    path = raw_file(tmp_path / "x.safetensors", header, bytes(size))
    with pytest.raises(InputError, match=message) as caught:
        read_header(path)
    assert str(caught.value).startswith(f"{path} is damaged or not a safetensors file: ")
    assert "\n" not in str(caught.value)


def test_headers_of_the_formats_own_writer(tmp_path: Path) -> None:
    dtypes = [
        getattr(torch, name) for name in ("float8_e4m3fn", "float8_e5m2", "int16", "uint16", "uint64", "complex64")
    ]
    save_file({str(dtype): torch.zeros(3, dtype=dtype) for dtype in dtypes}, tmp_path / "x.safetensors")
    _, entries = read_header(tmp_path / "x.safetensors")
    assert set(entries) == set(map(str, dtypes))


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": 3}, "the shard of a is no file name; given: 3"),
        ({"a": None}, "the shard of a is no file name"),
        ({"a": ["model.safetensors"]}, "the shard of a is no file name"),
        ({"a": "../m/one.safetensors"}, r"lacks the shard \.\./m/one\.safetensors"),
        ({"a": ".."}, r"lacks the shard \.\."),
        ({"a": ""}, "lacks the shard"),
        ({"a": "one\0.safetensors"}, "lacks the shard"),
        ({"a": "two.safetensors"}, "lacks the tensor a that"),
        ({"a": "one.safetensors", "b": "two.safetensors"}, "holds the tensor b twice, in one.safetensors and two"),
        ({}, "no weight_map"),
        ([], "no weight_map"),
    ],
)
def test_indices_that_lie(tmp_path: Path, weight_map: Any, message: str) -> None:
    path = tmp_path / "m"
    path.mkdir()
    (path / "config.json").write_text("{}")
    save_file({"a": torch.zeros(2), "b": torch.zeros(1)}, path / "one.safetensors")
    save_file({"b": torch.zeros(1)}, path / "two.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InputError, match=message):
        read_model(path)


def test_models_without_tensors_and_in_pickle(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"pickle and not read; allowed: safetensors, .* python -c .*save_pretrained"):
        read_model(path)
    raw_file(path / "model.safetensors", {})
    with pytest.raises(InputError, match="they hold no tensor"):
        read_model(path)


def test_a_download_cache_of_links_is_read(tmp_path: Path, write_model: WriteModel) -> None:
    """As huggingface_hub lays it out: snapshots/REVISION/NAME -> ../../blobs/HASH."""
    model = write_model("m", some_tensors(), shards=2)
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for place, file in enumerate(sorted(model.path.iterdir())):
        shutil.move(file, blobs / str(place))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(place))
    linked = read_model(snapshot)
    assert linked.shards == model.shards
    output = made(tmp_path, 1)[0]
    write_shards([output], linked, lambda name, entry: None)
    for shard in linked.shards:
        assert not (output / shard).is_symlink()
        assert (output / shard).read_bytes() == (snapshot / shard).read_bytes()
