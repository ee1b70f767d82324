"""The documents do not drift: every command block in README runs, links lead somewhere, the flag list is the code's."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from psacpo.recipe import Project

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("recipes/**/*.md"), ROOT / "benchmarks/README.md"]
)


def blocks(text: str) -> list[list[str]]:
    """The command lines of each ```sh block."""
    return [block.strip().splitlines() for block in re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)]


def run_block(lines: list[str], place: Path) -> None:
    """Run lines as a shell would, `cd` included, with psacpo as this interpreter's."""
    here = place
    for line in lines:
        words = shlex.split(line)
        if words[0] == "cd":
            here = here / words[1]
            continue
        assert words[0] == "psacpo", line
        command = [sys.executable, "-m", "psacpo.cli", *words[1:]]
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
        # 3: the random tiny models of this test need not meet the constraint that the line asks for.
        assert done.returncode in (0, 3 if "--constraint" in words else 0), (line, done.stderr)


def test_readme_has_the_blocks_that_are_tested_here() -> None:
    found = blocks((ROOT / "README.md").read_text())
    assert found[0] == ["make demo", "make test"]
    assert len(found) == 3
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert {"demo", "test", "test-all", "lint", "types", "docs", "bench", "clean"} <= set(targets)


@pytest.mark.xdist_group("demo")
def test_readme_two_commands_set_up_and_run(demo_run: Path) -> None:
    """`make demo` ran in the fixture by its own line; `make test` is what runs this, so its line is read."""
    assert (demo_run / "demo-run" / "frontier" / "report.html").is_file()
    planned = subprocess.run(["make", "-n", "test"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    # Within `make test` a second make also says which directory it enters and leaves.
    assert any(" -m pytest " in line for line in planned.splitlines())


@pytest.mark.xdist_group("demo")
def test_readme_commands_in_the_demos_directory(demo_run: Path, tmp_path: Path) -> None:
    shutil.copytree(demo_run / "demo-run", tmp_path / "demo-run", ignore=shutil.ignore_patterns("policies"))
    run_block(blocks((ROOT / "README.md").read_text())[1], tmp_path)
    assert (tmp_path / "demo-run" / "policies" / "policy@0.30" / "adapter_config.json").is_file()


def test_readme_commands_on_ones_own_model(tmp_path: Path, tiny_llama: Path, tiny_judge: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "my-model")
    for name in ("my-reward", "my-cost"):
        shutil.copytree(tiny_judge, tmp_path / name)
    words = ["loaf", "bread", "lock", "bike", "heat", "first", "second", "then"]
    rows = [{"prompt": f"bake the {w}", "chosen": f"mix the {w} help", "rejected": f"sorry {w}"} for w in words]
    for name in ("helpful", "harmless"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
    # A tiny model has 256 positions, and the default answer is 512 tokens: the recipe that align left takes the change.
    lines = blocks((ROOT / "README.md").read_text())[2]
    run_block(lines[:1], tmp_path)
    recipe = tmp_path / "project" / "psacpo.yaml"
    recipe.write_text(recipe.read_text() + "generation: {max_new_tokens: 16}\n")
    run_block(lines[1:], tmp_path)
    page = (tmp_path / "project" / "frontier" / "report.html").read_text()
    assert "psacpo frontier --reward-model ../my-reward --cost-model ../my-cost --prompts ../prompts.jsonl" in page
    # The same again needs no flags, and finds every answer.
    again = [sys.executable, "-m", "psacpo.cli", "frontier", "--dry-run", "--json"]
    planned = json.loads(subprocess.run(again, cwd=tmp_path / "project", capture_output=True, check=True).stdout)
    assert planned["answers"] == planned["answers found"] == 10 * len(rows)
    assert (tmp_path / "project" / "policy" / "model.safetensors").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target


def test_the_flag_list_is_the_codes() -> None:
    spec = importlib.util.spec_from_file_location("make_cli", ROOT / "docs" / "make_cli.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert page == module.render(), "run `make docs`"
    assert "..." not in page.split("Commands:\n")[1].split("```")[0], "a command's line is cut at 100 columns"


@pytest.mark.parametrize("recipe", sorted(ROOT.glob("recipes/**/psacpo.yaml")), ids=lambda path: path.parent.name)
def test_recipes_are_valid(recipe: Path) -> None:
    project = Project.find(recipe)
    project.align()
    project.frontier()
    project.merge(ratios=[0.3])


def test_the_table_of_judge_presets_is_the_codes() -> None:
    from psacpo.evalharness.judges.presets import PRESETS

    page = (ROOT / "docs" / "judges.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| `([\w-]+)` \| (scalar|guard|refusal) \| (higher|lower) \| (.*?) \| (.*) \|$", page, flags=re.MULTILINE
    )
    assert [row[0] for row in rows] == list(PRESETS)
    for name, kind, better, licence, model in rows:
        one = PRESETS[name]
        assert (kind, better, licence) == (one.settings["kind"], one.settings["better"], one.licence), name
        assert model == (f"[{one.settings['model']}]({one.source})" if "model" in one.settings else "a rule of psacpo")


@pytest.mark.parametrize("file", sorted(ROOT.glob("recipes/judges/*.yaml")), ids=lambda path: path.stem)
def test_files_of_judges_are_valid(file: Path) -> None:
    from psacpo.evalharness.judging.config import parse_judges

    assert len(parse_judges([str(file)])) > 1


def test_pages_name_every_key_of_a_recipe() -> None:
    from psacpo.align.config import Stage
    from psacpo.recipe_keys import Recipe

    pages = "".join((ROOT / "docs" / f"{name}.md").read_text() for name in ("align", "merge", "frontier", "engines"))
    for settings in (Recipe, Stage):
        for name, field in settings.model_fields.items():
            assert f"{field.alias or name}" in pages, name
