"""The launcher before it launches: what it checks, and the command and environment that it would start."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from psacpo.errors import InputError
from psacpo.merge import read_adapter
from psacpo.serve import ServeConfig, serve
from psacpo.serve import run as module
from psacpo.serve.cache import Lease, PolicyCache
from psacpo.serve.kernels import without_negative
from psacpo.serve.plan import Plan
from psacpo.serve.policies import Policies, policy_rank
from psacpo.serve.probe import prompt_scores, reachable, require_acting

Prepare = Callable[..., module.Launch]


@pytest.fixture
def settings(two_adapters: tuple[Path, Path], tmp_path: Path) -> dict[str, Any]:
    reward, safety = two_adapters
    return {"reward": reward, "safety": safety, "cache_dir": tmp_path / "cache", "cache_size": 10**8}


@pytest.fixture
def prepared() -> Iterator[Prepare]:
    """`prepare`, whose leases are given back at the end of the test, or with the next call."""
    held: list[Lease] = []

    def prepare(**values: Any) -> module.Launch:
        while held:
            held.pop().close()
        launch = module.prepare(ServeConfig(**values))
        held.extend(launch.leases)
        return launch

    yield prepare
    for lease in held:
        lease.close()


def value(command: list[str], flag: str) -> str:
    return command[command.index(flag) + 1]


def test_the_command_is_vllms_own_server(settings: dict[str, Any], prepared: Prepare, tiny_llama: Path) -> None:
    launch = prepared(**settings, port=8123, engine_args=["--enforce-eager"])
    command = launch.command
    assert command[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    assert value(command, "--model") == str(tiny_llama)
    assert value(command, "--served-model-name") == "base"
    assert (value(command, "--host"), value(command, "--port")) == ("127.0.0.1", "8123")
    assert value(command, "--max-lora-rank") == "16"  # 4 + 6
    assert value(command, "--middleware") == "psacpo.serve.gate.Gate"
    assert "--enforce-eager" in command
    assert "--revision" not in command
    first = command.index("--lora-modules") + 1
    modules = [json.loads(text) for text in command[first : first + 2]]
    assert [one["name"] for one in modules] == ["policy@0.00", "policy@1.00"]
    assert [read_adapter(Path(one["path"])).config["r"] for one in modules] == [4, 6]
    assert launch.acting == ["policy@0.00", "policy@1.00"]
    assert launch.environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert Plan.find(launch.environment) == launch.plan


def test_pins_are_built_ahead_and_nothing_is_resolved_later(settings: dict[str, Any], prepared: Prepare) -> None:
    launch = prepared(**settings, ratios=[0.3])
    first = launch.command.index("--lora-modules") + 1
    assert json.loads(launch.command[first])["name"] == "policy@0.30"
    assert launch.environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "0"
    # One end alone needs its own rank only, and vLLM's cost follows it.
    assert value(prepared(**settings, ratios=[1.0]).command, "--max-lora-rank") == "8"


def test_rank_is_the_largest_of_any_module(two_adapters: tuple[Path, Path]) -> None:
    adapters = [read_adapter(path) for path in two_adapters]
    assert policy_rank(adapters, []) == 10
    assert policy_rank(adapters, [0.0]) == 4
    assert policy_rank(adapters, [0.0, 1.0]) == 6
    assert policy_rank(adapters, [0.0, 0.5]) == 10


def test_the_key_is_in_the_environment_and_not_on_the_command_line(
    settings: dict[str, Any], prepared: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "inherited")
    launch = prepared(**settings, host="0.0.0.0", api_key="s3cret")
    assert "s3cret" not in " ".join(launch.command)
    assert launch.environment["VLLM_API_KEY"] == "s3cret"
    assert "VLLM_API_KEY" not in prepared(**settings).environment


def test_a_cpu_is_not_taken_whole(settings: dict[str, Any], prepared: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    assert 1 <= int(prepared(**settings).environment["VLLM_CPU_KVCACHE_SPACE"]) <= 4  # GiB
    # What was said otherwise is left as it is.
    assert "VLLM_CPU_KVCACHE_SPACE" not in prepared(**settings, gpu_memory_utilization=0.5).environment
    own = prepared(**settings, engine_args=["--kv-cache-memory-bytes", "1000000"])
    assert "VLLM_CPU_KVCACHE_SPACE" not in own.environment
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    assert prepared(**settings).environment["VLLM_CPU_KVCACHE_SPACE"] == "7"


def test_a_list_of_allowed_plugins_gets_ours(
    settings: dict[str, Any], prepared: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert prepared(**settings).environment["VLLM_PLUGINS"] == "other,psacpo"


def test_no_more_is_held_than_the_cache_has_room_for(
    settings: dict[str, Any], prepared: Prepare, capsys: pytest.CaptureFixture[str]
) -> None:
    needed = prepared(**settings).plan.policy_bytes
    launch = prepared(**settings | {"cache_size": 5 * needed + 1})
    assert launch.plan.capacity == 3
    assert "the cache holds 3 policies beside the ends" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"the cache is too small: one policy.*allowed: [\d.]+ MB or more"):
        prepared(**settings | {"cache_size": 3 * needed - 1})
    assert prepared(**settings | {"cache_size": needed + 1}, ratios=[0.3]).plan.capacity == 1


def test_policies_take_no_more_than_was_reckoned(settings: dict[str, Any], prepared: Prepare) -> None:
    plan = prepared(**settings).plan
    lease = Policies(plan, PolicyCache(plan.cache_dir, plan.cache_size)).lease("policy@0.123456789")
    taken = sum(file.stat().st_size for file in lease.path.iterdir())
    assert plan.policy_bytes / 3 < taken <= plan.policy_bytes


def test_adapters_too_large_for_the_engine(
    settings: dict[str, Any], prepared: Prepare, make_adapter: Any, tiny_llama: Path
) -> None:
    large = make_adapter(tiny_llama, seed=9, r=510)
    with pytest.raises(InputError, match="rank 514 together, more than vLLM takes"):
        prepared(**settings | {"safety": large})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_dora": True}, "adapter safety is not plain LoRA: it is DoRA"),
        ({"modules_to_save": ["lm_head"]}, "adapter safety is not plain LoRA: it holds trained values of lm_head"),
        ({"lora_bias": True}, r"adapter safety is not plain LoRA: its B have biases \(lora_bias\)"),
        ({"target_modules": ["q_proj", "lm_head"]}, "adapter safety changes lm_head, to which vLLM puts no adapter"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "changes model.embed_tokens, to which vLLM puts no adapter"),
    ],
)
def test_adapters_that_vllm_would_not_apply_in_full(
    settings: dict[str, Any], make_adapter: Any, tiny_llama: Path, options: dict[str, Any], words: str
) -> None:
    other = make_adapter(tiny_llama, seed=9, **options)
    with pytest.raises(InputError, match=f"{words}.*allowed: .*psacpo merge --as checkpoint"):
        module.prepare(ServeConfig(**settings | {"safety": other}))
    assert not settings["cache_dir"].exists()


def test_adapters_of_another_base(
    settings: dict[str, Any], prepared: Prepare, make_adapter: Any, tiny_qwen2: Path
) -> None:
    other = make_adapter(tiny_qwen2, seed=9)
    with pytest.raises(InputError):
        prepared(**settings | {"safety": other})


def test_a_zero_adapter_is_not_expected_to_act(settings: dict[str, Any], prepared: Prepare, tmp_path: Path) -> None:
    import shutil

    zero = tmp_path / "zero"
    shutil.copytree(settings["reward"], zero)
    tensors = load_file(zero / "adapter_model.safetensors")
    save_file(
        {key: tensor * (0 if "lora_B" in key else 1) for key, tensor in tensors.items()},
        zero / "adapter_model.safetensors",
    )
    launch = prepared(**settings | {"reward": zero})
    assert launch.acting == ["policy@1.00"]


def test_a_port_in_use_is_told_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "require_vllm", lambda: None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"cannot listen on 127.0.0.1 port {port}: .*; allowed: another --port"):
            serve(ServeConfig(reward=tmp_path / "no", safety=tmp_path / "no", port=port))


def test_an_address_of_another_machine() -> None:
    with pytest.raises(InputError, match=r"cannot listen on 192\.0\.2\.123"):
        module.require_free_port("192.0.2.123", 8000)


def test_no_vllm_tells_the_commands_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "installed", lambda name: False)
    monkeypatch.setattr("psacpo.evalharness.engines.install.sys.platform", "linux")
    monkeypatch.setattr("psacpo.evalharness.engines.install.platform.machine", lambda: "x86_64")
    for gpu, command in ((False, "vllm, then .*psacpo in the place of psacpo"), (True, "vllm[]]', then .*; or full")):
        monkeypatch.setattr(module, "has_gpu", lambda gpu=gpu: gpu)
        with pytest.raises(InputError, match=f"^vLLM is not installed; allowed: .*{command}"):
            module.require_vllm()


def test_a_plugin_that_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "installed", lambda name: True)
    monkeypatch.setattr(module, "entry_points", lambda group: [])
    with pytest.raises(InputError, match="cannot find psacpo's plugin.*pip install again"):
        module.require_vllm()


def started(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], script: str) -> Any:
    """`serve` with another program in the place of vLLM's server."""
    monkeypatch.setattr(module, "require_vllm", lambda: None)
    real = module.prepare

    def prepare(config: ServeConfig, *, watch: int | None = None) -> module.Launch:
        launch = real(config, watch=watch)
        command = [sys.executable, "-c", script, str(config.port), str(watch)]
        return module.Launch(command, launch.environment, launch.plan, [], launch.leases)

    monkeypatch.setattr(module, "prepare", prepare)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return ServeConfig(**settings, port=port)


def test_a_server_that_dies_at_start_is_one_line(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import sys; print('Traceback (most recent call last):'); sys.exit('torch.OutOfMemoryError: CUDA out of')"
    with pytest.raises(InputError, match="out of memory at start; allowed: .*exit code 1, its log is ") as caught:
        serve(started(monkeypatch, settings, script))
    log = Path(str(caught.value).rpartition(" ")[2])
    assert "Traceback" in log.read_text()
    assert oct(log.stat().st_mode & 0o777) == "0o600"
    log.unlink()


HEALTHY = """
import http.server, os, signal, subprocess, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
        if self.path == "/end": os._exit(7)
engine = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
open(os.environ["PIDS"], "w").write(f"{os.getpid()} {engine.pid}")
server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
server.serve_forever()
"""


# vLLM ends with 0 once its engine has died; whoever watches over the server has to see a failure.
@pytest.mark.parametrize(("ends", "code"), [(7, 7), (0, 1)])
def test_a_server_that_ends_by_itself_leaves_no_process(
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    ends: int,
    code: int,
) -> None:
    import threading
    import urllib.request

    pids = tmp_path / "pids"
    monkeypatch.setenv("PIDS", str(pids))
    config = started(monkeypatch, settings, HEALTHY.replace("_exit(7)", f"_exit({ends})"))

    def end() -> None:
        import time

        for _ in range(600):
            time.sleep(0.1)
            if "serving at" in capsys.readouterr().err:
                break
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{config.port}/end", timeout=5).read()

    killer = threading.Thread(target=end)
    killer.start()
    assert serve(config) == code
    killer.join()
    assert f"vLLM ended by itself, exit code {ends}: " in capsys.readouterr().err
    for pid in pids.read_text().split():
        listed = subprocess.run(["ps", "-o", "stat=", "-p", pid], capture_output=True, text=True, check=False)
        assert listed.stdout.strip() in ("", "Z"), f"process {pid} is left"


def test_policies_that_answer_as_the_base_are_refused() -> None:
    base = [-1.0, -2.5]
    require_acting(base, {"policy@0.00": [-1.0, -2.6], "policy@1.00": [-0.9, -2.5]})
    with pytest.raises(InputError, match=r"policy@1.00 answers exactly as the base: vLLM loads the adapter"):
        require_acting(base, {"policy@0.00": [-1.0, -2.6], "policy@1.00": [-1.0, -2.5]})
    with pytest.raises(InputError, match="no proper log-probabilities"):
        require_acting(base, {"policy@0.00": [float("nan"), -2.5]})


def test_scores_of_a_prompt() -> None:
    listed = [None, {"7": {"logprob": -0.5, "rank": 1}}, {"9": {"logprob": -2.0, "rank": 3}}]
    assert prompt_scores(listed) == [-0.5, -2.0]
    assert [reachable(host) for host in ("0.0.0.0", "::", "10.1.2.3")] == ["127.0.0.1", "::1", "10.1.2.3"]


def test_kernels_take_a_negative_index_for_no_adapter() -> None:
    """-1 means no adapter, and in Python the last one: the row must come out as it went in."""
    weights = torch.arange(24.0).reshape(2, 4, 3) + 1  # [slots, outputs, rank]

    def expand(inputs: torch.Tensor, weights: torch.Tensor, output: torch.Tensor, indices: torch.Tensor) -> None:
        output += torch.einsum("bi,boi->bo", inputs, weights[indices])

    before = torch.randn(3, 4)
    after, inputs = before.clone(), torch.ones(3, 3)
    without_negative(expand)(inputs, weights, after, torch.tensor([0, -1, 1]))
    assert torch.equal(after[1], before[1])
    torch.testing.assert_close(after[0] - before[0], weights[0].sum(1))
    torch.testing.assert_close(after[2] - before[2], weights[1].sum(1))
    assert torch.equal(inputs, torch.ones(3, 3))
