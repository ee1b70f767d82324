"""FSDP2 by recipes/accelerate/fsdp2.yaml, on two processes over gloo: as one process, killed and gone on with too."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from psacpo.align import align

RECIPE = Path(__file__).parents[2] / "recipes" / "accelerate" / "fsdp2.yaml"
# Becomes two processes, with what `accelerate launch` puts into the environment; twice, the first time to be killed.
# accelerate takes FSDP up for accelerators alone, so its state is told here; fully_shard itself runs on CPUs.
SCRIPT = """
import json, os, signal, sys
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.tensor import DTensor
from psacpo.align import AlignConfig, align
import psacpo.align.stages
from psacpo.align.trainer import PairTrainer

recipe, config = sys.argv[1], AlignConfig.model_validate(json.loads(sys.argv[2]))
command = ["--config_file", recipe, "--num_processes", "2", "--cpu", "-m", "psacpo", "align", "recipe.yaml"]
options, _, _ = _validate_launch_command(launch_command_parser().parse_args(command))
environment = {k: v for k, v in prepare_multi_gpu_env(options).items() if k.startswith(("ACCELERATE_", "FSDP_"))}
os.environ |= environment | {"ACCELERATE_USE_CPU": "true"}
torch.set_num_threads(1)

def init(self, *args, fsdp_plugin=None, real=AcceleratorState.__init__, **kwargs):
    real(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU and fsdp_plugin is not None:
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin
AcceleratorState.__init__ = init

def begin(self, real=PairTrainer.begin):
    parameters = list(self.model_wrapped.parameters())
    whole = sum(one.numel() for one in parameters)
    here = sum(one.to_local().numel() for one in parameters if isinstance(one, DTensor))
    assert self.accelerator.is_fsdp2 and here < 0.51 * whole, (here, whole)
    real(self)
PairTrainer.begin = begin

def write(self, model, trial, step, real=PairTrainer._write_checkpoint):
    real(self, model, trial, step)
    if os.environ["KILLED"] == f"{self.stage.name} {step}":
        self.accelerator.wait_for_everyone()
        os.kill(os.getpid(), signal.SIGKILL)
PairTrainer._write_checkpoint = write

def both(killed, port):
    children = []
    for rank in "01":
        child = os.fork()
        if child:
            children.append(child)
            continue
        os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "KILLED": killed, "MASTER_PORT": port}
        align(config)
        sys.exit()
    return [os.waitpid(child, 0)[1] for child in children]

assert both("b 2", sys.argv[3]) == [signal.SIGKILL] * 2
assert both("", sys.argv[4]) == [0, 0]
"""


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    places = [socket.socket() for _ in range(count)]
    for place in places:
        place.bind(("127.0.0.1", 0))
    found: list[int] = [place.getsockname()[1] for place in places]
    for place in places:
        place.close()
    return found


@pytest.mark.slow
def test_fsdp2(tiny_llama: Path, tmp_path: Path, rows: Any, write_rows: Any, make_config: Any, metrics: Any) -> None:
    """DPO and then RSA on it, which needs its start at every step; batches of 2 x 4 against batches of 8."""
    data = write_rows(tmp_path / "rows.jsonl", rows(24))
    kinds: list[dict[str, Any]] = [{"max_steps": 2}, {"loss": "radpo2", "max_steps": 3}]
    configs = {
        name: make_config(
            tiny_llama, tmp_path / name, [{"data": data, "batch_size": size} | kind for kind in kinds], save_steps=2
        )
        for name, size in (("one", 8), ("two", 4))
    }
    ports = map(str, free_ports(2))
    command = [sys.executable, "-c", SCRIPT, str(RECIPE), configs["two"].model_dump_json(by_alias=True), *ports]
    shared = os.environ | {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
    }
    with subprocess.Popen(command, env=shared, stderr=subprocess.PIPE, text=True) as running:
        align(configs["one"])
        _, said = running.communicate(timeout=240)
    assert running.returncode == 0, said[-3000:]
    assert said.count("b: goes on after step 2") == 1
    for name in ("a", "b"):
        for one, two in zip(*(metrics(tmp_path / place / name) for place in ("one", "two")), strict=True):
            assert two == pytest.approx(one, rel=2e-3, abs=1e-4), name
        one, two = (load_file(tmp_path / place / name / "adapter_model.safetensors") for place in ("one", "two"))
        assert one.keys() == two.keys()
        # Adam's first steps are of the learning rate, whatever the gradient: where that is nearly nothing, noise decides.
        assert max(float((one[key] - two[key]).abs().max()) for key in one) < 2e-3
