"""Any number of LoRA adapters on one base, with a weight of its own for each row of a batch; nothing is merged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from psacpo.errors import InputError
from psacpo.merge.adapters import Adapter, require_plain


class AdapterMixture:
    """Adds sum_i w[row, i] * s_i * B_i A_i x to the output of each adapted linear layer of a model.

    This is exactly the forward pass of the merged policy W_base + sum_i w_i s_i B_i A_i, for many w in one batch.
    The factors of all adapters are stacked once per layer, so a layer costs two thin products whatever their number.
    """

    def __init__(self, model: nn.Module, adapters: Mapping[str, Adapter]) -> None:
        require_plain(adapters)
        self.names = list(adapters)
        self._weights: Tensor | None = None
        modules: dict[str, nn.Module] = dict(model.named_modules())
        for path in sorted({path for adapter in adapters.values() for path in adapter.modules}):
            module = modules.get(path)
            if not isinstance(module, nn.Linear):
                kind = "no such layer" if module is None else type(module).__name__
                raise InputError(
                    f"the adapters change '{path}', which the base cannot mix ({kind})", allowed="linear layers"
                )
            self._attach(module, path, [adapters[name] for name in self.names])

    def _attach(self, module: nn.Linear, path: str, adapters: Sequence[Adapter]) -> None:
        downs, ups, owners = [], [], []
        for index, adapter in enumerate(adapters):
            factors = adapter.modules.get(path)
            if factors is None:
                continue
            rank = factors.A.shape[0]
            if factors.A.shape[1] != module.in_features or factors.B.shape[0] != module.out_features:
                raise InputError(
                    f"{adapter.path}: '{path}' has shape {factors.B.shape[0]}x{factors.A.shape[1]}, "
                    f"the base's is {module.out_features}x{module.in_features}: an adapter for another base"
                )
            downs.append(factors.A.float())
            ups.append(factors.B.float() * factors.scale)
            owners += [index] * rank
        place = module.weight.device
        down = torch.cat(downs, dim=0).to(place)  # [R, in]
        up = torch.cat(ups, dim=1).to(place)  # [out, R]
        owner = torch.tensor(owners, device=place)  # [R]: whose weight each rank carries

        def add_delta(_module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if self._weights is None:
                return None
            mixed = nn.functional.linear(inputs[0].float(), down) * self._weights[:, None, owner]
            return output + nn.functional.linear(mixed, up).to(output.dtype)

        module.register_forward_hook(add_delta)

    def set_rows(self, weights: Tensor | None) -> None:
        """Weights [rows, adapters] of the batch to come; None is the base alone."""
        self._weights = weights
