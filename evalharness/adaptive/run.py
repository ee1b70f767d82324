"""The answers of an adaptive sweep: asks what the procedure wants, has it judged, and keeps the books."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from psacpo.config import validate
from psacpo.console import progress, say
from psacpo.errors import InputError
from psacpo.evalharness.adaptive.books import Books, require_affordable
from psacpo.evalharness.adaptive.judged import Judging, Table
from psacpo.evalharness.adaptive.procedure import Ask, Procedure
from psacpo.evalharness.adaptive.space import Space, first_points, space_of
from psacpo.evalharness.adaptive.split import require_raceable, split
from psacpo.evalharness.baseline_settings import mixtures, outsiders
from psacpo.evalharness.config import FrontierConfig
from psacpo.evalharness.decision.scores import Scores
from psacpo.evalharness.generation import Answering, Plan, generate
from psacpo.evalharness.prompts import Job, PromptRow
from psacpo.evalharness.records import Record
from psacpo.evalharness.run_files import PLAN
from psacpo.files import write_atomically


def starting(config: FrontierConfig) -> FrontierConfig:
    """The settings with the points that an adaptive sweep starts from; others as they are.

    Raises:
        InputError: A constraint cannot be tested as the answers come, something names a point that is not there, or there
            may be no more points than fewer of them.
    """
    if config.adaptive is None:
        return config
    start = first_points(config)
    adaptive = config.adaptive
    if "weights" in start and "most_ratios" not in adaptive.model_fields_set:
        adaptive = adaptive.model_copy(update={"most_ratios": max(adaptive.most_ratios, 2 * len(start["weights"]))})
    values = config.model_dump(by_alias=True) | start | {"adaptive": adaptive.model_dump()}
    found = validate(FrontierConfig, values, where="--adaptive")
    if adaptive.most_ratios < len(found.point_names()):
        raise InputError(
            f"most_ratios {adaptive.most_ratios} is under the {len(found.point_names())} mixtures to start from",
            allowed="at least as many",
        )
    require_raceable(found)
    return found


@dataclass(frozen=True)
class Prepared:
    """An adaptive sweep before its first answer."""

    procedure: Procedure
    books: Books


def prepare(config: FrontierConfig, plan: Plan) -> Prepared:
    """Split the prompts and open the books.

    Raises:
        InputError: There are too few prompts, the budget is under what the design takes, or a policy that others are
            compared with is a model of its own.
    """
    assert config.adaptive is not None
    parts = split(config, config.adaptive, plan.prompts)
    shadows = _shadows(config, plan)
    mixed = [name for name in mixtures(config.baselines) if name not in shadows]
    procedure = Procedure(config, config.adaptive, parts, space_of(config), mixed, shadows)
    books = Books(config, plan, parts, shadows)
    require_affordable(config, books)
    return Prepared(procedure, books)


def _shadows(config: FrontierConfig, plan: Plan) -> list[str]:
    """The policies that a judge or a metric of a constraint or an axis compares others with."""
    metrics = config.all_metrics()
    asked = [*config.axes.model_dump().values(), *(constraint.metric for constraint in config.constraints)]
    found = [judge.anchor for judge in plan.judges.values()]
    found += [metrics[name].versus for name in asked] + [metric.versus for metric in config.metrics.values()]
    named = list(dict.fromkeys(name for name in found if name is not None))
    if apart := [name for name in named if name in outsiders(config.baselines)]:
        raise InputError(
            f"--adaptive: others are compared with baseline '{apart[0]}', which answers after them",
            allowed="another policy to compare with, or a sweep without --adaptive",
        )
    return named


def adaptive_answers(
    config: FrontierConfig, plan: Plan, prepared: Prepared
) -> tuple[FrontierConfig, list[tuple[PromptRow, Record]]]:
    """Every answer that was worth its while, and the settings with the points that were measured.

    What is asked is a function of the answers and verdicts so far, which are found by their content: a run that was
    interrupted asks the same again and goes on.
    """
    procedure, books = prepared.procedure, prepared.books
    answers: list[tuple[Job, Record]] = []
    jobs = _Jobs(plan, procedure.space)
    with (
        Answering(config, plan, more=True) as answering,
        Judging(config, plan.judges) as judging,
        progress("adaptive sweep", books.most()) as advance,
    ):
        table = Table(plan.prompts, list(config.all_judges()), config.samples)
        steps, told = procedure.steps(), _Told(procedure)
        ask: Ask | None = next(steps, None)
        while ask is not None:
            wanted = jobs.of(ask)
            scores: Scores | None = None
            if books.allow(ask.what, wanted):
                new = answering.ask(wanted, advance)
                table.put(new, judging.judge(new))
                procedure.took(ask)
                books.enter(ask.what, new)
                answers += new
                scores = table.scores()
            try:
                ask = steps.send(scores)
            except StopIteration:
                ask = None
            told.news()
    for own, part in plan.others:
        chosen = {plan.prompts[place].id for place in jobs.prompts_in(np.flatnonzero(procedure.parts.design))}
        some = Plan(**vars(part) | {"jobs": [job for job in part.jobs if job.row.id in chosen]})
        new = generate(own, some)
        books.enter("baselines", new)
        answers += new
    points = procedure.space.settings()
    measured = config.model_copy(update=points)
    record = books.record(procedure)
    keys = [job.request.key for job, _ in answers]
    write_atomically(config.out / PLAN, json.dumps({"completions": keys, "adaptive": record} | points) + "\n")
    say(books.line(procedure))
    return measured, [(job.row, found) for job, found in answers]


class _Jobs:
    """The jobs of any policy, made when it is asked for the first time."""

    def __init__(self, plan: Plan, space: Space) -> None:
        self.plan, self.space = plan, space
        self._of: dict[str, dict[str, list[Job]]] = {}
        self._add(plan.jobs)
        owner = Scores([], plan.prompts, {}).owner
        self._prompts: dict[int, list[int]] = {}
        for place, cluster in enumerate(owner.tolist()):
            self._prompts.setdefault(cluster, []).append(place)

    def prompts_in(self, clusters: Any) -> list[int]:
        """Places of the prompts of some clusters, in their order."""
        return sorted(place for cluster in clusters.tolist() for place in self._prompts[cluster])

    def of(self, ask: Ask) -> list[Job]:
        """All policies of a prompt side by side, prompts by length."""
        found: list[Job] = []
        wanted = {name: set(self.prompts_in(clusters)) for name, clusters in ask.work.items()}
        for name in wanted:
            if name not in self._of:
                assert self.plan.jobs_of is not None
                self._add(self.plan.jobs_of([self.space.policy(name)]))
        for place, row in enumerate(self.plan.prompts):
            sides = [self._of[name][row.id] for name, places in wanted.items() if place in places]
            found += [job for sample in zip(*sides, strict=True) for job in sample]
        return sorted(found, key=lambda job: len(job.request.prompt_ids))

    def _add(self, jobs: Sequence[Job]) -> None:
        for job in sorted(jobs, key=lambda job: job.sample):
            self._of.setdefault(job.request.policy.name, {}).setdefault(job.row.id, []).append(job)


class _Told:
    """What is said while it goes on: each point that is added, and how each one's walk ended."""

    def __init__(self, procedure: Procedure) -> None:
        self.procedure = procedure
        self.known: set[str] = set(procedure.space.names)
        self.ended: dict[str, str] = {}

    def news(self) -> None:
        """Say what is new."""
        for name, reason in self.procedure.reasons.items():
            if name not in self.known:
                self.known.add(name)
                say(f"{name} is added: {_WHY[reason['why']]}")
        for name, outcome in self.procedure.outcomes.items():
            if self.ended.get(name) != outcome:
                self.ended[name] = outcome
                say(f"{name}: {outcome}, after {len(self.procedure.asked[name])} clusters of prompts in all")


_WHY: Mapping[str, str] = {
    "crossing": "between its neighbours the certificate is expected to end",
    "gap": "its neighbours leave most of the frontier open",
}
