"""vLLM as the writer of a guard's replies: greedy tokens, and of each step the likeliest tokens' probabilities."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch

from psacpo.errors import InputError
from psacpo.evalharness.engines.vllm_start import one_line
from psacpo.evalharness.judges.guard_replies import PLAUSIBLE, Reply
from psacpo.evalharness.judges.pooling import start_vllm
from psacpo.files import digest

# Harm and refusal are often asked of the same guard, and a GPU has room for one vLLM: started once, while any holds it.
_RUNNING: WeakValueDictionary[str, Writing] = WeakValueDictionary()


class Writing:
    """One running vLLM that writes."""

    def __init__(self, path: Path, *, dtype: str, max_model_len: int, extra: Mapping[str, Any]) -> None:
        self.engine, self.eager = start_vllm(path, dtype=dtype, max_model_len=max_model_len, extra=extra)
        self._count = 0

    def replies(
        self, rows: Sequence[Sequence[int]], label_ids: Sequence[int], ends: Collection[int], steps: int
    ) -> list[Reply]:
        """Greedy replies; a label token that is not among the `PLAUSIBLE` likeliest of a step has no probability there.

        Args:
            rows: Ids that the guard reads.
            label_ids: The tokens whose probabilities are wanted.
            ends: Tokens that end a reply.
            steps: Most tokens of a reply.
        """
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        names = []
        for row in rows:
            self._count += 1
            names.append(f"guard-{self._count}")
            sampling = SamplingParams(
                temperature=0.0,
                max_tokens=steps,
                stop_token_ids=sorted(ends),
                logprobs=PLAUSIBLE,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            self.engine.add_request(names[-1], TokensPrompt(prompt_token_ids=list(row)), sampling)
        found: dict[str, Reply] = {}
        try:
            while self.engine.has_unfinished_requests():
                for output in self._step():
                    if output.finished:
                        found[output.request_id] = _reply(output.outputs[0], label_ids, ends)
        except Exception as error:  # whatever ends vLLM's loop
            raise InputError(f"vLLM stopped: {one_line(error)}", allowed="engine: transformers") from error
        return [found[name] for name in names]

    def _step(self) -> list[Any]:
        from torch.compiler import set_stance

        # vLLM compiles a helper of its log-probabilities even in eager mode: minutes of C++ on a small machine.
        with set_stance("force_eager") if self.eager else contextlib.nullcontext():
            found: list[Any] = self.engine.step()
        return found


def writing(path: Path, files: str, dtype: str, max_model_len: int, extra: Mapping[str, Any]) -> Writing:
    """The running vLLM of a guard's weights, started if no judge holds one.

    Args:
        files: Digest of the weights.
    """
    key = digest([files, dtype, max_model_len, dict(extra)])
    found = _RUNNING.get(key)
    if found is None:
        found = _RUNNING[key] = Writing(path, dtype=dtype, max_model_len=max_model_len, extra=extra)
    return found


def _reply(output: Any, label_ids: Sequence[int], ends: Collection[int]) -> Reply:
    ids = list(output.token_ids)
    said = torch.full((len(ids), len(label_ids)), -torch.inf)
    for step, entries in enumerate(output.logprobs):
        # The token that was written comes on top of them where it is not one of them.
        likely = {token: entry.logprob for token, entry in entries.items() if entry.rank <= PLAUSIBLE}
        for column, token in enumerate(label_ids):
            said[step, column] = likely.get(token, -torch.inf)
    end = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    return Reply(ids[:end], said, said.isfinite())
