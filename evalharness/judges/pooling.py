"""vLLM's pooling runner as the scorer of a sequence classifier: raw logits, as transformers gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from psacpo.errors import InputError
from psacpo.evalharness.config import Vllm
from psacpo.evalharness.engines.plan import vllm_device
from psacpo.evalharness.engines.vllm_start import cpu_arguments, one_line, start

PARITY_ROWS = 4
# How far apart two engines' scores may be, of 1 + the score: rounding of a forward pass in that precision.
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}
_MAX_NUM_SEQS = 256


class Pooling:
    """One running vLLM that classifies."""

    def __init__(self, path: Path, *, dtype: str, max_model_len: int, extra: Mapping[str, Any]) -> None:
        self.engine, _ = start_vllm(path, dtype=dtype, max_model_len=max_model_len, extra=extra, runner="pooling")
        self._count = 0

    def scores(self, rows: Sequence[Sequence[int]], label: int) -> list[float]:
        """The raw logit `label` of each row of ids.

        vLLM puts a sigmoid on a classifier of one label unless it is told not to.
        """
        from vllm import PoolingParams
        from vllm.inputs import TokensPrompt

        names = []
        for row in rows:
            self._count += 1
            names.append(str(self._count))
            parameters = PoolingParams(task="classify", use_activation=False)
            self.engine.add_request(names[-1], TokensPrompt(prompt_token_ids=list(row)), parameters)
        found: dict[str, float] = {}
        try:
            while self.engine.has_unfinished_requests():
                for output in self.engine.step():
                    if output.finished:
                        found[output.request_id.partition("-")[0]] = float(output.outputs.data.float()[label])
        except Exception as error:  # whatever ends vLLM's loop
            raise InputError(f"vLLM stopped: {one_line(error)}", allowed="engine: transformers") from error
        return [found[name] for name in names]


def start_vllm(
    path: Path, *, dtype: str, max_model_len: int, extra: Mapping[str, Any], runner: str = "generate"
) -> tuple[Any, bool]:
    """A running vLLM of a judge's weights, and whether it compiles nothing, as on a CPU.

    Args:
        extra: More of vLLM's engine arguments.
        runner: "pooling" for a classifier, "generate" for a guard that writes.
    """
    cpu = vllm_device() == "cpu"
    arguments: dict[str, Any] = {
        "model": str(path),
        "tokenizer": str(path),
        "runner": runner,
        "dtype": dtype,
        "max_model_len": max_model_len,
        "max_num_seqs": _MAX_NUM_SEQS,
        "enforce_eager": cpu,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    if cpu:
        arguments |= cpu_arguments(path, Vllm(), _MAX_NUM_SEQS, max_model_len, single=True)
    return start(arguments | dict(extra), extra), cpu


def require_parity(what: str, dtype: str, expected: Sequence[float], given: Sequence[float]) -> None:
    """Refuse an engine that does not give transformers' scores.

    Raises:
        InputError: A pair is further apart than rounding explains; both scores are named.
    """
    for own, other in zip(expected, given, strict=True):
        if not abs(own - other) <= TOLERANCE[dtype] * (1 + abs(own)):
            raise InputError(
                f"{what}: vLLM scores an answer {other:.6g} that transformers scores {own:.6g} in {dtype}",
                allowed=f"at most {TOLERANCE[dtype]:g} of 1 + the score apart, or engine: transformers",
            )
