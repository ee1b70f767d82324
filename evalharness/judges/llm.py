"""A language model as judge: each answer against the anchor's in both orders, or alone on a scale."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from psacpo.errors import InputError
from psacpo.evalharness.endpoint import Endpoint, GaveUp, url_and_key
from psacpo.evalharness.engines.install import how_to_install, installed
from psacpo.evalharness.judges import sacpo
from psacpo.evalharness.judges.base import Item, Verdict
from psacpo.evalharness.judges.llm_replies import expected_value, read_reply
from psacpo.evalharness.judges.llm_settings import TRANSPORT, LlmJudge
from psacpo.evalharness.judges.rubrics import SCALES, blocks, reply_form, rubric_text, sendable, system_message
from psacpo.files import canonical_json, digest

# Raised whenever the same settings and replies would give another score.
_VERSION = 1
_OUTCOMES = {"A": 1.0, "tie": 0.5, "B": 0.0}
# How an endpoint says that it does not know a field of the request.
_UNKNOWN_FIELD = (400, 415, 422, 501)
# So many first requests that are refused, each for itself, are refused for what they have in common.
_HOPELESS = 8
_TOP = 20
_CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True)
class _Question:
    """One request.

    Attributes:
        item: The place of its item.
        user: The place of its message among the item's.
        first: Which answer is shown as A: "answer" or "anchor"; None in mode absolute.
    """

    item: int
    user: int
    message: str
    first: str | None


@dataclass
class _Reply:
    """What came of a question; `value` is None where nothing that counts did.

    Attributes:
        value: The outcome for the item's answer in [0, 1], or its score.
        said: For the record: the reply and how it was read.
        tries: Replies before it that were no verdict.
        failed: The endpoint gave up.
    """

    value: float | None = None
    said: dict[str, Any] = field(default_factory=dict)
    tries: list[dict[str, Any]] = field(default_factory=list)
    failed: bool = False
    usage: Counter[str] = field(default_factory=Counter)


class Llm:
    """One judge.

    Attributes:
        anchor: The policy whose answers it compares with; None in mode absolute.
        system: The part of its requests that is the same for all items.
    """

    members: Sequence[str] = ()

    def __init__(self, name: str, settings: LlmJudge) -> None:
        self.what, self.settings = f"judge '{name}'", settings
        if not installed("openai"):
            raise InputError(
                f"{self.what}: the package openai is not installed", allowed=how_to_install("openai", gpu=False)
            )
        url_and_key(settings, what=self.what, setting="base_url")
        self.batch_size = 4 * settings.concurrency
        self.anchor = settings.anchor if settings.mode == "pairwise" else None
        rubric = rubric_text(settings.rubric, settings.rubric_text, settings.rubric_file)
        low, high = settings.scale
        self.key = "score" if self.anchor is None else "verdict"
        self.options: list[Any] = list(range(low, high + 1)) if self.anchor is None else list(_OUTCOMES)
        form, self.response_format = reply_form(self.key, self.options, explain=settings.explain)
        question = SCALES[settings.mode].format(low=low, high=high)
        if settings.protocol == "sacpo":
            assert settings.rubric is not None
            question, form = sacpo.QUESTION.format(low=sacpo.LOWEST[settings.rubric]), sacpo.FORM
        self.system = system_message(rubric, question, form)
        known = settings.model_dump(mode="json", exclude={*TRANSPORT, "anchor", "rubric", "rubric_text", "rubric_file"})
        example = blocks("", {"": ""}, "")  # its words are part of every request
        self.digest = digest({"version": _VERSION, "settings": known, "system": self.system, "blocks": example})
        # What the endpoint turned out not to take.
        self._plain = settings.structured == "off" or settings.protocol == "sacpo"
        self._limit = "max_tokens"
        self._endpoint: Endpoint | None = None
        self._refused: InputError | None = None
        self._answered = False

    def reads(self, item: Item) -> Any:
        """The prompt and the answer, with the anchor's in mode pairwise."""
        return [item.prompt, item.completion] + ([item.anchor] if self.anchor is not None else [])

    def judge(self, items: Sequence[Item]) -> list[Verdict]:
        """One verdict an item.

        A question that the endpoint gave up on makes a failed verdict, one without a readable reply an invalid one.
        `raw` is JSON: `asked` holds each reply and how it was read, `system` and `users` are the messages that were sent.

        Raises:
            InputError: The endpoint knows no such key, model or route, or takes no request of this form, and nothing of
                this batch was answered.
        """
        questions = [question for place, item in enumerate(items) for question in self._questions(place, item)]
        replies: list[list[tuple[_Question, _Reply]]] = [[] for _ in items]
        if questions:
            if self._endpoint is None:
                self._endpoint = Endpoint(self.settings, what=self.what)
            for question, reply in self._endpoint.all(questions, self._ask):
                replies[question.item].append((question, reply))
        self._stop_if_hopeless([reply for found in replies for _, reply in found])
        return [self._verdict(item, found) for item, found in zip(items, replies, strict=True)]

    def estimate(self, items: Sequence[Item]) -> dict[str, Any]:
        """What asking about these items takes: calls, prompt_tokens (at 4 characters each), max_completion_tokens, usd.

        `usd` is for replies of full length and no reply asked for again; None without `price_per_million`.
        """
        questions = [question for place, item in enumerate(items) for question in self._questions(place, item)]
        characters = sum(len(self.system) + len(question.message) for question in questions)
        usage = {
            "prompt_tokens": -(-characters // _CHARACTERS_PER_TOKEN),
            "completion_tokens": len(questions) * self.settings.max_tokens,
        }
        return {
            "calls": len(questions),
            "prompt_tokens": usage["prompt_tokens"],
            "max_completion_tokens": usage["completion_tokens"],
            "usd": self.usd(usage),
        }

    def usd(self, usage: Mapping[str, int]) -> float | None:
        """What tokens cost, `Verdict.usage` or a sum of them; None without `price_per_million`."""
        price = self.settings.price_per_million
        if price is None:
            return None
        sent, got = usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0)
        return (sent * price.input + got * price.output) / 1e6

    def _questions(self, place: int, item: Item) -> list[_Question]:
        repeats = range(self.settings.repeats)
        if self.anchor is None:
            message = blocks(item.prompt, {"": item.completion}, "Judge the answer by the criteria above.")
            return [_Question(place, 0, message, None) for _ in repeats]
        if item.anchor is None or item.anchor == item.completion:
            return []
        closing = "Compare the two answers by the criteria above."
        users = [
            ("answer", blocks(item.prompt, {"A": item.completion, "B": item.anchor}, closing)),
            ("anchor", blocks(item.prompt, {"A": item.anchor, "B": item.completion}, closing)),
        ]
        return [_Question(place, user, text, first) for _ in repeats for user, (first, text) in enumerate(users)]

    def _ask(self, question: _Question) -> tuple[_Question, _Reply]:
        """Ask until a reply can be read; every reply is kept."""
        found = _Reply()
        for _ in range(self.settings.rereads + 1):
            answer = self._send(question)
            if isinstance(answer, GaveUp):
                found.failed, found.said = True, {"why": answer.why, "status": answer.status}
                if self.settings.failures_as_ties and self._refused is None:
                    found.failed, found.value = False, 0.5
                break
            found.usage += Counter(_usage(answer))
            found.value, found.said = self._read(answer["choices"][0], question)
            if found.value is not None:
                break
            found.tries.append(found.said)
        if found.tries and found.tries[-1] is found.said:
            found.tries.pop()
        return question, found

    def _stop_if_hopeless(self, replies: Sequence[_Reply]) -> None:
        """Raise where going on would only be refused; what has been answered is kept first, by the batch it is in."""
        answered = any("reply" in reply.said for reply in replies)
        self._answered = self._answered or answered
        if self._refused and not answered:
            raise self._refused
        said = [reply.said for reply in replies]
        if len(said) >= _HOPELESS and not self._answered and all(400 <= (one["status"] or 0) < 500 for one in said):
            raise InputError(f"{self.what}: the endpoint took none of the first {len(said)} requests: {said[0]['why']}")

    def _send(self, question: _Question) -> dict[str, Any] | GaveUp:
        """The endpoint's answer, after doing without what it says that it does not take."""
        plain, limit = self._plain, self._limit
        while True:
            answer = self._post(question, plain, limit)
            if not isinstance(answer, GaveUp):
                self._plain, self._limit = plain, limit
                return answer
            if answer.status not in _UNKNOWN_FIELD:
                return answer
            if limit == "max_tokens" and "max_completion_tokens" in answer.why:
                limit = "max_completion_tokens"
            elif not plain and self.settings.structured == "auto":
                plain = True
            else:
                return answer

    def _post(self, question: _Question, plain: bool, limit: str) -> dict[str, Any] | GaveUp:
        assert self._endpoint is not None
        settings = self.settings
        messages = [{"role": "system", "content": self.system}, {"role": "user", "content": question.message}]
        body: dict[str, Any] = {"model": settings.model, "messages": messages, limit: settings.max_tokens}
        if settings.temperature is not None:
            body["temperature"] = settings.temperature
        if settings.logprobs:
            body |= {"logprobs": True, "top_logprobs": _TOP}
        if not plain:
            body["response_format"] = self.response_format
        if settings.extra:
            body["extra_body"] = settings.extra
        if self._refused is None:
            try:
                return self._endpoint.send(
                    self._endpoint.client.chat.completions.with_raw_response.create,
                    body,
                    _whole,
                    allowed=f"a key in {settings.api_key_env}, a served model",
                )
            except InputError as error:
                # Not raised here: what others were answered meanwhile is paid for, and is kept.
                self._refused = error
        return GaveUp(str(self._refused))

    def _read(self, choice: Mapping[str, Any], question: _Question) -> tuple[float | None, dict[str, Any]]:
        """A reply's value for the item's answer, None if it has none, and what to record of it."""
        message = choice.get("message") or {}
        text, reason = message.get("content"), choice.get("finish_reason")
        text = sendable(text) if isinstance(text, str) else None
        said: dict[str, Any] = {"reply": text, "finish_reason": reason}
        if text is None or not text.strip():
            refusal = str(message.get("refusal") or "")[:200]
            return None, said | {"why": f"the reply is empty (finish_reason {reason}) {refusal}".strip()}
        if self.settings.protocol == "sacpo":
            # Only the first line counts: a reply that is cut off behind it is as whole as any.
            scores = sacpo.read_scores(text) if "\n" in text or reason != "length" else None
            if scores is None and self.settings.failures_as_ties:
                scores = 0.0, 0.0
            if scores is None:
                return None, said | {"why": "the reply's first line is not two scores"}
            outcome = 0.5 if scores[0] == scores[1] else float(scores[0] > scores[1])
            return outcome if question.first == "answer" else 1 - outcome, said | {"scores": scores}
        if reason == "length":
            return None, said | {"why": f"the reply was cut off at max_tokens {self.settings.max_tokens}"}
        option = read_reply(text, self.key, self.options)
        if option is None:
            return None, said | {"why": "the reply does not end with the JSON object that was asked for"}
        values = _OUTCOMES if question.first else {option: float(option) for option in self.options}
        value: float | None = float(values[option])
        if self.settings.logprobs:
            value = expected_value(choice, self.key, values)
        if value is None:
            return None, said | {"why": "the endpoint gave no probabilities of the verdict (logprobs)"}
        said |= {"verdict": option}
        return 1 - value if question.first == "anchor" else value, said

    def _verdict(self, item: Item, found: Sequence[tuple[_Question, _Reply]]) -> Verdict:
        if not found:
            if item.anchor is None:
                return Verdict(
                    None, raw=canonical_json({"why": f"there is no answer of {self.anchor} to compare with"})
                )
            return Verdict(0.5, label="tie", raw=canonical_json({"why": "not asked: both answers are the same"}))
        usage: Counter[str] = sum((reply.usage for _, reply in found), Counter())
        values = [reply.value for _, reply in found if reply.value is not None]
        whole = len(values) == len(found)
        raw = {} if whole else {"why": next(reply.said["why"] for _, reply in found if reply.value is None)}
        raw |= {
            "asked": [_said(question, reply) for question, reply in sorted(found, key=lambda pair: pair[0].user)],
            "system": self.system,
            "users": [message for _, message in sorted({(q.user, q.message) for q, _ in found})],
        }
        text = json.dumps(raw, ensure_ascii=False)
        failed = any(reply.failed for _, reply in found)
        if not whole:
            return Verdict(None, raw=text, failed=failed, usage=dict(usage))
        score = sum(values) / len(values)
        label = None
        if self.anchor is not None:
            label = "win" if score > 0.5 else "loss" if score < 0.5 else "tie"
        return Verdict(score, label=label, raw=text, usage=dict(usage))


def _whole(answer: dict[str, Any]) -> dict[str, Any]:
    """The answer, if it is one: tried again otherwise."""
    choice = answer["choices"][0]
    if not isinstance(choice["message"], dict):
        raise TypeError("its message is no object")
    return answer


def _usage(answer: Mapping[str, Any]) -> dict[str, int]:
    said = answer.get("usage")
    counted = {key: said.get(key) for key in ("prompt_tokens", "completion_tokens")} if isinstance(said, dict) else {}
    return {"calls": 1} | {key: value for key, value in counted.items() if type(value) is int and 0 <= value < 2**53}


def _said(question: _Question, reply: _Reply) -> dict[str, Any]:
    found: dict[str, Any] = {"first": question.first} if question.first else {}
    found |= {"outcome" if question.first else "score": reply.value} | reply.said | {"user": question.user}
    return found | ({"tries": reply.tries} if reply.tries else {})
