"""What vLLM says when it does not start, as it said it, and the line that a person gets."""

from __future__ import annotations

import pytest

from psacpo.serve.faults import explain

# Excerpts of vLLM 0.32.0's own output, and of torch's and argparse's.
LOGS = {
    "port": (
        (
            'File "launcher.py", line 410, in create_server_socket\n    sock.bind(addr)\n'
            "OSError: [Errno 98] Address already in use\n"
        ),
        "the port is in use; allowed: another --port",
    ),
    "torchvision": (
        "RuntimeError: operator torchvision::nms does not exist\n",
        "allowed: pip uninstall -y torchvision torchaudio torchcodec triton",
    ),
    "gpu memory taken": (
        (
            "ValueError: Free memory on device cuda:0 (3.1/23.57 GiB) on startup is less than desired GPU memory "
            "utilization (0.92, 21.68 GiB). Decrease GPU memory utilization or reduce GPU memory used by other "
            "processes.\nRuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}\n"
        ),
        "out of memory at start: 21.68 GiB are wanted (--gpu-memory-utilization 0.92)",
    ),
    "cpu memory taken": (
        (
            "ValueError: Available memory on node 0 (11.6/23.46 GiB) on startup is less than desired CPU memory "
            "utilization (0.92, 21.58 GiB). On the CPU backend, the `--gpu-memory-utilization` flag controls the fraction "
            "of CPU memory reserved (despite its name).\n"
        ),
        "out of memory at start: 21.58 GiB are wanted (--gpu-memory-utilization 0.92)",
    ),
    "no cache blocks": (
        "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when\n",
        "nothing is left for the KV cache; allowed: a larger --gpu-memory-utilization",
    ),
    "long context": (
        (
            "ValueError: To serve at least one request with the model's max seq len (131072), (16.0 GiB KV cache is "
            "needed, which is larger than the available KV cache memory (3.26 GiB). Based on the available memory, the\n"
        ),
        "does not hold one request of 131072 tokens; allowed: a smaller --max-model-len",
    ),
    "cuda": (
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 224.00 MiB. GPU 0 has a total capacity of\n",
        "out of memory at start; allowed: a smaller --gpu-memory-utilization, --max-model-len or --max-loras",
    ),
    "modules": (
        (
            "ValueError: While loading /x/policy@0.00, expected target modules in {'qkv_proj', 'o_proj'} but received "
            "['model.layers.0.mlp.gate', 'model.layers.1.mlp.gate'] Please verify that the loaded LoRA module is\n"
        ),
        "vLLM cannot load the adapters: it has no LoRA layer for gate; allowed",
    ),
    "architecture": (
        "ValueError: GPT2LMHeadModel does not support LoRA yet.\n",
        "vLLM has no LoRA for GPT2LMHeadModel",
    ),
    "rank": ("ValueError: LoRA rank 24 is greater than max_lora_rank 16.\n", "rank 24, which is above the engine's"),
    "dora": ("ValueError: vLLM does not yet support DoRA.\n", "it does not support DoRA"),
    "context": (
        (
            "  Value error, User-specified max_model_len (4096) is greater than the derived max_model_len "
            "(max_position_embeddings=256 or model_max_length=None in model's config.json). VLLM_ALLOW\n"
        ),
        "--max-model-len 4096 is longer than the base's context; allowed: up to 256",
    ),
    "argument": (
        (
            "usage: api_server.py [-h] [--trust-remote-code | --no-trust-remote-code]\n"
            "api_server.py: error: unrecognized arguments: --frobnicate 3\n"
        ),
        "vLLM's server knows no argument --frobnicate 3",
    ),
    "argument's value": (
        "api_server.py: error: argument --block-size: invalid int value: 'x'\n",
        "refuses its arguments: argument --block-size: invalid int value: 'x'",
    ),
    "custom code": (
        "ValueError: The repository org/m contains custom code which must be executed to correctly load the model.\n",
        "the base brings code of its own",
    ),
    "unknown": (
        (
            "(EngineCore pid=7) KeyError: 'rope_scaling'\nRuntimeError: Engine core initialization failed. See root cause "
            "above. Failed core proc(s): {}\n"
        ),
        "vLLM did not start: KeyError: 'rope_scaling'",
    ),
    "silence": ("", "vLLM did not start"),
}


@pytest.mark.parametrize("name", LOGS)
def test_one_line_that_says_what_to_change(name: str) -> None:
    log, line = LOGS[name]
    # Among what vLLM always writes.
    around = (
        "(APIServer pid=1) INFO [api_utils.py:286] non-default args: {'max_model_len': 256, 'enable_lora': True}\n"
        "(EngineCore pid=2) INFO [core.py:133] Initializing a V1 LLM engine with config: trust_remote_code=False\n"
    )
    told = explain(around + log)
    assert line in told
    assert "\n" not in told


def test_a_server_that_had_started_is_not_said_to_have_failed_at_that() -> None:
    log = "(APIServer pid=1) ERROR vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue.\n"
    assert explain(log, "it stopped") == "it stopped: EngineDeadError: EngineCore encountered an issue."
    warning = (
        "(APIServer pid=1) WARNING 11-21 12:53:20 [system_utils.py:319] Current soft limit is 1024. This can cause fd "
        "limit errors like `OSError: [Errno 24] Too many open files`. Consider increasing with ulimit -n\n"
    )
    assert explain(warning + log, "it stopped").startswith("it stopped: EngineDeadError")
    assert explain("", "it stopped") == "it stopped"
