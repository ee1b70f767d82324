"""`align --inspect`: the numbers are those of training, nothing of a model is loaded, and what is shown is what is so."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from psacpo.align import AlignConfig
from psacpo.align.data import read_data
from psacpo.align.display import show
from psacpo.align.inspection import inspect
from psacpo.align.pairs import encode_rows

PAIRS = [
    {"prompt": "how do i bake", "chosen": "mix", "rejected": "no\n\x1b[31mred"},
    {"prompt": "how do i bake", "chosen": "no\n\x1b[31mred", "rejected": "mix"},
    {"prompt": "how do i bake", "chosen": "mix", "rejected": "no\n\x1b[31mred"},
    {"prompt": "open", "chosen": "with a key", "rejected": "so"},
    {"prompt": "bread " * 60, "chosen": "yes", "rejected": "no"},
    {"prompt": "bike", "chosen": "", "rejected": "so"},
    {"prompt": "bike", "chosen": "so", "rejected": "so"},
]
ANSWERS = [{"prompt": f"how {i}", "completion": "so " * (i + 1), "label": i % 4 == 0} for i in range(8)]


@pytest.fixture
def project(tmp_path: Path, tiny_llama: Path, write_rows: Callable[..., Path]) -> Path:
    """A directory with a recipe, data and evaluation prompts, and a base without weights."""
    shutil.copytree(tiny_llama, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    # Bytes that are no weights: who reads them falls over.
    (tmp_path / "base" / "model.safetensors").write_bytes(b"none")
    write_rows(tmp_path / "pairs.jsonl", PAIRS)
    write_rows(tmp_path / "answers.jsonl", ANSWERS)
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": "Open!"}])
    stages = [
        {"name": "reward", "data": "pairs.jsonl"},
        {"name": "safety", "data": "answers.jsonl", "loss": "kto", "undesirable_weight": 0.3},
    ]
    recipe = {"base": "base", "prompts": "prompts.jsonl", "max_length": 64, "stages": stages, "naive": True}
    (tmp_path / "psacpo.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def config_of(project: Path) -> AlignConfig:
    stages = yaml.safe_load((project / "psacpo.yaml").read_text())["stages"]
    stages = [stage | {"data": str(project / stage["data"])} for stage in stages]
    common: dict[str, Any] = {"evaluation_prompts": project / "prompts.jsonl", "max_length": 64, "naive": True}
    return AlignConfig(base=str(project / "base"), out=project, stages=stages, **common)


def test_numbers(project: Path) -> None:
    found = inspect(config_of(project))
    pairs, answers = found["data"]
    # The naive run of the same data is no third set of rows.
    assert (pairs["stages"], answers["stages"]) == (["reward"], ["safety", "safety-naive"])
    counts = {"read": 7, "empty": 1, "identical": 1, "used": 5, "truncated": 1, "truncated_prompts": 1}
    assert pairs["counts"] == counts | {"duplicates": 1, "contradictory": 1, "overlap": 1}
    assert pairs["prompts"] == 3
    tokenizer = AutoTokenizer.from_pretrained(project / "base")
    encoded = encode_rows(read_data(str(project / "pairs.jsonl"), {}), tokenizer, None, 64).pairs
    lengths = sorted(len(pair.chosen) for pair in encoded)
    assert pairs["tokens"]["chosen"] == {"median": lengths[2], "p95": lengths[4], "max": lengths[4]}
    longer = sum(len(pair.chosen) > len(pair.rejected) for pair in encoded)
    equal = sum(len(pair.chosen) == len(pair.rejected) for pair in encoded)
    share = (longer + equal / 2) / 5
    assert pairs["longer"] == {"chosen": longer, "equal": equal, "accuracy": max(share, 1 - share)}
    assert (answers["counts"]["desirable"], "longer" in answers) == (2, False)
    assert set(answers["tokens"]) == {"prompt", "desirable", "undesirable"}
    [note] = found["notes"]
    assert note.startswith("reward: warning: 1 of 5 rows ask what the evaluation's prompts ask")


def test_examples(project: Path) -> None:
    """Decoded from the very ids that training sees, with one BOS at the start and EOS at the end of every answer."""
    pairs, answers = inspect(config_of(project))["data"]
    assert [example["row"] for example in pairs["examples"]] == [1, 2, 3, 4, 5]
    example = pairs["examples"][3]
    assert example["prompt"] == "<s><|user|>open<|assistant|>"
    assert [answer["text"] for answer in example["answers"]] == ["with a key</s>", "so</s>"]
    assert example["prompt"].count("<s>") == 1
    assert len(answers["examples"]) == 5
    for example in answers["examples"]:
        [answer] = example["answers"]
        assert answer["kind"] == ("desirable" if example["row"] % 4 == 1 else "undesirable")
        assert answer["text"].endswith("</s>")


def test_drawn_with_the_seed(project: Path) -> None:
    def rows(seed: int) -> list[int]:
        config = config_of(project).model_copy(update={"seed": seed})
        return [example["row"] for example in inspect(config, 3)["data"][1]["examples"]]

    assert rows(0) == rows(0)
    assert len({tuple(rows(seed)) for seed in range(4)}) > 1


def test_page(project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain where it is piped: no escape codes, none of the data's either, no line over the width."""
    monkeypatch.setenv("COLUMNS", "70")
    show(inspect(config_of(project)))
    page = capsys.readouterr().out
    assert "\x1b" not in page
    assert max(map(len, page.splitlines())) <= 70
    assert not any(line.endswith(" ") for line in page.splitlines())
    for said in ("safety, safety-naive", "  dropped: empty", "  duplicates", "1 (20.0 %)", "accuracy by length alone"):
        assert said in page
    # Both columns' lines in one order: what the second has alone stands where it belongs.
    order = ["\nused", "\n  desirable", "\n  different prompts", "\n  chosen", "\n  rejected", "\nboth are"]
    assert [page.index(line) for line in order] == sorted(page.index(line) for line in order)
    assert "  chosen ⟦with a key</s>⟧\n  rejected ⟦so</s>⟧\n" in page
    assert "<|user|>open<|assistant|>" in page
    assert "⏎\N{REPLACEMENT CHARACTER}[31mred</s>⟧" in page


def test_command(project: Path, psacpo: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    before = sorted(project.rglob("*"))
    done = psacpo("align", "--inspect", "--json", cwd=project)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["data"] == json.loads(json.dumps(inspect_here(project)))
    assert done.stderr.startswith("reward: warning: 1 of 5 rows ask")
    assert sorted(project.rglob("*")) == before
    page = psacpo("align", "psacpo.yaml", "--inspect", cwd=project)
    assert "⟦with a key</s>⟧" in page.stdout
    (project / "pairs.jsonl").write_text('{"prompt": "a", "chosn": "b", "rejected": "c"}\n')
    refused = psacpo("align", "--inspect", cwd=project)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "did you mean 'chosn'" in refused.stderr


def inspect_here(project: Path) -> Any:
    found = inspect(config_of(project))["data"]
    return [data | {"source": Path(data["source"]).name} for data in found]
