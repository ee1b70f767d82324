"""Scores that somebody else gave: people, other tools, the logs of lm-eval and inspect."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from psacpo.errors import InputError, unknown_name
from psacpo.evalharness.judges.base import Item, Verdict
from psacpo.evalharness.judges.rule_settings import ImportJudge
from psacpo.files import digest, digest_file
from psacpo.merge.config import policy_name
from psacpo.rows import Row, read_rows

Key = tuple[str, str, int]
# inspect's letters: correct, partial, incorrect, no answer.
_LETTERS = {"C": 1.0, "P": 0.5, "I": 0.0, "N": 0.0}
_INPUTS = frozenset(["doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter", "metrics"])


@dataclass(frozen=True)
class _Given:
    """One score of the file: whose, and in which row it stands."""

    key: Key
    value: Any
    where: str


class Imported:
    """Looks up (prompt id, policy, sample); an answer without a row is an invalid verdict that says so."""

    batch_size = 4096
    members: Sequence[str] = ()
    anchor: str | None = None

    def __init__(self, name: str, settings: ImportJudge) -> None:
        self.settings = settings
        self.what = f"judge '{name}'"
        if not settings.path.is_file():
            raise InputError(f"{self.what}: no file of scores at {settings.path}")
        self.scores = self._read()
        self.digest = digest({"import": settings.model_dump(exclude={"path"}), "file": digest_file(settings.path)})

    def reads(self, item: Item) -> Any:
        """Which answer it is; and its text, because scores are those of one text."""
        return [item.prompt_id, item.policy, item.sample, item.completion]

    def judge(self, items: Sequence[Item]) -> list[Verdict]:
        """One verdict an item."""
        return [self._one((item.prompt_id, item.policy, item.sample)) for item in items]

    def _one(self, key: Key) -> Verdict:
        if key not in self.scores:
            prompt, policy, sample = key
            return Verdict(None, raw=f"no row for prompt '{prompt}', policy '{policy}', sample {sample}")
        value = self.scores[key]
        return Verdict(value) if math.isfinite(value) else Verdict(None, raw="the row holds no score")

    def _read(self) -> dict[Key, float]:
        scores: dict[Key, float] = {}
        places: dict[Key, str] = {}
        for given in self._given():
            if given.key in scores:
                prompt, policy, sample = given.key
                raise InputError(
                    f"{given.where} is a second score of prompt '{prompt}', policy '{policy}', sample {sample}",
                    given=f"the first is {places[given.key]}",
                    allowed="one row an answer",
                )
            scores[given.key], places[given.key] = _number(given), given.where
        return scores

    def _given(self) -> Iterator[_Given]:
        path, layout = self.settings.path, self.settings.format
        if layout in ("auto", "inspect") and path.suffix == ".json":
            loaded = _json(path.read_text(encoding="utf-8", errors="replace"), str(path))
            if isinstance(loaded, dict) and isinstance(loaded.get("samples"), list):
                return self._inspect(loaded)
        if layout == "inspect":
            raise InputError(f"{path} is no inspect log", allowed="its JSON form: inspect log convert --to json")
        rows = read_rows(path)
        if layout == "lm-eval" or (layout == "auto" and all({"doc_id", "resps"} <= set(row) for row in rows)):
            return self._lm_eval(rows)
        return self._rows(rows)

    def _rows(self, rows: Sequence[Row]) -> Iterator[_Given]:
        for number, row in enumerate(rows, start=1):
            where = f"{self.settings.path} row {number}"
            prompt = row.get("prompt_id", row.get("id"))
            if prompt is None:
                raise InputError(f"{where}: {unknown_name('column', 'prompt_id', row)}")
            if self.settings.score not in row:
                raise InputError(f"{where}: {unknown_name('column', self.settings.score, row)}")
            key = (str(prompt), self._policy(row, where), _whole(row.get("sample"), where))
            yield _Given(key, row[self.settings.score], where)

    def _policy(self, row: Mapping[str, Any], where: str) -> str:
        if row.get("policy") is not None:
            return str(row["policy"])
        if row.get("ratio") is None:
            return self.settings.policy
        try:
            return policy_name(float(row["ratio"]))
        except (TypeError, ValueError, OverflowError):
            raise InputError(f"{where}: ratio is no number", given=repr(row["ratio"])[:60]) from None

    def _lm_eval(self, rows: Sequence[Row]) -> Iterator[_Given]:
        """lm-eval's samples_*.jsonl: the prompt's id is that of the document, else its number in the task."""
        for number, row in enumerate(rows, start=1):
            where = f"{self.settings.path} row {number}"
            metrics = [name for name in row if name not in _INPUTS and not name.endswith("_hash")]
            if self.settings.score not in metrics:
                raise InputError(f"{where}: {unknown_name('metric', self.settings.score, metrics)}")
            doc = row.get("doc")
            prompt = doc["id"] if isinstance(doc, dict) and doc.get("id") is not None else row.get("doc_id")
            yield _Given((str(prompt), self.settings.policy, 0), row[self.settings.score], where)

    def _inspect(self, log: Mapping[str, Any]) -> Iterator[_Given]:
        """inspect's JSON log: a sample's id is the prompt's, its epochs are the samples; C, P, I, N are 1, 0.5, 0, 0."""
        for number, row in enumerate(log["samples"], start=1):
            where = f"{self.settings.path} sample {number}"
            if not isinstance(row, dict) or "id" not in row:
                raise InputError(f"{where} has no id")
            scores = row.get("scores") or {}
            if not isinstance(scores, dict) or not all(isinstance(one, dict) for one in scores.values()):
                raise InputError(f"{where}: its scores are damaged", allowed='"scores": {SCORER: {"value": ...}}')
            epoch = _whole(row.get("epoch", 1), where) - 1
            if scores and self.settings.score not in scores:
                raise InputError(f"{where}: {unknown_name('scorer', self.settings.score, scores)}")
            # A sample that ended in an error has no scores: nothing is known of it.
            value = scores[self.settings.score].get("value") if scores else None
            yield _Given((str(row["id"]), self.settings.policy, epoch), _LETTERS.get(str(value), value), where)


def _number(given: _Given) -> float:
    """The score as a number, NaN where the row leaves it empty."""
    if given.value is None or given.value == "":
        return math.nan
    try:
        value = float(given.value)
    except (TypeError, ValueError, OverflowError):
        value = math.inf
    if math.isinf(value):
        raise InputError(f"{given.where}: the score is no finite number", given=repr(given.value)[:60])
    return value


def _whole(value: Any, where: str) -> int:
    if value is None:
        return 0
    try:
        if int(value) == float(value):
            return int(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise InputError(f"{where}: sample or epoch is no whole number", given=repr(value)[:60])


def _json(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON: {error}") from error
