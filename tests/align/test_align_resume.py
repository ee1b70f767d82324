"""A stage that is killed goes on from its last checkpoint and ends in the same bytes."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from psacpo.align import AlignConfig, align, scoring
from psacpo.align.trainer import PairTrainer
from psacpo.errors import InputError

# Ends the process at once after the given step of the given stage, as the out-of-memory killer does.
KILLED = """
import json, os, signal, sys
from psacpo.align import AlignConfig, align
from psacpo.align.trainer import PairTrainer
import torch
torch.set_num_threads(1)
stage, step = sys.argv[2], int(sys.argv[3])
def log(self, logs, start_time=None, real=PairTrainer.log):
    real(self, logs, start_time)
    if self.stage.name == stage and self.state.global_step == step:
        os.kill(os.getpid(), signal.SIGKILL)
PairTrainer.log = log
align(AlignConfig.model_validate(json.loads(sys.argv[1])))
"""
DROPOUT = {"r": 4, "alpha": 8, "dropout": 0.2}


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def elsewhere(config: AlignConfig, out: Path) -> AlignConfig:
    return AlignConfig.model_validate(config.model_dump(by_alias=True) | {"out": out})


@pytest.fixture
def data(tmp_path: Path, rows: Any, write_rows: Any) -> Path:
    """Two and a half batches of 8, so that passes end unevenly."""
    return Path(write_rows(tmp_path / "rows.jsonl", rows(20)))


def test_sigkill(
    tiny_llama: Path, tmp_path: Path, data: Path, make_config: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed in stage 2, whose start is not what the checkpoint holds, before all pairs were scored by it."""
    stages = [{"data": data, "max_steps": 2}, {"data": data, "max_steps": 8}]
    config = make_config(tiny_llama, tmp_path / "killed", stages, lora=DROPOUT, save_steps=2)
    command = [sys.executable, "-c", KILLED, config.model_dump_json(by_alias=True), "b", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert {path.name for path in config.out.iterdir()} == {"a", ".b.checkpoints"}
    assert [path.name for path in (config.out / ".b.checkpoints").iterdir()] == ["checkpoint-2"]
    align(config)
    assert "b: goes on after step 2\n" in capsys.readouterr().err
    assert {path.name for path in config.out.iterdir()} == {"a", "b"}
    whole = elsewhere(config, tmp_path / "whole")
    align(whole)
    assert "goes on" not in capsys.readouterr().err
    for name in "ab":
        assert contents(config.out / name) == contents(whole.out / name)


class Stop(BaseException):
    """Neither bad input nor an error: what ends a process from outside."""


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    real = PairTrainer.log

    def log(self: PairTrainer, logs: dict[str, float], start_time: float | None = None) -> None:
        real(self, logs, start_time)
        if self.state.global_step == step:
            raise Stop

    monkeypatch.setattr(PairTrainer, "log", log)


@pytest.mark.parametrize(
    ("step", "stage"),
    [
        # The first pass ends with step 3, so the checkpoint of step 3 is at the start of the second one.
        (4, {"loss": "dpo"}),
        # Its baseline draws dropout before a step, and the checkpoint of step 6 lies inside the second pass of 4 steps.
        (7, {"loss": "kto", "batch_size": 6}),
        # The start's hidden states are kept, and made in other batches they would differ in the last digit.
        (5, {"loss": "radpo2", "gradient_accumulation": 2, "batch_size": 4}),
    ],
)
def test_losses(
    tiny_llama: Path,
    tmp_path: Path,
    data: Path,
    make_config: Any,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    stage: dict[str, Any],
) -> None:
    stages = [{"data": data, "max_steps": 9, "stop_margin": 1e3} | stage]
    config = make_config(tiny_llama, tmp_path / "killed", stages, lora=DROPOUT, save_steps=3)
    with monkeypatch.context() as patched, pytest.raises(Stop):
        stop_after(patched, step)
        align(config)
    assert not (config.out / "a").exists()
    calls: list[int] = []
    with monkeypatch.context() as patched:
        real = scoring.reference_states
        patched.setattr(scoring, "reference_states", lambda *inputs: (calls.append(1), real(*inputs))[1])
        align(config)
    # All pairs were seen before the checkpoint, and what the start gave for them is kept.
    assert not calls
    whole = elsewhere(config, tmp_path / "whole").model_copy(update={"save_steps": 0})
    align(whole)
    assert contents(config.out / "a") == contents(whole.out / "a")


def test_checkpoint_that_is_not_used(
    tiny_llama: Path,
    tmp_path: Path,
    data: Path,
    make_config: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of other settings, or without the marker that is written last."""
    out = tmp_path / "out"
    config = make_config(tiny_llama, out, [{"data": data, "max_steps": 5}], save_steps=2)
    with monkeypatch.context() as patched, pytest.raises(Stop):
        stop_after(patched, 3)
        align(config)
    place = out / ".a.checkpoints"
    shutil.copytree(place, tmp_path / "kept")
    other = make_config(tiny_llama, out, [{"data": data, "max_steps": 5, "beta": 0.2}], save_steps=2)
    align(other)
    assert not place.exists()
    shutil.rmtree(out / "a")
    shutil.copytree(tmp_path / "kept", place)
    (place / "checkpoint-2" / "progress.json").unlink()
    align(config)
    assert "goes on" not in capsys.readouterr().err
    assert len((out / "a" / "metrics.jsonl").read_text().splitlines()) == 5


def test_two_at_once(tiny_llama: Path, tmp_path: Path, data: Path, make_config: Any) -> None:
    import fcntl
    import os

    place = tmp_path / "out" / ".a.checkpoints"
    place.mkdir(parents=True)
    descriptor = os.open(place, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(InputError, match="another process trains this stage"):
        align(make_config(tiny_llama, tmp_path / "out", [{"data": data}]))
    os.close(descriptor)
    assert place.exists()


def test_batch_that_has_no_loss_is_kept(
    tiny_llama: Path, tmp_path: Path, rows: Any, write_rows: Any, make_config: Any
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", rows(8))
    # Scores of attention overflow once the first step has moved B away from 0.
    stage = {"data": data, "learning_rate": 1.0}
    config = make_config(tiny_llama, tmp_path / "out", [stage], lora={"r": 4, "alpha": 4e19}, save_steps=1)
    place = tmp_path / "out" / "a.nonfinite"
    for _ in range(2):  # the second time there is one already
        with pytest.raises(InputError, match=f"step 2: the loss is not finite for rows 1, .* the batch is in {place}"):
            align(config)
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.nonfinite"]
    lines = [json.loads(line) for line in (place / "batch.jsonl").read_text().splitlines()]
    assert sorted(line["row"] for line in lines) == list(range(1, 9))
    written = [json.loads(line) for line in Path(data).read_text().splitlines()]
    for line in lines:
        row = written[line["row"] - 1]
        assert line["loss"] is None
        assert row["prompt"] in line["prompt"]
        assert line["prompt"].endswith("<|assistant|>")
        assert line["answers"] == [row["chosen"] + "</s>", row["rejected"] + "</s>"]
    assert len((place / "metrics.jsonl").read_text().splitlines()) == 1
    record = json.loads((place / "psacpo.json").read_text())
    assert (record["kind"], record["stage"], record["step"]) == ("nonfinite", "a", 2)
    assert record["config"]["lora"]["alpha"] == 4e19
