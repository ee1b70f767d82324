"""Tiny real models, tokenizers, adapters and rows, made on disk in seconds: no network, no hub."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

WORDS = "how do i bake break a loaf lock of bread bike the mix open heat then sorry cannot help with that first second"
CHAT_TEMPLATE = (
    "{% if bos_token %}{{ bos_token }}{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def make_tokenizer(path: Path, *, chat: bool, bos: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE of a few hundred entries; with `bos` it puts <s> in front when it adds special tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    core.train_from_iterator([WORDS] * 4, trainer)
    if bos:
        from tokenizers.processors import TemplateProcessing

        core.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>" if bos else None, eos_token="</s>", pad_token="<pad>"
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(path)
    return tokenizer


def make_model(path: Path, kind: str = "llama", *, seed: int = 0, chat: bool = True, **sizes: Any) -> Path:
    """A random two-layer model directory with its tokenizer; weights large enough that every part matters."""
    tokenizer = make_tokenizer(path, chat=chat, bos=kind == "llama")
    torch.manual_seed(seed)
    options = SIZES | {"vocab_size": len(tokenizer), "initializer_range": 0.2} | sizes
    model: Any = (
        LlamaForCausalLM(LlamaConfig(**options)) if kind == "llama" else Qwen2ForCausalLM(Qwen2Config(**options))
    )
    model.save_pretrained(path)
    return path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What looks at the whole demo waits for it."""
    for item in items:
        if "demo_run" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Refuse to run where groups are not kept together: pytest-xdist 3.8 drops them without a word under pytest 9.2."""
    if getattr(session.config.option, "loadgroup", False):
        lost = [i.nodeid for i in session.items if i.get_closest_marker("xdist_group") and "@" not in i.nodeid]
        if lost:
            raise pytest.UsageError(f"--dist loadgroup does not act on {lost[0]}; allowed: pytest before 9.2")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama directory whose tokenizer has a chat template and a BOS."""
    return make_model(tmp_path_factory.mktemp("llama") / "model", "llama")


@pytest.fixture(scope="session")
def tiny_llama_raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama directory whose tokenizer has no chat template."""
    return make_model(tmp_path_factory.mktemp("llama-raw") / "model", "llama", chat=False)


@pytest.fixture(scope="session")
def tiny_qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 directory (biases on q, k, v; tied embeddings; no BOS)."""
    return make_model(tmp_path_factory.mktemp("qwen2") / "model", "qwen2", seed=1, tie_word_embeddings=True)


@pytest.fixture(scope="session")
def tiny_judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sequence-classification judge with one score, on a Llama."""
    path = tmp_path_factory.mktemp("judge") / "model"
    tokenizer = make_tokenizer(path, chat=True)
    torch.manual_seed(7)
    config = LlamaConfig(**SIZES, vocab_size=len(tokenizer), num_labels=1, initializer_range=0.2)
    LlamaForSequenceClassification(config).save_pretrained(path)
    return path


MakeAdapter = Callable[..., Path]


@pytest.fixture(scope="session")
def make_adapter(tmp_path_factory: pytest.TempPathFactory) -> MakeAdapter:
    """Write a PEFT LoRA directory for a base, both factors random: `make_adapter(base, seed=1, r=4, lora_alpha=8)`."""

    def make(base: Path, *, seed: int, scale: float = 0.1, **options: Any) -> Path:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options
        torch.manual_seed(seed)
        adapted = get_peft_model(model, LoraConfig(**settings))
        assert isinstance(adapted, PeftModel)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=scale)
        path = tmp_path_factory.mktemp("adapter") / f"adapter-{seed}"
        adapted.save_pretrained(path)
        return path

    return make


@pytest.fixture(scope="session")
def two_adapters(tiny_llama: Path, make_adapter: MakeAdapter) -> tuple[Path, Path]:
    """Reward and safety adapters on `tiny_llama`, of different rank and alpha."""
    return make_adapter(tiny_llama, seed=1, r=4, lora_alpha=8), make_adapter(tiny_llama, seed=2, r=6, lora_alpha=6)


def preference_rows(count: int, *, seed: int = 0) -> list[dict[str, str]]:
    """TRL preference rows out of a few dozen words."""
    draw = random.Random(seed)
    words = WORDS.split()

    def sentence(low: int, high: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(low, high)))

    return [
        {"prompt": sentence(3, 9), "chosen": sentence(2, 8) + " help", "rejected": sentence(2, 8) + " sorry"}
        for _ in range(count)
    ]


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows as JSON lines and give the path back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    """Thirty-two preference rows on disk."""
    return write_jsonl(tmp_path / "pairs.jsonl", preference_rows(32))


RunCommand = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def psacpo() -> RunCommand:
    """Run the real command in a process of its own: `psacpo("merge", "--ratio", "0.3", cwd=directory)`."""

    def run(*arguments: str | Path, cwd: Path | None = None, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "psacpo.cli", *map(str, arguments)]
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False)

    return run


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory in which `make demo`'s own command ran, with its project in demo-run; about a minute, once."""
    place = tmp_path_factory.mktemp("demo")
    root = Path(__file__).parent.parent
    planned = subprocess.run(["make", "-n", "demo"], cwd=root, capture_output=True, text=True, check=True).stdout
    [line] = [line for line in planned.splitlines() if "/psacpo demo" in line]
    arguments = line.split()[1:]
    done = subprocess.run(
        [sys.executable, "-m", "psacpo.cli", *arguments], cwd=place, capture_output=True, text=True, check=False
    )
    (place / "stdout.txt").write_text(done.stdout)
    (place / "stderr.txt").write_text(done.stderr)
    assert done.returncode == 0, done.stderr
    return place
