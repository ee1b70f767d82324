"""vLLM, started once for a whole sweep: policies as stacked adapters side by side, or as weights swapped in one by one."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from psacpo.errors import InputError
from psacpo.evalharness.config import Generation, Vllm
from psacpo.evalharness.engines.answers import answer_text, end_ids, read_generation_config, strip_end
from psacpo.evalharness.engines.base import Completion, Failure, NextTokens, Passage, Policy, Request
from psacpo.evalharness.engines.plan import EnginePlan, vllm_device
from psacpo.evalharness.engines.vllm_start import engine_arguments, one_line, start, stop
from psacpo.hub import load_tokenizer
from psacpo.merge.adapters import Adapter, write_adapter

# Requests that are handed over before the first of them is answered, for each that vLLM works on at once.
_AHEAD = 4
# The most likely tokens that vLLM gives log-probabilities of, unless it is started otherwise.
_TOP = 20

_BASE = Policy("base")

Weights = tuple[tuple[str, float], ...]


class VllmEngine:
    """One running vLLM.

    Attributes:
        batch_size: None: vLLM fills its batches itself, from whatever requests it holds.
        strategy: "lora" or "reload".
    """

    batch_size: int | None = None

    def __init__(
        self,
        engine: Any,
        base: Path,
        adapters: Mapping[str, Adapter],
        policies: Sequence[Policy],
        *,
        strategy: str,
        generation: Generation,
        max_num_seqs: int,
        eager: bool,
        log_probs: bool = False,
    ) -> None:
        self.engine, self.base, self.adapters, self.generation = engine, base, dict(adapters), generation
        self.strategy, self.log_probs = strategy, log_probs
        self.tokenizer = load_tokenizer(base)
        self.end_ids = end_ids(read_generation_config(base), self.tokenizer)
        self._eager, self._plain_logits = eager, False
        self._window = _AHEAD * max_num_seqs
        self._count = 0
        self._loaded: Weights | Path = ()
        self._scratch = tempfile.TemporaryDirectory(prefix="psacpo-adapters-")
        self._lora: dict[Weights, Any] = {}
        if strategy == "lora":
            self._add_adapters(policies)

    @classmethod
    def load(
        cls,
        base: Path,
        adapters: Mapping[str, Adapter],
        policies: Sequence[Policy],
        *,
        plan: EnginePlan,
        settings: Vllm,
        generation: Generation,
        dtype: str,
        seed: int,
        log_probs: bool = False,
    ) -> VllmEngine:
        """Start vLLM with the base's weights; with the lora strategy, hand it the policies.

        Raises:
            InputError: vLLM is not there, cannot start, or cannot load a policy: one line each, with the knob.
        """
        cpu = vllm_device() == "cpu"
        distinct = {_weights(policy) for policy in policies if policy.checkpoint is None} - {()}
        arguments = engine_arguments(base, plan, settings, adapters=len(distinct), dtype=dtype, seed=seed)
        engine = start(arguments, settings.extra)
        try:
            return cls(
                engine,
                base,
                adapters,
                policies,
                strategy=plan.strategy or "reload",
                generation=generation,
                max_num_seqs=arguments.get("max_num_seqs") or 256,
                eager=cpu and bool(arguments.get("enforce_eager")),
                log_probs=log_probs,
            )
        except BaseException:
            stop(engine)
            raise

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion | Failure]:
        """Answers as they finish: of all policies mixed (lora), or of one policy after another (reload)."""
        parameters = self._sampling()
        for part in self._parts(requests):
            for request, output in self._run(part, parameters):
                yield output if isinstance(output, Failure) else self._completion(request, output.outputs[0])

    def next_tokens(self, requests: Sequence[Request]) -> Sequence[Mapping[str, NextTokens]]:
        """Key -> the log-probabilities of the likeliest next tokens."""
        parameters = {"temperature": 0.0, "max_tokens": 1, "logprobs": _TOP, "detokenize": False}
        found: dict[str, NextTokens] = {}
        for part in self._parts(requests):
            for request, output in self._run(part, parameters):
                if isinstance(output, Failure):
                    raise InputError(f"vLLM gave {request.policy.name} no answer to a probe prompt: {output.error}")
                likely = output.outputs[0].logprobs[0]
                found[request.key] = {token: float(entry.logprob) for token, entry in likely.items()}
        return [found]

    def base_log_probs(self, passages: Sequence[Passage]) -> Iterator[tuple[str, float] | Failure]:
        """The base reads each answer but its last token, which it is then made to write: no longer than the answer was."""
        passage_of = {passage.key: passage for passage in passages}
        parameters = {"temperature": 0.0, "max_tokens": 1, "logprobs": 0, "prompt_logprobs": 0, "detokenize": False}
        requests = [Request(one.key, _BASE, one.prompt_ids + one.token_ids[:-1], seed=0) for one in passages]

        def last(request: Request) -> dict[str, Any]:
            return {"allowed_token_ids": [passage_of[request.key].token_ids[-1]]}

        if self._lora and not self._plain_logits:
            self.engine.collective_rpc("psacpo_plain_logits")
            self._plain_logits = True
        for part in self._parts(requests):
            for request, output in self._run(part, parameters, last):
                if isinstance(output, Failure):
                    yield output
                    continue
                passage = passage_of[request.key]
                # Of each token that was read and of the one that was written: before any token was ruled out.
                entries = [*output.prompt_logprobs[len(passage.prompt_ids) :], output.outputs[0].logprobs[0]]
                pairs = zip(entries, passage.token_ids, strict=True)
                yield request.key, math.fsum(float(entry[token].logprob) for entry, token in pairs)

    def close(self) -> None:
        """Stop vLLM and its workers, and remove the adapters that were written for it."""
        engine, self.engine = self.engine, None
        if engine is not None:
            stop(engine)
        self._scratch.cleanup()

    def _add_adapters(self, policies: Iterable[Policy]) -> None:
        """Write each mixture of adapters once and have vLLM load it now, so that what it refuses is known by name."""
        from vllm.lora.request import LoRARequest

        loaded = self._lora
        for policy in policies:
            weights = _weights(policy)
            if not weights or weights in loaded:
                continue
            directory = Path(self._scratch.name) / str(len(loaded) + 1)
            directory.mkdir()
            adapters = [self.adapters[name] for name, _ in weights]
            write_adapter(directory, adapters, [weight for _, weight in weights], base=str(self.base))
            loaded[weights] = LoRARequest(policy.name, len(loaded) + 1, str(directory))
            try:
                accepted = self.engine.add_lora(loaded[weights])
            except Exception as error:
                raise InputError(
                    f"vLLM cannot load {policy.name} as an adapter: {one_line(error)}",
                    allowed="strategy reload, or engine transformers",
                ) from error
            if accepted is False:
                raise InputError(f"vLLM did not take {policy.name} as an adapter", allowed="strategy reload")

    def _parts(self, requests: Sequence[Request]) -> Iterable[Sequence[Request]]:
        """The requests that can run together, once what they run on is in place."""
        if self.strategy == "lora":
            # Those that the engine started with are there; an adaptive sweep adds more.
            self._add_adapters({request.policy.name: request.policy for request in requests}.values())
            yield requests
            return
        groups: dict[Weights | Path, list[Request]] = {}
        for request in requests:
            groups.setdefault(request.policy.checkpoint or _weights(request.policy), []).append(request)
        # What is loaded comes first: it costs nothing.
        for weights in sorted(groups, key=lambda one: one != self._loaded):
            self._load(weights, groups[weights][0].policy)
            yield groups[weights]

    def _load(self, weights: Weights | Path, policy: Policy) -> None:
        """Have the running engine hold a policy's weights."""
        if weights == self._loaded:
            return
        if isinstance(weights, Path):
            method = "psacpo_load_checkpoint"
            arguments: dict[str, Any] = {"path": str(weights.resolve())}
        else:
            method = "psacpo_load_policy"
            paths = {name: str(self.adapters[name].path.resolve()) for name, _ in weights}
            arguments = {"base": str(self.base.resolve()), "adapters": paths, "weights": dict(weights)}
        try:
            self.engine.collective_rpc(method, kwargs=arguments)
            # Keys and values of a prompt that another policy has seen are not this one's.
            self.engine.reset_prefix_cache()
        except Exception as error:
            raise InputError(f"vLLM cannot load the weights of {policy.name}: {one_line(error)}") from error
        self._loaded = weights

    def _sampling(self) -> dict[str, Any]:
        settings = self.generation
        return {
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": settings.top_k,
            "max_tokens": settings.max_new_tokens,
            "stop": settings.stop or None,
            "stop_token_ids": sorted(self.end_ids),
            "logprobs": 0 if settings.logprobs or self.log_probs else None,
            # Text is only needed to find stop strings in; records have it decoded here, as every engine's.
            "detokenize": bool(settings.stop),
        }

    def _run(
        self,
        requests: Sequence[Request],
        parameters: Mapping[str, Any],
        own: Callable[[Request], Mapping[str, Any]] = lambda request: {},
    ) -> Iterator[tuple[Request, Any]]:
        """(request, vLLM's output or why there is none), as they finish; a bounded number is handed over ahead.

        Args:
            parameters: Of all requests' sampling.
            own: More of a request's own.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        waiting, under_way = deque(requests), dict[str, Request]()
        try:
            while waiting or under_way:
                while waiting and len(under_way) < self._window:
                    request = waiting.popleft()
                    self._count += 1
                    name = f"psacpo-{self._count}"
                    sampling = SamplingParams(
                        **parameters,
                        **own(request),
                        seed=request.seed % 2**63,
                        output_kind=RequestOutputKind.FINAL_ONLY,
                    )
                    lora = self._lora.get(_weights(request.policy))
                    prompt = {"prompt_token_ids": list(request.prompt_ids)}
                    try:
                        self.engine.add_request(name, prompt, sampling, lora_request=lora)
                    except ValueError as error:
                        yield request, Failure(request.key, one_line(error))
                        continue
                    under_way[name] = request
                if not under_way:
                    continue
                for output in self._step():
                    if output.finished and output.request_id in under_way:
                        yield under_way.pop(output.request_id), output
        finally:
            if under_way and self.engine is not None:
                with contextlib.suppress(Exception):
                    self.engine.abort_request(list(under_way))

    def _step(self) -> list[Any]:
        from torch.compiler import set_stance

        # vLLM compiles a helper of its log-probabilities even in eager mode: minutes of C++ on a small machine.
        stance = set_stance("force_eager") if self._eager else contextlib.nullcontext()
        try:
            with stance:
                found: list[Any] = self.engine.step()
        except Exception as error:
            raise InputError(
                f"vLLM stopped: {one_line(error)}",
                allowed="the same command again, which keeps what is finished; or engine transformers",
            ) from error
        return found

    def _completion(self, request: Request, output: Any) -> Completion | Failure:
        if output.finish_reason not in ("stop", "length"):
            return Failure(request.key, f"vLLM ended the answer with finish_reason {output.finish_reason}")
        drawn = tuple(output.token_ids)
        token_ids = strip_end(drawn, self.end_ids)
        said: list[float] = []
        if output.logprobs is not None:
            said = [float(entry[token].logprob) for token, entry in zip(drawn, output.logprobs, strict=True)]
        text = answer_text(self.tokenizer, token_ids, self.generation.stop)
        return Completion(
            request.key,
            text,
            token_ids,
            output.finish_reason,
            tuple(said[: len(token_ids)]) if self.generation.logprobs else None,
            math.fsum(said) if self.log_probs else None,
            drawn[-1] if len(token_ids) < len(drawn) else None,
        )


def _weights(policy: Policy) -> Weights:
    return tuple(sorted(policy.adapted.items()))
