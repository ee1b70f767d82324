"""PKU's beaver reward and cost models: a Llama with a score head, read without the code in their repository."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaModel, LlamaPreTrainedModel

from psacpo.errors import InputError

ARCHITECTURES = frozenset(["LlamaForScore", "LlamaModelForScore"])
_EPSILON = 1e-8
# score type -> how the normaliser acts on a score, given the mean and standard deviation of those seen in training
_NORMALIZE = {
    "reward": lambda score, mean, std: (score - mean) / (std + _EPSILON),
    "cost": lambda score, mean, std: score / (std + _EPSILON),
    "critic": lambda score, mean, std: score,
}


def end_scores(
    hidden: Tensor, attention_mask: Tensor, weight: Tensor, bias: Tensor | None, normalize: Any = None
) -> Tensor:
    """The score head at each row's last token.

    Args:
        hidden: Last hidden states [rows, width, size].
        attention_mask: 1 on tokens, 0 on padding, on either side [rows, width].
        weight: Of the head [1, size].
        bias: [1] or None.
        normalize: What acts on the scores afterwards.

    Returns:
        [rows], float32. The product is made in the model's precision, as in training.

    Source: safe-rlhf, `ScoreModelMixin.get_scores`.
    """
    places = torch.arange(hidden.shape[1], device=hidden.device)
    last = (attention_mask * places).argmax(dim=-1)
    ends = hidden[torch.arange(hidden.shape[0], device=hidden.device), last]
    scores = nn.functional.linear(ends, weight, bias).float()[:, 0]
    return scores if normalize is None else normalize(scores)


class LlamaForScore(LlamaPreTrainedModel):  # type: ignore[no-untyped-call]
    """A Llama whose score is read off its last token; weights `model.*`, `score_head.*` and perhaps `normalizer.*`."""

    _keys_to_ignore_on_load_unexpected = [r"normalizer\.", r"lm_head\.", r"rotary_emb\.inv_freq"]  # noqa: RUF012

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model: Any = LlamaModel(config)
        self.score_head = nn.Linear(config.hidden_size, 1, bias=bool(getattr(config, "bias", False)))
        if getattr(config, "do_normalize", False):
            self.normalizer: Any = nn.Module()
            self.normalizer.register_buffer("mean", torch.zeros(1))
            self.normalizer.register_buffer("var", torch.ones(1))
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Scores [rows] of padded ids [rows, width]."""
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return end_scores(hidden, attention_mask, self.score_head.weight, self.score_head.bias, self._normalize())

    def _normalize(self) -> Any:
        if not getattr(self.config, "do_normalize", False):
            return None
        mean, var = self.normalizer.mean.float(), self.normalizer.var.float()
        act: Any = _NORMALIZE[getattr(self.config, "score_type", "reward")]
        return lambda scores: act(scores, mean, var.sqrt())


def is_score_model(config: Any) -> bool:
    """Whether config.json is that of a beaver model."""
    return bool(ARCHITECTURES & set(config.architectures or []))


def check_config(config: Any, better: str, what: str) -> None:
    """Refuse a score model that is no Llama with one score, or whose direction is the other one.

    Raises:
        InputError: It is one of these.
    """
    kind = getattr(config, "score_type", "reward")
    for name, given, valid in (
        ("model_type", config.model_type, ["llama"]),
        ("score_dim", getattr(config, "score_dim", 1), [1]),
        ("score_type", kind, list(_NORMALIZE)),
    ):
        if given not in valid:
            raise InputError(f"{what}: {name} of its config.json", given=given, allowed=", ".join(map(str, valid)))
    wanted = {"reward": "higher", "cost": "lower"}.get(kind, better)
    if better != wanted:
        raise InputError(f"{what} is a {kind} model by its config.json", given=f"better: {better}", allowed=wanted)
