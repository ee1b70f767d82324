"""The command line: parse, build the settings, make one call, say where the result is."""

from __future__ import annotations

import errno
import gc
import os
import select
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from psacpo import __version__
from psacpo.__main__ import interrupt_once
from psacpo.errors import InputError

app = typer.Typer(
    name="psacpo",
    help="A language model's helpfulness/safety balance as a dial, with evidence for where to set it.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

RecipeArgument = Annotated[
    Path | None,
    typer.Argument(metavar="RECIPE", help="A recipe, or a directory with psacpo.yaml; default: the one here."),
]
OutOption = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Output directory.")]
SeedOption = Annotated[int | None, typer.Option("--seed", metavar="N", help="Seed of every random choice.")]
BaseOption = Annotated[str | None, typer.Option("--base", metavar="MODEL", help="Base model: a directory or a hub id.")]
RewardOption = Annotated[Path | None, typer.Option("--reward", metavar="DIR", help="Reward adapter: a PEFT directory.")]
SafetyOption = Annotated[Path | None, typer.Option("--safety", metavar="DIR", help="Safety adapter: a PEFT directory.")]
RatioOption = Annotated[
    list[str] | None,
    typer.Option(
        "--ratio",
        "--ratios",
        metavar="RATIO",
        help="Weight of the safety policy, 0 to 1; repeatable; or a grid 0:1:0.125.",
    ),
]
TemplateOption = Annotated[
    str | None,
    typer.Option("--template", metavar="TEXT", help="Raw template with {prompt}; default: the chat template."),
]


def _named_directory(text: str) -> Path:
    """A path that is not empty, as a shell variable that is not set makes it: Path takes that for the directory here."""
    if not text.strip():
        raise typer.BadParameter("it names no directory")
    return Path(text)


VerdictCacheOption = Annotated[
    Path | None,
    typer.Option("--cache", metavar="DIR", help="Verdicts shared with other runs and files.", parser=_named_directory),
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace what is in the output directory.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Check everything and print the plan; do nothing.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        print(f"psacpo {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Where to put the demo's project directory.")
    ] = Path("psacpo-demo"),
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Seed of data, training and sampling.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """The whole main job on a built-in tiny model, CPU only.

    align, frontier, merge and report, in under two minutes, in a project directory to go on in.
    """
    _quiet_libraries()
    from psacpo.pipeline import demo as job

    run = job(out, seed)
    code = _show_run(run, as_json)
    if not as_json:
        print(f"\nGo on in it:  cd {out} && psacpo merge --ratio 0.3 && psacpo frontier")
    raise typer.Exit(code)


@app.command()
def init(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The project's directory.")] = Path(),
    base: Annotated[str, typer.Option("--base", metavar="MODEL", help="Base model: a directory or a hub id.")] = "",
    data: Annotated[
        str, typer.Option("--data", metavar="NAME", help="Preference rows: own, or pku-saferlhf from the hub.")
    ] = "own",
) -> None:
    """Leave a psacpo.yaml to start from, each key explained."""
    from psacpo.starter import DATA, starter

    path = starter(directory, base=base, data=data)
    print(f"{path}: {DATA[data].hint}, prompts at data/prompts.jsonl")
    there = "" if directory.resolve() == Path.cwd() else f"cd {shlex.quote(str(directory))} && "
    print(f"then  {there}psacpo align --inspect && psacpo run")


@app.command()
def align(
    recipe: RecipeArgument = None,
    base: BaseOption = None,
    reward_data: Annotated[
        str | None, typer.Option("--reward-data", metavar="FILE", help="Preference rows for helpfulness.")
    ] = None,
    safety_data: Annotated[
        str | None, typer.Option("--safety-data", metavar="FILE", help="Preference rows for safety.")
    ] = None,
    template: TemplateOption = None,
    beta: Annotated[
        float | None, typer.Option("--beta", metavar="NUMBER", help="KL weight of the first stage.")
    ] = None,
    lambda_: Annotated[
        float | None, typer.Option("--lambda", metavar="NUMBER", help="Stage 2 has the KL weight beta/lambda.")
    ] = None,
    order: Annotated[
        str | None,
        typer.Option(
            "--order", metavar="NAMES", help="The stages' names in order, as safety,reward; default: the recipe's."
        ),
    ] = None,
    naive: Annotated[
        bool, typer.Option("--naive", help="Also train each later stage from the base, for rewarded soups.")
    ] = False,
    lambdas: Annotated[
        str | None,
        typer.Option("--lambdas", metavar="NUMBERS", help="Also train stage 2 at each of these lambdas, as 1,2,4."),
    ] = None,
    out: OutOption = None,
    seed: SeedOption = None,
    overwrite: OverwriteOption = False,
    inspect: Annotated[
        bool, typer.Option("--inspect", help="Show the data, five examples and what the loss sees; do nothing.")
    ] = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Preference data in, a reward and a safety adapter out."""
    _quiet_libraries()
    from psacpo.align import plan
    from psacpo.pipeline import align as job
    from psacpo.recipe import Project, stages_from_flags

    project = Project.find(recipe)
    config = project.align(
        base=base,
        stages=stages_from_flags(project, reward_data, safety_data),
        template=template,
        beta=beta,
        order=order,
        naive=naive or None,
        lambdas=lambdas,
        # An inspection writes nothing, so it need not know where.
        out=out or (Path() if inspect else None),
        seed=seed,
        overwrite=overwrite or None,
        **{"lambda": lambda_},
    )
    if inspect:
        return _show_inspection(config, as_json)
    if dry_run:
        return _print_plan(plan(config), as_json)
    where = job(project, config)
    if os.environ.get("RANK", "0") != "0":  # of several processes one speaks
        return
    adapters = {stage.name: str(where / stage.name) for stage in config.runs}
    kind = "adapter" if config.tuning == "lora" else "model"
    _show(
        {"out": str(where), "adapters": adapters},
        as_json,
        [f"{name} {kind}: {path}" for name, path in adapters.items()],
    )


@app.command()
def merge(
    recipe: Annotated[
        Path | None,
        typer.Argument(metavar="RECIPE", help="psacpo.yaml, its directory, or a mergekit file; default: the one here."),
    ] = None,
    base: BaseOption = None,
    reward: Annotated[
        str | None, typer.Option("--reward", metavar="DIR", help="Reward policy: a PEFT adapter or a full model.")
    ] = None,
    safety: Annotated[
        str | None, typer.Option("--safety", metavar="DIR", help="Safety policy, of the same kind.")
    ] = None,
    ratio: RatioOption = None,
    policy: Annotated[
        list[str] | None,
        typer.Option("--policy", metavar="DIR=WEIGHT", help="A policy and its weight, any number of them; repeatable."),
    ] = None,
    method: Annotated[
        str | None, typer.Option("--method", metavar="NAME", help="linear (default), ties, slerp, ...")
    ] = None,
    parameter: Annotated[
        list[str] | None,
        typer.Option("--parameter", metavar="NAME=VALUE", help="Of the method, as density=0.5; repeatable."),
    ] = None,
    kind: Annotated[
        str | None, typer.Option("--as", metavar="KIND", help="adapter or checkpoint; default: as what comes in.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option("--rank", metavar="N", help="Recompress the adapter to this rank.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", metavar="DTYPE", help="Of a checkpoint; default: as its base.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", metavar="N", help="Seed of the methods that draw.")] = None,
    extrapolate: Annotated[bool, typer.Option("--extrapolate", help="Allow ratios outside 0 to 1.")] = False,
    unnormalised: Annotated[
        bool, typer.Option("--unnormalised", help="Allow policies' weights that do not sum to 1.")
    ] = False,
    allow_different_base: Annotated[
        bool, typer.Option("--allow-different-base", help="Merge adapters made on another base.")
    ] = False,
    out: OutOption = None,
    overwrite: OverwriteOption = False,
    push_to_hub: Annotated[
        str | None, typer.Option("--push-to-hub", metavar="REPO", help="Upload to this hub repository.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="A new hub repository is private.")] = False,
    verify: Annotated[
        Path | None, typer.Option("--verify", metavar="DIR", help="Check an output against its sources; merge nothing.")
    ] = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Merge policies exactly, at one ratio or many.

    Adapters on one base, or full models; by default the reward and the safety adapter of the project here.
    """
    _quiet_libraries()
    from psacpo.merge.config import parse_parameters, parse_policies, parse_ratios
    from psacpo.recipe import merge_settings

    if verify is not None:
        from psacpo.merge.verify import verify as check

        found = check(verify, base=base, reward=reward, safety=safety)
        return _show(found, as_json, [f"{name}: {value}" for name, value in found.items()])
    config = merge_settings(
        recipe,
        base=base,
        reward=reward,
        safety=safety,
        ratios=parse_ratios(ratio or [], extrapolate=extrapolate) or None,
        policies=parse_policies(policy or []) or None,
        method=method,
        parameters=parse_parameters(parameter or []) or None,
        rank=rank,
        dtype=dtype,
        seed=seed,
        extrapolate=extrapolate or None,
        unnormalised=unnormalised or None,
        allow_different_base=allow_different_base or None,
        out=out,
        overwrite=overwrite or None,
        push_to_hub=push_to_hub,
        private=private or None,
        **{"as": kind},
    )
    if dry_run:
        from psacpo.merge.run import plan

        return _print_plan(plan(config), as_json)
    from psacpo.merge import merge as job
    from psacpo.merge.card import merge_summary, written_before

    before = written_before(config.out)
    outputs = job(config)
    found = {"sources": config.sources, "outputs": [str(path) for path in outputs]}
    _show(found, as_json, merge_summary(outputs, before))


@app.command()
def frontier(
    recipe: RecipeArgument = None,
    base: BaseOption = None,
    reward: RewardOption = None,
    safety: SafetyOption = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", metavar="FILE", help="Rows with a column prompt.")
    ] = None,
    ratio: RatioOption = None,
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights", metavar="GRID", help="For more than two adapters: grid, or grid:STEPS; in place of --ratio."
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", metavar="NAME=DIR", help="One more adapter, for --weights or baselines; repeatable."),
    ] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option("--baseline", metavar="NAME=MODEL", help="A whole model to measure beside the sweep; repeatable."),
    ] = None,
    reward_model: Annotated[
        str | None, typer.Option("--reward-model", metavar="MODEL", help="Scalar judge called reward.")
    ] = None,
    cost_model: Annotated[
        str | None, typer.Option("--cost-model", metavar="MODEL", help="Scalar judge called cost.")
    ] = None,
    constraint: Annotated[
        list[str] | None,
        typer.Option("--constraint", metavar="CONSTRAINT", help="METRIC<=NUMBER or METRIC>=NUMBER; repeatable."),
    ] = None,
    template: TemplateOption = None,
    samples: Annotated[int | None, typer.Option("--samples", metavar="N", help="Answers a prompt and policy.")] = None,
    engine: Annotated[
        str | None,
        typer.Option("--engine", metavar="NAME", help="auto, transformers, vllm, openai or ray; docs/engines.md."),
    ] = None,
    strategy: Annotated[
        str | None, typer.Option("--strategy", metavar="NAME", help="How vLLM gets the policies: auto, lora or reload.")
    ] = None,
    engine_set: Annotated[
        list[str] | None,
        typer.Option(
            "--engine-set",
            metavar="SETTING",
            help="ENGINE.NAME=VALUE, as vllm.tensor_parallel_size=2; repeatable.",
        ),
    ] = None,
    allow_code: Annotated[bool, typer.Option("--allow-code", help="Let the recipe's python judges run.")] = False,
    cache: VerdictCacheOption = None,
    confidence: Annotated[
        float | None, typer.Option("--confidence", metavar="SHARE", help="Of intervals and certificates; default 0.95.")
    ] = None,
    holdout: Annotated[
        float | None,
        typer.Option("--holdout", metavar="SHARE", help="Clusters kept out of choosing the ratio; default 0.2."),
    ] = None,
    adaptive: Annotated[
        bool,
        typer.Option("--adaptive", help="Add ratios, or weights, where they decide something; ask no more than that."),
    ] = False,
    budget: Annotated[
        str | None,
        typer.Option("--budget", metavar="AMOUNT", help="Of --adaptive: at most 20000 generations, or 2Mtokens."),
    ] = None,
    from_scores: Annotated[
        Path | None,
        typer.Option(
            "--from-scores", metavar="FILE", help="Scores that are there already, in place of models and judges."
        ),
    ] = None,
    lower_is_better: Annotated[
        list[str] | None,
        typer.Option("--lower-is-better", metavar="COLUMN", help="Of --from-scores, a column better low; repeatable."),
    ] = None,
    out: OutOption = None,
    seed: SeedOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Sweep the ratios, judge, trace the frontier, choose a ratio.

    Exits with 3 when no ratio meets the constraint.
    """
    _quiet_libraries()
    if from_scores is not None:
        from psacpo.evalharness.decision.from_scores import frontier_from_scores, scores_plan, scores_settings

        given: dict[str, Any] = {
            "--base": base,
            "--reward": reward,
            "--safety": safety,
            "--prompts": prompts,
            "--ratio": ratio,
            "--weights": weights,
            "--adapter": adapter,
            "--baseline": baseline,
        }
        given |= {"--reward-model": reward_model, "--cost-model": cost_model, "--samples": samples, "--engine": engine}
        given |= {"--adaptive": adaptive, "--budget": budget, "--cache": cache}
        if clash := [flag for flag, value in given.items() if value]:
            raise InputError("--from-scores asks no model", given=clash[0], allowed="scores, and what is asked of them")
        scores = scores_settings(
            from_scores,
            recipe,
            constraints=constraint or None,
            confidence=confidence,
            holdout=holdout,
            lower=lower_is_better or None,
            out=out,
            seed=seed,
        )
        if dry_run:
            return _print_plan(scores_plan(scores), as_json)
        raise typer.Exit(_show_run(frontier_from_scores(scores), as_json))
    from psacpo.evalharness.adaptive.settings import adaptive_flags
    from psacpo.evalharness.command import parse_named
    from psacpo.evalharness.config import parse_engine_settings
    from psacpo.merge.config import parse_ratios
    from psacpo.pipeline import frontier as job
    from psacpo.recipe import Project

    judges = {"reward": (reward_model, "higher"), "cost": (cost_model, "lower")}
    adapters = {"reward": reward, "safety": safety} | {
        name: Path(place) for name, place in parse_named(adapter or [], "--adapter").items()
    }
    project = Project.find(recipe)
    config = project.frontier(
        base=base,
        adapters={name: path for name, path in adapters.items() if path is not None},
        prompts=prompts,
        ratios=parse_ratios(ratio or []) or None,
        weights=weights,
        baselines={name: {"model": place} for name, place in parse_named(baseline or [], "--baseline").items()} or None,
        judges={n: {"kind": "scalar", "model": m, "better": b} for n, (m, b) in judges.items() if m is not None},
        constraints=constraint or None,
        template=template,
        samples=samples,
        engine=engine,
        strategy=strategy,
        **parse_engine_settings(engine_set or []),
        allow_code=allow_code or None,
        confidence=confidence,
        holdout=holdout,
        adaptive=adaptive_flags(adaptive, budget, project.recipe.adaptive if project.recipe else None),
        out=out,
        seed=seed,
    )
    if cache is not None:
        # It changes no result: a run is made again without it.
        config = config.model_copy(update={"cache": cache})
    if dry_run:
        from psacpo.evalharness.sweep import plan_summary

        return _print_plan(plan_summary(config), as_json)
    raise typer.Exit(_show_run(job(project, config), as_json))


@app.command()
def judge(
    source: Annotated[
        Path | None,
        typer.Argument(metavar="SOURCE", help="Rows with prompt and completion, or the directory of a frontier."),
    ] = None,
    judges: Annotated[
        list[str] | None,
        typer.Option(
            "--judge", metavar="JUDGE", help="A preset, a YAML file of judges, or NAME= one of these; repeatable."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Verdicts of a file's rows; default: scores.jsonl.")
    ] = None,
    calibrate: Annotated[
        Path | None, typer.Option("--calibrate", metavar="FILE", help="Human labels to hold the judges against.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option("--threshold", metavar="NUMBER", help="Scores above it count as the label 1.")
    ] = None,
    cache: VerdictCacheOption = None,
    max_invalid: Annotated[
        float | None, typer.Option("--max-invalid", metavar="SHARE", help="Of a judge's verdicts; default 0.02.")
    ] = None,
    device: Annotated[str | None, typer.Option("--device", metavar="NAME", help="auto, cpu or cuda.")] = None,
    allow_code: Annotated[bool, typer.Option("--allow-code", help="Let the judges' own code run.")] = False,
    seed: SeedOption = None,
    show: Annotated[bool, typer.Option("--list", help="Show the presets; judge nothing.")] = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Score stored completions, of a file or of a frontier; nothing is generated.

    Exits with 2 when more verdicts than --max-invalid are invalid, with everything kept.
    """
    _quiet_libraries()
    if show:
        from psacpo.evalharness.judging.table import preset_lines, presets

        return _show(presets(), as_json, preset_lines())
    from psacpo.evalharness.judging.config import judge_settings
    from psacpo.evalharness.judging.job import judge as job
    from psacpo.evalharness.judging.job import plan, plan_for_people

    config = judge_settings(
        source,
        judges or [],
        out=out,
        calibrate=calibrate,
        threshold=threshold,
        cache=cache,
        max_invalid=max_invalid,
        device=device,
        allow_code=allow_code or None,
        seed=seed,
    )
    if dry_run:
        planned = plan(config)
        return _print_plan(planned if as_json else plan_for_people(planned), as_json)
    found = job(config)
    _show(found.result, as_json, found.lines)
    found.refuse()


@app.command()
def compare(
    run_a: Annotated[Path, typer.Argument(metavar="RUN_A", help="A directory that `psacpo frontier` left.")],
    run_b: Annotated[Path, typer.Argument(metavar="RUN_B", help="Another, on the same prompts or some of them.")],
    confidence: Annotated[float, typer.Option("--confidence", metavar="SHARE", help="Of the intervals.")] = 0.95,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Seed of the bootstrap.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Two runs' paired differences, at each ratio, of the choices, and in hypervolume."""
    from psacpo.evalharness.decision.compare import compare as job
    from psacpo.evalharness.decision.compare_lines import compare_lines

    if not 0.5 < confidence < 1:
        raise InputError("the confidence is out of range", given=confidence, allowed="over 0.5 and under 1")
    found = job(run_a, run_b, confidence=confidence, seed=seed)
    _show(found, as_json, compare_lines(found))


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A directory that `psacpo frontier` left.")] = Path(
        "frontier"
    ),
    as_json: JsonOption = False,
) -> None:
    """Rebuild a run's figure, table and page; no model is loaded."""
    from psacpo.evalharness.report import report as job

    page = job(run)
    _show({"report": str(page)}, as_json, [f"wrote {page}"])


@app.command()
def serve(
    recipe: RecipeArgument = None,
    base: BaseOption = None,
    reward: RewardOption = None,
    safety: SafetyOption = None,
    ratio: Annotated[
        list[str] | None,
        typer.Option(
            "--ratio", "--ratios", metavar="RATIO", help="Serve this ratio and no other, nor the base; repeatable."
        ),
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(
            "--host", metavar="ADDRESS", help="Address to listen on, default 127.0.0.1; others need --api-key."
        ),
    ] = None,
    port: Annotated[int | None, typer.Option("--port", metavar="PORT", help="Default: 8000.")] = None,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", metavar="KEY", envvar="PSACPO_API_KEY", help="Bearer token that clients must send."),
    ] = None,
    max_ratios: Annotated[
        int | None, typer.Option("--max-ratios", metavar="N", help="Ratios held at once beside 0 and 1; default 64.")
    ] = None,
    snap: Annotated[
        float | None, typer.Option("--snap", metavar="STEP", help="Move ratios to the nearest multiple, as 0.05.")
    ] = None,
    cache_dir: Annotated[
        Path | None, typer.Option("--cache-dir", metavar="DIR", help="Where built policies are kept.")
    ] = None,
    cache_size: Annotated[
        str | None, typer.Option("--cache-size", metavar="SIZE", help="Bytes that they may take, default 20GB.")
    ] = None,
    max_loras: Annotated[
        int | None, typer.Option("--max-loras", metavar="N", help="Different ratios in one batch; default 10.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", metavar="DTYPE", help="Of the weights: auto, float32, ...")
    ] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option("--max-model-len", metavar="TOKENS", help="Longest prompt and answer together, in tokens."),
    ] = None,
    gpu_memory_utilization: Annotated[
        float | None,
        typer.Option("--gpu-memory-utilization", metavar="SHARE", help="Part of the device's memory to take."),
    ] = None,
    tensor_parallel_size: Annotated[
        int | None, typer.Option("--tensor-parallel-size", metavar="N", help="Devices that each layer is split over.")
    ] = None,
    pipeline_parallel_size: Annotated[
        int | None,
        typer.Option("--pipeline-parallel-size", metavar="N", help="Groups of devices that layers are spread over."),
    ] = None,
    quantization: Annotated[
        str | None, typer.Option("--quantization", metavar="NAME", help="vLLM's name of a quantisation of the base.")
    ] = None,
    engine_args: Annotated[
        str | None,
        typer.Option(
            "--engine-args",
            metavar="ARGUMENTS",
            help="Further arguments of vLLM's server in one string: '--enforce-eager'.",
        ),
    ] = None,
    seed: SeedOption = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show vLLM's log from the start.")] = False,
) -> None:
    """An OpenAI-compatible endpoint where model="policy@0.30" sets the dial per request. Needs vLLM.

    By default for the reward and the safety adapter of the project here.
    """
    _quiet_libraries()
    from psacpo.merge.config import parse_ratios
    from psacpo.recipe import Project
    from psacpo.serve import serve as job
    from psacpo.serve.settings import serve_settings, split_arguments

    config = serve_settings(
        Project.find(recipe),
        base=base,
        reward=reward,
        safety=safety,
        ratios=parse_ratios(ratio or []) or None,
        host=host,
        port=port,
        api_key=api_key,
        max_ratios=max_ratios,
        snap=snap,
        cache_dir=cache_dir,
        cache_size=cache_size,
        max_loras=max_loras,
        dtype=dtype,
        max_model_len=max_model_len,
        gpu_memory_utilization=gpu_memory_utilization,
        tensor_parallel_size=tensor_parallel_size,
        pipeline_parallel_size=pipeline_parallel_size,
        quantization=quantization,
        engine_args=split_arguments(engine_args),
        seed=seed,
        verbose=verbose or None,
    )
    raise typer.Exit(job(config))


@app.command()
def run(recipe: RecipeArgument = None, as_json: JsonOption = False) -> None:
    """align, frontier, and merge at the chosen ratio; resumable."""
    _quiet_libraries()
    from psacpo.pipeline import merged, merged_lines
    from psacpo.pipeline import run as job
    from psacpo.recipe import Project

    project = Project.find(recipe)
    measured = job(project)
    found = merged(project, measured)
    raise typer.Exit(_show_run(measured, as_json, found, merged_lines(found)))


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """What works here: packages, devices, room, engines, and what installs the others.

    Exits with 2 when psacpo itself cannot work here.
    """
    _quiet_libraries()
    from psacpo.doctor import examine, healthy, lines

    found = examine()
    _show(found, as_json, lines(found))
    raise typer.Exit(0 if healthy(found) else 2)


def _show_run(run: Path, as_json: bool, more: dict[str, Any] | None = None, more_lines: list[str] | None = None) -> int:
    """Print a run's table and verdict, and what came of it; 3 where its constraint is met by no ratio."""
    from psacpo.evalharness.summary import summary, summary_lines

    found = summary(run)
    _show(found | (more or {}), as_json, [*summary_lines(run), *(more_lines or [])])
    return 3 if found["choice"]["constraints"] and found["choice"]["policy"] is None else 0


def _show_inspection(config: Any, as_json: bool) -> None:
    from psacpo.align.display import show
    from psacpo.align.inspection import inspect
    from psacpo.console import say

    found = inspect(config)
    for note in found["notes"]:
        say(note)
    if as_json:
        return _show(found, as_json, [])
    show(found)


def _show(result: dict[str, Any], as_json: bool, lines: list[str]) -> None:
    import json

    from psacpo.console import printable

    print(json.dumps(result) if as_json else printable("\n".join(lines)))


def _print_plan(plan: dict[str, Any], as_json: bool) -> None:
    from psacpo.console import plan_lines

    _show(plan, as_json, plan_lines(plan))


def _quiet_libraries() -> None:
    """Our own progress is what the user reads; a library's warnings still come through as errors would."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _terminated(number: int, _frame: object) -> None:
    """Leave as an exception would, so that half-written directories beside the outputs are removed."""
    sys.exit(128 + number)


def main() -> None:
    """Run a command; bad input is one line and exit 2, Ctrl-C is exit 130, SIGTERM 143."""
    signal.signal(signal.SIGTERM, _terminated)
    interrupt_once()
    # Importing torch and transformers makes a million objects that live on: to look through them again and again for
    # garbage would be a third of the time that the imports take.
    gc.set_threshold(100_000, 20, 50)
    code = 0
    try:
        try:
            code = app(standalone_mode=False)
        except SystemExit as left:
            if isinstance(left.__context__, BrokenPipeError):  # which typer ends with 1
                raise left.__context__ from None
            raise
        if code == 130:  # what typer makes of Ctrl-C
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            again = "ended" if "serve" in sys.argv[1:2] else "interrupted; the same command goes on from here"
            print(f"psacpo: {again}", file=sys.stderr)
        if sys.stdout is not None:
            sys.stdout.flush()
    except InputError as error:
        code = _fail(str(error))
    except BrokenPipeError:
        # Whoever read the result went away (`psacpo ... | head`), and nothing is wrong with it. Without a reader of
        # what is said while it works there may be no result: that is what a shell calls SIGPIPE.
        code = 128 + signal.SIGPIPE if _unread(2) else code
        if not (_unread(1) or _unread(2)):
            raise
        for number in filter(_unread, (1, 2)):
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    except (PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError) as error:
        if error.filename is None:
            raise
        # Whatever looks at a path may meet these, and the place is all that the user needs to mend them.
        code = _fail(f"{error.filename2 or error.filename}: {(error.strerror or 'cannot be used').lower()}")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise
        code = _fail(f"cannot write {error.filename or 'what is printed'}: {os.strerror(error.errno).lower()}")
        # What is left in the buffer would be tried once more at the very end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except Exception as error:
        format_message = getattr(error, "format_message", None)
        if format_message is None:  # a click error is the user's, anything else is ours and shows its trace
            raise
        code = _fail(f"{format_message()} (psacpo --help)")
    gc.freeze()  # else all that is loaded is looked through for garbage once more, to no end
    sys.exit(code or 0)


def _unread(number: int) -> bool:
    """Whether a file descriptor is a pipe that no one reads any more."""
    poll = select.poll()
    poll.register(number, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _fail(message: str) -> int:
    from psacpo.console import printable

    try:
        print(f"psacpo: error: {printable(' '.join(message.split()))}", file=sys.stderr)
    except BrokenPipeError:  # no one reads it, and it is an error all the same
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    return 2


if __name__ == "__main__":
    main()
