"""The real command in a process of its own: what a user types, sees, and gets when something is wrong."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.xdist_group("cli")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tiny_judge: Path) -> Path:
    """A project directory that `psacpo align` left: two adapters and psacpo.yaml."""
    root = tmp_path_factory.mktemp("cli")
    rows = [
        {"prompt": f"how do i bake {word}", "chosen": f"mix the {word} help", "rejected": f"sorry {word}"}
        for word in ["loaf", "bread", "lock", "bike", "heat", "first", "second", "then"]
    ]
    for name in ("helpful", "safe"):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = [{"id": str(i), "prompt": row["prompt"]} for i, row in enumerate(rows)]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    stage = {"max_steps": 2, "batch_size": 4, "learning_rate": 0.01}
    recipe = {
        "base": str(tiny_llama),
        "max_length": 64,
        "lora": {"r": 2, "alpha": 4},
        "stages": [
            {"name": "reward", "data": "helpful.jsonl"} | stage,
            {"name": "safety", "data": "safe.jsonl"} | stage,
        ],
        "prompts": "prompts.jsonl",
        "ratios": [0.0, 0.5, 1.0],
        "judges": {
            "reward": {"kind": "scalar", "model": str(tiny_judge)},
            "cost": {"kind": "scalar", "model": str(tiny_judge), "better": "lower"},
        },
        "generation": {"max_new_tokens": 8},
        "resamples": 200,
        "constraints": ["unsafe_rate<=1"],
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = psacpo_command("align", "recipe.yaml", "--out", "project", cwd=root)
    assert done.returncode == 0, done.stderr
    assert "reward adapter: project/reward" in done.stdout
    return root / "project"


def psacpo_command(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "psacpo.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """One line on the error stream, exit 2, nothing on standard output."""
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert done.stderr.startswith("psacpo: error: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stdout == ""
    for word in words:
        assert word in done.stderr, (word, done.stderr)


def copy(project: Path, tmp_path: Path) -> Path:
    import shutil

    # With what lies beside it: the recipe's paths lead there.
    shutil.copytree(project.parent, tmp_path / "copy")
    return tmp_path / "copy" / project.name


def test_the_two_commands_work_as_typed(project: Path) -> None:
    merged = psacpo_command("merge", "--ratio", "0.3", cwd=project)
    assert merged.returncode == 0, merged.stderr
    assert merged.stdout.splitlines() == [
        "reward: reward",
        "safety: safety",
        "wrote policies/policy@0.30",
    ]
    assert (project / "policies" / "policy@0.30" / "adapter_model.safetensors").is_file()
    measured = psacpo_command("frontier", cwd=project)
    assert measured.returncode == 0, measured.stderr
    assert "policy@0.50" in measured.stdout
    assert "chosen ratio: " in measured.stdout
    assert (project / "frontier" / "report.html").is_file()
    assert measured.stdout.startswith("chosen ratio: ")
    assert max(map(len, measured.stdout.splitlines())) <= 100
    # Quiet when piped: no progress bars of ours or of the libraries.
    assert "\r" not in measured.stderr
    assert "\x1b" not in measured.stdout + measured.stderr
    rebuilt = psacpo_command("report", "frontier", cwd=project)
    assert rebuilt.stdout == "wrote frontier/report.html\n"
    again = psacpo_command("merge", "--ratio", "0.3", cwd=project)
    assert again.returncode == 0
    assert "policies/policy@0.30 is there already" in again.stderr
    assert again.stdout.splitlines()[-1] == "there already: policies/policy@0.30"
    (project / "policies" / "policy@0.30" / "README.md").write_text("changed")
    refused(psacpo_command("merge", "--ratio", "0.3", cwd=project), "policies/policy@0.30", "in use", "--overwrite")
    assert psacpo_command("merge", "--ratio", "0.3", "--overwrite", cwd=project).returncode == 0


def test_output_for_machines(project: Path) -> None:
    merged = psacpo_command(
        "merge", "--ratios", "0:1:0.5", "--as", "checkpoint", "--out", "grid", "--json", cwd=project
    )
    assert merged.returncode == 0, merged.stderr
    found = json.loads(merged.stdout)
    assert found["outputs"] == ["grid/policy@0.00", "grid/policy@0.50", "grid/policy@1.00"]
    assert all((project / path / "model.safetensors").is_file() for path in found["outputs"])
    measured = psacpo_command("frontier", "--out", "machine", "--json", cwd=project)
    assert json.loads(measured.stdout)["choice"]["constraints"] == ["unsafe_rate<=1"]
    plan = psacpo_command("frontier", "--out", "planned", "--dry-run", "--json", cwd=project)
    assert json.loads(plan.stdout)["answers"] == 4 * 8
    assert not (project / "planned").exists()
    shown = psacpo_command("frontier", "--out", "planned", "--dry-run", cwd=project)
    assert "policies:           policy@0.00, policy@0.50, policy@1.00, base\n" in shown.stdout
    assert not set("[]{}'") & set(shown.stdout)
    plan = psacpo_command("align", "--dry-run", "--json", cwd=project)
    assert plan.returncode == 0, plan.stderr
    assert json.loads(plan.stdout)["reward.state"] == "done"


def test_no_ratio_meets_the_constraint(project: Path) -> None:
    done = psacpo_command("frontier", "--constraint", "unsafe_rate<=0", "--out", "strict", cwd=project)
    assert done.returncode == 3, (done.stdout, done.stderr)
    assert "chosen ratio: none: no ratio meets unsafe_rate<=0" in done.stdout


def test_aligning_again_does_nothing_again(project: Path) -> None:
    weights = project / "safety" / "adapter_model.safetensors"
    before = weights.stat().st_mtime_ns, weights.read_bytes()
    done = psacpo_command("align", cwd=project)
    assert done.returncode == 0, done.stderr
    assert before == (weights.stat().st_mtime_ns, weights.read_bytes())


def test_help_is_there_for_all(tmp_path: Path) -> None:
    verbs = ("demo", "align", "merge", "frontier", "report", "serve", "run", "doctor")
    for verb in verbs:
        done = psacpo_command(verb, "--help", cwd=tmp_path)
        assert done.returncode == 0
        assert done.stdout.startswith(f"Usage: psacpo {verb}") or "Usage: " in done.stdout
        # Options say what they take in the reader's words, not in Python's.
        assert not any(name in done.stdout for name in ("<str>", "<int>", "<float>", "list["))
    bare = psacpo_command(cwd=tmp_path)
    assert bare.returncode == 0
    assert all(verb in bare.stdout for verb in verbs)


def test_help_loads_no_heavy_library(tmp_path: Path) -> None:
    script = (
        "import sys; sys.argv = ['psacpo', 'merge', '--help']\n"
        "import psacpo.cli\n"
        "try: psacpo.cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'peft', 'numpy', 'scipy', 'matplotlib', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["merge", "--ratio", "abc"], ["ratio 'abc' is not a number", "0 to 1"]),
        (["merge", "--ratio", "1.5"], ["ratio 1.5 is out of range"]),
        (["merge", "--ratio", "0.3", "--as", "gguf"], ["gguf", "adapter"]),
        (
            ["merge", "--ratio", "0.3", "--reward", "nowhere", "--out", "new"],
            ["no reward model nowhere", "no directory nowhere"],
        ),
        (["merge", "--ratio", "0.3", "--reward", "frontier.nope", "--out", "new"], ["frontier.nope"]),
        (["merge", "--ratio", "0.3", "--base", ".", "--out", "new"], ["not a model directory"]),
        (["merge"], ["--ratio"]),
        (["merge", "--rato", "0.3"], ["--rato", "--ratio"]),
        (["frontier", "--constraint", "harm<=0.1"], ["harm", "unsafe_rate"]),
        (["frontier", "--constraint", "unsafe_rate<0.1"], ["cannot be read"]),
        (["frontier", "--prompts", "nowhere.jsonl"], ["nowhere.jsonl"]),
        (["frontier", "--engine", "llama.cpp"], ["engine"]),
        (["frontier", "--reward-model", "reward"], ["judge 'reward'", "no config.json"]),
        (["frontier", "--out", "reward"], ["reward", "in use"]),
        (["frontier", "no-such-recipe.yaml"], ["no recipe at no-such-recipe.yaml"]),
        (["align", "--reward-data", "nowhere.jsonl"], ["nowhere.jsonl"]),
        (["align", "--base", "policies", "--out", "x"], ["policies"]),
        (["report", "reward"], ["reward", "frontier.json"]),
        (["frontier", "--out", "a" * 300], ["cannot write", "too long"]),
        (["frontier", "--template", "\udcff{prompt}"], ["template holds bytes that are no UTF-8"]),
        (["demo", "--seed", "-1", "--out", "new"], ["the seed is negative"]),
        (["frobnicate"], ["frobnicate"]),
    ],
)
def test_bad_input(project: Path, arguments: list[str], words: list[str]) -> None:
    before = sorted(path.name for path in project.iterdir())
    refused(psacpo_command(*arguments, cwd=project), *words)
    assert sorted(path.name for path in project.iterdir()) == before


def test_bad_data(project: Path, tmp_path: Path) -> None:
    here = copy(project, tmp_path)

    def align(text: str) -> subprocess.CompletedProcess[str]:
        (here / "rows.jsonl").write_text(text)
        return psacpo_command("align", "--safety-data", "rows.jsonl", "--out", "new", cwd=here)

    refused(align(""), "rows.jsonl holds no row")
    refused(align('{"prompt": "a", "chosn": "b", "rejected": "c"}\n'), "chosen", "did you mean 'chosn'")
    refused(align('{"prompt": "a"\n'), "line 1")
    assert not (here / "new").exists()


def test_run_refuses_an_adapter_that_no_stage_makes(project: Path, tmp_path: Path) -> None:
    here = copy(project, tmp_path)
    recipe = yaml.safe_load((here / "psacpo.yaml").read_text())
    (here / "psacpo.yaml").write_text(yaml.safe_dump(recipe | {"adapters": {"reward": "reward", "safety": "safe"}}))
    refused(psacpo_command("run", cwd=here), "adapter 'safety' is to be at safe", "a stage: reward, safety")


def test_an_adapter_for_another_base(project: Path, make_adapter: Any, tiny_qwen2: Path, tmp_path: Path) -> None:
    other = make_adapter(tiny_qwen2, seed=11)
    refused(
        psacpo_command("merge", "--ratio", "0.3", "--safety", other, "--out", tmp_path / "x", cwd=project),
        "another base",
    )
    refused(psacpo_command("frontier", "--safety", other, "--out", tmp_path / "x", cwd=project), "adapter")
    assert not (tmp_path / "x").exists()


def test_no_space(project: Path, tmp_path: Path) -> None:
    """A limit on file size stands in for a full disk: the same write fails in the same way for the command."""
    script = (
        "import shutil, sys\n"
        "usage = shutil.disk_usage\n"
        "shutil.disk_usage = lambda path: usage(path)._replace(free=1000)\n"
        "from psacpo.cli import main\n"
        f"sys.argv = ['psacpo', 'merge', '--ratio', '0.3', '--out', {str(tmp_path / 'x')!r}]\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=project, capture_output=True, text=True, check=False)
    refused(done, "no space", "GB needed")
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_cannot_be_used_is_one_line(project: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused(psacpo_command("demo", "--out", tmp_path / "file" / "x", cwd=tmp_path), "file")
    here = copy(project, tmp_path)
    (here / "taken" / "completions.jsonl").mkdir(parents=True)
    (here / "taken" / "psacpo.json").write_text('{"kind": "frontier"}')
    done = psacpo_command("frontier", "--out", "taken", cwd=here)
    refused(done, "taken/completions.jsonl: is a directory")
    with (here / "psacpo.yaml").open("a") as recipe:
        recipe.write('frontier: "\\ud800"\n')
    refused(psacpo_command("frontier", cwd=here), "cannot write", "ud800", "half a surrogate pair")


def test_ctrl_c_is_130(project: Path, tmp_path: Path) -> None:
    script = (
        "import sys, psacpo.merge.run as run\n"
        "def interrupted(config): raise KeyboardInterrupt\n"
        "run.merge = interrupted\n"
        "from psacpo.cli import main\n"
        f"sys.argv = ['psacpo', 'merge', '--ratio', '0.3', '--out', {str(tmp_path / 'x')!r}]\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=project, capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert done.stderr == "psacpo: interrupted; the same command goes on from here\n"


def test_who_reads_the_output_may_go_away_and_a_full_device_is_one_line(project: Path) -> None:
    def shell(line: str) -> subprocess.CompletedProcess[str]:
        words = line.replace("COMMAND", f"{shlex.quote(sys.executable)} -m psacpo")
        return subprocess.run(["bash", "-c", words], cwd=project, capture_output=True, text=True, check=False)

    for command in ("merge --ratio 0.3 --out x --dry-run", "judge --list"):
        done = shell(f"set -o pipefail; COMMAND {command} | true")
        assert (done.returncode, done.stderr) == (0, "")
        refused(shell(f"COMMAND {command} > /dev/full"), "cannot write what is printed: no space left on device")
    # More than a pipe's buffer and Python's hold, so that the write itself fails.
    big = "import sys, psacpo.cli as cli; cli._print_plan = lambda *_: print('x' * 10**6); cli.main()"
    python = f"{shlex.quote(sys.executable)} -c {shlex.quote(big)}"
    done = shell(f"set -o pipefail; {python} merge --ratio 0.3 --out x --dry-run | true")
    assert (done.returncode, done.stderr) == (0, "")
    assert shell("set -o pipefail; COMMAND merge --ratio 2 2>&1 | true").returncode == 2


def test_a_second_ctrl_c_changes_nothing(project: Path, tmp_path: Path) -> None:
    script = (
        "import os, signal, sys, time, psacpo.merge.run as run\n"
        "def again(): os.kill(os.getpid(), signal.SIGINT)\n"
        "def interrupted(config):\n"
        "    try: again()\n"
        "    finally: again(); print('tidied', file=sys.stderr)\n"
        "run.merge = interrupted\n"
        "import atexit; atexit.register(again)\n"
        "from psacpo.cli import main\n"
        f"sys.argv = ['psacpo', 'merge', '--ratio', '0.3', '--out', {str(tmp_path / 'x')!r}]\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=project, capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert done.stderr == "tidied\npsacpo: interrupted; the same command goes on from here\n"


def test_sigterm_leaves_nothing_half_written(project: Path, tmp_path: Path) -> None:
    script = (
        "import os, signal, sys, psacpo.merge.adapter_jobs as adapter_jobs\n"
        "def stopped(*arguments, **options): os.kill(os.getpid(), signal.SIGTERM)\n"
        "adapter_jobs.write_adapter = stopped\n"
        "from psacpo.cli import main\n"
        f"sys.argv = ['psacpo', 'merge', '--ratio', '0.3', '--out', {str(tmp_path / 'x')!r}]\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=project, capture_output=True, text=True, check=False)
    assert done.returncode == 143, done.stderr
    assert list(tmp_path.iterdir()) == []
