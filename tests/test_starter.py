"""`psacpo init`: the recipe it leaves is one that every command reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from psacpo.cli import app
from psacpo.errors import InputError
from psacpo.recipe import Project
from psacpo.starter import DATA, starter


@pytest.mark.parametrize("data", DATA)
def test_the_recipe_is_read_by_align_and_frontier(tmp_path: Path, tiny_llama: Path, data: str) -> None:
    path = starter(tmp_path / "new", base=str(tiny_llama), data=data)
    project = Project.find(path)
    align = project.align()
    assert [stage.name for stage in align.stages] == ["reward", "safety"]
    assert align.base == str(tiny_llama)
    frontier = project.frontier()
    assert [str(constraint) for constraint in frontier.constraints] == ["unsafe_rate<=0.05"]
    # The cost judge gives a probability, so the default "cost above 0" would call every answer unsafe.
    assert frontier.all_metrics()["unsafe_rate"].above == 0.5
    assert frontier.judges["reward"].better == "higher"
    assert frontier.judges["cost"].better == "lower"


def test_a_recipe_is_never_overwritten(tmp_path: Path) -> None:
    starter(tmp_path, base="org/model")
    before = (tmp_path / "psacpo.yaml").read_text()
    with pytest.raises(InputError, match="is there already"):
        starter(tmp_path, base="org/other")
    assert (tmp_path / "psacpo.yaml").read_text() == before


def test_what_is_wrong_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="data 'pku'.*pku-saferlhf"):
        starter(tmp_path, base="org/model", data="pku")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is not a directory"):
        starter(tmp_path / "file", base="org/model")
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
    assert "init" in {command.callback.__name__ for command in app.registered_commands if command.callback}
