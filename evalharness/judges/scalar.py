"""Sequence-classification reward and cost models: the raw logit is the score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from psacpo.errors import InputError
from psacpo.evalharness.config import ScalarJudge
from psacpo.evalharness.judges.base import Verdict
from psacpo.files import digest, digest_directory
from psacpo.hub import load_config, load_model, load_tokenizer, model_directory
from psacpo.prompting import Prompt, encode_completion, encode_prompt, require_chat_template


class Scalar:
    """A one-label sequence classifier on the pair (prompt, completion), never squashed by a sigmoid.

    The pair is written by the judge's own chat template, or by its raw template with {prompt} and {completion}.
    """

    def __init__(self, name: str, settings: ScalarJudge, *, device: str) -> None:
        self.name, self.settings, self.device = name, settings, device
        self.batch_size = settings.batch_size
        self.path: Path = model_directory(settings.model, what=f"judge '{name}'")
        self.digest = digest(
            {
                "kind": "scalar",
                "files": digest_directory(self.path, patterns=("*.safetensors", "*.json", "*.jinja", "*.model")),
                "settings": settings.model_dump(exclude={"batch_size", "model"}),
            }
        )
        self.what = f"judge '{name}'"
        self._loaded: Any = None
        self.tokenizer = self._check()

    def judge(self, pairs: Sequence[tuple[Prompt, str]]) -> list[Verdict]:
        """Scores of one batch; a pair that does not fit in `max_length` or gives no number is invalid."""
        import torch

        tokenizer = self.tokenizer
        encoded = [self._encode(tokenizer, prompt, completion) for prompt, completion in pairs]
        fitting = [index for index, ids in enumerate(encoded) if len(ids) <= self.settings.max_length]
        verdicts = [
            Verdict(None, raw=f"{len(ids)} tokens, over max_length {self.settings.max_length}") for ids in encoded
        ]
        if not fitting:
            return verdicts
        width = max(len(encoded[index]) for index in fitting)
        model = self._model()
        pad = tokenizer.pad_token_id
        ids = torch.tensor([encoded[i] + [pad] * (width - len(encoded[i])) for i in fitting], device=model.device)
        # From lengths, not from ids != pad: the pad token may also end an answer.
        lengths = torch.tensor([len(encoded[i]) for i in fitting], device=model.device)
        mask = (torch.arange(width, device=model.device)[None] < lengths[:, None]).long()
        with torch.inference_mode():
            scores = model(input_ids=ids, attention_mask=mask).logits[:, 0].float().tolist()
        for index, score in zip(fitting, scores, strict=True):
            verdicts[index] = Verdict(score) if math.isfinite(score) else Verdict(None, raw=f"score {score}")
        return verdicts

    def _encode(self, tokenizer: Any, prompt: Prompt, completion: str) -> list[int]:
        if self.settings.template is None:
            start = encode_prompt(tokenizer, prompt, None)
            return start + encode_completion(tokenizer, prompt, completion, None)
        if not isinstance(prompt, str):
            [message] = prompt  # several are refused before a sweep starts
            prompt = message["content"]
        text = _fill(self.settings.template, prompt, completion)
        ids: list[int] = tokenizer(text)["input_ids"]
        return ids

    def _check(self) -> Any:
        """The tokenizer, after everything that can be known without loading weights: refused before the sweep."""
        config = load_config(self.path, what=self.what)
        architectures = config.architectures or []
        if not any(name.endswith("ForSequenceClassification") for name in architectures) or config.num_labels != 1:
            raise InputError(
                f"{self.what} at {self.settings.model} is no scalar judge",
                given=f"{', '.join(architectures) or 'no architecture'} with {config.num_labels} labels",
                allowed="a sequence-classification model with one label",
            )
        weights = sorted(self.path.glob("*.safetensors"))
        if not weights:
            raise InputError(f"{self.what} at {self.settings.model} holds no weights (*.safetensors)")
        for file in weights:
            # The header alone: a damaged file is told now, and not when all answers are generated.
            try:
                with safe_open(file, framework="pt"):
                    pass
            except (OSError, SafetensorError) as error:
                raise InputError(f"{self.what}: {file} is damaged: {error}") from error
        tokenizer = load_tokenizer(self.path, what=self.what)
        if self.settings.template is None:
            require_chat_template(tokenizer)
        if tokenizer.pad_token_id is None:
            if tokenizer.eos_token_id is None:
                raise InputError(f"the tokenizer of {self.what} has neither a pad nor an EOS token")
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def _model(self) -> Any:
        if self._loaded is None:
            import torch
            from transformers import AutoModelForSequenceClassification

            dtype = getattr(torch, self.settings.dtype)
            model = load_model(AutoModelForSequenceClassification, self.path, what=self.what, dtype=dtype)
            model.config.pad_token_id = self.tokenizer.pad_token_id
            device = self.device
            if device == "auto":
                device = "cuda" if torch.cuda.is_available() else "cpu"
            self._loaded = model.to(device).eval()
        return self._loaded


def _fill(template: str, prompt: str, completion: str) -> str:
    """Both fields in one pass, so that a prompt which holds the text {completion} stays as it is."""
    before, _, rest = template.partition("{prompt}")
    if "{completion}" in before:
        before = before.replace("{completion}", completion)
        return before + prompt + rest
    return before + prompt + rest.replace("{completion}", completion)
