"""The training loop of one stage: a Hugging Face Trainer that scores pairs, keeps one line a step, and knows its end."""

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
from psacpo.align.forward import batch_log_probs, logits_selection
from psacpo.align.losses import LOSSES, all_finite, smoothed
from psacpo.align.pairs import Pair, collate
from psacpo.errors import InputError

Metrics = dict[str, float | int | None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a stage went.

    Attributes:
        metrics: One record an optimiser step, each taken before that step's update.
        stopped_by: "max_steps", "epochs" or "stop_margin".
        state: The full state dict of the policy, on the main process.
    """

    metrics: list[Metrics]
    stopped_by: str
    state: dict[str, Tensor]


class PairTrainer(Trainer):
    """Trains a policy on pairs against the policy that it is when training begins.

    The reference log-probabilities are those of the model at the start, in evaluation mode, computed once before the
    first step. Every forward goes through the wrapped model, so data-parallel and sharded training work as in
    `transformers`. The loss of a step is the mean over all its pairs, on all processes and accumulated batches.
    """

    # `compute_loss` divides by the pairs of the whole step itself, so that uneven last batches weigh right.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        policy: Any,
        arguments: TrainingArguments,
        pairs: list[Pair],
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
        """
        self.pairs = pairs
        self.stage = stage
        self.beta = beta
        self.fresh = fresh
        self.pad_id = pad_id
        super().__init__(
            model=policy,
            args=arguments,
            train_dataset=range(len(pairs)),
            data_collator=self.batch,
            callbacks=[_ReferenceFirst(self)],
        )
        self.remove_callback(PrinterCallback)
        # Releases before 5.19 read this in the place of `loss_is_scaled_for_ga`.
        self.model_accepts_loss_kwargs = True
        self.policy = policy
        self.selection = logits_selection(policy.get_base_model())
        self.loss = LOSSES[stage.loss]
        # Shape (2, number of pairs): reference log-probabilities of the chosen and of the rejected answers.
        self.reference = torch.empty(2, 0)
        self.sums: Tensor | None = None
        self.average = 0.0
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
        return Outcome(self.metrics, stopped_by, state)

    def batch(self, indices: list[int]) -> dict[str, Tensor]:
        """The pairs at `indices` as a batch: what `collate` gives, and `index`."""
        return collate([self.pairs[index] for index in indices], self.pad_id) | {"index": torch.tensor(indices)}

    def log_probs(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """log pi(answer | prompt) of chosen and rejected answers. Shape (2, B), float32, in nats."""
        return batch_log_probs(model, batch, self.selection).view(2, -1)

    @torch.no_grad()
    def score_reference(self) -> Tensor:
        """Log-probabilities of all pairs under the model as it is, in evaluation mode. Shape (2, number of pairs)."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        order = sorted(range(len(self.pairs)), key=lambda index: len(self.pairs[index]))
        # Equally many for every process, some twice: under sharding each forward is a collective operation.
        shares = math.ceil(len(order) / world)
        mine = [order[place % len(order)] for place in range(rank, shares * world, world)]
        model = self.model_wrapped
        model.eval()
        # A fresh adapter adds exact zeros; leaving it out gives the same numbers in less time.
        found = []
        with (
            self.policy.disable_adapter() if self.fresh else contextlib.nullcontext(),
            console.progress(f"{self.stage.name}: reference", len(mine)) as advance,
        ):
            for first in range(0, len(mine), self.stage.batch_size):
                part = mine[first : first + self.stage.batch_size]
                batch = {name: value.to(self.args.device) for name, value in self.batch(part).items()}
                with self.accelerator.autocast():
                    found.append(self.log_probs(model, batch))
                advance(len(part))
        places = torch.tensor(mine, device=self.args.device)
        scores = self.accelerator.gather(torch.cat(found, dim=1).T.contiguous())
        places = self.accelerator.gather(places)
        result = torch.empty(len(self.pairs), 2, device=self.args.device)
        result[places] = scores
        return result.T.contiguous()

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """The batches of one optimiser step, and how many pairs they hold on all processes together."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = torch.tensor(sum(len(batch["index"]) for batch in batches), device=self.args.device)
        return batches, self.accelerator.reduce(count, "sum")

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This batch's share of the step's mean loss."""
        index = inputs["index"]
        chosen, rejected = self.log_probs(model, inputs)
        reference_chosen, reference_rejected = self.reference[:, index]
        found = self.loss(chosen, rejected, reference_chosen, reference_rejected, self.beta)
        if not all_finite(found.losses):
            self.refuse(found.losses, index)
        margins = found.margins
        parts = (found.losses.detach(), margins, (margins > 0).float(), *found[1:], torch.ones_like(margins))
        sums = torch.stack([part.sum() for part in parts])
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
        sums = self.accelerator.reduce(self.sums, "sum").tolist()
        self.sums = None
        loss, margin, accuracy, chosen, rejected = (value / sums[-1] for value in sums[:-1])
        step = self.state.global_step
        self.average, smooth = smoothed(self.average, margin, len(self.metrics) + 1, self.stage.stop_smoothing)
        record: Metrics = {
            "step": step,
            "loss": loss,
            "margin": margin,
            "margin_smoothed": smooth,
            "accuracy": accuracy,
            "chosen_logratio": chosen,
            "rejected_logratio": rejected,
            "learning_rate": logs["learning_rate"],
            # Not finite where a float16 step overflowed and was passed over; JSON has no word for that but null.
            "grad_norm": logs["grad_norm"] if math.isfinite(logs["grad_norm"]) else None,
        }
        self.metrics.append(record)
        self.advance(1, note=f"loss {loss:.3f} margin {margin:.2f}")
        if self.stage.stop_margin is not None and smooth >= self.stage.stop_margin:
            self.reached = self.control.should_training_stop = True
        if self.args.report_to:
            super().log({name: value for name, value in record.items() if value is not None}, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: the count is of no use here and walks all parameters every step."""
        return 0


class _ReferenceFirst(TrainerCallback):
    """Scores the reference when the model is wrapped and on its device, then opens the bar of the steps."""

    def __init__(self, trainer: PairTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        trainer = self.trainer
        trainer.reference = trainer.score_reference()
        trainer.advance = trainer.bars.enter_context(console.progress(trainer.stage.name, trainer.args.max_steps))
