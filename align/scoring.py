"""A stage's examples scored by its policy: as which rows, in how many calls, and what the start said of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor

from psacpo.align.drift import answer_risks, plain_head, reference_states
from psacpo.align.examples import Example
from psacpo.align.forward import PLAIN, Route, answer_log_probs
from psacpo.align.layout import LAYOUTS, LENGTHS, Batch, group
from psacpo.align.probe import choose_route, probe_pairs, window_obstacle
from psacpo.align.reference import Start, can_keep
from psacpo.align.token_losses import Head

# What one call of one module costs over forward and backward, in multiply-adds that the device does in that time.
_CALL_COST = {"cpu": 1e6}
_CALL_COST_ELSEWHERE = 3e9
# Where each process calls the model on its own. Elsewhere a call is a collective operation and moves all weights.
_INDEPENDENT = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
# Up to how many bytes the reference's hidden states of all answers are kept; beyond, they are computed every step.
_KEPT_STATES = 1 << 30


class Drift(NamedTuple):
    """What `Scorer.risks` gives of B pairs, each of shape (2, B): chosen, then rejected answers; sums over tokens, in nats.

    Attributes:
        log_probs: Of the policy; its gradient is that of log pi + c risk.
        reference: Log-probabilities under the start.
        risks: The drift, without gradient.
        divergences: KL(start, policy), without gradient.
    """

    log_probs: Tensor
    reference: Tensor
    risks: Tensor
    divergences: Tensor


class Scorer:
    """Asks a policy for the log-probabilities of the answers of examples, which are named by their places in a list.

    K is the largest number of answers of an example: 2 for pairs.

    Attributes:
        route: How the model is asked; the plain way until `begin` has looked at the model.
        reference: Log-probabilities of the first, second and so on answers under the policy as it was at `begin`, NaN
            where not computed yet. Shape (K, number of examples), in nats.
    """

    def __init__(
        self, policy: Any, pairs: Sequence[Example], pad_id: int, accelerator: Accelerator, *, fresh: bool
    ) -> None:
        """
        Args:
            policy: A PEFT model.
            pad_id: The token id that padding holds; it is masked everywhere.
            accelerator: Whose device, autocast and processes the model lives with.
            fresh: Whether the adapter is untrained, so that the reference is the base itself.
        """
        self.policy = policy
        self.base = policy.get_base_model()
        self.pairs = pairs
        self.pad_id = pad_id
        self.accelerator = accelerator
        self.fresh = fresh
        self.independent = accelerator.distributed_type in _INDEPENDENT
        self.call_cost = call_cost(policy, accelerator.device.type)
        self.route = PLAIN
        most = max(len(pair.answers) for pair in pairs)
        self.reference = torch.full((most, len(pairs)), math.nan, device=accelerator.device)
        self.states: dict[int, tuple[Tensor, ...]] = {}
        self.reference_head: Head | None = None

    def begin(self, model: Any, dtype: torch.dtype) -> str:
        """Choose the route and keep the start. To be called once the model is wrapped and placed, before any update.

        Args:
            model: The policy as it is called, in its wrapper.
            dtype: What it computes in.

        Returns:
            Why the route is not the fastest, in one line; "" if it is.

        Raises:
            FloatingPointError: The model gives log-probabilities that are not finite.
        """
        self.model = model
        self.start = Start(self.policy, fresh=self.fresh, keep=can_keep(self.accelerator))
        two = probe_pairs(self.pairs)

        def score(route: Route) -> Tensor:
            with self.accelerator.autocast():
                return answer_log_probs(model, self.base, self._placed(LAYOUTS[route.layout](two, self.pad_id)), route)

        obstacle = window_obstacle(self.base.config.get_text_config(), max(map(len, two)))
        with self.start.active():
            self.route, why = choose_route(score, dtype, obstacle)
        if self.start.passing:
            self.score_all()
        head = self.base.get_output_embeddings()
        if isinstance(head, torch.nn.Linear) and any(parameter.requires_grad for parameter in head.parameters()):
            bias = None if head.bias is None else head.bias.detach().clone()
            self.reference_head = Head(head.weight.detach().clone(), bias)
        return why

    def batch(self, indices: Sequence[int]) -> Batch:
        """The pairs at `indices` as the route's rows, on the device, and `index`."""
        rows = LAYOUTS[self.route.layout]([self.pairs[index] for index in indices], self.pad_id)
        return self._placed(rows | {"index": torch.tensor(indices)})

    def _placed(self, batch: Batch) -> Batch:
        return {name: value.to(self.accelerator.device) for name, value in batch.items()}

    def length(self, index: int) -> int:
        """Tokens that the pair takes up in a batch."""
        return LENGTHS[self.route.layout](self.pairs[index])

    def deal(self, indices: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
        """`indices` as batches of the given sizes with rows of like length, the longest first."""
        order = sorted(indices, key=lambda index: (-self.length(index), index))
        ends = [sum(sizes[: place + 1]) for place in range(len(sizes))]
        return [order[end - size : end] for size, end in zip(sizes, ends, strict=True)]

    def split(self, indices: Sequence[int]) -> list[list[int]]:
        """`indices` in the batches that cost least together; as they are where a call is a collective operation."""
        if not self.independent:
            return [list(indices)]
        parts = group([self.length(index) for index in indices], self.call_cost)
        return [[indices[place] for place in part] for part in parts]

    def log_probs(self, model: Any, batch: Batch) -> Tensor:
        """log pi(answer | prompt) of B examples' answers, 0 where one has none. Shape (K, B), float32, in nats."""
        return self._by_slot(answer_log_probs(model, self.base, batch, self.route), batch)

    def _by_slot(self, tokens: Tensor, batch: Batch) -> Tensor:
        """Sums over tokens (A, L), arranged as (K, B)."""
        sums, answered = tokens.sum(dim=1), batch["answered"]
        if answered.numel() < len(self.reference) * answered.shape[1]:
            rest = answered.new_zeros(len(self.reference) - len(answered), answered.shape[1])
            answered = torch.cat([answered, rest])
        if sums.numel() == answered.numel():
            return sums.view(answered.shape)
        return sums.new_zeros(answered.shape).masked_scatter(answered, sums)

    def risks(
        self, model: Any, batch: Batch, risk: str, level: float | None, slopes: Tensor, *, per_token: bool = False
    ) -> Drift:
        """Log-probabilities and the drift from the start, which is asked in the same batch where it is not kept.

        Args:
            slopes: c of chosen and rejected answers: `token_losses.token_risks_from_hidden`. Shape (2,).
            per_token: Whether an answer's risk is the mean over its tokens.
        """
        states = self.start_states(model, batch)
        c = slopes[:, None].expand(2, len(batch["index"])).flatten()
        weight = torch.ones_like(c)
        if per_token:
            weight = 1 / batch["completion_mask"].sum(dim=1)
            c = c * weight
        found = answer_risks(model, self.base, batch, self.route, states, risk, level, c, self.reference_head)
        risks = found.risks * weight[:, None]
        parts = (found.log_probs, found.reference_log_probs, risks, found.divergences)
        drift = Drift(*(self._by_slot(part, batch) for part in parts))
        self.reference[:, batch["index"]] = drift.reference.to(self.reference.dtype)
        return drift

    def start_states(self, model: Any, batch: Batch) -> Tensor:
        """`drift.reference_states` of a batch under the start, kept where all that the answers need is small."""
        places = batch["index"].tolist()
        lengths = batch["completion_mask"].sum(dim=1).tolist()
        if all(place in self.states for place in places):
            return torch.cat([self.states[place][slot] for slot in range(2) for place in places])
        with self.start.active():
            found = reference_states(model, self.base, batch, self.route)
        if self._keeps(found):
            parts = torch.split(found, lengths)
            for at, place in enumerate(places):
                self.states[place] = parts[at].clone(), parts[len(places) + at].clone()
        return found

    def _keeps(self, states: Tensor) -> bool:
        if plain_head(self.base, self.route) is None or not self.independent:
            return False
        tokens = sum(len(answer) for pair in self.pairs for answer in pair.answers)
        return tokens * states.shape[1] * states.element_size() <= _KEPT_STATES

    def unscored(self, indices: Sequence[int]) -> list[int]:
        """Those of `indices` whose reference is not known."""
        known = self.reference[0].isfinite().tolist()
        return [index for index in indices if not known[index]]

    def score(self, dealt: Sequence[Sequence[int]]) -> None:
        """Fill `reference` for the batches of one step; every process then knows what all have found.

        All processes must call this together, with equally many batches of the same sizes.
        """
        mine = [index for part in dealt for index in part]
        self._score(self.split(self.unscored(mine)) if self.independent else dealt)
        if self.accelerator.num_processes > 1:
            places = torch.tensor(mine, device=self.accelerator.device)
            found = self.accelerator.gather(self.reference[:, places].T.contiguous())
            self.reference[:, self.accelerator.gather(places)] = found.T

    def _score(self, parts: Sequence[Sequence[int]]) -> None:
        with self.start.active():
            for part in parts:
                batch = self.batch(part)
                with self.accelerator.autocast():
                    self.reference[:, batch["index"]] = self.log_probs(self.model, batch)

    def score_all(self, size: int = 8) -> None:
        """Score all pairs, in equally many batches on every process."""
        order = self.deal(range(len(self.pairs)), [len(self.pairs)])[0]
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        # Some twice at the end, so that every batch is full on every process.
        rounds = math.ceil(len(order) / (world * size))
        for first in range(rank * size, rounds * world * size, world * size):
            self.score([[order[place % len(order)] for place in range(first, first + size)]])


def call_cost(policy: Any, device: str) -> float:
    """What one more forward and backward costs, in tokens: the time of its modules' calls over that of a token."""
    modules = sum(1 for module in policy.modules() if next(module.children(), None) is None)
    weights: int = sum(parameter.numel() for parameter in policy.parameters())
    return float(modules * _CALL_COST.get(device, _CALL_COST_ELSEWHERE) / max(weights, 1))
