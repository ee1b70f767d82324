"""The wheel guard: what ships is what the allow-list names, and it works without the checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SKIPPED = (
    ".git",
    ".venv",
    ".venv-vllm",
    ".mypy",
    ".mypy_cache",
    ".ruff_cache",
    ".pytest_cache",
    "build",
    "dist",
    "__pycache__",
    "*-run",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the tree in a directory of another name, with a stray file at its root."""
    copy = tmp_path_factory.mktemp("build") / "p-sacpo"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*SKIPPED), symlinks=True)
    (copy / "stray.py").write_text("raise SystemExit('a stray module shipped')\n", encoding="utf-8")
    (copy / "align" / "notes.txt").write_text("no package data\n", encoding="utf-8")
    out = copy.parent / "wheels"
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
        str(copy),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    [built] = out.glob("*.whl")
    return built


def test_only_the_allow_list_ships(wheel: Path) -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    modules = {f"{name.replace('.', '/')}.py" for name in settings["py-modules"]}
    packages = {name.replace(".", "/") for name in settings["packages"]}
    for name in names:
        assert name in modules or str(Path(name).parent) in packages or name.startswith("psacpo/demo/weights/"), name
        assert Path(name).suffix != ".txt"
    assert modules <= set(names)
    assert not any("tests/" in name or Path(name).name.startswith(("test_", "conftest")) for name in names)
    assert max(Counter(names).values()) == 1


def test_every_module_of_the_checkout_ships(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in ("align", "merge", "evalharness", "demo"):
        for path in (ROOT / package).rglob("*.py"):
            assert f"psacpo/{path.relative_to(ROOT).as_posix()}" in names
    for path in ROOT.glob("*.py"):
        assert f"psacpo/{path.name}" in names
    for package in ("align", "merge", "evalharness", "demo"):
        assert f"psacpo/{package}/py.typed" in names


def test_the_demo_and_the_page_ship(wheel: Path) -> None:
    files = {info.filename: info.file_size for info in zipfile.ZipFile(wheel).infolist()}
    assert "psacpo/demo/psacpo.yaml" in files
    weights = {name: size for name, size in files.items() if name.endswith(".safetensors")}
    assert {Path(name).parent.name for name in weights} == {"base", "reward", "cost"}
    assert sum(weights.values()) <= 6_000_000
    assert any(name.endswith(".html.jinja") for name in files)


def test_the_wheel_runs_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(target)
    # -S -I would lose the dependencies; a path in front of all others wins over the editable finder.
    script = (
        f"import sys; sys.path.insert(0, {str(target)!r})\n"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f).lower()]\n"
        "import psacpo, psacpo.cli, psacpo.demo, psacpo.recipe\n"
        f"assert psacpo.__file__.startswith({str(target)!r}), psacpo.__file__\n"
        "sys.argv = ['psacpo', '--version']; psacpo.cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("psacpo ")


def test_the_version_is_said_once_and_the_same() -> None:
    import psacpo

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == psacpo.__version__


def test_every_direct_dependency_is_pinned_within_its_bounds() -> None:
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            pins[name.lower()] = version
    for text in (*project["dependencies"], *project["optional-dependencies"]["dev"]):
        requirement = Requirement(text)
        assert requirement.name.lower() in pins, requirement.name
        assert pins[requirement.name.lower()] in requirement.specifier, text
    for text in project["dependencies"]:
        operators = {specifier.operator for specifier in Requirement(text).specifier}
        assert {">=", "<"} <= operators, f"{text} lacks a tested bound"
