"""Makes the demo's shipped weights from its seeded grammar: tokenizer, base model, two judges.

python recipes/demo/build_weights.py --out demo/weights                  # everything
python recipes/demo/build_weights.py --out demo/weights --only judges    # after the base

The base takes about half an hour on one core and the judges five.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

import psacpo.demo
from psacpo.demo import data, oracle, world

SPECIAL = ("<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
VOCABULARY = 2048


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every word of the grammar is one token and any other text is spelled out."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_pattern(), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=2,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = TEMPLATE
    return wrapped


def _pattern() -> Regex:
    return Regex(r"\n?[0-9]\.| ?[A-Za-z']+|\n| ?[^\sA-Za-z0-9]+|[0-9]|\s+")


def _corpus() -> list[str]:
    """Every prompt wording and answer line of the world, once or a few times each."""
    rng = random.Random("psacpo demo tokenizer")
    texts = []
    for split in world.SPLITS:
        for topic in world.topics(split):
            texts += [world.make_prompt(rng, topic).prompt for _ in range(8)]
            texts += [world.answer(rng, topic, style) for style in world.STYLES]
    return texts


def reserved() -> set[str]:
    """Prompts that no training step may see: all development, evaluation and test prompts."""
    return {r.prompt for split in ("dev", "eval", "test") for r in world.prompt_set(split, data.EVAL_COUNTS)}


def encode(tokenizer: PreTrainedTokenizerFast, prompt: str, completion: str) -> tuple[list[int], int]:
    """(ids of the whole chat, length of its prompt part)."""
    user = [{"role": "user", "content": prompt}]
    head = tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True)
    first = tokenizer(head, add_special_tokens=False)["input_ids"]
    rest = tokenizer(completion + "<|end|>", add_special_tokens=False)["input_ids"]
    return first + rest, len(first)


@dataclass(frozen=True)
class Phase:
    """One leg of the base's training: a warm-up and a cosine to zero, under an optimiser of its own."""

    steps: int
    noise: float = 0.0  # largest standard deviation of the low-rank noise; the weights' own is 0.07
    moods: bool = False  # shift the input embeddings by a mood, and the odds of the styles with it


PHASES = (
    Phase(1600),
    Phase(800, noise=0.025, moods=True),
    Phase(800, noise=0.05, moods=True),
    Phase(1200, noise=0.1, moods=True),
)


def train_base(out: Path, phases: tuple[Phase, ...] = PHASES, batch_size: int = 64, peak: float = 3e-3) -> None:
    """Supervised training on endless fresh answers in the base's mix of styles; loss on answers only.

    In the later phases each gradient is taken at weights with random low-rank noise of a size that grows from
    phase to phase. It is of the kind that a LoRA update brings, so a later update moves what it is trained to
    move and leaves the wording of answers intact: with a tenth of this noise two answers in three were damaged at
    the safe end, with all of it one in a hundred lines (docs/log.md).
    """
    torch.manual_seed(0)
    rng = random.Random("psacpo demo base 0")
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config).train()
    print(f"base: {model.num_parameters():,} parameters, vocabulary {len(tokenizer)}", flush=True)
    began = time.time()
    for number, phase in enumerate(phases, 1):
        optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
        batches = _fresh_batches(rng, tokenizer, batch_size, phase.moods)
        average = 0.0
        for step in range(phase.steps):
            for group in optimizer.param_groups:
                group["lr"] = peak * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / phase.steps))
            loss = _base_step(model, next(batches), tokenizer.pad_token_id, phase.noise)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            average = loss if step == 0 else 0.98 * average + 0.02 * loss
            if (step + 1) % 100 == 0:
                print(f"phase {number} step {step + 1} loss {average:.4f} {time.time() - began:.0f} s", flush=True)
        save(model, tokenizer, out)


def _base_step(model: LlamaForCausalLM, batch: list[Mooded], pad: int, size: float) -> float:
    """Leaves the clipped gradient of one batch in the model; returns its loss."""
    moods, rows = torch.tensor([mood for mood, _ in batch]), [row for _, row in batch]
    ids, mask, labels = collate(rows, pad)
    noise = low_rank_noise(model, size) if size else {}
    for weight, change in noise.items():
        weight.data.add_(change)
    embedded = model.model.embed_tokens(ids) + (moods @ mood_directions(model.config.hidden_size))[:, None]
    hidden = model.model(inputs_embeds=embedded, attention_mask=mask).last_hidden_state[:, :-1]
    asked = labels[:, 1:] != -100
    loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[asked]), labels[:, 1:][asked])
    loss.backward()
    for weight, change in noise.items():
        weight.data.sub_(change)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    return loss.item()


Mooded = tuple[tuple[float, float], tuple[list[int], int]]  # (eager, careful), encoded chat


def mood_directions(width: int, size: float = 0.15) -> torch.Tensor:
    """(2, width): what one nat of each mood adds to every input embedding while the base is trained.

    A large model has met many personas, and alignment moves it among them. This gives the small one two
    smooth ways to differ, along which its wording is intact; the shipped base is the plain middle.
    """
    generator = torch.Generator().manual_seed(0)
    return size * torch.nn.functional.normalize(torch.randn(2, width, generator=generator), dim=1)


def low_rank_noise(model: LlamaForCausalLM, size: float, rank: int = 4) -> dict[torch.nn.Parameter, torch.Tensor]:
    """A random change of every linear layer in the blocks, of rank `rank` and one size drawn up to `size`."""
    scale = size * float(torch.rand(())) / math.sqrt(rank)
    found = {}
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            rows, columns = module.weight.shape
            found[module.weight] = scale * torch.randn(rows, rank) @ torch.randn(rank, columns)
    return found


def _fresh_batches(
    rng: random.Random, tokenizer: PreTrainedTokenizerFast, batch_size: int, moods: bool, count: int = 16
) -> Iterator[list[Mooded]]:
    """Endless batches of new chats, each of about equal lengths; `count` at a time in random order."""
    banned = reserved()
    everything = [topic for split in world.SPLITS for topic in world.topics(split)]
    while True:
        rows: list[Mooded] = []
        while len(rows) < count * batch_size:
            request = world.make_prompt(rng, rng.choice(everything))
            if request.prompt not in banned:
                plain = not moods or rng.random() < 0.4
                mood = (0.0, 0.0) if plain else (rng.uniform(-3, 3), rng.uniform(-4, 4))
                style = world.base_style(rng, request.topic.family, *mood)
                rows.append((mood, encode(tokenizer, request.prompt, world.answer(rng, request.topic, style))))
        rows.sort(key=lambda row: len(row[1][0]))
        batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
        rng.shuffle(batches)
        yield from batches


def collate(rows: list[tuple[list[int], int]], pad: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Right-padded ids, mask and labels (-100 on the prompt and the padding), each (batch, length)."""
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row, _ in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row, _ in rows])
    labels = torch.tensor([[-100] * n + row[n:] + [-100] * (longest - len(row)) for row, n in rows])
    return ids, mask, labels


def sample_policies(base: Path) -> list[dict[str, str]]:
    """What the base and policies of a run of the demo say on training prompts, beyond the safe end too.

    The run is the demo's own recipe with a seed that no run of the demo has and a safety stage that goes on a
    little longer, so that judges have met text that training has damaged.
    """
    rng = random.Random("psacpo demo judge prompts")
    mix = {"benign": 0.35, "borderline": 0.20, "harmful": 0.45}
    requests = [world.make_prompt(rng, data.draw_topic(rng, mix)) for _ in range(400)]
    rows = [{"id": f"{number:03d}", "prompt": request.prompt} for number, request in enumerate(requests)]
    recipe = yaml.safe_load((Path(psacpo.demo.__file__).parent / "psacpo.yaml").read_text())
    for name in ("metrics", "audit", "constraints"):
        del recipe[name]
    recipe |= {
        "seed": JUDGE_SEED,
        "stages": recipe["stages"][:2],
        "adapters": {"reward": "reward", "safety": "safety"},
        "ratios": [0, 0.5, 1],
        "baselines": {"base": {}, "beyond": {"reward": -0.3, "safety": 1.3}},
        "judges": {name: recipe["judges"][name] for name in ("oracle_help", "oracle_harm")},
        "axes": {"reward": "oracle_help", "cost": "oracle_harm"},
    }
    recipe["stages"][1]["stop_margin"] += 0.5
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        shutil.copytree(base, root / "model")
        (root / "data").mkdir()
        for name, found in {
            "reward": data.reward_pairs(JUDGE_SEED),
            "safety": data.safety_pairs(JUDGE_SEED),
            "prompts": rows,
        }.items():
            (root / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
        (root / "psacpo.yaml").write_text(yaml.safe_dump(recipe))
        for command in ("align", "frontier"):
            subprocess.run([sys.executable, "-m", "psacpo.cli", command, str(root)], check=True)
        said = [json.loads(line) for line in (root / "frontier" / "completions.jsonl").read_text().splitlines()]
    prompts = {row["id"]: row["prompt"] for row in rows}
    said.sort(key=lambda record: (record["policy"], record["prompt_id"]))
    return [{"prompt": prompts[record["prompt_id"]], "completion": record["text"]} for record in said]


JUDGE_LAYERS = 3
JUDGE_SEED = 1000  # no run of the demo has this seed


def judge_texts(rng: random.Random, samples: list[dict[str, str]], count: int) -> list[tuple[str, list[str]]]:
    """(training prompt, answers to compare): grammar answers, damaged ones, and what policies really said."""
    by_prompt: dict[str, list[str]] = {}
    for sample in samples:
        by_prompt.setdefault(sample["prompt"], []).append(sample["completion"])
    sampled = list(by_prompt)
    everyone = world.topics("train")
    found = []
    for number in range(count):
        if sampled and number % 2:
            prompt = sampled[(number // 2) % len(sampled)]
            topic = oracle.topic_of(prompt)
            said = by_prompt[prompt]
        else:
            topic = rng.choice(everyone)
            prompt, said = world.make_prompt(rng, topic).prompt, []
        assert topic is not None
        answers: list[str] = []
        for _ in range(3):
            text = (
                rng.choice(said) if said and rng.random() < 0.7 else world.answer(rng, topic, rng.choice(world.STYLES))
            )
            if rng.random() < 0.3:
                text = damage(rng, text, rng.choice(everyone))
            answers.append(text)
        found.append((prompt, answers))
    return found


def damage(rng: random.Random, text: str, other: world.Topic) -> str:
    """The text with one fault of the kinds that a broken policy makes."""
    lines = text.split("\n")
    words = text.split(" ")
    where = rng.randrange(len(lines))
    fault = rng.randrange(7)
    if fault == 0:  # a coherent answer about something else
        return world.answer(rng, other, rng.choice(("full", "short", "terse", "warn")))
    if fault == 1:  # a step of another topic
        lines[where] = lines[where][:3] + rng.choice(other.steps) if where else world.TIP.format(step=other.steps[0])
    elif fault == 2:  # a line said twice
        lines.insert(where, lines[where])
    elif fault == 3:  # a line lost
        del lines[where]
    elif fault == 4:  # a wrong word
        words[rng.randrange(len(words))] = rng.choice(rng.choice(other.steps).split(" "))
        return " ".join(words)
    elif fault == 5:  # words in disorder
        start = rng.randrange(len(words))
        part = words[start : start + 5]
        rng.shuffle(part)
        return " ".join(words[:start] + part + words[start + 5 :])
    else:  # cut short
        return " ".join(words[: rng.randrange(1, len(words) + 1)])
    return "\n".join(lines)


def train_judge(
    out: Path, base: Path, name: str, samples: list[dict[str, str]], prompts: int = 4000, batch_size: int = 32
) -> None:
    """A scalar judge on the lower layers of the base, trained on noisy verdicts only.

    Labels are those that preference data carry: which of two answers the annotator prefers and, for the cost
    judge, whether the annotator calls an answer unsafe, which puts the zero of its score.
    """
    torch.manual_seed(JUDGE_SEED)
    rng = random.Random(f"psacpo demo judge {name}")
    tokenizer = AutoTokenizer.from_pretrained(base)
    config = LlamaConfig.from_pretrained(base, num_hidden_layers=JUDGE_LAYERS, num_labels=1)
    model = LlamaForSequenceClassification.from_pretrained(base, config=config, dtype=torch.float32)
    torch.nn.init.normal_(model.score.weight, std=0.02)
    utility = oracle.helpfulness if name == "reward" else data.harmlessness
    examples = []
    for prompt, answers in judge_texts(rng, samples, prompts):
        rows = [encode(tokenizer, prompt, text)[0] for text in answers]
        values = [utility(prompt, text) for text in answers]
        flags = [data.calls_unsafe(rng, prompt, text) for text in answers]
        pairs = [(i, j) for i in range(3) for j in range(i)]
        examples.append(
            (rows, [(i, j) if data.prefers_first(rng, values[i], values[j]) else (j, i) for i, j in pairs], flags)
        )
    rng.shuffle(examples)
    cut = len(examples) - 256
    steps = cut // batch_size
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
    sign = -1.0 if name == "cost" else 1.0
    for step in range(steps):
        batch = examples[step * batch_size : (step + 1) * batch_size]
        rate = 1e-3 * min(1.0, (step + 1) / 10) * (1 - step / steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        scores, better, worse, unsafe = _scores(model, batch, tokenizer.pad_token_id)
        loss = -torch.nn.functional.logsigmoid(sign * (scores[better] - scores[worse])).mean()
        if name == "cost":
            loss = loss + torch.nn.functional.binary_cross_entropy_with_logits(scores, unsafe)
        else:
            loss = loss + 0.01 * scores.square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 25 == 0:
            print(f"judge {name} step {step + 1} of {steps} loss {loss.item():.3f}", flush=True)
    model.eval()
    with torch.no_grad():
        scores, better, worse, unsafe = _scores(model, examples[cut:], tokenizer.pad_token_id)
    pair = (sign * (scores[better] - scores[worse]) > 0).float().mean().item()
    print(f"judge {name}: held-out pairs {pair:.3f}, unsafe sign {((scores > 0) == (unsafe > 0)).float().mean():.3f}")
    save(model, tokenizer, out)


def _scores(
    model: LlamaForSequenceClassification,
    batch: list[tuple[list[list[int]], list[tuple[int, int]], list[bool]]],
    pad: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(scores (3n,), rows of preferred answers, rows of the others, unsafe labels (3n,)) of n examples."""
    rows = [(ids, 0) for answers, _, _ in batch for ids in answers]
    ids, mask, _ = collate(rows, pad)
    scores = model(input_ids=ids, attention_mask=mask).logits[:, 0]
    better = torch.tensor([3 * n + i for n, (_, pairs, _) in enumerate(batch) for i, _ in pairs])
    worse = torch.tensor([3 * n + j for n, (_, pairs, _) in enumerate(batch) for _, j in pairs])
    unsafe = torch.tensor([float(label) for _, _, labels in batch for label in labels])
    return scores, better, worse, unsafe


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Writes a Hugging Face model directory in half precision, with a minimised tokenizer.json."""
    half = copy.deepcopy(model).half()
    half.config.dtype = "float16"
    half.save_pretrained(out)
    tokenizer.save_pretrained(out)
    path = out / "tokenizer.json"
    (out / "model.safetensors").chmod(0o644)
    path.write_text(json.dumps(json.loads(path.read_text()), ensure_ascii=False, separators=(",", ":")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for base/, reward/ and cost/")
    parser.add_argument("--only", choices=("base", "judges"), help="default: both, in this order")
    parser.add_argument("--threads", type=int, default=1, help="the last bits of the weights depend on it")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.only != "judges":
        train_base(args.out / "base")
    if args.only != "base":
        samples = sample_policies(args.out / "base")
        for name in ("reward", "cost"):
            train_judge(args.out / name, args.out / "base", name, samples)


if __name__ == "__main__":
    main()
