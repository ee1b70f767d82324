"""Merges in several processes: the same bytes as in one, and no worker left behind."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from psacpo.errors import InputError
from psacpo.merge import processes
from psacpo.merge.linear import linear_producer, write_linear
from psacpo.merge.models import ModelDirectory, read_model
from psacpo.merge.processes import deal, write_in_processes
from psacpo.merge.tensorfiles import Entry, make_header

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")
MakeModel = Callable[..., ModelDirectory]


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_WORTHWHILE", 0)


@pytest.fixture
def make_model(tmp_path: Path) -> MakeModel:
    """A model of as many shards as there are sizes, a tensor of so many float32 numbers in each."""

    def make(name: str, sizes: tuple[int, ...], *, seed: int = 0, bad: int | None = None) -> ModelDirectory:
        path, draw, weight_map = tmp_path / name, np.random.default_rng(seed), {}
        path.mkdir()
        for place, size in enumerate(sizes):
            numbers = draw.standard_normal(size, dtype=np.float32)
            if place == bad:
                numbers[1] = np.nan
            file = f"model-{place + 1:05d}-of-{len(sizes):05d}.safetensors"
            weight_map[f"w{place}"] = file
            header = make_header({f"w{place}": Entry("F32", (size,), 0, 4 * size)}, {"format": "pt"})
            (path / file).write_bytes(header + numbers.tobytes())
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        (path / "config.json").write_text("{}")
        return read_model(path)

    return make


def outputs(tmp_path: Path, *names: str) -> list[Path]:
    for name in names:
        (tmp_path / name).mkdir()
    return [tmp_path / name for name in names]


def test_the_same_as_in_one_process(tmp_path: Path, make_model: MakeModel) -> None:
    sizes = (70_000, 10, 30_000, 40_000)
    models = [make_model("a", sizes), make_model("b", sizes, seed=1)]
    mixes = [(0.7, 0.3), (0.5, 0.5)]
    one = write_linear(outputs(tmp_path, "x", "y"), models, mixes)
    counted: list[int] = []
    producer = linear_producer(models, mixes)
    apart = outputs(tmp_path, "p", "q")
    found = write_in_processes(apart, models[0], producer, processes=3, done=counted.append)
    assert found == one.outputs
    assert [list(files) for files in found] == [list(models[0].shards)] * 2
    assert producer.input_digests() == one.inputs
    assert sum(counted) == 2 * sum(file.stat().st_size for file in models[0].path.glob("*.safetensors"))
    for before, after in zip(("x", "y"), apart, strict=True):
        for file in (tmp_path / before).iterdir():
            assert file.read_bytes() == (after / file.name).read_bytes()


def test_shards_are_dealt_by_size(make_model: MakeModel) -> None:
    model = make_model("a", (100, 90, 10, 5))
    groups = deal(model, 2)
    assert sorted(name for group in groups for name in group) == sorted(model.shards)
    assert [sum(int(name[6:11]) in (1, 2) for name in group) for group in groups] == [1, 1]
    assert len(deal(model, 9)) == 4


def test_an_error_in_a_process_is_the_callers(tmp_path: Path, make_model: MakeModel) -> None:
    models = [make_model("a", (10, 10)), make_model("b", (10, 10), seed=1, bad=1)]
    with pytest.raises(InputError, match=r"b/model-00002-of-00002.safetensors: w1 holds nan at index \[1\]"):
        write_in_processes(outputs(tmp_path, "o"), models[0], linear_producer(models, [(0.5, 0.5)]), processes=2)


def test_a_process_that_is_killed_is_told(
    tmp_path: Path, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [make_model("a", (10, 10)), make_model("b", (10, 10), seed=1)]
    monkeypatch.setattr(processes, "write_shards", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(InputError, match=r"ended from outside \(exit code -9\)"):
        write_in_processes(outputs(tmp_path, "o"), models[0], linear_producer(models, [(0.5, 0.5)]), processes=2)


def test_processes_end_with_their_parent(
    tmp_path: Path, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [make_model("a", (10, 10)), make_model("b", (10, 10), seed=1)]

    def linger(*_: object, **__: object) -> None:
        (tmp_path / f"{os.getpid()}.pid").touch()
        time.sleep(60)

    monkeypatch.setattr(processes, "write_shards", linger)
    parent = os.fork()
    if parent == 0:
        write_in_processes(outputs(tmp_path, "o"), models[0], linear_producer(models, [(0.5, 0.5)]), processes=2)
        os._exit(0)
    until = time.monotonic() + 30
    while len(found := list(tmp_path.glob("*.pid"))) < 2 and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    for file in found:
        # Its parent is gone, so somebody else reaps it; until then it is a zombie.
        while (state := _state(int(file.stem))) not in ("", "Z") and time.monotonic() < until:
            time.sleep(0.02)
        assert state in ("", "Z")
    assert len(found) == 2


def _state(process: int) -> str:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return ""
