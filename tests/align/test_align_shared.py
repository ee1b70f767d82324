"""Both answers behind one prompt in one row: the same numbers as apart, and only where the model allows it."""

from __future__ import annotations

import copy
import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from psacpo.align.examples import Pair
from psacpo.align.forward import PLAIN, Route, answer_log_probs
from psacpo.align.layout import LAYOUTS, group, padded_rows, shared_rows, tree_mask
from psacpo.align.lora import add_in_place
from psacpo.align.probe import choose_route, probe_pairs, window_obstacle
from psacpo.align.reference import Start

FAST = Route("shared", "chunked")


def test_rows_by_hand() -> None:
    pairs = [Pair(1, [5, 6], [7], [8, 9]), Pair(2, [4], [3, 2], [1])]
    batch = shared_rows(pairs, 0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [4, 3, 2, 1, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 2, 3], [0, 1, 2, 1, 2]]
    assert batch["segments"].tolist() == [[1, 1, 2, 3, 3], [1, 2, 2, 3, 0]]
    # Answers: 7 | 3 2 | 8 9 | 1; each first token is predicted at the prompt's end, flat over two rows of five.
    assert batch["predictors"].tolist() == [[1, 0], [5, 6], [1, 3], [5, 0]]
    assert batch["targets"].tolist() == [[7, 0], [3, 2], [8, 9], [1, 0]]
    mask = [[True, False], [True, True], [True, True], [True, False]]
    assert batch["completion_mask"].tolist() == mask

    apart = padded_rows(pairs, 0)
    assert apart["input_ids"].tolist() == [[5, 6, 7, 0], [4, 3, 2, 0], [5, 6, 8, 9], [4, 1, 0, 0]]
    assert apart["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]]
    assert apart["predictors"].tolist() == [[1, 0], [4, 5], [9, 10], [12, 0]]
    assert apart["targets"].tolist() == batch["targets"].tolist()
    assert apart["completion_mask"].tolist() == mask


def test_who_sees_whom_by_hand() -> None:
    """prompt prompt chosen rejected padding: the rejected answer sees the prompt and itself."""
    seen = tree_mask(torch.tensor([[1, 1, 2, 3, 0]]))
    assert seen.shape == (1, 1, 5, 5)
    assert seen[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 1, 0, 0, 1],
    ]


ANSWER = st.lists(st.integers(3, 60), min_size=1, max_size=9)
PAIR = st.builds(Pair, st.just(1), st.lists(st.integers(3, 60), min_size=1, max_size=12), ANSWER, ANSWER)


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def policy(request: pytest.FixtureRequest) -> Any:
    """Under an adapter that changes something."""
    base: Any = AutoModelForCausalLM.from_pretrained(
        request.getfixturevalue(f"tiny_{request.param}"), dtype=torch.float32
    )
    policy = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    torch.manual_seed(0)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return policy


@given(pairs=st.lists(PAIR, min_size=1, max_size=4), seed=st.integers(0, 9))
@settings(max_examples=15, deadline=None)
def test_shared_is_unshared(policy: Any, pairs: list[Pair], seed: int) -> None:
    """Log-probabilities of every token and the gradient of a random combination of them, within rounding."""
    found, gradients = [], []
    for route in (PLAIN, FAST):
        policy.zero_grad()
        scores = answer_log_probs(policy, policy.get_base_model(), LAYOUTS[route.layout](pairs, 2), route)
        weights = torch.randn(scores.shape, generator=torch.Generator().manual_seed(seed))
        (scores * weights).sum().backward()
        found.append(scores.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters() if p.requires_grad]))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)
    assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[0].norm()


def test_rejected_does_not_see_chosen(policy: Any) -> None:
    """Other tokens in the chosen answer change not one bit of the rejected one's log-probabilities."""
    found = []
    for chosen in ([7, 8, 9], [50, 51, 52]):
        batch = shared_rows([Pair(1, [5, 6], chosen, [10, 11])], 2)
        with torch.no_grad():
            found.append(answer_log_probs(policy, policy.get_base_model(), batch, FAST))
    assert torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[0][0], found[1][0])


def cost(parts: list[list[int]], lengths: list[int], overhead: float) -> float:
    return sum(len(part) * max(lengths[place] for place in part) + overhead for part in parts)


def partitions(places: list[int]) -> list[list[list[int]]]:
    """All ways to split `places` into groups."""
    if not places:
        return [[]]
    first, *rest = places
    found = []
    for smaller in partitions(rest):
        found.append([[first], *smaller])
        found += [[*smaller[:i], [first, *smaller[i]], *smaller[i + 1 :]] for i in range(len(smaller))]
    return found


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6), overhead=st.integers(0, 60))
@settings(max_examples=40, deadline=None)
def test_groups_cost_least(lengths: list[int], overhead: int) -> None:
    """Against every way to split so many rows."""
    found = group(lengths, overhead)
    assert sorted(itertools.chain(*found)) == list(range(len(lengths)))
    assert cost(found, lengths, overhead) == min(
        cost(parts, lengths, overhead) for parts in partitions(list(range(len(lengths))))
    )
    widths = [max(lengths[place] for place in part) for part in found]
    assert widths == sorted(widths, reverse=True)


def test_groups_at_the_ends() -> None:
    assert group([3, 9, 3, 5], 0) == [[1], [3], [0, 2]]
    assert group([3, 9, 3, 5], 1e9) == [[1, 3, 0, 2]]
    assert group([], 5) == []


SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
GATED = SIZE | {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}


def gemma2() -> Any:
    """A soft cap behind the head, and a window in every other layer."""
    return Gemma2ForCausalLM(Gemma2Config(**GATED, sliding_window=8, attn_implementation="eager", pad_token_id=0))


MODELS: dict[str, tuple[Any, int, Route, str]] = {
    "full attention": (lambda: MistralForCausalLM(MistralConfig(**GATED, sliding_window=None)), 20, FAST, ""),
    "eager attention": (
        lambda: MistralForCausalLM(MistralConfig(**GATED, sliding_window=None, attn_implementation="eager")),
        20,
        FAST,
        "",
    ),
    "learned positions": (
        lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64)),
        20,
        FAST,
        "",
    ),
    "window wide enough": (lambda: MistralForCausalLM(MistralConfig(**GATED, sliding_window=30)), 20, FAST, ""),
    "window": (
        lambda: MistralForCausalLM(MistralConfig(**GATED, sliding_window=8)),
        20,
        Route("padded", "chunked"),
        "prompts are not shared: attention reaches 8 tokens back, and rows have up to 20",
    ),
    "positions out of the mask": (
        lambda: BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=64)),
        20,
        Route("padded", "chunked"),
        "prompts are not shared: ",
    ),
    "state space": (
        lambda: MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64, state_size=4)),
        20,
        Route("padded", "chunked"),
        "prompts are not shared: ",
    ),
    "capped logits": (
        gemma2,
        8,
        Route("shared", "model"),
        "logits are the model's own: it changes log-probabilities by",
    ),
    "capped logits and window": (
        gemma2,
        20,
        Route("padded", "model"),
        "prompts are not shared: attention reaches 8 tokens back, and rows have up to 20; logits are the model's own",
    ),
}


def sharp(model: Any) -> Any:
    """Weights large enough that every token matters to every later one."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "conv" not in name:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def probed(model: Any, longest: int) -> tuple[Route, str]:
    draw = random.Random(0)
    pairs = [
        Pair(row, *([draw.randrange(3, 64) for _ in range(count)] for count in counts))
        for row, counts in enumerate([(longest - 5, 5, 3), (2, 3, 2)])
    ]

    def score(route: Route) -> torch.Tensor:
        with torch.no_grad():
            return answer_log_probs(model, model, LAYOUTS[route.layout](pairs, 0), route)

    return choose_route(score, torch.float32, window_obstacle(model.config.get_text_config(), longest))


@pytest.mark.parametrize("name", MODELS)
def test_the_model_decides(name: str) -> None:
    make, longest, expected, reason = MODELS[name]
    route, why = probed(sharp(make()), longest)
    assert route == expected, why
    assert why.startswith(reason)
    assert "\n" not in why
    assert bool(why) == bool(reason)


def test_window_is_found_without_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe alone notices it too: its longest pair reaches as far as any row will."""
    monkeypatch.setattr("psacpo.align.probe._WINDOWS", ())
    route, why = probed(sharp(MODELS["window"][0]()), 20)
    assert route == Route("padded", "chunked")
    assert "it changes log-probabilities" in why


def test_a_head_that_does_not_take_it() -> None:
    """A model whose forward wants real logits back is asked for them."""

    class Picky(MistralForCausalLM):
        def forward(self, *inputs: Any, **options: Any) -> Any:
            found = super().forward(*inputs, **options)
            if found.logits.shape[-1] != self.config.vocab_size:
                raise RuntimeError("these are no logits\nat all")
            return found

    route, why = probed(sharp(Picky(MistralConfig(**GATED, sliding_window=None))), 20)
    assert route == Route("shared", "model")
    assert why == "logits are the model's own: RuntimeError: these are no logits"


def test_weights_that_are_no_numbers() -> None:
    model = sharp(MODELS["full attention"][0]())
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        probed(model, 20)


def test_probe_takes_the_longest_and_the_shortest() -> None:
    pairs = [Pair(row, [1] * length, [2], [3]) for row, length in enumerate([3, 9, 1, 4])]
    assert [pair.row for pair in probe_pairs(pairs)] == [1, 2]
    assert [pair.row for pair in probe_pairs(pairs[:1])] == [0]


def weights(policy: Any) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in policy.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("fresh", [False, True])
def test_start_comes_back_and_goes_again(policy: Any, fresh: bool) -> None:
    policy = copy.deepcopy(policy)
    batch, inner = shared_rows([Pair(1, [5, 6], [7, 8], [10, 11])], 2), policy.get_base_model()

    def score() -> torch.Tensor:
        return answer_log_probs(policy, inner, batch, FAST).detach()

    policy.train()
    start = Start(policy, fresh=fresh)
    with policy.disable_adapter():
        base = score()
    before = base if fresh else score()
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    moved, after = weights(policy), score()
    with pytest.raises(KeyError), start.active():
        assert torch.equal(score(), before)
        assert not torch.is_grad_enabled()
        assert not policy.training
        raise KeyError
    assert policy.training
    assert all(torch.equal(one, other) for one, other in zip(weights(policy), moved, strict=True))
    assert all(parameter.requires_grad == ("lora" in name) for name, parameter in policy.named_parameters())
    assert torch.equal(score(), after)
    assert not torch.equal(after, before)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_lora_in_place_is_pefts(tiny_llama: Path, dropout: float, precision: str) -> None:
    """Values and gradients, in training with dropout, under autocast, and with the adapter off."""
    options = LoraConfig(r=4, lora_alpha=6, lora_dropout=dropout, target_modules="all-linear", use_rslora=True)
    torch.manual_seed(0)
    peft: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32), options)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    ours = copy.deepcopy(peft)
    assert add_in_place(ours) == 14
    ids = torch.randint(3, 60, (2, 7))
    found = []
    for policy in (peft, ours):
        policy.train()
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            logits = policy(ids).logits.float()
        logits.pow(2).mean().backward()
        gradient = torch.cat([p.grad.flatten() for p in policy.parameters() if p.requires_grad])
        with policy.disable_adapter(), torch.no_grad():
            found.append((logits.detach(), gradient, policy(ids).logits))
    (logits, gradient, off), (logits_, gradient_, off_) = found
    bound = 1e-6 if precision == "float32" else 0.02
    assert (logits - logits_).norm() <= bound * logits.norm()
    assert (gradient - gradient_).norm() <= 3 * bound * gradient.norm()
    assert torch.equal(off, off_)
    assert not torch.equal(off, logits)


def test_lora_of_another_kind_stays_as_it_is(tiny_llama: Path) -> None:
    base: Any = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    policy: Any = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    assert add_in_place(policy) == 0
