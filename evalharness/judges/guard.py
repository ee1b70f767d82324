"""Guards: language models that name a class, scored by the probabilities of the words for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch

from psacpo.errors import InputError, unknown_name
from psacpo.evalharness.judges.base import Item, TextJudge, Verdict
from psacpo.evalharness.judges.guard_replies import (
    Reply,
    class_probabilities,
    greedy_replies,
    label_tokens,
    reply_ends,
)
from psacpo.evalharness.judges.guard_spec import Output, read_spec, with_template
from psacpo.evalharness.judges.scalar import CUT, FILES, check_weights, device_of, single
from psacpo.evalharness.judges.settings import GuardJudge
from psacpo.evalharness.judges.untrusted import Chat, Encoder, Piece, fill
from psacpo.files import digest, digest_directory
from psacpo.hub import load_config, load_model, load_tokenizer, model_directory
from psacpo.prompting import require_chat_template

# Harm and refusal are often asked of the same guard: its weights are in memory once, while any judge holds them.
_LOADED: WeakValueDictionary[tuple[str, str, str], Any] = WeakValueDictionary()


# Settings that play no part in what it says, or that others of its digest say.
_NOT_ITS_OWN = {"batch_size", "model", "preset", "spec", "template_file"}
_ENGINE = {"engine", "vllm"}


class Guard(TextJudge):
    """A generative classifier by its spec; the score is the probability of harm, or of what `output` says."""

    def __init__(self, name: str, settings: GuardJudge, *, device: str) -> None:
        self.settings, self.device, self.what = settings, device, f"judge '{name}'"
        self.batch_size = settings.batch_size
        spec = with_template(read_spec(settings.spec), settings.template_file, what=self.what)
        if settings.guidelines is not None:
            if not spec.guidelines:
                raise InputError(f"{self.what}: guard {settings.spec} takes no guidelines")
            spec = spec.model_copy(update={"guidelines": list(settings.guidelines)})
        if settings.output not in spec.outputs:
            raise unknown_name(f"output of guard {settings.spec}", settings.output, spec.outputs)
        self.spec = spec
        self.guidelines: Sequence[str | None] = spec.guidelines or [None]
        self.output: Output = spec.outputs[settings.output]
        if settings.controversial != "harm" and not self.output.controversial:
            raise InputError(f"{self.what}: {settings.output} of guard {settings.spec} has no controversial class")
        self.path: Path = model_directory(settings.model, what=self.what)
        self.files = digest_directory(self.path, patterns=FILES)
        self.digest = digest(
            {
                "kind": "guard",
                "files": self.files,
                "spec": spec.model_dump(exclude={"source"}),
                "settings": settings.model_dump(
                    exclude=_NOT_ITS_OWN | (_ENGINE if settings.engine == "transformers" else set())
                ),
            }
        )
        if settings.vllm and settings.engine != "vllm":
            raise InputError(f"{self.what}: vllm: is for engine: vllm")
        self._check()
        self._loaded: Any = None
        self._vllm: Any = None

    def reads(self, item: Item) -> Any:
        """The prompt, the completion, and those of the prompt's columns that stand in the template."""
        return [item.prompt, item.completion, {name: item.fields.get(name) for name in self.spec.fields}]

    def judge(self, items: Sequence[Item]) -> list[Verdict]:
        """One verdict an item: of several guidelines that of the one broken most, invalid where one of them is."""
        worst: list[Verdict | None] = [None] * len(items)
        for guideline in self.guidelines:
            for index, verdict in enumerate(self._judge(items, guideline)):
                if guideline is not None:
                    verdict = replace(verdict, raw=f"{verdict.raw} [{guideline}]")
                before = worst[index]
                if before is None or (
                    before.score is not None and (verdict.score is None or verdict.score > before.score)
                ):
                    worst[index] = verdict
        return [verdict for verdict in worst if verdict is not None]

    def encode(self, item: Item, guideline: str | None = None) -> list[int]:
        """The ids that the guard reads.

        Raises:
            InputError: They are too many, or the template does not take the prompt.
        """
        return self._encode(item, guideline)[0]

    def _encode(self, item: Item, guideline: str | None) -> tuple[list[int], bool]:
        """The ids, and whether the answer was cut."""
        spec = self.spec
        return self.encoder.encode_cut(
            self._pieces(item, guideline),
            max_length=self.limit,
            truncate=self.settings.too_long == "truncate",
            max_cut=spec.max_completion_tokens,
            add_special_tokens=spec.template is not None and spec.bos,
        )

    def _judge(self, items: Sequence[Item], guideline: str | None) -> list[Verdict]:
        verdicts: dict[int, Verdict] = {}
        encoded: dict[int, list[int]] = {}
        cut: dict[int, bool] = {}
        for index, item in enumerate(items):
            try:
                encoded[index], cut[index] = self._encode(item, guideline)
            except InputError as error:
                verdicts[index] = Verdict(None, raw=str(error))
        order = sorted(encoded, key=lambda index: len(encoded[index]))
        self._start_vllm([encoded[index] for index in order])
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            for index, reply in zip(batch, self._replies([encoded[index] for index in batch]), strict=True):
                verdict = self._read(reply)
                verdicts[index] = replace(verdict, raw=f"{verdict.raw} [{CUT}]") if cut[index] else verdict
        return [verdicts[index] for index in range(len(items))]

    def _pieces(self, item: Item, guideline: str | None) -> list[Piece]:
        if self.spec.template is None:
            prompt = item.prompt
            before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
            return self.chats[guideline].pieces([*before, {"role": "assistant", "content": item.completion}])
        fields = {"prompt": single(item.prompt), "completion": item.completion}
        for name in self.spec.fields:
            value = item.fields.get(name)
            if value is None:
                if name not in self.spec.defaults:
                    raise InputError(f"the prompt has no '{name}', which guard {self.settings.spec} reads")
                value = self.spec.defaults[name].replace("{prompt}", fields["prompt"])
            fields[name] = str(value)
        return fill(self.spec.template, fields, trusted={"guideline": guideline or ""})

    def _read(self, reply: Reply) -> Verdict:
        """The verdict in a reply: the classes' probabilities at the place where the word stands."""
        text = self.tokenizer.decode(reply.ids, skip_special_tokens=True)
        place = self._place(reply.ids)
        if place is None or place >= len(reply.logprobs) or not bool(reply.logprobs[place].isfinite().any()):
            return Verdict(None, raw=text)
        if not bool(reply.plausible[place].any()):
            return Verdict(None, raw=f"no word for {', '.join(self.output.labels)} is likely there: {text}")
        shares = class_probabilities(reply.logprobs[place], self.columns)
        label = max(shares, key=lambda name: shares[name])
        if label in self.output.unanswered:
            return Verdict(None, label=label, raw=text)
        counted = [*self.output.positive, *(self.output.controversial if self.settings.controversial == "harm" else ())]
        score = min(1.0, sum(shares[name] for name in counted))
        return Verdict(score, label=label, probability=shares[label], raw=text)

    def _place(self, ids: Sequence[int]) -> int | None:
        """The step at which the word is written, past `after` and white space; None where the reply never got there."""
        start = 0
        if self.output.after:
            reached = (
                count for count in range(1, len(ids) + 1) if self.output.after in self.tokenizer.decode(ids[:count])
            )
            found = next(reached, None)
            if found is None:
                return None
            start = found
        while start < len(ids) and not self.tokenizer.decode([ids[start]]).strip():
            start += 1
        return start

    def _replies(self, rows: Sequence[Sequence[int]]) -> list[Reply]:
        """Greedy replies to one batch."""
        if self._vllm is not None:
            written: list[Reply] = self._vllm.replies(rows, self.label_ids, self.ends, self.spec.max_new_tokens)
            return written
        return greedy_replies(
            self._model(), rows, label_ids=self.label_ids, ends=self.ends, steps=self.spec.max_new_tokens
        )

    def _start_vllm(self, rows: Sequence[Sequence[int]]) -> None:
        """Start vLLM, once, after transformers read the first rows and let go of the model: it must say the same."""
        if self.settings.engine != "vllm" or self._vllm is not None or not rows:
            return
        from psacpo.evalharness.engines.plan import require_vllm
        from psacpo.evalharness.judges.guard_vllm import writing
        from psacpo.evalharness.judges.pooling import PARITY_ROWS, require_parity

        require_vllm()
        first, settings = rows[:PARITY_ROWS], self.settings
        expected = [self._read(reply).score for reply in self._replies(first)]
        self._loaded = None
        longest = self.limit + self.spec.max_new_tokens
        self._vllm = writing(self.path, str(self.files), settings.dtype, longest, settings.vllm)
        given = [self._read(reply).score for reply in self._replies(first)]
        # An invalid verdict has to be one of both: it counts as -1, far from any probability.
        numbers = [[-1.0 if score is None else score for score in side] for side in (expected, given)]
        require_parity(self.what, settings.dtype, *numbers)

    def _check(self) -> None:
        """Everything that can be known without loading weights: refused before the sweep."""
        spec, settings = self.spec, self.settings
        config = load_config(self.path, what=self.what)
        architectures = config.architectures or []
        if not any(name.endswith(("ForCausalLM", "ForConditionalGeneration")) for name in architectures):
            raise InputError(
                f"{self.what} at {settings.model} is no guard",
                given=", ".join(architectures) or "no architecture",
                allowed="a language model; a classifier with a score is of kind scalar",
            )
        check_weights(self.path, settings.model, self.what)
        self.tokenizer = tokenizer = load_tokenizer(self.path, what=self.what)
        self.chats: dict[str | None, Chat] = {}
        if spec.template is None:
            require_chat_template(tokenizer)
            for guideline in self.guidelines:
                options = {spec.guideline_argument: guideline} if spec.guideline_argument else {}
                chat = Chat(tokenizer, what=self.what, add_generation_prompt=spec.add_generation_prompt, **options)
                self.chats[guideline] = chat
        trusted = spec.template or str(tokenizer.chat_template)
        self.encoder = Encoder(tokenizer, what=self.what, trusted=trusted, markers=spec.markers)
        self.columns, self.label_ids = label_tokens(tokenizer, self.output, self.what)
        positions = getattr(config.get_text_config(), "max_position_embeddings", None) or settings.max_length
        self.limit = min(settings.max_length, positions - spec.max_new_tokens)
        self.ends = reply_ends(self.path, tokenizer)
        example = Item("a", "a", fields=dict.fromkeys(spec.fields, "a"))
        for guideline in self.guidelines:
            self.encoder.require_one_bos(self.encode(example, guideline))

    def _model(self) -> Any:
        if self._loaded is None:
            from transformers import AutoModelForCausalLM

            device = device_of(self.device)
            key = (str(self.files), self.settings.dtype, device)
            self._loaded = _LOADED.get(key)
            if self._loaded is None:
                dtype = getattr(torch, self.settings.dtype)
                model = load_model(AutoModelForCausalLM, self.path, what=self.what, dtype=dtype)
                self._loaded = _LOADED[key] = model.to(device).eval()
        return self._loaded
