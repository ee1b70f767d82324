"""The records as files for other tools: Parquet, one row a verdict, and the samples and results of lm-eval."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from statistics import NormalDist
from typing import Any

from psacpo.evalharness.report.records import Completion, Run, Verdict
from psacpo.evalharness.report.schema import Estimate, Frontier, Policy
from psacpo.files import digest

TASK = "psacpo"
LM_EVAL = "lm-eval"


def records_parquet(run: Run) -> bytes:
    """Every completion with each of its verdicts, one row a verdict, as a Parquet file.

    A completion that no judge scored has one row with no judge. `score` is null where the verdict is invalid.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    text, number, whole = pa.string(), pa.float64(), pa.int64()
    kinds = {
        "completion": text,
        "policy": text,
        "ratio": number,
        "prompt_id": text,
        "category": text,
        "cluster": text,
        "prompt": text,
        "sample": whole,
        "text": text,
        "n_tokens": whole,
        "finish_reason": text,
        "judge": text,
        "judge_digest": text,
        "better": text,
        "score": number,
        "label": text,
        "probability": number,
        "raw": text,
        "valid": pa.bool_(),
        "failed": pa.bool_(),
        "usage": text,
    }
    columns: dict[str, list[Any]] = {name: [] for name in kinds}
    for row in _rows(run):
        for name in kinds:
            columns[name].append(row.get(name))
    table = pa.table({name: pa.array(columns[name], kind) for name, kind in kinds.items()})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def _rows(run: Run) -> Iterator[dict[str, Any]]:
    ratios = {policy.name: policy.ratio for policy in run.frontier.policies()}
    for (policy, prompt_id), samples in run.completions.items():
        prompt = run.prompts[prompt_id]
        asked = prompt.get("prompt")
        for item in samples:
            about = {
                "completion": item.key,
                "policy": policy,
                "ratio": ratios[policy],
                "prompt_id": prompt_id,
                "category": _optional(prompt.get("category")),
                "cluster": _optional(prompt.get("cluster")),
                "prompt": asked if isinstance(asked, str) else json.dumps(asked, ensure_ascii=False),
                "sample": item.sample,
                "text": item.text,
                "n_tokens": item.n_tokens,
                "finish_reason": item.finish_reason,
            }
            for judge, verdict in item.verdicts.items():
                spec = run.frontier.judges.get(judge) or run.frontier.metrics[judge]
                given = {"judge": judge, "judge_digest": getattr(spec, "digest", None), "better": spec.better}
                yield about | given | _said(verdict)
            if not item.verdicts:
                yield about


def _optional(value: object) -> str | None:
    return None if value is None else str(value)


def _said(verdict: Verdict) -> dict[str, Any]:
    return {
        "score": verdict.score,
        "label": verdict.label,
        "probability": verdict.probability,
        "raw": verdict.raw,
        "valid": verdict.score is not None,
        "failed": verdict.failed,
        "usage": json.dumps(dict(verdict.usage), sort_keys=True) if verdict.usage else None,
    }


def lm_eval_files(run: Run) -> dict[str, str]:
    """Path under the run -> text of lm-evaluation-harness's two files for each policy, in a directory by its name.

    The keys are those of its `results_*.json` and `samples_*.jsonl` (version 0.4): metrics are `name,filter` with the
    filter `none`; there is one task, `psacpo`. `_stderr` is half the interval's width over the normal quantile, and
    `_low` and `_high` are the interval itself.
    """
    stamp = digest([run.frontier.model_dump(mode="json"), sorted(run.prompts)])[:12]
    files: dict[str, str] = {}
    for policy in run.frontier.policies():
        folder = _folder(policy.name)
        while f"{LM_EVAL}/{folder}/results_{stamp}.json" in files:
            folder += "_"
        samples = _samples(run, policy)
        results = _results(run, policy, folder, samples)
        files[f"{LM_EVAL}/{folder}/results_{stamp}.json"] = json.dumps(results, indent=2, ensure_ascii=False) + "\n"
        if samples:
            text = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
            files[f"{LM_EVAL}/{folder}/samples_{TASK}_{stamp}.jsonl"] = text
    return files


def _folder(name: str) -> str:
    """A policy's name as lm-eval makes a directory of a model's: no character that a file system minds."""
    return re.sub(r"[^\w.@+-]+", "__", name, flags=re.ASCII).strip(".")[:64] or "policy"


def _samples(run: Run, policy: Policy) -> list[dict[str, Any]]:
    """One row a prompt; a metric is the mean over the prompt's samples."""
    rows = []
    for place, (key, prompt) in enumerate(run.prompts.items()):
        found = run.completions.get((policy.name, key), [])
        if not found:
            continue
        doc = {name: value for name, value in prompt.items() if name not in ("messages", "prompt_ids")}
        said = prompt.get("prompt", "")
        context = said if isinstance(said, str) else json.dumps(said)
        values = _values(run.frontier, prompt, found)
        rows.append(
            {
                "doc_id": place,
                "doc": doc,
                "target": "",
                "arguments": {"gen_args_0": {"arg_0": context, "arg_1": _generation(run)}},
                "resps": [[item.text for item in found]],
                "filtered_resps": [item.text for item in found],
                "filter": "none",
                "metrics": list(values),
                "doc_hash": digest(doc),
                "prompt_hash": digest(context),
                "target_hash": digest(""),
                **values,
            }
        )
    return rows


def _values(frontier: Frontier, prompt: dict[str, Any], samples: list[Completion]) -> dict[str, float]:
    found = {}
    for name, spec in frontier.metrics.items():
        scores = [spec.of(item.verdicts[spec.judge].score, prompt) for item in samples if spec.judge in item.verdicts]
        if known := [score for score in scores if score is not None]:
            found[name] = sum(known) / len(known)
    return found


def _results(run: Run, policy: Policy, folder: str, samples: list[dict[str, Any]]) -> dict[str, Any]:
    frontier = run.frontier
    config = run.config
    numbers: dict[str, Any] = {"alias": TASK}
    for name, estimate in policy.metrics.items():
        numbers |= _numbers(name, estimate, frontier.choice.confidence)
    count = len(samples) if samples else policy.n_prompts
    return {
        "results": {TASK: numbers},
        "group_subtasks": {TASK: []},
        "configs": {
            TASK: {
                "task": TASK,
                "output_type": "generate_until",
                "repeats": config.get("samples", 1),
                "generation_kwargs": _generation(run),
                "metric_list": [
                    {"metric": name, "aggregation": "mean", "higher_is_better": spec.better == "higher"}
                    for name, spec in frontier.metrics.items()
                ],
                "metadata": {"judges": {name: judge.digest for name, judge in frontier.judges.items()}},
            }
        },
        "versions": {TASK: frontier.version},
        "n-shot": {TASK: 0},
        "higher_is_better": {TASK: {name: spec.better == "higher" for name, spec in frontier.metrics.items()}},
        "n-samples": {TASK: {"original": count, "effective": count}},
        "config": {
            "model": "psacpo",
            "model_args": {"policy": policy.name, "ratio": policy.ratio} | _weights(policy),
            "gen_kwargs": _generation(run),
            "random_seed": config.get("seed"),
            "bootstrap_iters": config.get("resamples"),
        },
        "model_source": "psacpo",
        "model_name": policy.name,
        "model_name_sanitized": folder,
        "task_hashes": {TASK: digest([s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in samples])}
        if samples
        else {},
    }


def _weights(policy: Policy) -> dict[str, Any]:
    return {"weights": policy.weights} if policy.weights else {}


def _numbers(name: str, estimate: Estimate, confidence: float) -> dict[str, Any]:
    if estimate.mean is None:
        return {}
    found: dict[str, Any] = {f"{name},none": estimate.mean, f"{name}_stderr,none": "N/A"}
    if estimate.low is not None and estimate.high is not None:
        found[f"{name}_stderr,none"] = (estimate.high - estimate.low) / 2 / NormalDist().inv_cdf((1 + confidence) / 2)
        found |= {f"{name}_low,none": estimate.low, f"{name}_high,none": estimate.high}
    return found


def _generation(run: Run) -> dict[str, Any]:
    """The sampling settings under the names that lm-eval has for them."""
    found = run.config.get("generation")
    if not isinstance(found, dict):
        return {}
    names = {"max_new_tokens": "max_gen_toks", "stop": "until"}
    kept = {
        names.get(key, key): found[key]
        for key in ("max_new_tokens", "temperature", "top_p", "top_k", "stop")
        if key in found
    }
    return kept | {"do_sample": bool(found.get("temperature"))}
