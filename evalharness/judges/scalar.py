"""Reward and cost models: the raw logit is the score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from psacpo.errors import InputError, unknown_name
from psacpo.evalharness.judges.base import Item, TextJudge, Verdict
from psacpo.evalharness.judges.settings import ScalarJudge
from psacpo.evalharness.judges.untrusted import Chat, Encoder, Piece, fill
from psacpo.files import digest, digest_directory
from psacpo.hub import load_config, load_model, load_tokenizer, model_directory
from psacpo.prompting import require_chat_template

CUT = "the answer's end was cut off to fit"
FILES = ("*.safetensors", "*.json", "*.jinja", "*.model")


class Scalar(TextJudge):
    """A sequence classifier, or a beaver score model, on the pair (prompt, completion), never squashed by a sigmoid.

    The pair is written by the judge's own chat template, or by its raw template with {prompt} and {completion}.
    """

    def __init__(self, name: str, settings: ScalarJudge, *, device: str, allow_code: bool = False) -> None:
        self.name, self.settings, self.device = name, settings, device
        self.batch_size = settings.batch_size
        self.what = f"judge '{name}'"
        if settings.trust_remote_code and not allow_code:
            raise InputError(
                f"{self.what} would run the code of {settings.model}", allowed="say --allow-code if you trust it"
            )
        self.path: Path = model_directory(settings.model, what=self.what)
        files = (*FILES, "*.py") if settings.trust_remote_code else FILES
        self.digest = digest(
            {
                "kind": "scalar",
                "files": digest_directory(self.path, patterns=files),
                "settings": settings.model_dump(exclude={"batch_size", "model", "preset"}),
            }
        )
        self.config = self._read_config()
        self.label = self._check_config()
        check_weights(self.path, settings.model, self.what)
        self.tokenizer = load_tokenizer(self.path, what=self.what)
        self._loaded: Any = None
        self._pooling: Any = None
        self._prepare()

    def judge(self, items: Sequence[Item]) -> list[Verdict]:
        """Scores of the pairs; one that does not fit in `max_length` or gives no number is invalid."""
        verdicts: list[Verdict | None] = [None] * len(items)
        encoded: dict[int, list[int]] = {}
        notes: dict[int, str | None] = {}
        for index, item in enumerate(items):
            try:
                encoded[index], cut = self._encode(item)
                notes[index] = CUT if cut else None
            except InputError as error:
                verdicts[index] = Verdict(None, raw=str(error))
        if self.settings.engine == "vllm" and encoded:
            self._start_vllm(list(encoded.values()))
        # Rows of like length together: padding costs as much as text.
        order = sorted(encoded, key=lambda index: len(encoded[index]))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            for index, score in zip(batch, self._scores([encoded[index] for index in batch]), strict=True):
                good = math.isfinite(score)
                verdicts[index] = Verdict(score, raw=notes[index]) if good else Verdict(None, raw=f"score {score}")
        return [verdict for verdict in verdicts if verdict is not None]

    def encode(self, item: Item) -> list[int]:
        """The ids that the model reads.

        Raises:
            InputError: They are more than `max_length`, or the template does not take the prompt.
        """
        return self._encode(item)[0]

    def _encode(self, item: Item) -> tuple[list[int], bool]:
        """The ids, and whether the answer was cut."""
        eos = self.tokenizer.eos_token_id
        room = self.limit - self.settings.append_eos
        ids, cut = self.encoder.encode_cut(
            self._pieces(item),
            max_length=room,
            truncate=self.settings.too_long == "truncate",
            add_special_tokens=self.settings.template is not None,
        )
        if not ids:
            raise InputError("nothing to read: the template and the pair are empty")
        return ([*ids, eos] if self.settings.append_eos and ids[-1] != eos else ids), cut

    def _pieces(self, item: Item) -> list[Piece]:
        prompt = item.prompt
        if self.chat is not None:
            before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
            return self.chat.pieces([*before, {"role": "assistant", "content": item.completion}])
        assert self.settings.template is not None
        return fill(self.settings.template, {"prompt": single(prompt), "completion": item.completion})

    def _start_vllm(self, rows: Sequence[Sequence[int]]) -> None:
        """Start vLLM, once, after transformers scored the first rows and let go of the model: it must give the same."""
        if self._pooling is not None:
            return
        from psacpo.evalharness.engines.plan import require_vllm
        from psacpo.evalharness.judges.pooling import PARITY_ROWS, Pooling, require_parity

        require_vllm()
        first = rows[:PARITY_ROWS]
        expected = self._scores(first)
        self._loaded = None
        pooling = Pooling(self.path, dtype=self.settings.dtype, max_model_len=self.limit, extra=self.settings.vllm)
        require_parity(self.what, self.settings.dtype, expected, pooling.scores(first, self.label))
        self._pooling = pooling

    def _scores(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """Raw scores of one batch, right-padded."""
        import torch

        if self._pooling is not None:
            pooled: list[float] = self._pooling.scores(rows, self.label)
            return pooled
        model = self._model()
        pad = self._pad(rows)
        width = max(map(len, rows))
        ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], device=model.device)
        # From lengths, not from ids != pad: the pad token may also end an answer.
        lengths = torch.tensor([len(row) for row in rows], device=model.device)
        mask = (torch.arange(width, device=model.device)[None] < lengths[:, None]).long()
        with torch.inference_mode():
            found = model(input_ids=ids, attention_mask=mask)
            if self.score_model:
                scores = found
            elif (
                self.settings.label is None and getattr(found, "score", None) is not None
            ):  # what heads of their own code call the one number
                scores = found.score.reshape(len(rows))
            else:
                scores = found.logits[:, self.label]
        values: list[float] = scores.float().tolist()
        return values

    def _pad(self, rows: Sequence[Sequence[int]]) -> int:
        """The id that fills up a batch.

        A sequence classifier reads the last token that is not the config's pad token. Where the config names none, it has
        to be one that no row holds, or an answer that ends with it would be read one token too early.
        """
        given = self.config.pad_token_id
        if given is not None and given >= 0:  # early Llama conversions say -1
            return int(given)
        held = {number for row in rows for number in row}
        pad = next(number for number in range(len(held) + 1) if number not in held)
        self._model().config.pad_token_id = pad
        return pad

    def _read_config(self) -> Any:
        if not self.settings.trust_remote_code:
            return load_config(self.path, what=self.what)
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(self.path, trust_remote_code=True)
        except Exception as error:  # the code of a repository raises what it likes
            raise InputError(f"cannot read config.json of {self.what} {self.path}: {error}") from error

    def _check_config(self) -> int:
        """The index of the wanted logit, after everything that can be known of the config."""
        from psacpo.evalharness.judges import score_head

        config, settings = self.config, self.settings
        if settings.vllm and settings.engine != "vllm":
            raise InputError(f"{self.what}: vllm: is for engine: vllm")
        self.score_model = score_head.is_score_model(config)
        if settings.engine == "vllm" and (self.score_model or settings.trust_remote_code):
            raise InputError(
                f"{self.what}: engine vllm reads sequence classifiers that vLLM knows", allowed="engine: transformers"
            )
        if self.score_model:
            score_head.check_config(config, settings.better, self.what)
            return 0
        architectures = config.architectures or []
        if settings.trust_remote_code:
            return settings.label if isinstance(settings.label, int) else 0
        names = dict(config.id2label or {})
        if not any(name.endswith("ForSequenceClassification") for name in architectures):
            raise InputError(
                f"{self.what} at {settings.model} is no scalar judge",
                given=f"{', '.join(architectures) or 'no architecture'} with {config.num_labels} labels",
                allowed="a sequence-classification model, or a beaver score model",
            )
        if isinstance(settings.label, str):
            found = [index for index, label in names.items() if label == settings.label]
            if not found:
                raise unknown_name(f"label of {self.what}", settings.label, map(str, names.values()))
            return int(found[0])
        if settings.label is not None:
            if not 0 <= settings.label < config.num_labels:
                raise InputError(f"{self.what}: no logit {settings.label}", allowed=f"0 to {config.num_labels - 1}")
            return settings.label
        if config.num_labels != 1:
            raise InputError(
                f"{self.what} at {settings.model} is no scalar judge",
                given=f"{', '.join(architectures)} with {config.num_labels} labels",
                allowed=f"one label, or label: one of {', '.join(map(str, names.values()))}",
            )
        return 0

    def _prepare(self) -> None:
        """The template, the encoder and the longest text, refused here where the tokenizer does not fit."""
        settings, tokenizer = self.settings, self.tokenizer
        if settings.append_eos and tokenizer.eos_token_id is None:
            raise InputError(f"{self.what}: append_eos, and its tokenizer has no EOS token")
        self.chat: Chat | None = None
        if settings.template is None:
            require_chat_template(tokenizer)
            self.chat = Chat(tokenizer, what=self.what)
        trusted = settings.template or str(tokenizer.chat_template)
        self.encoder = Encoder(tokenizer, what=self.what, trusted=trusted)
        positions = getattr(self.config, "max_position_embeddings", None)
        self.limit = min(settings.max_length, positions or settings.max_length)
        self.encoder.require_one_bos(self.encode(Item("a", "a")))

    def _model(self) -> Any:
        if self._loaded is None:
            import torch
            from transformers import AutoModelForSequenceClassification

            from psacpo.evalharness.judges.score_head import LlamaForScore

            loader = LlamaForScore if self.score_model else AutoModelForSequenceClassification
            more = {"trust_remote_code": True} if self.settings.trust_remote_code else {}
            dtype = getattr(torch, self.settings.dtype)
            model = load_model(loader, self.path, what=self.what, dtype=dtype, **more)
            self._loaded = model.to(device_of(self.device)).eval()
        return self._loaded


def single(prompt: Any) -> str:
    """The text of a prompt of one message, which is all that a raw template takes."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) != 1:
        raise InputError(f"a raw template takes one string, this prompt has {len(prompt)} messages")
    return str(prompt[0]["content"])


def device_of(name: str) -> str:
    """`auto` as the device that there is."""
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def check_weights(path: Path, model: str, what: str) -> None:
    """Refuse a directory whose safetensors are not there or damaged, by their headers alone, before answers are made."""
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        raise InputError(
            f"{what} at {model} holds no weights (*.safetensors)", allowed="safetensors; pickled weights are not read"
        )
    for file in weights:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise InputError(f"{what}: {file} is damaged: {error}") from error
