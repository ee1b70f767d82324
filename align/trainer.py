"""The training loop of one stage: a Hugging Face Trainer that scores pairs, keeps one line a step, and knows its end.

What a step is comes from the settings alone: its pairs, and the mean of their losses. How they are computed does not
change it: the step's pairs are dealt anew by length into its batches, and each batch is split where that saves work.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from psacpo import console
from psacpo.align.checkpoints import Checkpoints, full_disk_as_such
from psacpo.align.examples import Example, Labelled, Pair
from psacpo.align.forward import Route
from psacpo.align.losses import all_finite, smoothed
from psacpo.align.objectives import Pairwise, Risky, objective_of
from psacpo.align.reference import Start, replaced, trainable
from psacpo.align.scoring import Scorer
from psacpo.align.stage_config import Stage
from psacpo.errors import InputError

Metrics = dict[str, float | int | None]
# Keeps a batch whose loss is not finite, given with its losses, the step and the records before it; says where.
Keep = Callable[[Sequence[Example], Sequence[float], int, Sequence[Metrics]], str]


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
        precompute: bool = False,
        checkpoints: Checkpoints | None = None,
        keep: Keep | None = None,
    ) -> None:
        """
        Args:
            policy: A PEFT model as `model.load_policy` gives it.
            arguments: With `max_steps` set; every step must be logged.
            fresh: Whether the adapter is untrained, so that the reference is the base itself.
            pad_id: The token id that padding holds; it is masked everywhere.
            precompute: Whether to score all pairs before the first step, so that no copy of the start is kept. A loss
                that needs the start's distributions keeps one all the same.
            checkpoints: Where to put them, as often as the arguments say, and what to go on from.
            keep: What to do with a batch whose loss is not finite.

        Raises:
            InputError: The stage's loss cannot learn from such rows.
        """
        self.checkpoints, self.keep, self.precompute = checkpoints, keep, precompute
        # What a checkpoint that is gone on from knew, and the weights that the stage began with.
        self.resumed: dict[str, Tensor] | None = None
        self.began: list[Tensor] | None = None
        self.restored = True
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
            self.train(resume_from_checkpoint=self.take_up())
        stopped_by = "stop_margin" if self.reached else "epochs" if self.stage.max_steps is None else "max_steps"
        state = self.accelerator.get_state_dict(self.model_wrapped)
        known = self.scorer.reference[0, : len(self.pairs)].isfinite().int()
        scored = int((self.accelerator.reduce(known, "sum") > 0).sum())
        return Outcome(self.metrics, stopped_by, state, self.scorer.route, scored)

    def begin(self) -> None:
        """Look at the model once it is wrapped and on its device, before the first step."""
        half = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None
        try:
            with self.as_begun():
                why = self.scorer.begin(self.model_wrapped, half or self.scorer.base.dtype)
                self.know()
        except FloatingPointError as error:
            raise InputError(
                f"stage '{self.stage.name}': the model gives {error} before it is trained",
                allowed="a base and a start whose weights are finite, or dtype float32",
            ) from error
        self.objective.begin(self.scorer)
        if why and self.accelerator.is_main_process:
            console.say(f"{self.stage.name}: {why}")
        self.advance = self.bars.enter_context(console.progress(self.stage.name, self.args.max_steps))
        self.advance(len(self.metrics))

    def know(self) -> None:
        """Take over what a checkpoint knew of the start, and score the rest where that is to be known beforehand."""
        if self.resumed is not None:
            self.scorer.reference.copy_(self.resumed.pop("reference"))
            self.scorer.states |= _unflattened(self.resumed, self.args.device)
        if self.precompute and not isinstance(self.objective, Risky) and self.scorer.independent:
            self.scorer.start = Start(self.model, fresh=False, keep=False)
            self.scorer.score_all()

    def take_up(self) -> str | None:
        """Where to go on from, with this trainer's own part of it taken; None begins anew."""
        found = self.checkpoints.latest() if self.checkpoints else None
        if self.checkpoints is None or found is None:
            return None
        place, progress = found
        self.metrics, self.restored = progress["metrics"], False
        self.average, self.smooth, self.margins = (progress[name] for name in ("average", "smooth", "margins"))
        self.resumed = self.checkpoints.read_tensors(place, self.accelerator.process_index)
        if self.accelerator.is_main_process:
            console.say(f"{self.stage.name}: goes on after step {len(self.metrics)}")
        return str(place)

    @contextlib.contextmanager
    def as_begun(self) -> Iterator[None]:
        """Inside, the policy has the weights that the stage began with, where those were replaced by a checkpoint's."""
        if self.began is None:
            yield
            return
        with replaced(self.scorer.policy, self.began):
            yield
        self.began = None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self.scorer.fresh:
            self.began = [parameter.detach().clone() for parameter in trainable(self.scorer.policy)]
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restore the generators once: before whatever a step draws, where the Trainer does it after `get_batch_samples`."""
        if not self.restored:
            self.restored = True
            super()._load_rng_state(checkpoint)

    def _get_output_dir(self, trial: Any) -> str:
        """Where checkpoints go; `output_dir` is for what trackers write."""
        return super()._get_output_dir(trial) if self.checkpoints is None else str(self.checkpoints.place)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The Trainer's checkpoint, and beside it the records, averages and what the scorer knows of the start."""
        step = self.state.global_step
        # What is about to be written whole needs none.
        if self.checkpoints is None or self.reached or step >= self.args.max_steps:
            return
        # Of other sharded weights the start could not be put back.
        if not self.scorer.independent and not self.accelerator.is_fsdp2:
            return
        with full_disk_as_such(self.checkpoints.place):
            self._write_checkpoint(model, trial, step)

    def _write_checkpoint(self, model: Any, trial: Any, step: int) -> None:
        assert self.checkpoints is not None
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        tensors = {"reference": self.scorer.reference} | _flattened(self.scorer.states)
        self.checkpoints.write_tensors(step, self.accelerator.process_index, tensors)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            averages = {"average": self.average, "smooth": self.smooth, "margins": self.margins}
            self.checkpoints.finish(step, {"metrics": self.metrics} | averages)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """The batches of one optimiser step, and how many losses they have on all processes together.

        The pairs of this process are dealt anew by length, and those that no step has held are scored at the start.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not self.restored and self.checkpoints is not None:
            self._load_rng_state(str(self.checkpoints.at(self.state.global_step)))
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
        step = self.state.global_step + 1
        bad = sorted(self.pairs[i].row for i in index[~torch.isfinite(losses)].tolist())
        some = ", ".join(map(str, bad[:5])) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        where = ""
        if self.keep is not None:
            examples = [self.pairs[i] for i in index.tolist()]
            where = f"; the batch is in {self.keep(examples, losses.tolist(), step, self.metrics)}"
        raise InputError(
            f"stage '{self.stage.name}' step {step}: the loss is not finite for rows {some} of {self.stage.data}{where}",
            allowed="a lower learning_rate, a smaller beta, or dtype float32",
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
        self.advance(1, note=note(record))
        if self.stage.stop_margin is not None and self.margins and self.smooth >= self.stage.stop_margin:
            self.reached = self.control.should_training_stop = True
        if self.args.report_to:
            super().log({name: value for name, value in record.items() if value is not None}, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: the count is of no use here and walks all parameters every step."""
        return 0


def note(record: Metrics) -> str:
    """A step's record for a progress bar: loss, accuracy, margin in nats, and KL and risk where the loss has them."""
    names = {"loss": "loss", "accuracy": "acc", "margin_smoothed": "margin", "kl": "kl", "risk": "risk"}
    known = [(word, record.get(name)) for name, word in names.items()]
    return " ".join(f"{word} {value:.3g}" for word, value in known if value is not None)


def _flattened(states: dict[int, tuple[Tensor, ...]]) -> dict[str, Tensor]:
    """The scorer's kept states under names: the example's place, the answer's slot."""
    return {f"{place}.{slot}": part for place, parts in states.items() for slot, part in enumerate(parts)}


def _unflattened(tensors: dict[str, Tensor], device: Any) -> dict[int, tuple[Tensor, ...]]:
    found: dict[int, dict[int, Tensor]] = {}
    for name, part in tensors.items():
        place, slot = map(int, name.split("."))
        found.setdefault(place, {})[slot] = part.to(device)
    return {place: tuple(parts[slot] for slot in sorted(parts)) for place, parts in found.items()}


class _Beginning(TrainerCallback):
    """Calls `PairTrainer.begin` when the model is wrapped and on its device."""

    def __init__(self, trainer: PairTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.trainer.begin()
