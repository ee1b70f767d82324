"""A scalar judge on vLLM's pooling runner: raw logits, and no others than transformers'."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from psacpo.errors import InputError
from psacpo.evalharness.judges import Item, make_judge
from psacpo.evalharness.judges.pooling import require_parity
from psacpo.evalharness.judges.settings import ScalarJudge

pytestmark = pytest.mark.xdist_group("judges-vllm")
ITEMS = [Item(prompt, answer) for prompt in ("open", "how do i bake a loaf") for answer in ("heat", "", "sorry, " * 30)]


def test_parity_is_refused_beyond_rounding() -> None:
    require_parity("judge 'j'", "float32", [20.0, -1.0], [20.01, -1.001])
    with pytest.raises(InputError, match=r"vLLM scores an answer 0\.999998 that transformers scores 13 in bfloat16"):
        require_parity("judge 'j'", "bfloat16", [13.0], [1 / (1 + torch.tensor(-13.0).exp().item())])
    with pytest.raises(InputError, match="scores an answer nan"):
        require_parity("judge 'j'", "float32", [1.0], [float("nan")])


def test_what_vllm_does_not_read_is_refused_at_once(tiny_judge: Path) -> None:
    with pytest.raises(InputError, match=r"vllm: is for engine: vllm"):
        make_judge(
            "j", ScalarJudge(kind="scalar", model=str(tiny_judge), vllm={"seed": 1}), device="cpu", allow_code=False
        )
    settings = ScalarJudge(kind="scalar", model=str(tiny_judge), engine="vllm", trust_remote_code=True)
    with pytest.raises(InputError, match=r"engine vllm reads sequence classifiers"):
        make_judge("j", settings, device="cpu", allow_code=True)


@pytest.mark.slow
def test_vllm_gives_the_raw_logits_of_transformers(tiny_llama: Path, tmp_path: Path) -> None:
    try:
        import vllm  # noqa: F401
    except Exception as error:  # whatever keeps it from importing
        if os.environ.get("PSACPO_REQUIRE_VLLM") == "1":
            raise
        pytest.skip(f"vLLM cannot be imported: {type(error).__name__}")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path)
    torch.manual_seed(0)
    # Heads of 32: the smallest that vLLM has CPU kernels for.
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "num_labels": 1}
    config = LlamaConfig(**LlamaConfig.from_pretrained(tiny_llama).to_dict() | sizes)
    model = LlamaForSequenceClassification(config)
    model.score.weight.data *= 20  # far from where a sigmoid could be mistaken for the logit
    model.save_pretrained(tmp_path)

    def judge(**more: Any) -> Any:
        settings = ScalarJudge(kind="scalar", model=str(tmp_path), **more)
        return make_judge("j", settings, device="cpu", allow_code=False)

    plain, fast = judge(), judge(engine="vllm", vllm={"max_num_seqs": 4})
    expected = [verdict.score for verdict in plain.judge(ITEMS)]
    assert [verdict.score for verdict in fast.judge(ITEMS)] == pytest.approx(expected, abs=1e-3)
    assert max(map(abs, expected)) > 1.5
    assert fast.judge([Item("open", "a" * (1 << 20))])[0].valid is False
    assert fast.digest != plain.digest
