"""What the tests against vLLM's real server share."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

# One process less, one thread, a small cache: what makes vLLM start quickly on a CPU.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


@pytest.fixture(scope="session")
def vllm_environment() -> dict[str, str]:
    """Environment of a vLLM on the CPU. Skips where there is no vLLM; where it is required, fails."""
    if importlib.util.find_spec("vllm") is None:
        if os.environ.get("PSACPO_REQUIRE_VLLM") == "1":
            pytest.fail("PSACPO_REQUIRE_VLLM=1, but vLLM is not installed")
        pytest.skip("vLLM is not installed")
    return os.environ | ENVIRONMENT


@pytest.fixture(scope="session")
def served_base(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A base whose heads are as wide as vLLM's CPU attention wants them, with the tokenizer of `tiny_llama`."""
    base = tmp_path_factory.mktemp("served") / "base"
    shutil.copytree(tiny_llama, base)
    sizes = json.loads((base / "config.json").read_text())
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=sizes["vocab_size"],
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(base)
    return base
