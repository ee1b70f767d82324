"""Why vLLM did not start: its log in, one line that says what to change out. Pure functions of text."""

from __future__ import annotations

import re
from collections.abc import Callable

from psacpo.evalharness.engines.install import CLEAN

_MEMORY_KNOBS = "a smaller --gpu-memory-utilization, --max-model-len or --max-loras, or a larger --tensor-parallel-size"

# What vLLM (0.22 to 0.32), torch and argparse write -> what to tell. The first that matches anywhere in the log wins,
# so causes stand before what they lead to.
_FAULTS: tuple[tuple[str, Callable[[re.Match[str]], str]], ...] = (
    (
        r"operator torchvision::nms does not exist|Could not load this library: \S*_torchaudio|libtorchcodec",
        lambda m: (
            "the vLLM of this environment cannot be imported beside torchvision, torchaudio or torchcodec built "
            f"for another torch; allowed: {CLEAN}"
        ),
    ),
    (
        r"(?i)address already in use|\[Errno 98\]",
        lambda m: "the port is in use; allowed: another --port, or the program that has it ended",
    ),
    (
        (
            r"(?:Free|Available) memory on (?:device|node) .{1,120} on startup is less than desired .{1,40} utilization "
            r"\((?P<part>[\d.]+), (?P<wanted>[\d.]+) GiB\)"
        ),
        lambda m: (
            f"out of memory at start: {m['wanted']} GiB are wanted (--gpu-memory-utilization {m['part']}) and "
            "not free; allowed: a smaller --gpu-memory-utilization, or other programs on the device ended"
        ),
    ),
    (
        (
            r"max seq len \((?P<length>\d+)\).{1,120}larger than the "
            r"(?:available KV cache|maximum number of tokens)"
        ),
        lambda m: (
            f"out of memory at start: the KV cache does not hold one request of {m['length']} tokens; allowed: a "
            "smaller --max-model-len, or a larger --gpu-memory-utilization"
        ),
    ),
    (
        r"No available memory for the cache blocks",
        lambda m: (
            "out of memory at start: nothing is left for the KV cache; allowed: a larger "
            "--gpu-memory-utilization, a smaller --max-loras, or a larger --tensor-parallel-size"
        ),
    ),
    (
        (
            r"OutOfMemoryError|CUDA out of memory|CUDA error: out of memory|DefaultCPUAllocator: can't allocate|"
            r"not enough memory: you tried to allocate|MemoryError\b|Cannot allocate memory"
        ),
        lambda m: f"out of memory at start; allowed: {_MEMORY_KNOBS}",
    ),
    (
        r"expected target modules in .{1,4000}but received (?P<got>\[.*?\])",
        lambda m: (
            f"vLLM cannot load the adapters: it has no LoRA layer for {_some(m['got'])}; allowed: adapters on "
            "the linear layers, or full weights of one ratio by psacpo merge --as checkpoint"
        ),
    ),
    (
        r"(?P<model>\w+) does not support LoRA yet",
        lambda m: (
            f"vLLM has no LoRA for {m['model']}; allowed: full weights of one ratio by psacpo merge --as "
            "checkpoint, opened in vLLM"
        ),
    ),
    (
        r"LoRA rank (?P<rank>\d+) is greater than max_lora_rank",
        lambda m: f"the adapters have rank {m['rank']}, which is above the engine's limit",
    ),
    (
        r"vLLM does not (?:yet )?support (?P<what>[^.\n]{1,60})\.",
        lambda m: f"vLLM cannot load the adapters: it does not support {m['what']}",
    ),
    (
        r"User-specified max_model_len \((?P<given>\d+)\) is greater than the derived max_model_len \(\w+=(?P<most>\d+)",
        lambda m: f"--max-model-len {m['given']} is longer than the base's context; allowed: up to {m['most']}",
    ),
    (
        r"(?:unrecognized arguments?|Unrecognized argument)s?: (?P<what>.+)",
        lambda m: f"vLLM's server knows no argument {m['what'].strip()[:120]}",
    ),
    (
        r"api_server\.py: error: (?P<what>.+)",
        lambda m: f"vLLM's server refuses its arguments: {m['what'].strip()[:200]}",
    ),
    (
        r"(?:Cannot access gated repo|is a gated repo|401 Client Error)",
        lambda m: (
            "the base is a gated model and no token of an account with access is set; allowed: huggingface-cli "
            "login, or HF_TOKEN"
        ),
    ),
    (
        r"contains custom code which must be executed|pass the argument .?trust_remote_code=True",
        lambda m: "the base brings code of its own; allowed: --trust-remote-code for vLLM, if you trust that code",
    ),
)
_CHATTER = re.compile(r"^.*\b(?:DEBUG|INFO|WARNING) \d\d-\d\d .*$", re.MULTILINE)
_RAISED = re.compile(r"\b(?P<kind>[A-Z]\w*(?:Error|Exception)): (?P<what>.+)")


def explain(log: str, what: str = "vLLM did not start") -> str:
    """One line on why the server whose output is `log` ended; `what` it did begins it, unless it is known."""
    for pattern, line in _FAULTS:
        if found := re.search(pattern, log):
            return line(found)
    # The innermost process raises first; what the ones around it say ("engine core initialization failed") says less.
    # Its warnings name errors that may come one day.
    raised = [m for m in _RAISED.finditer(_CHATTER.sub("", log)) if "initialization failed" not in m["what"]]
    if raised:
        return f"{what}: {raised[0]['kind']}: {raised[0]['what'].strip()[:240]}"
    return what


def _some(listed: str) -> str:
    """The last parts of a list of module names, each once: `lm_head, embed_tokens`."""
    names = dict.fromkeys(re.findall(r"([\w-]+)'", listed))
    return ", ".join(list(names)[:4]) or listed[:80]
