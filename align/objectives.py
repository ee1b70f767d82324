"""What one step of a stage asks of its policy, by the kind of loss: pairs, pairs with risks, or labelled answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from psacpo.align.examples import Example, Labelled, Pair, labelled, mismatched, require_margins
from psacpo.align.layout import Batch
from psacpo.align.losses import LOSSES, AnswerTerms, Loss, Options, PairTerms, kl_baseline
from psacpo.align.scoring import Scorer
from psacpo.align.stage_config import Stage
from psacpo.errors import InputError


@dataclass(frozen=True, slots=True)
class Found:
    """What an objective finds for B examples.

    Attributes:
        losses: The sum of each example's losses, differentiable. Shape (B,).
        measured: What `metrics.jsonl` shows the means of: one-dimensional, detached, of any length.
    """

    losses: Tensor
    measured: dict[str, Tensor]


class Pairwise:
    """Losses of pairs by their log-ratios alone."""

    def __init__(self, pairs: Sequence[Any], stage: Stage, beta: float, seed: int) -> None:
        """
        Args:
            pairs: What the stage trains on.
            beta: The stage's KL weight.
            seed: Of whatever is drawn.
        """
        self.stage = stage
        self.options = options_of(stage, beta)
        self.loss: Loss = LOSSES[stage.loss]
        self.pairs: list[Pair] = list(pairs)
        # What the scorer is to know: the stage's examples first.
        self.examples: Sequence[Example] = self.pairs

    def begin(self, scorer: Scorer) -> None:
        """Take the scorer, once it has looked at the model."""
        self.scorer = scorer
        self.margins = torch.tensor([pair.margin for pair in self.pairs], device=scorer.reference.device)
        lengths = [[len(answer) for answer in pair.answers] for pair in self.pairs]
        self.lengths = torch.tensor(lengths, device=scorer.reference.device).T

    def count(self, indices: Sequence[int]) -> int:
        """How many losses these examples have."""
        return len(indices)

    def referred(self, dealt: Sequence[Sequence[int]]) -> list[list[int]]:
        """The batches whose reference log-probabilities a step on `dealt` needs."""
        return [list(part) for part in dealt]

    def prepare(self, model: Any, dealt: Sequence[Sequence[int]]) -> None:
        """Do what a whole step needs before its first batch. Called by all processes together."""

    def __call__(self, model: Any, batch: Batch) -> Found:
        """Losses and measurements of one batch."""
        index = batch["index"]
        chosen, rejected = self.scorer.log_probs(model, batch)
        reference_chosen, reference_rejected = self.scorer.reference[:, index]
        return self.found(index, chosen - reference_chosen, rejected - reference_rejected)

    def found(self, index: Tensor, chosen: Tensor, rejected: Tensor, risks: Tensor | None = None) -> Found:
        assert self.loss.pairs is not None
        terms = PairTerms(chosen, rejected, self.lengths[0, index], self.lengths[1, index], self.margins[index])
        if risks is not None:
            terms = terms._replace(chosen_risk=risks[0], rejected_risk=risks[1])
        losses = self.loss.pairs(terms, self.options)
        chosen, rejected = chosen.detach(), rejected.detach()
        # In nats: by how much the policy moved towards the chosen answer, seen from the reference.
        margins = chosen - rejected
        measured = {"loss": losses.detach(), "margin": margins, "accuracy": (margins > 0).float()}
        return Found(losses, measured | {"chosen_logratio": chosen, "rejected_logratio": rejected})

    def record(self, means: dict[str, float]) -> dict[str, float | None]:
        """The means of a step as `metrics.jsonl` has them."""
        return dict(means)


class Risky(Pairwise):
    """Losses of pairs that see the risk of the policy's drift at every token."""

    def begin(self, scorer: Scorer) -> None:
        super().begin(scorer)
        if scorer.start.passing:
            raise InputError(
                f"stage '{self.stage.name}': {self.stage.loss} needs its start at every step, which ZeRO-3 and FSDP1 "
                "keep only where that is the base",
                allowed="start base, FSDP2, ZeRO-2, data-parallel training, or another loss",
            )
        assert self.loss.slopes is not None
        self.slopes = torch.tensor(self.loss.slopes(self.options), device=scorer.reference.device)
        # "any" measure is the one in the settings.
        own = self.loss.risk in (None, "any")
        self.risk = self.stage.risk if own else str(self.loss.risk)
        self.level = self.stage.risk_level if own else None

    def referred(self, dealt: Sequence[Sequence[int]]) -> list[list[int]]:
        # The reference's whole distributions are needed, so its log-probabilities come with them.
        return []

    def __call__(self, model: Any, batch: Batch) -> Found:
        index = batch["index"]
        drift = self.scorer.risks(model, batch, self.risk, self.level, self.slopes, per_token=self.stage.risk_per_token)
        chosen, rejected = drift.log_probs - drift.reference
        found = self.found(index, chosen, rejected, drift.risks)
        weight = self.options.alpha if self.stage.loss in ("tdpo2", "radpo2") else 1.0
        measured = {
            "kl": drift.divergences.flatten(),
            "chosen_risk": drift.risks[0],
            "rejected_risk": drift.risks[1],
            # As it enters beside the margin.
            "risk": weight * (drift.risks[1] - drift.risks[0]),
        }
        return Found(found.losses, found.measured | {name: value.detach() for name, value in measured.items()})


class Labels(Pairwise):
    """Losses of single answers, desirable or not, against a baseline of the whole step."""

    def __init__(self, pairs: Sequence[Any], stage: Stage, beta: float, seed: int) -> None:
        super().__init__([], stage, beta, seed)
        self.own: list[Labelled] = [labelled(pair) for pair in pairs]
        self.examples = [*self.own, *mismatched(self.own, seed)]
        self.baseline = torch.zeros(())

    def begin(self, scorer: Scorer) -> None:
        self.scorer = scorer
        most = len(scorer.reference)
        labels = [[*one.desirable, *[False] * (most - len(one.desirable))] for one in self.own]
        answered = [[slot < len(one.answers) for slot in range(most)] for one in self.own]
        self.desirable = torch.tensor(labels, device=scorer.reference.device).T
        self.answered = torch.tensor(answered, device=scorer.reference.device).T

    def count(self, indices: Sequence[int]) -> int:
        return sum(len(self.own[index].answers) for index in indices)

    def referred(self, dealt: Sequence[Sequence[int]]) -> list[list[int]]:
        return [*map(list, dealt), *self._behind(dealt)]

    def _behind(self, dealt: Sequence[Sequence[int]]) -> list[list[int]]:
        """The same prompts with answers that are not theirs."""
        return [[index + len(self.own) for index in part] for part in dealt]

    @torch.no_grad()
    def prepare(self, model: Any, dealt: Sequence[Sequence[int]]) -> None:
        scorer = self.scorer
        total = torch.zeros(2, device=scorer.reference.device)
        parts = self._behind(dealt)
        if scorer.independent:
            parts = scorer.split(scorer.deal([index for part in parts for index in part], [sum(map(len, parts))])[0])
        model.train()
        for part in parts:
            batch = scorer.batch(part)
            with scorer.accelerator.autocast():
                log_probs = scorer.log_probs(model, batch)
            ratios = log_probs - scorer.reference[:, batch["index"]]
            total += torch.stack([ratios.sum(), batch["answered"].sum().float()])
        summed, count = scorer.accelerator.reduce(total, "sum")
        self.baseline = kl_baseline(summed / count)

    def __call__(self, model: Any, batch: Batch) -> Found:
        assert self.loss.answers is not None
        index = batch["index"]
        answered, desirable = self.answered[:, index], self.desirable[:, index]
        ratios = self.scorer.log_probs(model, batch) - self.scorer.reference[:, index]
        losses = self.loss.answers(AnswerTerms(ratios, desirable, self.baseline), self.options) * answered
        found = ratios.detach()
        right = torch.where(desirable, found > self.baseline, found < self.baseline)
        measured = {
            "loss": losses.detach()[answered],
            "accuracy": right[answered].float(),
            "chosen_logratio": found[answered & desirable],
            "rejected_logratio": found[answered & ~desirable],
            "kl": self.baseline[None],
        }
        return Found(losses.sum(dim=0), measured)

    def record(self, means: dict[str, float]) -> dict[str, float | None]:
        shown: dict[str, float | None] = {name: None if math.isnan(mean) else mean for name, mean in means.items()}
        chosen, rejected = shown["chosen_logratio"], shown["rejected_logratio"]
        margin = None if chosen is None or rejected is None else chosen - rejected
        return {"loss": shown.pop("loss"), "margin": margin} | shown


def options_of(stage: Stage, beta: float) -> Options:
    """The stage's numbers for its loss."""
    names = [field.name for field in fields(Options) if field.name != "beta"]
    return Options(beta, **{name: getattr(stage, name) for name in names})


def objective_of(pairs: Sequence[Pair | Labelled], stage: Stage, beta: float, seed: int) -> Pairwise:
    """What the stage asks of its policy.

    Raises:
        InputError: The loss cannot learn from these rows.
    """
    loss = LOSSES[stage.loss]
    if loss.answers is not None:
        return Labels(pairs, stage, beta, seed)
    if any(isinstance(pair, Labelled) for pair in pairs):
        raise InputError(
            f"stage '{stage.name}': {stage.loss} learns from pairs, and the rows are single answers with a label",
            allowed="rows with chosen and rejected answers, or loss kto",
        )
    require_margins(stage.name, stage.loss, [pair for pair in pairs if isinstance(pair, Pair)])
    return (Pairwise if loss.risk is None else Risky)(pairs, stage, beta, seed)
