"""What runs inside vLLM's workers: the weights of a policy, made tensor by tensor and swapped in. Nothing is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from psacpo.evalharness.engines.whole import read_policy
from psacpo.merge.adapters import Adapter
from psacpo.merge.checkpoints import delta_producer
from psacpo.merge.models import ModelDirectory, read_model
from psacpo.merge.stored import DTYPES


class PolicyWorker:
    """Mixed into vLLM's worker by `worker_extension_cls`; its methods are called by `collective_rpc`."""

    def psacpo_load_policy(self, base: str, adapters: Mapping[str, str], weights: Mapping[str, float]) -> None:
        """Swap in W_base + sum of weighted changes. Each worker keeps its part of every tensor, as when it started.

        Args:
            base: Model directory.
            adapters: Name -> PEFT or model directory.
            weights: Adapter name -> weight; none is the base itself.
        """
        held: dict[str, Adapter] = self.__dict__.setdefault("_psacpo_adapters", {})
        for name in weights:
            if name not in held:
                held[name] = read_policy(Path(adapters[name]), base)
        found = merged_weights(read_model(Path(base)), [held[name] for name in weights], list(weights.values()))
        worker: Any = self
        worker.reload_weights(weights_iterator=found)

    def psacpo_load_checkpoint(self, path: str) -> None:
        """Swap in the weights of a model directory of the base's architecture."""
        worker: Any = self
        worker.reload_weights(weights_iterator=merged_weights(read_model(Path(path)), [], []))

    def psacpo_plain_logits(self) -> None:
        """Take the adapters' part out of the output embedding, where this strategy puts none.

        vLLM looks one adapter up for each request there, and with log-probabilities of a prompt a request has many
        rows: on a CPU it stops, elsewhere it would add one adapter's zeros or another's.
        """
        worker: Any = self
        model = worker.model_runner.get_model()
        wrapped = [name for name, one in model.named_modules() if type(one).__name__ == "LogitsProcessorWithLoRA"]
        for name in wrapped:
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, model.get_submodule(name).base_layer)


def merged_weights(
    model: ModelDirectory, adapters: Sequence[Adapter], weights: Sequence[float]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a base by name, changed as `psacpo merge --as checkpoint` changes it, to the last bit.

    One tensor is in memory at a time.

    Raises:
        InputError: A change finds no weight, or a merged weight is not finite in the base's dtype.
    """
    produce = delta_producer(model, adapters, [weights]) if adapters else None
    for _, entries in model.shards.values():
        for name, entry in entries.items():
            blocks = produce(name, entry) if produce else None
            if blocks is None:
                tensor = model.read(name)
                assert tensor is not None
                yield name, tensor
                continue
            data = bytearray(entry.end - entry.start)
            for offset, (block,) in blocks:
                view = memoryview(block).cast("B")
                data[offset : offset + len(view)] = view
            yield name, torch.frombuffer(data, dtype=DTYPES[entry.dtype]).reshape(entry.shape)
