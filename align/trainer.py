"""The training loop of one stage: a Hugging Face Trainer that scores pairs, keeps one line a step, and knows its end.

What a step is comes from the settings alone: its pairs, and the mean of their losses. How they are computed does not
change it: the step's pairs are dealt anew by length into its batches, and each batch is split where that saves work.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from psacpo import console
from psacpo.align.config import Stage
from psacpo.align.forward import Route
from psacpo.align.losses import all_finite, smoothed
from psacpo.align.objectives import Pairwise, objective_of
from psacpo.align.pairs import Labelled, Pair
from psacpo.align.scoring import Scorer
from psacpo.errors import InputError

Metrics = dict[str, float | int | None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a stage went.

    Attributes:
        metrics: One record an optimiser step, each taken before that step's update.
        stopped_by: "max_steps", "epochs" or "stop_margin".
        state: The full state dict of the policy, on the main process.
        route: How the model was asked.
        scored: Pairs whose reference was computed.
    """

    metrics: list[Metrics]
    stopped_by: str
    state: dict[str, Tensor]
    route: Route
    scored: int


class PairTrainer(Trainer):
    """Trains a policy on pairs against the policy that it is when training begins.

    The reference log-probabilities are those of the model at the start, in evaluation mode, computed once for each
    pair when a step first holds it: a stage that ends early pays for no others. Every forward goes through the wrapped
    model, so data-parallel and sharded training work as in `transformers`. The loss of a step is the mean over all its
    pairs, on all processes and accumulated batches.
    """

    # `compute_loss` divides by the pairs of the whole step itself, so that uneven last batches weigh right.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        policy: Any,
        arguments: TrainingArguments,
        pairs: list[Pair] | list[Labelled],
        stage: Stage,
        *,
        beta: float,
        fresh: bool,
        pad_id: int,
    ) -> None:
        """
        Args:
            policy: A PEFT model as `model.load_policy` gives it.
            arguments: With `max_steps` set; every step must be logged.
            fresh: Whether the adapter is untrained, so that the reference is the base itself.
            pad_id: The token id that padding holds; it is masked everywhere.

        Raises:
            InputError: The stage's loss cannot learn from such rows.
        """
        self.pairs = pairs
        self.stage = stage
        self.objective: Pairwise = objective_of(pairs, stage, beta, arguments.data_seed or arguments.seed)
        super().__init__(
            model=policy,
            args=arguments,
            train_dataset=range(len(pairs)),
            # The loader deals out numbers; rows are made when it is known which stand together.
            data_collator=lambda indices: {"index": torch.tensor(indices)},
            callbacks=[_Beginning(self)],
        )
        self.remove_callback(PrinterCallback)
        # Releases before 5.19 read this in the place of `loss_is_scaled_for_ga`.
        self.model_accepts_loss_kwargs = True
        self.scorer = Scorer(policy, self.objective.examples, pad_id, self.accelerator, fresh=fresh)
        # Of the step so far: sums and numbers of what is measured, and their names.
        self.sums: Tensor | None = None
        self.measured: tuple[str, ...] = ()
        self.average, self.smooth, self.margins = 0.0, 0.0, 0
        self.metrics: list[Metrics] = []
        self.reached = False
        self.bars = contextlib.ExitStack()
        self.advance: console.Advance = lambda step=1, note="": None

    def fit(self) -> Outcome:
        """Train to the end of the stage.

        Raises:
            InputError: The loss is not finite; the step and its rows are named.
        """
        with self.bars:
            self.train()
        stopped_by = "stop_margin" if self.reached else "epochs" if self.stage.max_steps is None else "max_steps"
        state = self.accelerator.get_state_dict(self.model_wrapped)
        known = self.scorer.reference[0, : len(self.pairs)].isfinite().int()
        scored = int((self.accelerator.reduce(known, "sum") > 0).sum())
        return Outcome(self.metrics, stopped_by, state, self.scorer.route, scored)

    def begin(self) -> None:
        """Look at the model once it is wrapped and on its device, before the first step."""
        half = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None
        try:
            why = self.scorer.begin(self.model_wrapped, half or self.scorer.base.dtype)
        except FloatingPointError as error:
            raise InputError(
                f"stage '{self.stage.name}': the model gives {error} before it is trained",
                allowed="a base and a start whose weights are finite, or dtype float32",
            ) from error
        self.objective.begin(self.scorer)
        if why and self.accelerator.is_main_process:
            console.say(f"{self.stage.name}: {why}")
        self.advance = self.bars.enter_context(console.progress(self.stage.name, self.args.max_steps))

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """The batches of one optimiser step, and how many losses they have on all processes together.

        The pairs of this process are dealt anew by length, and those that no step has held are scored at the start.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        indices = [index for batch in batches for index in batch["index"].tolist()]
        dealt = self.scorer.deal(indices, [len(batch["index"]) for batch in batches])
        referred = self.objective.referred(dealt)
        unscored = self.scorer.unscored([index for part in referred for index in part])
        counts = torch.tensor([self.objective.count(indices), len(unscored)], device=self.args.device)
        losses, new = self.accelerator.reduce(counts, "sum")
        if new:
            self.scorer.score(referred)
        self.objective.prepare(self.model_wrapped, dealt)
        return [{"index": torch.tensor(part)} for part in dealt], losses

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward over one batch, in as many calls as cost least together."""
        parts = self.scorer.split(inputs["index"].tolist())
        total = torch.zeros((), device=self.args.device)
        for place, part in enumerate(parts, start=1):
            with contextlib.nullcontext() if place == len(parts) else self.accelerator.no_sync(model):
                total += super().training_step(model, self.scorer.batch(part), num_items_in_batch)
        return total

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This batch's share of the step's mean loss."""
        found = self.objective(model, inputs)
        if not all_finite(found.losses):
            self.refuse(found.losses, inputs["index"])
        self.measured = tuple(found.measured)
        parts = found.measured.values()
        counts = torch.tensor([len(part) for part in parts], dtype=torch.float32, device=found.losses.device)
        sums = torch.stack([torch.stack([part.sum().float() for part in parts]), counts])
        self.sums = sums if self.sums is None else self.sums + sums
        # Data-parallel training averages gradients over processes; the sum over them is wanted.
        loss = found.losses.sum() * (self.accelerator.num_processes / num_items_in_batch)
        return (loss, {}) if return_outputs else loss

    def refuse(self, losses: Tensor, index: Tensor) -> None:
        """Say where the loss ceased to be a number."""
        bad = sorted(self.pairs[i].row for i in index[~torch.isfinite(losses)].tolist())
        some = ", ".join(map(str, bad[:5])) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise InputError(
            f"stage '{self.stage.name}' step {self.state.global_step + 1}: the loss is not finite for rows {some} of "
            f"{self.stage.data}",
            allowed="a lower learning_rate, or dtype float32",
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Called by the Trainer after every step: keep the step's record and decide whether the margin is reached."""
        if self.sums is None:
            return  # The Trainer's closing summary, which is about time.
        sums, counts = self.accelerator.reduce(self.sums, "sum").tolist()
        self.sums = None
        means = {
            name: value / count if count else math.nan
            for name, value, count in zip(self.measured, sums, counts, strict=True)
        }
        shown = self.objective.record(means)
        loss, margin = shown.pop("loss"), shown.pop("margin")
        if margin is not None:
            self.margins += 1
            self.average, self.smooth = smoothed(self.average, margin, self.margins, self.stage.stop_smoothing)
        record: Metrics = {
            "step": self.state.global_step,
            "loss": loss,
            "margin": margin,
            "margin_smoothed": self.smooth,
            **shown,
            "learning_rate": logs["learning_rate"],
            # Not finite where a float16 step overflowed and was passed over; JSON has no word for that but null.
            "grad_norm": logs["grad_norm"] if math.isfinite(logs["grad_norm"]) else None,
        }
        self.metrics.append(record)
        kl = f" kl {shown['kl']:.2f}" if shown.get("kl") is not None else ""
        self.advance(1, note=f"loss {loss:.3f} margin {self.smooth if margin is None else margin:.2f}{kl}")
        if self.stage.stop_margin is not None and self.margins and self.smooth >= self.stage.stop_margin:
            self.reached = self.control.should_training_stop = True
        if self.args.report_to:
            super().log({name: value for name, value in record.items() if value is not None}, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: the count is of no use here and walks all parameters every step."""
        return 0


class _Beginning(TrainerCallback):
    """Calls `PairTrainer.begin` when the model is wrapped and on its device."""

    def __init__(self, trainer: PairTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.trainer.begin()
