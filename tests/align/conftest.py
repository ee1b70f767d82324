"""Rows that can be learnt, settings of tiny runs, and one finished run that many tests look at."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from psacpo.align import AlignConfig, align

WORDS = ["how", "do", "i", "bake", "a", "loaf", "of", "bread", "the", "mix", "open", "heat", "then", "with", "bike"]
Rows = Sequence[Any]
WriteRows = Callable[..., Path]
MakeConfig = Callable[..., AlignConfig]


def learnable_rows(count: int, *, seed: int = 0, chosen: str = "help", rejected: str = "sorry") -> list[dict[str, str]]:
    """Preferences that one word decides: each answer begins with its marker."""
    draw = random.Random(seed)

    def words(low: int, high: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(low, high)))

    return [
        {"prompt": words(3, 8), "chosen": f"{chosen} {words(2, 6)}", "rejected": f"{rejected} {words(2, 6)}"}
        for _ in range(count)
    ]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads cost these tiny models more than they give, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def rows() -> Callable[..., list[dict[str, str]]]:
    """`rows(count, seed=0)`: the rows of `learnable_rows`."""
    return learnable_rows


@pytest.fixture(scope="session")
def write_rows() -> WriteRows:
    """Write rows as JSON lines: `write_rows(path, rows)`."""

    def write(path: Path, rows: Rows) -> Path:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def make_config() -> MakeConfig:
    """Settings of a tiny run: `make_config(base, out, [{"data": …}, …], **settings)`; stages are a, b, c if unnamed."""

    def make(base: Path | str, out: Path, stages: list[dict[str, Any]], **settings: Any) -> AlignConfig:
        common = {"learning_rate": 1e-2, "batch_size": 8, "max_steps": 3, "lr_scheduler": "constant"}
        full = [
            {"name": "abc"[place]} | common | stage | {"data": str(stage["data"])} for place, stage in enumerate(stages)
        ]
        values = {"base": str(base), "out": out, "stages": full, "lora": {"r": 4, "alpha": 8}, "device": "cpu"}
        return AlignConfig.model_validate(values | settings)

    return make


@pytest.fixture(scope="session")
def finished(
    one_thread: None,
    tiny_llama: Path,
    tmp_path_factory: pytest.TempPathFactory,
    write_rows: WriteRows,
    make_config: MakeConfig,
) -> AlignConfig:
    """A finished run: `reward`, `safety` from it, and `naive` on safety's data from the base."""
    place = tmp_path_factory.mktemp("run")
    first = write_rows(place / "first.jsonl", learnable_rows(48))
    second = write_rows(place / "second.jsonl", learnable_rows(40, seed=1, chosen="open", rejected="lock"))
    config = make_config(
        tiny_llama,
        place / "out",
        [
            {"name": "reward", "data": first, "max_steps": 12},
            {"name": "safety", "data": second, "max_steps": 4},
            {"name": "naive", "data": second, "max_steps": 4, "start": "base", "beta": 0.01},
        ],
        seed=7,
    )
    assert align(config) == place / "out"
    return config


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def metrics() -> Callable[[Path], list[dict[str, Any]]]:
    """`metrics(directory)`: the lines of its metrics.jsonl."""
    return read_metrics
