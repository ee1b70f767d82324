"""`psacpo init`: a recipe to start from, with every choice that a first run asks for and what it means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import yaml

from psacpo.errors import InputError, unknown_name
from psacpo.files import readable_io_errors, write_atomically


class Data(NamedTuple):
    """Where the preference rows of both stages come from: the lines of the recipe, and what to do for them."""

    reward: str
    safety: str
    template: str
    hint: str


DATA: dict[str, Data] = {
    "own": Data(
        "    data: data/helpful.jsonl               # rows prompt, chosen, rejected; or completion, label for loss kto",
        "    data: data/safe.jsonl",
        "",
        "put your rows at data/helpful.jsonl and data/safe.jsonl",
    ),
    "pku-saferlhf": Data(
        "    data: PKU-Alignment/PKU-SafeRLHF-30K   # CC BY-NC 4.0: research only\n    preset: pku-saferlhf-helpful",
        "    data: PKU-Alignment/PKU-SafeRLHF-30K\n    preset: pku-saferlhf-safe",
        '# template: "BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:"   # for a base with no chat template\n',
        "the data is taken from the hub",
    ),
}
"""Name of `--data` -> where rows come from."""

_TEXT = """\
# One project, every command: psacpo align, frontier, merge, serve, or psacpo run for all of them in a row.
# Relative paths start at this file. Each command's page in docs/ says which other keys there are.
base: {base}
dtype: bfloat16                            # float32 on a CPU
{template}
# align: stage 1 for helpfulness, stage 2 from it for safety.
beta: 0.1                                  # KL weight of stage 1
lambda: 10                                 # stage 2 has beta/lambda: large, so that its end of the dial is safe
lora: {{r: 16, alpha: 32, dropout: 0.05}}
stages:
  - name: reward
{reward}
    loss: dpo
    epochs: 1
  - name: safety
{safety}
    loss: dpo
    epochs: 1

# frontier: every ratio answers the prompts, judges score the answers.
prompts: data/prompts.jsonl                # rows id, prompt; optional category and cluster; best some hundred
judges:                                    # psacpo judge --list names the presets, with licences
  reward: {{preset: skywork-v2-small}}
  cost: {{preset: qwen3guard}}               # probability of harm, so unsafe is above one half
metrics:
  unsafe_rate: {{judge: cost, above: 0.5}}
constraints: ["unsafe_rate<=0.05"]         # the most helpful ratio that meets it at this confidence is chosen
confidence: 0.95
ratios: [0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1]
generation: {{max_new_tokens: 512, temperature: 1.0}}
"""


def starter(directory: Path, *, base: str, data: str = "own") -> Path:
    """Write a psacpo.yaml to start from, never over one that is there.

    Args:
        directory: The project's; made if there is none.
        base: A model directory or hub id. A directory is written as an absolute path.
        data: A name of `DATA`.

    Returns:
        The recipe's path.

    Raises:
        InputError: There is a recipe already, `directory` cannot be one, `base` is empty, or `data` is unknown.
    """
    if data not in DATA:
        raise unknown_name("data", data, DATA)
    if not base.strip():
        raise InputError("--base is missing", allowed="a model directory or a hub id")
    if not (base.isprintable() and str(directory).isprintable()):
        raise InputError("--base or the directory holds a letter that cannot be shown", allowed="printable letters")
    path = directory / "psacpo.yaml"
    with readable_io_errors(directory):
        if path.exists() or path.is_symlink():
            raise InputError(f"{path} is there already", allowed="another directory, or remove it first")
        if directory.exists() and not directory.is_dir():
            raise InputError(f"{directory} is not a directory")
        named = json.dumps(_placed(base), ensure_ascii=False)
        text = _TEXT.format(base=named, **DATA[data]._asdict())
        assert yaml.safe_load(text)["base"]
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError as error:
            raise InputError(f"cannot write {path}: no directory can be made there") from error
        write_atomically(path, text)
    return path


def _placed(base: str) -> str:
    """A model directory as an absolute path, a hub id as it stands."""
    try:
        place = Path(base).expanduser()
        return str(place.resolve()) if place.is_dir() else base
    except (OSError, RuntimeError) as error:  # no home for ~, or a name as long as no path is
        raise InputError(f"--base is no path and no hub id: {type(error).__name__}", given=base[:80]) from error
