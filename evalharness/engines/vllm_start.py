"""Starting vLLM and stopping it: its arguments on a CPU, and what it says when it does not start, in one line."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from psacpo.errors import InputError, unknown_name
from psacpo.evalharness.config import Vllm
from psacpo.evalharness.engines.plan import EnginePlan, broken_vllm, require_vllm, vllm_device
from psacpo.hub import load_config

# Engine arguments that decide what is computed, or that this engine sets itself.
_OURS = frozenset(
    ("model", "tokenizer", "enable_lora", "max_lora_rank", "max_loras", "max_cpu_loras", "worker_extension_cls", "seed")
)
_UNSAFE = frozenset(("trust_remote_code", "allowed_local_media_path", "code_revision"))
_MAX_NUM_SEQS = 256
# Tokens of one step on a CPU, where that holds the longest prompt.
_BATCHED_TOKENS = 2048


def engine_arguments(
    base: Path, plan: EnginePlan, settings: Vllm, *, adapters: int, dtype: str, seed: int
) -> dict[str, Any]:
    """What vLLM is started with for a sweep; what nobody says is left to it.

    Args:
        adapters: Different mixtures that the policies are.
    """
    cpu = vllm_device() == "cpu"
    max_num_seqs = settings.max_num_seqs or _MAX_NUM_SEQS
    arguments: dict[str, Any] = {
        "model": str(base),
        "tokenizer": str(base),
        "dtype": settings.dtype or dtype,
        "seed": seed,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "pipeline_parallel_size": settings.pipeline_parallel_size,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "max_model_len": plan.max_model_len,
        "max_num_seqs": max_num_seqs,
        "quantization": settings.quantization,
        "enforce_eager": cpu if settings.enforce_eager is None else settings.enforce_eager,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "worker_extension_cls": f"{__package__}.vllm_worker.PolicyWorker",
    }
    if plan.strategy == "lora" and adapters:
        # vLLM's CPU kernels take -1, "no adapter", as an index from the end: requests of the base that share a batch
        # with adapters get the last slot's (seen in 0.32). One slot more than adapters leaves that one empty: zeros.
        count = adapters + plan.spare + cpu
        arguments |= {
            "enable_lora": True,
            "max_lora_rank": plan.max_lora_rank,
            "max_loras": count,
            "max_cpu_loras": count,
        }
    single = settings.tensor_parallel_size * settings.pipeline_parallel_size == 1
    if cpu:
        arguments |= cpu_arguments(base, settings, max_num_seqs, plan.max_model_len, single)
    return {key: value for key, value in (arguments | settings.extra).items() if value is not None}


def cpu_arguments(
    base: Path, settings: Vllm, max_num_seqs: int, max_model_len: int | None, single: bool
) -> dict[str, Any]:
    """On a CPU: one process where one is enough, and no more memory for keys and values than the answers can fill.

    Left alone vLLM compiles, starts three processes and takes most of the machine's memory.
    """
    # A prompt that is read in parts ends a seeded sweep there: vLLM 0.32 sets back the generator by `set_offset`, which
    # those of a CPU do not have ("CPU Generator does not use offset").
    arguments: dict[str, Any] = {"enable_chunked_prefill": False}
    if max_model_len is not None:
        arguments["max_num_batched_tokens"] = max(_BATCHED_TOKENS, max_model_len, max_num_seqs)
    if single:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        if os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0":
            arguments["distributed_executor_backend"] = "uni"
    if not os.environ.get("VLLM_CPU_KVCACHE_SPACE") and max_model_len is not None:
        config = load_config(base).get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        # Two tensors, four bytes, and room for blocks that are not full.
        token = 2 * config.num_hidden_layers * heads * width * 4
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        arguments["kv_cache_memory_bytes"] = int(
            min(max(token * (max_model_len + 256) * max_num_seqs, 1 << 26), memory / 4)
        )
    return arguments


def start(arguments: Mapping[str, Any], extra: Mapping[str, Any]) -> Any:
    """A running engine, or one line that says why not."""
    for name in ("VLLM_NO_USAGE_STATS", "VLLM_DO_NOT_TRACK"):
        os.environ.setdefault(name, "1")
    # Standard output is for results.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # Before it raises, vLLM writes out every request of the batch.
    logging.getLogger("vllm.logging_utils.dump_input").setLevel(logging.CRITICAL)
    require_vllm()
    for name in extra:
        if name in _OURS | _UNSAFE:
            raise InputError(f"vllm.extra: {name} is not taken from a recipe", allowed="other engine arguments")
    try:
        with warnings.catch_warnings():  # of what its packages will have to rename
            warnings.simplefilter("ignore", FutureWarning)
            from vllm.engine.arg_utils import EngineArgs
            from vllm.v1.engine.llm_engine import LLMEngine
    except Exception as error:
        raise broken_vllm(error) from error
    known = set(EngineArgs.__dataclass_fields__)
    for name in extra:
        if name not in known:
            raise unknown_name("key in vllm.extra", name, known - _OURS - _UNSAFE)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return LLMEngine.from_engine_args(EngineArgs(**arguments))
    except Exception as error:
        raise _start_error(error) from error


def _start_error(error: Exception) -> InputError:
    """Why vLLM did not start, with the setting that mends it where that is known."""
    text = " ".join(str(one) for one in _chain(error))
    if re.search(r"max(imum)? (seq|model)[ _]len|max_model_len|KV cache is needed", text, re.IGNORECASE):
        knob = "a smaller vllm.max_model_len or max_new_tokens, or a larger vllm.gpu_memory_utilization"
    elif re.search(r"out of memory|free memory|available memory|no available memory|kv cache", text, re.IGNORECASE):
        knob = (
            "a free device, another vllm.gpu_memory_utilization, fewer vllm.max_num_seqs, more "
            "vllm.tensor_parallel_size, vllm.quantization; on a CPU VLLM_CPU_KVCACHE_SPACE (GiB)"
        )
    elif "Engine core initialization failed" in text:
        knob = "see the lines above; if memory ran out, vllm.gpu_memory_utilization or vllm.tensor_parallel_size"
    else:
        knob = "other settings under vllm:, or engine transformers"
    return InputError(f"vLLM cannot start: {one_line(error)}", allowed=knob)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def one_line(error: Exception) -> str:
    """What an error says, in one line; validation errors of vLLM's settings say it after a heading."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    if lines and re.match(r"\d+ validation errors? for ", lines[0]) and len(lines) > 2:
        lines = [lines[2] if lines[2].startswith("Value error, ") else f"{lines[1]}: {lines[2]}"]
    told = [line for line in lines if line.startswith("Value error, ")] or lines
    return (told[0] if told else type(error).__name__).removeprefix("Value error, ").partition(" [type=")[0][:300]


def stop(engine: Any) -> None:
    """Shut vLLM down and let go of what it keeps for the process, so that another engine can be started in it."""
    import gc

    from vllm.distributed import cleanup_dist_env_and_memory

    with contextlib.suppress(Exception):
        engine.engine_core.shutdown()
    del engine
    gc.collect()
    cleanup_dist_env_and_memory()
