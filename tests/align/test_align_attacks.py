"""Bad input that once trained something else, or ended in a traceback: refused in one line, or made good."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from psacpo.align import align
from psacpo.align.checkpoints import Checkpoints, full_disk_as_such
from psacpo.align.config import AlignConfig
from psacpo.align.data import read_data
from psacpo.align.model import find_base, load_causal
from psacpo.errors import InputError
from psacpo.prompting import render_prompt
from psacpo.recipe import Project
from psacpo.rows import read_rows

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
SCORED = {"prompt": "hi", "chosen": MESSAGES, "rejected": MESSAGES, "score_rejected": 0}


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 10**400, 1e300])
def test_numbers_that_decide_nothing(number: float, tmp_path: Path, write_rows: Callable[..., Path]) -> None:
    scored = write_rows(tmp_path / "scored.jsonl", [SCORED | {"score_chosen": number}])
    with pytest.raises(InputError, match="row 1.*score_chosen.*allowed: a finite number"):
        read_data(str(scored), {}, "ultrafeedback")
    margin = write_rows(tmp_path / "m.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c", "margin": number}])
    with pytest.raises(InputError, match="row 1.*margin.*allowed: a finite number"):
        read_data(str(margin), {}, wanted=("margin",))


def test_a_csv_of_digits_and_one_with_a_column_twice(tmp_path: Path) -> None:
    (tmp_path / "digits.csv").write_text("prompt,chosen,rejected,margin\n1+1,02,3,0.5\n", encoding="utf-8")
    row = {"prompt": "1+1", "chosen": "02", "rejected": "3", "margin": 0.5}
    assert read_rows(tmp_path / "digits.csv") == [row]
    (tmp_path / "twice.csv").write_text("prompt,chosen,chosen\na,b,c\n", encoding="utf-8")
    with pytest.raises(InputError, match="two columns 'chosen'"):
        read_rows(tmp_path / "twice.csv")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"naive": True}, "naive needs a stage that starts at another"),
        ({"lora": {"target_modules": "q_proj"}}, "'q_proj'; allowed: all-linear, or a list"),
        ({"lora": {"target_modules": []}}, "allowed: all-linear, or a list"),
        ({"template": "\ud800{prompt}"}, "half a surrogate pair"),
        ({"stages": [{"name": "a", "data": "d", "batch_size": 10**30}]}, "batch_size|less than or equal"),
        ({"stages": [{"name": "a" * 300, "data": "d"}]}, "300 characters; allowed: at most 100"),
    ],
)
def test_settings(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        AlignConfig.model_validate({"base": "b", "out": tmp_path, "stages": [{"name": "a", "data": "d"}]} | settings)


def damaged(base: Path, name: str, place: Path) -> Path:
    shutil.copytree(base, place)
    weights = place / "model.safetensors"
    if name == "cut short":
        weights.write_bytes(weights.read_bytes()[:5000])
    else:
        weights.unlink()
        save_file({"lm_head.weight": torch.zeros(1)}, place / "model-00001-of-00002.safetensors")
        index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
        (place / "model.safetensors.index.json").write_text(json.dumps(index))
    return place


@pytest.mark.parametrize("name", ["cut short", "a shard missing"])
def test_weights_that_cannot_be_read(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    base = find_base(str(damaged(tiny_llama, name, tmp_path / "base")))
    with pytest.raises(InputError, match="cannot load the weights of"):
        load_causal(base, "float32")


def test_a_role_that_the_template_leaves_out() -> None:
    class Tokenizer:
        chat_template, name_or_path = "some", "model"

        def apply_chat_template(self, messages: Any, **_: Any) -> str:
            return "".join(m["content"] for m in messages if m["role"] in ("user", "assistant"))

    assert render_prompt(Tokenizer(), MESSAGES, None) == "hiyes"
    with pytest.raises(InputError, match="leaves out messages of 'human'"):
        render_prompt(Tokenizer(), [{"role": "human", "content": "hello"}], None)


@pytest.mark.parametrize("damage", [lambda f: f.unlink(), lambda f: f.write_bytes(f.read_bytes()[:2])])
def test_a_checkpoint_that_lost_a_part_is_passed_over(damage: Callable[[Path], None], tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "key")
    for step in (1, 2):
        checkpoints.at(step).mkdir()
        (checkpoints.at(step) / "optimizer.pt").write_bytes(b"state")
        checkpoints.finish(step, {"metrics": [step]})
    found = checkpoints.latest()
    assert found is not None
    assert found[1] == {"metrics": [2]}
    damage(checkpoints.at(2) / "optimizer.pt")
    assert checkpoints.latest() is None


def test_a_full_disk_is_no_error_of_the_data(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left"), full_disk_as_such(tmp_path):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 114112 vs 114004")
    with pytest.raises(RuntimeError, match="other"), full_disk_as_such(tmp_path):
        raise RuntimeError("other")


def test_a_recipe_of_the_user_stays(
    tiny_llama: Path,
    tmp_path: Path,
    rows: Any,
    write_rows: Callable[..., Path],
    make_config: Callable[..., AlignConfig],
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, home = tmp_path / "out", tmp_path / "out" / "psacpo.yaml"
    out.mkdir()
    home.write_text("base: mine  # a comment\n")
    config = make_config(tiny_llama, out, [{"data": write_rows(tmp_path / "rows.jsonl", rows(8)), "max_steps": 1}])
    align(config)
    project = Project(None, Path(), "the command line")
    project.leave(config)
    assert home.read_text() == "base: mine  # a comment\n"
    assert "stays as it is" in capsys.readouterr().err
    home.unlink()
    project.leave(config)
    # What was added to the one that was left is still there when align comes by again.
    added = home.read_text() + "prompts: p.jsonl\n"
    home.write_text(added)
    project.leave(config)
    assert home.read_text() == added
    project.leave(config.model_copy(update={"beta": 0.2}))
    assert "prompts: p.jsonl" in home.read_text()
    assert "beta: 0.2" in home.read_text()
