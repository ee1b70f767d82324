"""The job `frontier`: all policies answer all prompts from one loaded base, judges score, the frontier is traced."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from psacpo.errors import InputError
from psacpo.evalharness.adaptive.estimate import estimate, judge_estimates
from psacpo.evalharness.adaptive.run import adaptive_answers, prepare, starting
from psacpo.evalharness.baseline_settings import mixtures, outsiders
from psacpo.evalharness.baselines import plan_outsiders
from psacpo.evalharness.checks import check, require_one_bos
from psacpo.evalharness.config import FrontierConfig
from psacpo.evalharness.dial import ratio_policy
from psacpo.evalharness.engines import Policy
from psacpo.evalharness.engines.plan import engine_identity, plan_engine
from psacpo.evalharness.engines.whole import WholeModel, read_policy
from psacpo.evalharness.generation import Plan, generate
from psacpo.evalharness.judging.cache import Cache
from psacpo.evalharness.prompt_sets import digest_prompts
from psacpo.evalharness.prompts import plan_jobs
from psacpo.evalharness.records import locked, read_records
from psacpo.evalharness.run_files import COMPLETIONS, FAILURES, FRONTIER, PLAN, PROMPTS, VERDICTS
from psacpo.evalharness.scoring import Measured, score
from psacpo.evalharness.weights import weights_name
from psacpo.files import write_atomically, write_manifest
from psacpo.hub import load_config, load_tokenizer
from psacpo.merge.adapters import require_compatible
from psacpo.merge.bases import find_base
from psacpo.prompting import require_chat_template

__all__ = ["COMPLETIONS", "FAILURES", "FRONTIER", "PLAN", "PROMPTS", "VERDICTS", "check", "frontier", "plan_summary"]


def frontier(config: FrontierConfig) -> Path:
    """Sweep the ratios, judge the answers, trace the frontier, draw the report.

    The run directory can be interrupted at any point; the same command goes on from there and ends in the same
    result. Finished answers and verdicts are found by their content, so a changed adapter, prompt, setting or judge
    never meets a stale one.

    Returns:
        The run directory: frontier.json, frontier.csv, frontier.png, frontier.svg, report.html, records.parquet,
        lm-eval/, model-card.md, completions.jsonl, verdicts.jsonl, prompts.jsonl, plan.json, psacpo.json.

    Raises:
        InputError: Something in the settings or the files they name is wrong; nothing expensive was started. Or the
            share of invalid verdicts is over `max_invalid`; everything is kept.
    """
    config = starting(config)
    plan = _plan(config)
    prepared = prepare(config, plan) if config.adaptive else None
    cache = Cache(config.cache)
    with locked(config.out):
        _write_inputs(config, plan)
        if prepared is not None:
            config, answers = adaptive_answers(config, plan, prepared)
            _write_manifest(config, plan)  # with the ratios that were measured
        else:
            parts = [(config, plan), *plan.others]
            answers = [(job.row, record) for own, part in parts for job, record in generate(own, part)]
        refuse = score(Measured(config, policies_of(config), plan.prompts, answers, plan.judges), cache)
    refuse()
    return config.out


def plan_summary(config: FrontierConfig) -> dict[str, Any]:
    """What `frontier` would do, after every check it makes before the expensive part."""
    config = starting(config)
    plan = _plan(config)
    prepared = prepare(config, plan) if config.adaptive else None
    jobs = plan.all_jobs()
    keys = {job.request.key for job in jobs}
    path = config.out / COMPLETIONS
    stored = {record["key"] for record in read_records(path)} if path.is_file() else set()
    done = keys & stored
    answers = prepared.books.most() if prepared else len(jobs)
    told: dict[str, Any] = {
        "base": str(plan.base),
        "policies": config.policy_names(),
        "prompts": len(plan.prompts),
    }
    if prepared is not None:
        told |= {"answers at most": answers, "answers found": len(stored)}
        told |= {"adaptive": estimate(config, plan, prepared)}
    else:
        told |= {
            "answers": answers,
            "answers found": len(done),
            "prompt tokens": sum(len(job.request.prompt_ids) for job in jobs),
            "new tokens at most": (len(keys) - len(done)) * config.generation.max_new_tokens,
        }
    told |= {"engine": plan.engine.line(), "judges": dict.fromkeys(plan.judges, answers)}
    if asked := judge_estimates(config, plan.judges, plan.prompts, answers):
        told["judges take at most"] = asked
    return told | {"out": str(config.out)}


def _plan(config: FrontierConfig) -> Plan:
    """Read and check all inputs; load no model weights."""
    prompts, judges = check(config)
    adapters = {name: read_policy(path, config.base) for name, path in config.adapters.items()}
    if len({isinstance(adapter, WholeModel) for adapter in adapters.values()}) > 1:
        raise InputError(
            "adapters holds both adapters and whole models", allowed="adapters on one base, or models trained from it"
        )
    require_compatible(adapters)
    found = find_base(config.base, adapters, on_disk=True)
    assert found.path is not None
    assert found.digest is not None
    base, base_digest = found.path, found.digest
    tokenizer = load_tokenizer(base)
    if config.template is None:
        require_chat_template(tokenizer)
    policies = [policy for policy in policies_of(config) if policy.name not in outsiders(config.baselines)]
    jobs_of = functools.partial(
        plan_jobs,
        tokenizer,
        prompts,
        template=config.template,
        samples=config.samples,
        seed=config.seed,
        max_length=getattr(load_config(base), "max_position_embeddings", None),
        max_new_tokens=config.generation.max_new_tokens,
        identity={
            "base": base_digest,
            # Log-probabilities are part of a record, but no answer hangs on whether they are there.
            "generation": config.generation.model_dump(
                exclude={"batch_size", "kl_to_base"} | (set() if config.generation.logprobs else {"logprobs"})
            ),
        }
        | engine_identity(config),
        adapter_digests={name: adapter.content for name, adapter in adapters.items()},
    )
    jobs = jobs_of(policies)
    require_one_bos(tokenizer, jobs)
    later = mixable(config) if config.adaptive is not None else []
    engine = plan_engine(config, base, adapters, [*policies, *later], [job.request for job in jobs])
    if config.adaptive is not None:
        engine = replace(engine, spare=config.adaptive.most_ratios - len(config.point_names()))
    plan = Plan(base, base_digest, adapters, judges, prompts, policies, jobs, engine)
    plan.others = plan_outsiders(config, prompts, base)
    plan.jobs_of = jobs_of
    return plan


def policies_of(config: FrontierConfig) -> list[Policy]:
    """The swept policies from the reward end on, then the baselines; those that are models of their own have no weights."""
    swept = [ratio_policy(ratio) for ratio in sorted(config.ratios)]
    if config.weights is not None:
        swept = [Policy(weights_name(vector), vector, point=True) for vector in config.weight_points()]
    mixed = mixtures(config.baselines)
    return swept + [Policy(name, mixed.get(name, {})) for name in config.baselines]


def mixable(config: FrontierConfig) -> list[Policy]:
    """A mixture of all adapters that an adaptive sweep over weights may come to mix; none for ratios."""
    weighed = dict.fromkeys(name for vector in config.weight_points() for name in vector)
    return [Policy("any mixture", dict.fromkeys(weighed, 1 / len(weighed)), point=True)] if weighed else []


def _write_inputs(config: FrontierConfig, plan: Plan) -> None:
    """psacpo.json first, so that an interrupted run is known for one; then what the records refer to."""
    run = config.out
    _write_manifest(config, plan)
    ids = {job.row.id: job.request.prompt_ids for job in plan.jobs}
    rows = [
        {"id": r.id, "prompt": r.prompt, "cluster": r.cluster} | r.fields | {"prompt_ids": ids[r.id]}
        for r in plan.prompts
    ]
    write_atomically(run / PROMPTS, "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows))
    write_atomically(run / PLAN, json.dumps({"completions": [job.request.key for job in plan.all_jobs()]}) + "\n")


def _write_manifest(config: FrontierConfig, plan: Plan) -> None:
    write_manifest(
        config.out,
        kind="frontier",
        config=config.model_dump(mode="json", by_alias=True),
        inputs={"base": plan.base_digest, "prompts": digest_prompts(config.prompts)}
        | {f"adapter {name}": adapter.digest for name, adapter in plan.adapters.items()}
        | {f"baseline {part.policies[0].name}": part.base_digest for _, part in plan.others if part.base_digest}
        | {f"judge {name}": judge.digest for name, judge in plan.judges.items()},
        seeds={"seed": config.seed},
        engine=plan.engine.record(),
    )
