"""Settings of the server: what is refused before anything is started, and what reaches vLLM's command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from psacpo.config import validate
from psacpo.errors import InputError
from psacpo.serve.config import ServeConfig, default_cache, is_loopback

ENDS = {"reward": Path("r"), "safety": Path("s")}


def config(**values: Any) -> ServeConfig:
    return validate(ServeConfig, ENDS | values, where="the command line")


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"host": "0.0.0.0"}, "host 0.0.0.0 can be reached from other machines; allowed: an api key .--api-key."),
        ({"host": "::"}, "can be reached from other machines"),
        ({"host": "192.168.0.7"}, "can be reached from other machines"),
        ({"host": "gpu-box"}, "can be reached from other machines"),
        ({"host": ""}, "can be reached from other machines"),
        ({"host": "0.0.0.0", "api_key": ""}, "api_key is empty"),
        ({"api_key": "two words"}, "api_key is empty or holds white space"),
        ({"ratios": [1.5]}, "ratio 1.5 is out of range"),
        ({"ratios": [float("nan")]}, "finite"),
        ({"snap": 0.3}, "snap 0.3 does not divide 1"),
        ({"snap": 0.05, "ratios": [0.3]}, "allowed: one of the two"),
        ({"max_ratios": 0}, "max_ratios"),
        ({"port": 0}, "port"),
        ({"port": 70000}, "port"),
        ({"cache_size": "many"}, "size 'many' cannot be read"),
        ({"cache_size": 0}, "greater than 0"),
        ({"gpu_memory_utilization": 1.2}, "less than or equal to 1"),
        ({"dtype": "float8"}, "dtype"),
        ({"engine_args": ["--max-lora-rank=512"]}, "--max-lora-rank is set by psacpo serve"),
        ({"engine_args": ["--max_lora_rank", "512"]}, "--max_lora_rank is set by psacpo serve"),
        ({"engine_args": ["--api-key", "x"]}, "--api-key is set by psacpo serve"),
        ({"max_ratio": 3}, "did you mean 'max_ratios'"),
    ],
)
def test_refused_in_one_line(values: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError, match=line) as caught:
        config(**values)
    assert "\n" not in str(caught.value)


def test_defaults_are_private_and_bounded() -> None:
    found = config()
    assert found.host == "127.0.0.1"
    assert found.api_key is None
    assert found.max_ratios == 64
    assert found.cache_size == 20 * 10**9


def test_a_key_opens_the_host_and_is_not_printed() -> None:
    found = config(host="0.0.0.0", api_key="s3cret")
    assert "s3cret" not in repr(found) + str(found) + found.model_dump_json()


def test_loopback() -> None:
    assert [is_loopback(host) for host in ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost")] == [True] * 5
    assert [is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "localhost.evil.com", "")] == [False] * 5


@pytest.mark.parametrize(
    ("text", "size"), [("20GB", 20 * 10**9), ("1.5M", 1_500_000), ("300", 300), ("2 tb", 2 * 10**12), (7, 7)]
)
def test_sizes(text: Any, size: int) -> None:
    assert config(cache_size=text).cache_size == size


def test_pins_are_sorted_and_said_once() -> None:
    assert config(ratios=[0.6, 0.3, 0.3, -0.0]).ratios == [0.0, 0.3, 0.6]


def test_the_cache_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert default_cache() == Path("/x/psacpo/policies")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/u")
    assert default_cache() == Path("/home/u/.cache/psacpo/policies")


def test_engine_flags_hold_what_was_said_and_nothing_unsaid() -> None:
    assert config().engine_flags() == [
        "--dtype", "auto", "--max-loras", "10", "--tensor-parallel-size", "1", "--pipeline-parallel-size", "1",
        "--seed", "0",
    ]  # fmt: skip
    said = config(gpu_memory_utilization=0.5, max_model_len=128, quantization="awq").engine_flags()
    assert [
        said[said.index(flag) + 1] for flag in ("--gpu-memory-utilization", "--max-model-len", "--quantization")
    ] == ["0.5", "128", "awq"]
