"""The entry point in `vllm.general_plugins`: vLLM asks the resolver for adapters that it does not know yet."""

from __future__ import annotations

import os
from typing import Any

from psacpo.serve.plan import VARIABLE

NAME = "psacpo"


def register() -> None:
    """Register the resolver in a server that `psacpo serve` started, in each of its processes; nothing in another vLLM."""
    if VARIABLE not in os.environ:
        return
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

    from psacpo.serve.kernels import leave_the_base_alone, leave_the_logits_alone

    leave_the_base_alone()
    leave_the_logits_alone()

    class PolicyResolver(LoRAResolver):  # type: ignore[misc, unused-ignore]
        """Resolves the policies that the gate has let in, and no other name."""

        async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
            from psacpo.serve.gate import Gate

            path = None if Gate.running is None else Gate.running.path(lora_name)
            if path is None:
                return None
            # The server overwrites the id.
            return LoRARequest(lora_name=lora_name, lora_int_id=1, lora_path=str(path))

    LoRAResolverRegistry.register_resolver(NAME, PolicyResolver())
