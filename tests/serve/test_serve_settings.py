"""The recipe and the flags of `psacpo serve`, and the command itself as far as it goes without vLLM."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from psacpo.errors import InputError
from psacpo.recipe import Project
from psacpo.serve.config import ServeConfig
from psacpo.serve.settings import serve_settings, split_arguments

RunCommand = Callable[..., subprocess.CompletedProcess[str]]


def project(root: Path, **more: object) -> Project:
    (root / "psacpo.yaml").write_text(
        json.dumps({"base": "org/base", "adapters": {"reward": "r", "safety": "s"}} | more)
    )
    return Project.find(root)


def test_a_project_says_base_and_adapters(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    found = serve_settings(project(tmp_path))
    assert (found.base, found.reward, found.safety) == ("org/base", tmp_path / "r", tmp_path / "s")
    assert (found.dtype, found.seed) == ("auto", 0)  # unsaid, the base's own
    local = serve_settings(project(tmp_path, base="own", dtype="bfloat16", seed=5))
    assert (local.base, local.dtype, local.seed) == (str(tmp_path / "own"), "bfloat16", 5)


def test_it_finds_what_merge_finds(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    here = project(tmp_path, base="./model")
    merged, served = here.merge(ratios=[0.5]), serve_settings(here)
    assert (str(merged.base), str(merged.reward), str(merged.safety)) == (
        served.base,
        str(served.reward),
        str(served.safety),
    )


def test_flags_win(tmp_path: Path) -> None:
    found = serve_settings(
        project(tmp_path), reward=Path("other"), ratios=[0.3], port=8001, cache_size="2GB", host=None
    )
    assert (found.reward, found.safety) == (Path("other"), tmp_path / "s")
    assert (found.ratios, found.port, found.cache_size, found.host) == ([0.3], 8001, 2 * 10**9, "127.0.0.1")


def test_what_is_missing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"'reward' is missing: there is no psacpo.yaml here; allowed: --reward"):
        serve_settings(Project.find(None))
    with pytest.raises(InputError, match=r"'safety' is missing: \S*psacpo.yaml does not say it; allowed: --safety"):
        serve_settings(project(tmp_path, adapters={"reward": "r"}))


def test_arguments_for_vllm_are_split_as_by_a_shell() -> None:
    assert split_arguments("--enforce-eager --chat-template 'a b.jinja'") == [
        "--enforce-eager",
        "--chat-template",
        "a b.jinja",
    ]
    assert split_arguments(None) is None
    with pytest.raises(InputError, match="--engine-args cannot be split"):
        split_arguments("--chat-template 'a")


def test_every_field_has_its_flag(psacpo: RunCommand, tmp_path: Path) -> None:
    shown = psacpo("serve", "--help", cwd=tmp_path).stdout
    for name in ServeConfig.model_fields:
        assert f"--{name.replace('_', '-')} " in shown, name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "'reward' is missing: there is no psacpo.yaml here"),
        (["--host", "0.0.0.0"], "host 0.0.0.0 can be reached from other machines; allowed: an api key (--api-key)"),
        (["--ratio", "1.5"], "ratio 1.5 is out of range"),
        (["--ratio", "nan"], "ratio"),
        (["--snap", "0.3"], "snap 0.3 does not divide 1"),
        (["--snap", "0.1", "--ratio", "0.3"], "snap is for a server of any ratio"),
        (["--max-ratios", "0"], "max_ratios"),
        (["--cache-size", "lots"], "size 'lots' cannot be read"),
        (["--engine-args", "--port 9"], "--port is set by psacpo serve"),
        (["--dtype", "float8"], "dtype"),
    ],
)
def test_bad_input_is_one_line(psacpo: RunCommand, tmp_path: Path, arguments: list[str], words: str) -> None:
    ends = ["--reward", "r", "--safety", "s"] if arguments else []
    done = psacpo("serve", *ends, *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""


def test_a_port_in_use_or_no_vllm_is_one_line(psacpo: RunCommand, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = psacpo("serve", "--reward", "r", "--safety", "s", "--port", str(port), cwd=tmp_path)
    assert done.returncode == 2
    [line] = done.stderr.strip().splitlines()
    assert "vLLM is not installed; allowed: " in line or f"cannot listen on 127.0.0.1 port {port}" in line


def test_ctrl_c_ends_a_server_and_promises_nothing() -> None:
    """Other commands go on from where they were; a server that is started again starts again."""
    script = (
        "import sys, psacpo.serve\n"
        "def interrupted(config): raise KeyboardInterrupt\n"
        "psacpo.serve.serve = interrupted\n"
        "from psacpo.cli import main\n"
        "sys.argv = ['psacpo', 'serve', '--reward', 'r', '--safety', 's']\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "psacpo: ended\n")
