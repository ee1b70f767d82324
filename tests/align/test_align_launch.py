"""More than one process: what `accelerate launch` is given."""

from __future__ import annotations

from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[2] / "recipes" / "accelerate"


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_the_files(path: Path) -> None:
    """As `accelerate launch --config_file` does: unknown keys are errors, and the launcher makes plugins of the rest."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import DistributedType

    config = load_config_from_file(str(path))
    kinds = {"multi_gpu": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed_zero2": "DEEPSPEED", "deepspeed_zero3": "DEEPSPEED"}
    assert config.distributed_type == DistributedType(kinds[path.stem])
    head = [line.removeprefix("#").strip() for line in path.read_text().splitlines() if line.startswith("#")]
    [command] = [line for line in head if line.startswith("accelerate launch")]
    assert f"--config_file recipes/accelerate/{path.name} " in command
    parsed = launch_command_parser().parse_args(command.split()[2:])
    assert (parsed.module, parsed.training_script, parsed.training_script_args) == (
        True,
        "psacpo",
        ["align", "recipe.yaml"],
    )
    parsed, _, _ = _validate_launch_command(parsed)
    assert parsed.use_fsdp == (path.stem == "fsdp2")
    assert parsed.use_deepspeed == path.stem.startswith("deepspeed")
    if path.stem == "fsdp2":
        assert (parsed.fsdp_version, parsed.fsdp_state_dict_type) == (2, "FULL_STATE_DICT")
    if parsed.use_deepspeed:
        assert int(parsed.zero_stage) == int(path.stem[-1])
