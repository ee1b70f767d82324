"""Token ids for a judge's template around text that nobody vouches for: an answer cannot end the template or open a turn.

The judge reads what it was trained on: the whole text is encoded at once, as its own tokenizer does it. Where that turns a
part of an untrusted span into a control token, that token is written out as plain text instead.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, TypeAlias

from psacpo.errors import InputError

_LEFT, _RIGHT = "\n ", " \n"
_STAND_IN = r"PSACPOcontent(\d+)x"
# What is left of the padding -> what the template strips: nothing, line breaks, all white space.
_KEPT_LEFT: dict[str, str | None] = {"\n ": "", " ": "\n", "": None}
_KEPT_RIGHT: dict[str, str | None] = {" \n": "", " ": "\n", "": None}


@dataclass(frozen=True)
class Span:
    """A piece of text from a prompt or an answer.

    Attributes:
        cut: Whether its end may be cut off where the whole is too long.
    """

    text: str
    cut: bool = False


Piece: TypeAlias = str | Span
# The template's own text, or a message's index and what is stripped off its content's two ends.
_Part: TypeAlias = str | tuple[int, str | None, str | None]


class Encoder:
    """Encodes pieces of which `str` are trusted and `Span` are not.

    Args:
        tokenizer: A fast transformers tokenizer.
        what: What error lines call its owner.
        trusted: The judge's templates: added tokens that occur in them are control tokens too, marked as such or not.
        markers: Words of the template that are no tokens of their own (`[/INST]` in Llama 2); in a span a space is put
            behind their first letter.

    Raises:
        InputError: The tokenizer has no fast version, so where a token came from cannot be told.
    """

    def __init__(self, tokenizer: Any, *, what: str, trusted: str = "", markers: Sequence[str] = ()) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise InputError(f"the tokenizer of {what} has no fast version (tokenizer.json)")
        self.tokenizer, self.what = tokenizer, what
        added: Mapping[int, Any] = tokenizer.added_tokens_decoder
        self.control = {
            number: str(token.content)
            for number, token in added.items()
            if token.special or (token.content.strip() and token.content in trusted)
        }
        names = set(self.control.values())
        self.markers = [marker for marker in markers if marker not in names]
        lengths = map(len, tokenizer.get_vocab())
        self.longest = max(lengths, default=1)

    def encode(self, pieces: Sequence[Piece], **options: Any) -> list[int]:
        """The ids alone of `encode_cut`."""
        return self.encode_cut(pieces, **options)[0]

    def encode_cut(
        self,
        pieces: Sequence[Piece],
        *,
        max_length: int,
        truncate: bool = False,
        max_cut: int | None = None,
        add_special_tokens: bool = False,
    ) -> tuple[list[int], bool]:
        """Token ids of the pieces one behind the other, at most `max_length`, and whether a span was cut.

        Args:
            truncate: Cut the end off the last `cut` span where the whole is too long.
            max_cut: Most tokens of that span; the rest is cut off whether the whole fits or not.
            add_special_tokens: Let the tokenizer put its BOS or EOS around the whole.

        Raises:
            InputError: The text is longer than `max_length` tokens.
        """
        # A text of so many letters has more tokens than that, whatever it says; a megabyte is not encoded to learn it.
        most = (max_length + 1) * self.longest
        parts: list[str] = []
        spans: list[tuple[int, int]] = []
        cut: tuple[int, int] | None = None
        shortened = False
        place = 0
        for piece in pieces:
            text = piece if isinstance(piece, str) else self._harmless(piece.text)
            if isinstance(piece, Span):
                length = len(text)
                if piece.cut and max_cut is not None:
                    text = text[: (max_cut + 1) * self.longest]
                if len(text) > most:
                    if not (truncate and piece.cut):
                        raise InputError(f"{len(text)} characters, over max_length {max_length} tokens")
                    text = text[:most]
                shortened |= len(text) < length
                spans.append((place, place + len(text)))
                cut = spans[-1] if piece.cut else cut
            parts.append(text)
            place += len(text)
        whole = "".join(parts)
        found = self.tokenizer(
            whole, add_special_tokens=add_special_tokens, return_offsets_mapping=True, return_attention_mask=False
        )
        ids: list[int] = []
        inside: list[int] = []
        for number, (start, end) in zip(found["input_ids"], found["offset_mapping"], strict=True):
            plain = self._plain(number, start, end, whole, spans)
            if cut is not None and start < end and cut[0] <= start and end <= cut[1]:
                inside += range(len(ids), len(ids) + len(plain))
            ids += plain
        spare = len(inside) if max_cut is None else min(max_cut, len(inside))
        dropped = set(inside[spare:])
        excess = len(ids) - len(dropped) - max_length
        if excess > 0:
            if not truncate or excess > spare:
                raise InputError(f"{len(ids) - len(dropped)} tokens, over max_length {max_length}")
            dropped |= set(inside[spare - excess : spare])
        return [number for index, number in enumerate(ids) if index not in dropped], shortened or bool(dropped)

    def require_one_bos(self, ids: Sequence[int]) -> None:
        """Refuse ids that begin with BOS twice: the template writes one where the tokenizer puts one already."""
        bos = self.tokenizer.bos_token_id
        if bos is not None and list(ids[:2]) == [bos, bos]:
            raise InputError(f"the template of {self.what} writes the BOS token twice")

    def _harmless(self, text: str) -> str:
        text = clean(text)
        for marker in self.markers:
            text = text.replace(marker, f"{marker[0]} {marker[1:]}")
        return text

    def _plain(self, number: int, start: int, end: int, whole: str, spans: Sequence[tuple[int, int]]) -> list[int]:
        """The token itself; for a control token out of a span, those of its name as plain text."""
        name = self.control.get(number)
        if name is None or start == end:
            return [number]
        # Some control tokens swallow the white space beside them: what counts is where the name stands.
        at = whole.find(name, start, end)
        if at >= 0:
            start, end = at, at + len(name)
        if not any(max(start, left) < min(end, right) for left, right in spans):
            return [number]
        ids = self._letters([name])
        if self.control.keys() & set(ids):
            ids = [one for one in self._letters(name) if one not in self.control]
        return ids

    def _letters(self, texts: Sequence[str]) -> list[int]:
        return [
            number
            for text in texts
            for number in self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        ]


def clean(text: str) -> str:
    """`text` with pairs of surrogates joined and lone ones as U+FFFD: tokenizers take no others."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def fill(template: str, fields: Mapping[str, str], *, trusted: Mapping[str, str] | None = None) -> list[Piece]:
    """A template's pieces: its own text, what stands for {name} by `trusted`, and a span for {name} by `fields`.

    All in one pass: a prompt that holds the text {completion} stays as it is.
    """
    pieces: list[Piece] = []
    known = trusted or {}
    pattern = "|".join(re.escape(name) for name in (*fields, *known))
    for index, part in enumerate(re.split(rf"\{{({pattern})\}}", template)):
        if index % 2:
            pieces.append(known[part] if part in known else Span(fields[part], cut=part == "completion"))
        elif part:
            pieces.append(part)
    return pieces


class Chat:
    """A tokenizer's chat template around messages whose content is untrusted.

    The template sees stand-ins in place of the contents, so nothing in an answer can steer it (one that drops everything
    before `</think>`, say). Where it strips white space from contents, it is stripped here.
    """

    def __init__(self, tokenizer: Any, *, what: str, add_generation_prompt: bool = False, **options: Any) -> None:
        self.tokenizer, self.what = tokenizer, what
        self.options = {"add_generation_prompt": add_generation_prompt} | options
        self._known: dict[tuple[str, ...], list[_Part]] = {}
        self._in_parts = False

    def pieces(self, messages: Sequence[Mapping[str, str]]) -> list[Piece]:
        """The pieces of the written conversation; the last message may be cut.

        Raises:
            InputError: The template refuses messages of these roles, or leaves one of them out.
        """
        roles = tuple(str(message["role"]) for message in messages)
        if roles not in self._known:
            self._known[roles] = self._learn(roles)
        pieces: list[Piece] = []
        for part in self._known[roles]:
            if isinstance(part, str):
                pieces.append(part)
                continue
            index, left, right = part
            text = messages[index]["content"]
            text = text if left == "" else text.lstrip(left)
            text = text if right == "" else text.rstrip(right)
            pieces.append(Span(text, cut=index == len(messages) - 1))
        return pieces

    def _learn(self, roles: tuple[str, ...]) -> list[_Part]:
        """The parts, of a template that takes contents as texts or as lists of parts, as those that also take images."""
        try:
            return self._learn_by(roles)
        except InputError as error:
            self._in_parts = True
            try:
                return self._learn_by(roles)
            except InputError:
                self._in_parts = False
                raise error from None

    def _learn_by(self, roles: tuple[str, ...]) -> list[_Part]:
        names = [f"PSACPOcontent{index}x" for index in range(len(roles))]
        bare = re.split(_STAND_IN, self._render(roles, names))
        padded = re.split(_STAND_IN, self._render(roles, [f"{_LEFT}{name}{_RIGHT}" for name in names]))
        written = set(map(int, bare[1::2]))
        for index, role in enumerate(roles):
            if index not in written:
                raise InputError(f"the chat template of {self.what} leaves out the message of '{role}'")
        left: dict[int, str | None] = {}
        right: dict[int, str | None] = {}
        for place in range(0, len(bare), 2) if bare[1::2] == padded[1::2] else ():
            # Between two contents: what is left of the one's right padding, the template's own text, the other's left.
            ends = _KEPT_RIGHT if place else {"": ""}
            starts = _KEPT_LEFT if place < len(bare) - 1 else {"": ""}
            for end, start in product(ends, starts):
                if end + bare[place] + start == padded[place]:
                    right[place - 1], left[place + 1] = ends[end], starts[start]
                    break
        return [
            (int(part), left.get(place, ""), right.get(place, "")) if place % 2 else part
            for place, part in enumerate(bare)
            if part
        ]

    def _render(self, roles: Sequence[str], contents: Sequence[str]) -> str:
        messages = [
            {"role": role, "content": [{"type": "text", "text": content}] if self._in_parts else content}
            for role, content in zip(roles, contents, strict=True)
        ]
        try:
            text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, **self.options)
        except Exception as error:  # a template is somebody's code: it raises what it likes
            raise InputError(
                f"the chat template of {self.what} cannot write messages of {', '.join(roles)}: {error}"
            ) from error
        return text
