"""The settings of `serve`. No torch here."""

from __future__ import annotations

import ipaddress
import math
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SecretStr, field_validator, model_validator

from psacpo.config import Strict
from psacpo.serve.ratios import Dial, grid_steps

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", re.IGNORECASE | re.ASCII)
# vLLM's flags that `serve` sets itself; given a second time they would undo what it checked.
# fmt: off
_OURS = frozenset((
    "--model", "--served-model-name", "--host", "--port", "--api-key", "--enable-lora", "--no-enable-lora",
    "--max-lora-rank", "--max-loras", "--lora-modules", "--dtype", "--max-model-len", "--gpu-memory-utilization",
    "--tensor-parallel-size", "-tp", "--pipeline-parallel-size", "-pp", "--quantization", "-q", "--seed", "--revision",
    "--api-server-count", "-asc", "--uds", "--headless", "--grpc", "--root-path",
))
# fmt: on


def parse_size(value: object) -> object:
    """Bytes from `20GB`, `500M` or a number; anything else is left for pydantic to refuse."""
    if not isinstance(value, str):
        return value
    found = _SIZE.fullmatch(value.strip())
    if found is None:
        raise ValueError(f"size '{value}' cannot be read; allowed: bytes, or a number with a unit such as 20GB")
    return round(float(found[1]) * _UNITS[found[2].upper()])


def default_cache() -> Path:
    """Where policies are kept if nothing else is said: psacpo/policies in the user's cache directory."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "psacpo" / "policies"


class ServeConfig(Strict):
    """A policy at any ratio behind an OpenAI-compatible endpoint.

    Attributes:
        base: Model directory or hub id; None takes what the adapters name.
        reward: The reward adapter, a PEFT directory.
        safety: The safety adapter, a PEFT directory.
        ratios: Serve these ratios and nothing else; empty serves any from 0 to 1.
        host: Address to listen on; one that other machines reach needs an api_key.
        port: TCP port.
        api_key: Clients must send it as a bearer token, for every path but /health.
        max_ratios: Policies held at once beside the ends (or pins); the least recently used goes first.
        snap: Move a ratio to the nearest multiple of this, 1/n, which bounds the different ratios for good.
        cache_dir: Where built policies are kept; servers may share it.
        cache_size: Bytes that the policies in cache_dir may take together.
        max_loras: Different ratios in one batch of the engine; each takes a slot of adapter memory on the device.
        dtype: Of the weights on the device; auto is vLLM's choice: the base's own, half precision for a float32 base.
        max_model_len: Longest prompt and answer together, in tokens; None is the base's own.
        gpu_memory_utilization: Part of the device's memory that the engine takes; None is vLLM's own choice.
        tensor_parallel_size: Devices that each layer is split over.
        pipeline_parallel_size: Groups of devices that the layers are spread over.
        quantization: vLLM's name of a quantisation of the base; None is what config.json says.
        seed: Of sampling.
        engine_args: Further arguments of vLLM's server, as on its command line.
        verbose: Show vLLM's own log from the start, not only once it serves.
    """

    reward: Path
    safety: Path
    base: Annotated[str | None, BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value)] = None
    ratios: list[float] = Field(default_factory=list)
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65535)
    api_key: SecretStr | None = None
    max_ratios: int = Field(64, ge=1)
    snap: float | None = None
    cache_dir: Path = Field(default_factory=default_cache)
    cache_size: Annotated[int, BeforeValidator(parse_size), Field(gt=0)] = 20 * 10**9
    max_loras: int = Field(10, ge=1)
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    max_model_len: int | None = Field(None, ge=1)
    gpu_memory_utilization: float | None = Field(None, gt=0, le=1)
    tensor_parallel_size: int = Field(1, ge=1)
    pipeline_parallel_size: int = Field(1, ge=1)
    quantization: str | None = None
    seed: int = Field(0, ge=0)
    engine_args: list[str] = Field(default_factory=list)
    verbose: bool = False

    @field_validator("ratios")
    @classmethod
    def _in_range(cls, ratios: list[float]) -> list[float]:
        for ratio in ratios:
            if not math.isfinite(ratio) or not 0 <= ratio <= 1:
                raise ValueError(f"ratio {ratio:g} is out of range; allowed: a number from 0 to 1")
        return sorted({abs(ratio) for ratio in ratios})

    @field_validator("api_key")
    @classmethod
    def _a_token(cls, key: SecretStr | None) -> SecretStr | None:
        # A header's value: visible ASCII. Anything else could never be sent, so every client would be locked out.
        if key is not None and not re.fullmatch(r"[\x21-\x7e]+", key.get_secret_value()):
            raise ValueError("api_key is empty or holds white space or other than ASCII characters")
        return key

    @field_validator("engine_args")
    @classmethod
    def _not_ours(cls, arguments: list[str]) -> list[str]:
        for argument in arguments:
            flag = argument.partition("=")[0]
            if flag.replace("_", "-") in _OURS:
                raise ValueError(f"{flag} is set by psacpo serve; allowed: its own option, or other options of vLLM")
        return arguments

    @model_validator(mode="after")
    def _fits_together(self) -> ServeConfig:
        if not is_loopback(self.host) and self.api_key is None:
            raise ValueError(
                f"host {self.host} can be reached from other machines; allowed: an api key (--api-key), or 127.0.0.1"
            )
        if self.snap is not None:
            grid_steps(self.snap)  # raises where it is no grid
            if self.ratios:
                raise ValueError("snap is for a server of any ratio, and ratio pins some; allowed: one of the two")
        return self

    @property
    def steps(self) -> int | None:
        """Steps of the grid that ratios are moved to, None where there is none."""
        return None if self.snap is None else grid_steps(self.snap)

    def dial(self, bases: tuple[str, ...]) -> Dial:
        """What model names are answered."""
        return Dial(bases=bases, pins=tuple(self.ratios), steps=self.steps)

    def engine_flags(self) -> list[str]:
        """The arguments of vLLM's server that are said here by their own names."""
        said: dict[str, Any] = {
            "--dtype": self.dtype,
            "--max-loras": self.max_loras,
            "--max-model-len": self.max_model_len,
            "--gpu-memory-utilization": self.gpu_memory_utilization,
            "--tensor-parallel-size": self.tensor_parallel_size,
            "--pipeline-parallel-size": self.pipeline_parallel_size,
            "--quantization": self.quantization,
            "--seed": self.seed,
        }
        return [text for flag, value in said.items() if value is not None for text in (flag, str(value))]


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
