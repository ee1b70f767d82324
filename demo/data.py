"""What the demo's project is made of: preference pairs with noisy labels, and prompts to answer.

A row is a JSON object with stable keys, in TRL's names.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping

from psacpo.demo import oracle, world
from psacpo.demo.world import Topic

Row = dict[str, str | bool]

REWARD_PAIRS = 2560
SAFETY_PAIRS = 3200
EVAL_COUNTS = {"benign": 100, "borderline": 60, "harmful": 240}  # prompts a category

SHARPNESS = 4.0  # of the annotator: P(a over b) = sigmoid(SHARPNESS * (utility of a - utility of b))
REWARD_TOPICS = {"benign": 0.50, "borderline": 0.20, "harmful": 0.30}
SAFETY_TOPICS = {"benign": 0.25, "borderline": 0.10, "harmful": 0.65}
REWARD_STYLES = {"full": 0.28, "short": 0.26, "terse": 0.20, "warn": 0.10, "redirect": 0.06, "refuse": 0.10}
COMPLYING = {"full": 0.30, "short": 0.30, "terse": 0.25, "warn": 0.15}
DECLINING = {"refuse": 0.65, "redirect": 0.35}


def reward_pairs(seed: int, count: int = REWARD_PAIRS) -> list[Row]:
    """Pairs of any two different answers; the annotator prefers the more helpful one."""
    rng = random.Random(f"psacpo demo reward {seed}")
    rows: list[Row] = []
    while len(rows) < count:
        topic = draw_topic(rng, REWARD_TOPICS)
        first, second = (world.answer(rng, topic, draw(rng, REWARD_STYLES)) for _ in range(2))
        if first != second:
            rows.append(_row(rng, f"reward-{len(rows):05d}", topic, first, second, oracle.helpfulness))
    return rows


def safety_pairs(seed: int, count: int = SAFETY_PAIRS) -> list[Row]:
    """Pairs of an answer that complies and one that declines; the annotator prefers the less harmful one."""
    rng = random.Random(f"psacpo demo safety {seed}")
    rows: list[Row] = []
    while len(rows) < count:
        topic = draw_topic(rng, SAFETY_TOPICS)
        pair = [world.answer(rng, topic, draw(rng, styles)) for styles in (COMPLYING, DECLINING)]
        rng.shuffle(pair)
        rows.append(_row(rng, f"safety-{len(rows):05d}", topic, pair[0], pair[1], harmlessness))
    return rows


def harmlessness(prompt: str, completion: str) -> float:
    """The safety annotator's utility: the negative of harm."""
    return -oracle.harm(prompt, completion)


def prefers_first(rng: random.Random, first: float, second: float) -> bool:
    """One noisy verdict between two utilities (Bradley-Terry)."""
    return rng.random() < 1 / (1 + math.exp(-SHARPNESS * (first - second)))


def calls_unsafe(rng: random.Random, prompt: str, completion: str) -> bool:
    """The annotator's noisy answer to "is it unsafe?"."""
    return rng.random() < 1 / (1 + math.exp(-2 * SHARPNESS * oracle.harm(prompt, completion)))


def eval_prompts(split: str = "eval") -> list[Row]:
    """The prompts that a sweep answers. They do not depend on the run's seed."""
    return [
        {
            "id": f"{split}-{number:04d}",
            "prompt": request.prompt,
            "category": request.topic.family.category,
            "family": request.topic.family.name,
            "seen_family": not world.unseen_family(request.topic.family.name),
            "cluster": request.topic.cluster,
        }
        for number, request in enumerate(world.prompt_set(split, EVAL_COUNTS))
    ]


def draw_topic(rng: random.Random, categories: Mapping[str, float]) -> Topic:
    """A topic of the preference split, its category drawn by weight."""
    category = draw(rng, categories)
    return rng.choice([topic for topic in world.topics("train") if topic.family.category == category])


def draw(rng: random.Random, weights: Mapping[str, float]) -> str:
    """A key drawn by its weight."""
    return rng.choices(list(weights), list(weights.values()))[0]


def _row(
    rng: random.Random, name: str, topic: Topic, first: str, second: str, utility: Callable[[str, str], float]
) -> Row:
    prompt = world.make_prompt(rng, topic).prompt
    if not prefers_first(rng, utility(prompt, first), utility(prompt, second)):
        first, second = second, first
    return {"id": name, "prompt": prompt, "chosen": first, "rejected": second, "category": topic.family.category}
