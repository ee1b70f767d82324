"""What can be known to be wrong before a sweep starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from psacpo.errors import InputError
from psacpo.evalharness.baseline_settings import ModelBaseline
from psacpo.evalharness.baselines import check_outsiders
from psacpo.evalharness.config import FrontierConfig
from psacpo.evalharness.engines.plan import require_engine
from psacpo.evalharness.judges import Judge, make_judge
from psacpo.evalharness.judges.guard_spec import GuardSpec, read_spec
from psacpo.evalharness.judges.rule_settings import KlJudge
from psacpo.evalharness.judges.settings import GuardJudge
from psacpo.evalharness.judging.calibrate import read_calibration
from psacpo.evalharness.judging.verdicts import in_order
from psacpo.evalharness.prompt_sets import prompt_sets
from psacpo.evalharness.prompts import Job, PromptRow, read_prompts
from psacpo.files import read_manifest, readable_io_errors, require_apart
from psacpo.prompting import end_of_turn_ids


def check(config: FrontierConfig) -> tuple[list[PromptRow], dict[str, Judge]]:
    """What can be checked before there are adapters: output directory, prompts, judges, device."""
    require_run_directory(config.out)
    models = [Path(getattr(settings, "model", "")) for settings in config.judges.values() if hasattr(settings, "model")]
    models += [Path(one.model) for one in config.baselines.values() if isinstance(one, ModelBaseline)]
    require_apart(
        config.out, [path for path in (Path(config.base), *models, *config.adapters.values()) if path.is_dir()]
    )
    require_engine(config)
    check_outsiders(config)
    if config.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise InputError("device cuda: there is no CUDA device", allowed="auto, cpu")
    prompts = read_prompts(config.prompts)
    require_fields(config, prompts)
    judges = {
        name: make_judge(name, settings, device=config.device, allow_code=config.allow_code)
        for name, settings in config.judges.items()
    }
    require_members(config, judges)
    require_templates(config, prompts)
    _require_kl(config)
    return prompts, judges


def _require_kl(config: FrontierConfig) -> None:
    """Refuse a judge of the distance to the base in a sweep that does not measure it."""
    name = next((name for name, one in config.judges.items() if isinstance(one, KlJudge)), None)
    if name is not None and not config.measures_kl():
        raise InputError(
            f"judge '{name}' is of kind kl_to_base, which this sweep does not measure",
            given=f"engine {config.engine}, generation.kl_to_base {config.generation.kl_to_base}".lower(),
            allowed="generation: {kl_to_base: true}",
        )


def require_members(config: FrontierConfig, judges: Mapping[str, Judge]) -> None:
    """Refuse judges made of others that are not there, and an anchor that no policy is."""
    in_order(judges)
    calibrations(config, judges)
    policies = config.policy_names()
    for name, judge in judges.items():
        if judge.anchor is not None and judge.anchor not in policies:
            raise InputError(
                f"judge '{name}' compares with policy '{judge.anchor}', which is none of this sweep",
                allowed=", ".join(policies),
            )


def require_run_directory(run: Path) -> None:
    """A new or empty directory, or one that a `frontier` of before left."""
    with readable_io_errors(run):
        if run.is_symlink() or (run.exists() and not run.is_dir()):
            raise InputError(f"output {run} exists and is not a directory")
        used = run.is_dir() and any(path.name != ".lock" for path in run.iterdir())
    if used:
        manifest = read_manifest(run)
        if manifest is None or manifest.get("kind") != "frontier":
            raise InputError(
                f"output directory {run} is in use (it holds files that are not a frontier run's)",
                allowed="a new or empty directory, or an earlier run to go on with",
            )


def require_one_bos(tokenizer: Any, jobs: Sequence[Job]) -> None:
    """Refuse a prompt in whose text the BOS token is written once more: it would cut off what stands before it.

    Only where BOS is nothing but that: some models end turns with it too, and some templates begin each turn with it.
    """
    bos = tokenizer.bos_token_id
    if bos is None or bos == tokenizer.eos_token_id or bos in end_of_turn_ids(tokenizer):
        return
    for job in jobs:
        prompt, count = job.row.prompt, job.request.prompt_ids.count(bos)
        turns = 1 if isinstance(prompt, str) else sum(message["role"] == "user" for message in prompt)
        if count > max(turns, 1):
            raise InputError(
                f"prompt '{job.row.id}' holds the BOS token {tokenizer.bos_token!r} {count} times",
                allowed="once, at its beginning: take it out of the prompt's text or of the template",
            )


def require_fields(config: FrontierConfig, prompts: Sequence[PromptRow]) -> None:
    """Refuse a metric whose `where` fits no prompt: it would be silently empty."""
    for name, metric in config.all_metrics().items():
        if not any(all(row.fields.get(k) == v for k, v in metric.where.items()) for row in prompts):
            fields = sorted({key for row in prompts for key in row.fields})
            raise InputError(
                f"metric '{name}': no prompt of {_named(config)} has {metric.where}",
                allowed=f"fields of the prompts: {', '.join(fields) or 'none'}",
            )
        if metric.worst is not None and not any(row.fields.get(metric.worst) is not None for row in prompts):
            fields = sorted({key for row in prompts for key in row.fields})
            raise InputError(
                f"metric '{name}': no prompt of {_named(config)} has a field '{metric.worst}'",
                allowed=f"fields of the prompts: {', '.join(fields) or 'none'}",
            )


def _named(config: FrontierConfig) -> str:
    return ", ".join(str(one.path) for one in prompt_sets(config.prompts))


def require_templates(config: FrontierConfig, prompts: Sequence[PromptRow]) -> None:
    """Refuse a judge whose raw template would see less of a conversation than the policies do."""
    turns = next((row.id for row in prompts if not isinstance(row.prompt, str) and len(row.prompt) > 1), None)
    for name, settings in config.judges.items():
        raw = getattr(settings, "template", None) is not None
        if isinstance(settings, GuardJudge):
            spec = read_spec(settings.spec)
            raw = spec.template is not None or settings.template_file is not None
            _require_columns(name, spec, prompts)
        if turns is not None and raw:
            raise InputError(
                f"judge '{name}' has a raw template, which takes one string, and prompt '{turns}' has several messages",
                allowed="string prompts, or template: null to use the judge's chat template",
            )


def _require_columns(name: str, spec: GuardSpec, prompts: Sequence[PromptRow]) -> None:
    """Refuse a guard whose template reads a column that some prompt has not."""
    for field in spec.fields:
        lacking = next((row.id for row in prompts if row.fields.get(field) is None), None)
        if field not in spec.defaults and lacking is not None:
            raise InputError(f"judge '{name}' reads the prompts' column '{field}', which prompt '{lacking}' has not")


def calibrations(config: FrontierConfig, judges: Mapping[str, Judge]) -> dict[str, dict[str, Any]]:
    """Metric -> what its calibration says of its judge, for the metrics that have one.

    Raises:
        InputError: A calibration is of another judge, another version of it, or another threshold than the metric's.
    """
    found = {}
    for name, metric in config.all_metrics().items():
        if metric.calibration is None:
            continue
        if metric.judge not in judges:
            raise InputError(f"metric '{name}': '{metric.judge}' is no judge that can be calibrated")
        one = read_calibration(metric.calibration, metric.judge, judges[metric.judge].digest)
        if metric.above != one["threshold"]:
            raise InputError(
                f"metric '{name}' counts scores above {metric.above}, and {metric.calibration} was made at the "
                f"threshold {one['threshold']:g}",
                allowed=f"above: {one['threshold']:g}, or psacpo judge --calibrate with that --threshold",
            )
        found[name] = one
    return found
