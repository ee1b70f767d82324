"""The whole job on tiny models: what is left on disk, what is done again, what each stage starts from."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from psacpo.align import AlignConfig, align, plan
from psacpo.align.data import read_preferences
from psacpo.align.forward import PLAIN, answer_log_probs
from psacpo.align.layout import padded_rows
from psacpo.align.pairs import encode_rows
from psacpo.align.planning import total_steps
from psacpo.errors import InputError
from psacpo.files import digest_file, digest_model, read_manifest

Metrics = Callable[[Path], list[dict[str, Any]]]
FILES = {"adapter_config.json", "adapter_model.safetensors", "metrics.jsonl", "psacpo.json", "README.md"}


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def inodes(directory: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in [directory, *directory.iterdir()]}


def changed(config: AlignConfig, *, stages: dict[str, dict[str, Any]] | None = None, **settings: Any) -> AlignConfig:
    """`config` with other settings, and other settings of the named stages."""
    values = config.model_dump(by_alias=True) | settings
    values["stages"] = [stage | (stages or {}).get(stage["name"], {}) for stage in values["stages"]]
    return AlignConfig.model_validate(values)


def margins(config: AlignConfig, policy: str, reference: str, data: str) -> torch.Tensor:
    """Margins in nats on all rows of `data`, from the directories alone: load both in PEFT, score, subtract."""
    tokenizer = AutoTokenizer.from_pretrained(config.base)
    pairs = encode_rows(read_preferences(data, {}), tokenizer, config.template, config.max_length).pairs
    scores = []
    for name in (policy, reference):
        base: Any = AutoModelForCausalLM.from_pretrained(config.base, dtype=torch.float32)
        model: Any = base if name == "base" else PeftModel.from_pretrained(base, config.out / name)
        with torch.no_grad():
            found = answer_log_probs(model.eval(), base, padded_rows(pairs, 0), PLAIN)
        scores.append(found.sum(dim=1).view(2, -1))
    ratios = scores[0] - scores[1]
    return ratios[0] - ratios[1]


def test_directories(finished: AlignConfig) -> None:
    assert {path.name for path in finished.out.iterdir()} == {"reward", "safety", "naive"}
    for stage in finished.stages:
        directory = finished.out / stage.name
        assert {path.name for path in directory.iterdir()} == FILES
        settings = json.loads((directory / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == os.path.abspath(finished.base)
        assert (settings["r"], settings["lora_alpha"], settings["peft_type"]) == (4, 8, "LORA")
        assert settings["target_modules"] == sorted(settings["target_modules"])
        weights = load_file(directory / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
        # Every linear layer but the head: 7 in each of 2 layers, A and B.
        assert len(weights) == 2 * 7 * 2
        # Whoever may read one file may read them all.
        assert len({path.stat().st_mode for path in directory.iterdir() if path.name.startswith("adapter")}) == 1


def test_manifest(finished: AlignConfig, metrics: Metrics) -> None:
    reward, safety, naive = (read_manifest(finished.out / stage.name) or {} for stage in finished.stages)
    assert reward["kind"] == "adapter"
    assert reward["base_digest"] == reward["inputs"]["base"] == digest_model(Path(finished.base))
    assert reward["inputs"]["data"] == digest_file(Path(finished.stages[0].data))
    assert "start" not in reward["inputs"]
    assert safety["inputs"]["start"] == digest_model(finished.out / "reward") == reward["digest"]
    assert [m["beta"] for m in (reward, safety, naive)] == pytest.approx([0.1, 0.01, 0.01])
    assert [m["lambda"] for m in (reward, safety, naive)] == [None, pytest.approx(10.0), None]
    assert [m["start"] for m in (reward, safety, naive)] == ["base", "reward", "base"]
    assert [m["steps"] for m in (reward, safety, naive)] == [12, 4, 4]
    assert {m["stopped_by"] for m in (reward, safety, naive)} == {"max_steps"}
    assert reward["rows"] == {
        "read": 48,
        "empty": 0,
        "identical": 0,
        "truncated": 0,
        "used": 48,
        "drawn": 48,
        "scored": 48,
    }
    assert safety["rows"]["drawn"] == 32
    assert reward["final"] == metrics(finished.out / "reward")[-1]
    assert reward["seeds"]["seed"] == 7
    assert len({m["seeds"]["stage"] for m in (reward, safety, naive)}) == 3
    assert len({m["key"] for m in (reward, safety, naive)}) == 3


def test_metrics(finished: AlignConfig, metrics: Metrics) -> None:
    found = metrics(finished.out / "reward")
    assert [line["step"] for line in found] == list(range(1, 13))
    for line in found:
        assert line["margin"] == pytest.approx(line["chosen_logratio"] - line["rejected_logratio"], abs=1e-4)
        assert line["learning_rate"] == 1e-2
        assert line["grad_norm"] > 0


def test_learnable_rows_are_learnt(finished: AlignConfig, metrics: Metrics) -> None:
    found = metrics(finished.out / "reward")
    assert found[-1]["accuracy"] > 0.9
    assert found[-1]["loss"] < 0.4
    # And the policy on disk is the trained one.
    assert (margins(finished, "reward", "base", finished.stages[0].data) > 0).float().mean() > 0.95


@pytest.mark.parametrize("name", ["reward", "safety", "naive"])
def test_every_stage_starts_at_its_reference(finished: AlignConfig, metrics: Metrics, name: str) -> None:
    first, second = metrics(finished.out / name)[:2]
    assert abs(first["margin"]) < 1e-5
    assert first["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert second["margin"] > 0.01


def test_second_stage_refers_to_the_first(copy: AlignConfig, tmp_path: Path, metrics: Metrics) -> None:
    """With one batch of all rows, the margin at step 2 is that of the policy after step 1. Seen from stage 1's adapter
    it is what training said, seen from the base it is not."""
    data = copy.stages[1].data
    for steps in (1, 2):
        new = changed(copy, stages={"safety": {"max_steps": steps, "batch_size": 40}})
        new = new.model_copy(update={"stages": new.stages[:2]})
        shutil.rmtree(copy.out / "safety")
        align(new)
        if steps == 1:
            from_reward, from_base = (margins(copy, "safety", name, data).mean().item() for name in ("reward", "base"))
    said = metrics(copy.out / "safety")[1]["margin"]
    assert from_reward == pytest.approx(said, abs=1e-3)
    assert abs(from_base - said) > 0.01


def test_naive_stage_knows_nothing_of_the_first(finished: AlignConfig, tmp_path: Path) -> None:
    """It starts at the base and has its own seed: without the other stages it comes out the same."""
    alone = changed(finished, out=tmp_path / "out")
    alone = alone.model_copy(update={"stages": [finished.stages[2]]})
    align(alone)
    assert contents(alone.out / "naive") == contents(finished.out / "naive")


def test_two_runs_are_the_same_bytes(finished: AlignConfig, tmp_path: Path) -> None:
    """Also in another directory, and with global generators in another state."""
    torch.rand(3)
    again = changed(finished, out=tmp_path / "out")
    align(again)
    for stage in finished.stages:
        assert contents(again.out / stage.name) == contents(finished.out / stage.name), stage.name


def test_another_seed_is_another_adapter(finished: AlignConfig, tmp_path: Path) -> None:
    other = changed(finished, out=tmp_path / "out", seed=8).model_copy(update={"stages": [finished.stages[2]]})
    align(other)
    name = "adapter_model.safetensors"
    assert contents(other.out / "naive")[name] != contents(finished.out / "naive")[name]


def test_adapters_change_the_logits(finished: AlignConfig) -> None:
    ids = torch.tensor([[0, 20, 30, 40]])
    found = []
    for name in (None, "reward", "safety", "naive"):
        model: Any = AutoModelForCausalLM.from_pretrained(finished.base, dtype=torch.float32)
        found.append((PeftModel.from_pretrained(model, finished.out / name) if name else model)(ids).logits)
    for i in range(4):
        for j in range(i):
            assert (found[i] - found[j]).abs().max() > 1e-3


@pytest.fixture
def copy(finished: AlignConfig, tmp_path: Path) -> AlignConfig:
    """The finished run in a directory of the test's own."""
    shutil.copytree(finished.out, tmp_path / "out")
    return changed(finished, out=tmp_path / "out")


def test_done_stages_are_not_done_again(copy: AlignConfig, capsys: pytest.CaptureFixture[str]) -> None:
    before = {stage.name: inodes(copy.out / stage.name) for stage in copy.stages}
    align(copy)
    assert {stage.name: inodes(copy.out / stage.name) for stage in copy.stages} == before
    said = capsys.readouterr()
    assert said.err.splitlines() == [f"{s.name}: already done, taken from {copy.out / s.name}" for s in copy.stages]
    assert said.out == ""


def test_run_goes_on_after_the_last_finished_stage(copy: AlignConfig, finished: AlignConfig) -> None:
    shutil.rmtree(copy.out / "safety")
    shutil.rmtree(copy.out / "naive")
    before = inodes(copy.out / "reward")
    align(copy)
    assert inodes(copy.out / "reward") == before
    assert contents(copy.out / "safety") == contents(finished.out / "safety")


def test_other_data_of_stage_two(copy: AlignConfig, tmp_path: Path, rows: Any, write_rows: Any) -> None:
    data = write_rows(tmp_path / "new.jsonl", rows(30, seed=5))
    new = changed(copy, stages={"safety": {"data": str(data)}})
    before = inodes(copy.out / "reward")
    with pytest.raises(InputError, match="safety holds the result of other settings, data, start or base"):
        align(new)
    with pytest.raises(InputError, match="overwrite"):
        plan(new)
    old = contents(copy.out / "safety")
    align(changed(new, overwrite=True))
    assert inodes(copy.out / "reward") == before
    assert contents(copy.out / "safety")["adapter_model.safetensors"] != old["adapter_model.safetensors"]


def test_other_first_stage_makes_later_ones_stale(copy: AlignConfig) -> None:
    """Nothing is trained before that is said: the first stage's directory is gone and stays gone."""
    shutil.rmtree(copy.out / "reward")
    with pytest.raises(InputError, match="safety holds the result of other"):
        align(changed(copy, stages={"reward": {"learning_rate": 2e-2}}))
    assert not (copy.out / "reward").exists()


def test_changed_weights_are_noticed(copy: AlignConfig, finished: AlignConfig) -> None:
    shutil.copy(finished.out / "naive" / "adapter_model.safetensors", copy.out / "reward")
    with pytest.raises(InputError, match="reward was changed or is not whole"):
        align(copy)


def test_directory_of_something_else(copy: AlignConfig) -> None:
    shutil.rmtree(copy.out / "naive")
    (copy.out / "naive").mkdir()
    (copy.out / "naive" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="in use"):
        align(copy)
    assert (copy.out / "naive" / "thesis.tex").exists()


def test_plan(copy: AlignConfig) -> None:
    shutil.rmtree(copy.out / "naive")
    found = plan(copy)
    assert (found["reward.state"], found["safety.state"], found["naive.state"]) == ("done", "done", "to train")
    assert (found["naive.pairs"], found["naive.steps"], found["naive.beta"]) == (32, 4, 0.01)
    assert found["adapter_bytes"] > (copy.out / "reward" / "adapter_model.safetensors").stat().st_size * 0.9
    assert not (copy.out / "naive").exists()


def test_stop_margin(
    tiny_llama: Path, tmp_path: Path, rows: Any, write_rows: Any, make_config: Any, metrics: Metrics
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", rows(32))
    config = make_config(tiny_llama, tmp_path / "out", [{"data": data, "max_steps": 30, "stop_margin": 1.0}])
    align(config)
    found = metrics(tmp_path / "out" / "a")
    smooth = [line["margin_smoothed"] for line in found]
    assert len(found) < 30
    assert smooth[-1] >= 1.0 > max(smooth[:-1])
    assert (read_manifest(tmp_path / "out" / "a") or {})["stopped_by"] == "stop_margin"
    # By hand: weights 0.8^(n-i), normalised.
    weights = [0.8 ** (len(found) - 1 - place) for place in range(len(found))]
    mean = sum(w * line["margin"] for w, line in zip(weights, found, strict=True)) / sum(weights)
    assert smooth[-1] == pytest.approx(mean)


def test_accumulation_is_the_mean_over_all_pairs(
    tiny_llama: Path, tmp_path: Path, rows: Any, write_rows: Any, make_config: Any, metrics: Metrics
) -> None:
    """Ten pairs as one batch, and as batches of 4, 4 and 2: the same step, though the last batch is smaller."""
    data = write_rows(tmp_path / "rows.jsonl", rows(10))
    shapes = {"whole": {"batch_size": 10}, "parts": {"batch_size": 4, "gradient_accumulation": 3}}
    found = {}
    for name, shape in shapes.items():
        # The same stage name is the same seed; one pass over the data is one step.
        stage = {"name": "a", "data": data, "max_steps": None, "epochs": 2} | shape
        align(make_config(tiny_llama, tmp_path / name, [stage]))
        found[name] = metrics(tmp_path / name / "a")
        assert (read_manifest(tmp_path / name / "a") or {})["stopped_by"] == "epochs"
    for one, other in zip(found["whole"], found["parts"], strict=True):
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    assert len(found["whole"]) == 2


@pytest.mark.parametrize(
    ("pairs", "per_batch", "accumulation", "epochs", "steps"),
    [(100, 8, 1, 1.0, 13), (100, 8, 2, 1.0, 7), (100, 8, 2, 3.0, 21), (100, 10, 1, 0.25, 3), (3, 8, 4, 1.0, 1)],
)
def test_total_steps(pairs: int, per_batch: int, accumulation: int, epochs: float, steps: int) -> None:
    assert total_steps(pairs, per_batch, accumulation, epochs) == steps


def test_part_of_an_epoch_draws_part_of_the_rows(
    tiny_llama: Path, tmp_path: Path, rows: Any, write_rows: Any, make_config: Any, metrics: Metrics
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", rows(40))
    align(make_config(tiny_llama, tmp_path / "out", [{"data": data, "max_steps": None, "epochs": 0.4}]))
    assert len(metrics(tmp_path / "out" / "a")) == 2
    assert (read_manifest(tmp_path / "out" / "a") or {})["rows"]["drawn"] == 16


@pytest.mark.parametrize(
    ("scheduler", "rates"),
    [
        ("constant", [0.0, 0.5, 1, 1, 1, 1]),
        ("linear", [0.0, 0.5, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.0, 0.5, 1, 0.8535534, 0.5, 0.1464466]),
    ],
)
def test_schedules(
    scheduler: str,
    rates: list[float],
    tiny_llama: Path,
    tmp_path: Path,
    rows: Any,
    write_rows: Any,
    make_config: Any,
    metrics: Metrics,
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", rows(8))
    stage = {"data": data, "max_steps": 6, "warmup_steps": 2, "lr_scheduler": scheduler, "learning_rate": 1e-3}
    align(make_config(tiny_llama, tmp_path / "out", [stage | {"batch_size": 4}]))
    found = [line["learning_rate"] / 1e-3 for line in metrics(tmp_path / "out" / "a")]
    assert found == pytest.approx(rates, abs=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "bfloat16", "gradient_checkpointing": True},
        {"dtype": "float16"},
        {
            "template": "USER: {prompt} ASSISTANT:",
            "lora": {"r": 2, "alpha": 3, "dropout": 0.1, "target_modules": ["q_proj"]},
        },
    ],
)
def test_other_settings_on_qwen2(
    options: dict[str, Any],
    tiny_qwen2: Path,
    tmp_path: Path,
    rows: Any,
    write_rows: Any,
    make_config: Any,
    metrics: Metrics,
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", rows(24))
    stages = [{"data": data, "max_steps": 4}, {"data": data, "max_steps": 2}]
    align(make_config(tiny_qwen2, tmp_path / "out", stages, **options))
    for name in "ab":
        weights = load_file(tmp_path / "out" / name / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
        assert all(tensor.abs().max() > 0 for tensor in weights.values())
        assert len(weights) == (4 if "lora" in options else 28)
    first = metrics(tmp_path / "out" / "a")
    # With dropout in the adapter the policy in training is not quite the reference, even at the start of stage 2.
    assert abs(first[0]["margin"]) < 1e-4
    assert first[-1]["margin"] > 0.05


def test_gradient_checkpointing_changes_nothing(
    tiny_llama: Path,
    tmp_path: Path,
    rows: Any,
    write_rows: Any,
    make_config: Any,
    metrics: Metrics,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    calls: list[int] = []
    real = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda *inputs: (calls.append(1), real(*inputs))[1])
    data = write_rows(tmp_path / "rows.jsonl", rows(16))
    found, counts = [], []
    for flag in (False, True):
        calls.clear()
        align(make_config(tiny_llama, tmp_path / str(flag), [{"data": data}], gradient_checkpointing=flag))
        found.append([line["margin"] for line in metrics(tmp_path / str(flag) / "a")])
        counts.append(len(calls))
    assert found[0] == pytest.approx(found[1], abs=1e-4)
    # Two layers in each of 3 steps run a second time, for the backward pass.
    assert counts[1] - counts[0] == 2 * 3


def test_loss_that_is_no_number(tiny_llama: Path, tmp_path: Path, rows: Any, write_rows: Any, make_config: Any) -> None:
    data = write_rows(tmp_path / "rows.jsonl", rows(8))
    # Scores of attention overflow once the first step has moved B away from 0.
    stage = {"data": data, "learning_rate": 1.0}
    with pytest.raises(
        InputError, match=r"stage 'a' step 2: the loss is not finite for rows 1, 2, 3, 4, 5 and 3 more of"
    ):
        align(make_config(tiny_llama, tmp_path / "out", [stage], lora={"r": 4, "alpha": 4e19}))
    assert not (tmp_path / "out" / "a").exists()


def test_weights_that_are_no_numbers_are_not_written(
    tiny_llama: Path, tmp_path: Path, rows: Any, write_rows: Any, make_config: Any
) -> None:
    """The last step has no step after it to notice."""
    data = write_rows(tmp_path / "rows.jsonl", rows(8))
    stage = {"data": data, "max_steps": 1, "beta": 1e6}
    with pytest.raises(InputError, match="weights that are not finite"):
        align(make_config(tiny_llama, tmp_path / "out", [stage], lora={"r": 4, "alpha": 1e38}))
    assert not list((tmp_path / "out").glob("*"))
    assert not list((tmp_path / "out").glob(".*"))


def without(base: Path, place: Path, *names: str) -> Path:
    shutil.copytree(base, place)
    for name in names:
        (place / name).unlink()
    return place


def test_bad_input(
    tiny_llama: Path,
    tiny_llama_raw: Path,
    tiny_judge: Path,
    finished: AlignConfig,
    tmp_path: Path,
    rows: Any,
    write_rows: Any,
    make_config: Any,
) -> None:
    good = write_rows(tmp_path / "rows.jsonl", rows(4))
    long = write_rows(tmp_path / "long.jsonl", [{"prompt": "bread " * 300, "chosen": "yes", "rejected": "no"}])
    half = write_rows(tmp_path / "half.jsonl", [{"prompt": "bread", "chosen": "yes"}])
    file = tmp_path / "file"
    file.write_text("")
    gone = "no_such/thing.jsonl"
    nothing = {"data": good}
    cases: list[tuple[str, dict[str, Any], list[dict[str, Any]]]] = [
        ("no base model directory at ./none", {"base": "./none"}, [nothing]),
        ("no config.json", {"base": finished.out / "reward"}, [nothing]),
        ("holds no weights", {"base": without(tiny_llama, tmp_path / "w", "model.safetensors")}, [nothing]),
        ("holds no tokenizer", {"base": without(tiny_llama, tmp_path / "t", "tokenizer.json")}, [nothing]),
        ("has no chat template", {"base": tiny_llama_raw}, [nothing]),
        ("is a LlamaForSequenceClassification", {"base": tiny_judge}, [nothing]),
        # The data of the last stage are read before the first stage is trained.
        (f"no file or directory at {gone}", {}, [nothing, {"data": gone}]),
        ("unknown column 'rejected'", {}, [nothing, {"data": half}]),
        ("unknown column 'question'", {}, [{"data": good, "columns": {"prompt": "question"}}]),
        ("module 'q_prj', did you mean 'q_proj'", {"lora": {"target_modules": ["v_proj", "q_prj"]}}, [nothing]),
        ("rows of 3.. tokens are longer.*max_length up to 256", {}, [{"data": long}]),
        ("unknown device 'tpu'.*allowed: auto, cpu, cuda", {"device": "tpu"}, [nothing]),
        ("unknown report_to 'wandbb', did you mean 'wandb'", {"report_to": "wandbb"}, [nothing]),
        ("a part of the path is a file", {"out": file / "deeper"}, [nothing]),
    ]
    if not torch.cuda.is_available():
        cases.append(("there is no CUDA device", {"device": "cuda"}, [nothing]))
    for message, settings, stages in cases:
        out = settings.pop("out", tmp_path / "out")
        base = settings.pop("base", tiny_llama)
        with pytest.raises(InputError, match=message) as error:
            align(make_config(base, out, stages, **settings))
        assert "\n" not in str(error.value)
        assert not (tmp_path / "out").exists(), message
