"""Merges by mergekit itself, stored small, for tests/merge/test_merge_methods.py to compare with.

Run it with the Python of an environment that holds mergekit 0.1.5 (psacpo is not needed there):

    python make_goldens.py mergekit-0.1.5.safetensors

The file holds tiny random Llama checkpoints (`input/MODEL/TENSOR`), what mergekit made of them in each case of CASES
(`output/CASE`: all tensors, flattened, in the order of their names), and of the methods that draw the mean and the
variance of each element over many runs (`random/METHOD/...`). The cases are in its metadata.
"""

from __future__ import annotations

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "vocab_size": 20,
    "tie_word_embeddings": False,
}
LAYER = {
    "self_attn.q_proj.weight": (8, 8),
    "self_attn.k_proj.weight": (4, 8),
    "self_attn.v_proj.weight": (4, 8),
    "self_attn.o_proj.weight": (8, 8),
    "mlp.gate_proj.weight": (16, 8),
    "mlp.up_proj.weight": (16, 8),
    "mlp.down_proj.weight": (8, 16),
    "input_layernorm.weight": (8,),
    "post_attention_layernorm.weight": (8,),
}
SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (20, 8),
    "model.norm.weight": (8,),
    "lm_head.weight": (20, 8),
    **{f"model.layers.{layer}.{name}": shape for layer in range(3) for name, shape in LAYER.items()},
}


def listed(**models: Any) -> list[dict[str, Any]]:
    """`models` of a file: name=weight, or name=(weight, further parameters)."""
    found = []
    for name, value in models.items():
        weight, more = value if isinstance(value, tuple) else (value, {})
        found.append({"model": name, "parameters": {"weight": weight, **more}})
    return found


def whole(*names: str) -> list[dict[str, Any]]:
    return [{"sources": [{"model": name, "layer_range": [0, 3]} for name in names]}]


FILTERS = [
    {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
    {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
    {"value": 0.5},
]
# Computed by mergekit in float32, on float32 checkpoints.
CASES: dict[str, dict[str, Any]] = {
    "linear": {"merge_method": "linear", "models": listed(a=0.75, b=0.25)},
    "linear-unnormalised": {
        "merge_method": "linear",
        "models": listed(a=1.0, b=0.3, c=0.5),
        "parameters": {"normalize": False},
    },
    "linear-gradient": {
        "merge_method": "linear",
        "models": listed(a=[0.1, 0.9, 0.4], b=[{"filter": "down_proj", "value": 2}, {"value": 1e-1}]),
    },
    "slerp": {
        "merge_method": "slerp",
        "base_model": "a",
        "models": [{"model": "a"}, {"model": "b"}],
        "parameters": {"t": 0.3},
    },
    "slerp-slices": {
        "merge_method": "slerp",
        "base_model": "b",
        "slices": whole("a", "b"),
        "parameters": {"t": FILTERS},
    },
    "slerp-parallel": {
        "merge_method": "slerp",
        "base_model": "a",
        "models": [{"model": "a"}, {"model": "c"}],
        "parameters": {"t": 0.6},
    },
    "nuslerp": {"merge_method": "nuslerp", "models": listed(a=0.7, b=0.5)},
    "nuslerp-base": {"merge_method": "nuslerp", "base_model": "base", "models": listed(a=0.7, b=0.3)},
    "nuslerp-rows": {
        "merge_method": "nuslerp",
        "models": listed(a=0.7, b=0.5),
        "parameters": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
    },
    "nuslerp-columns": {
        "merge_method": "nuslerp",
        "base_model": "base",
        "models": listed(a=0.2, b=0.5),
        "parameters": {"nuslerp_flatten": False},
    },
    "model_stock": {
        "merge_method": "model_stock",
        "base_model": "base",
        "models": [{"model": name} for name in ("a", "b", "c")],
    },
    "model_stock-filters": {
        "merge_method": "model_stock",
        "base_model": "base",
        "models": [{"model": name} for name in ("base", "a", "b")],
        "parameters": {"filter_wise": True},
    },
    "task_arithmetic": {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": listed(a=0.7, b=-0.3),
        "parameters": {"lambda": 0.8},
    },
    "ties": {
        "merge_method": "ties",
        "base_model": "base",
        "models": listed(a=(0.7, {"density": 0.4}), b=(0.3, {"density": 0.6})),
    },
    "ties-three": {
        "merge_method": "ties",
        "base_model": "base",
        "models": listed(a=(0.7, {"density": [1, 0.2]}), b=(0.3, {"density": 0.5}), c=(-0.4, {"density": 0.8})),
        "parameters": {"normalize": False, "int8_mask": True, "lambda": 1.5, "rescale": True},
    },
    "breadcrumbs": {
        "merge_method": "breadcrumbs",
        "base_model": "base",
        "models": listed(a=(0.7, {"density": 0.5, "gamma": 0.05}), b=(0.6, {"density": 0.9, "gamma": 0.2})),
    },
    "breadcrumbs_ties": {
        "merge_method": "breadcrumbs_ties",
        "base_model": "base",
        "models": listed(a=0.7, b=0.3),
        "parameters": {"density": 0.6, "gamma": 0.1, "rescale": True, "normalize": True},
    },
    "dare_ties-dense": {"merge_method": "dare_ties", "base_model": "base", "models": listed(a=0.7, b=0.5)},
    "della-dense": {"merge_method": "della", "base_model": "base", "models": listed(a=0.7, b=0.5)},
}
# Those of them that are computed in bfloat16 as well, on the same checkpoints in bfloat16, which is what most files say.
HALF = ("linear", "slerp", "nuslerp", "model_stock", "task_arithmetic", "ties", "breadcrumbs")

RANDOM: dict[str, dict[str, float]] = {
    "dare_linear": {},
    "dare_ties": {},
    "della": {"epsilon": 0.3},
    "della_linear": {"epsilon": 0.3},
}
RANDOM_SETTINGS = {"weight": [0.7, 0.5], "density": [0.6, 0.4]}
RUNS = 4000


def inputs() -> dict[str, dict[str, torch.Tensor]]:
    """Three fine-tunes of one base, the third close to the first.

    In float32, so that no two differences from the base are of equal size: which of those comes first is left open.
    """
    draw = np.random.Generator(np.random.PCG64(20260105))

    def noise(scale: float) -> dict[str, torch.Tensor]:
        return {
            name: torch.from_numpy(draw.standard_normal(shape) * scale).float()
            for name, shape in sorted(SHAPES.items())
        }

    base = noise(0.5)
    a, b = ({name: base[name] + delta for name, delta in noise(0.1).items()} for _ in range(2))
    c = {name: a[name] + delta for name, delta in noise(0.004).items()}
    return {"base": base, "a": a, "b": b, "c": c}


def merged(case: dict[str, Any], place: Path) -> torch.Tensor:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    def located(value: Any) -> Any:
        if isinstance(value, list):
            return [located(item) for item in value]
        if isinstance(value, dict):
            return {
                key: str(place / item) if key in ("model", "base_model") else located(item)
                for key, item in value.items()
            }
        return value

    with tempfile.TemporaryDirectory() as out:
        options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
        run_merge(MergeConfiguration.model_validate(located(case)), out, options)
        tensors = load_file(Path(out) / "model.safetensors")
    assert tensors.keys() == SHAPES.keys()
    return torch.cat([tensors[name].reshape(-1) for name in sorted(tensors)])


def random_outcomes(method: str, more: dict[str, float]) -> dict[str, torch.Tensor]:
    """Mean and variance of each element of the merged difference, and the share that is not 0, over many runs."""
    from mergekit import merge_methods
    from mergekit.merge_methods.base import TensorGroup

    base, one, other = random_inputs()
    group = TensorGroup.from_tensors([base, one, other], ids=["base", "a", "b"], base_index=0)
    torch.manual_seed(0)
    runs = []
    for _ in range(RUNS):
        (result,) = merge_methods.get(method)([group], parameters={**RANDOM_SETTINGS, **more})
        runs.append(result - base)
    stacked = torch.stack(runs).double()
    return {
        "mean": stacked.mean(dim=0).float(),
        "variance": stacked.var(dim=0).float(),
        "kept": (stacked != 0).double().mean(dim=0).float(),
    }


def random_inputs() -> tuple[torch.Tensor, ...]:
    """Base (zero, so that what is left out is exactly 0) and two models, [12, 16], float32."""
    draw = np.random.Generator(np.random.PCG64(7))
    one, other = (torch.from_numpy(draw.standard_normal((12, 16))).float() for _ in range(2))
    return torch.zeros(12, 16), one, other


def write_models(models: dict[str, dict[str, torch.Tensor]], place: Path) -> Path:
    for name, model in models.items():
        directory = place / name
        directory.mkdir(parents=True)
        save_file(model, directory / "model.safetensors", metadata={"format": "pt"})
        (directory / "config.json").write_text(json.dumps(CONFIG))
    return place


def main(target: Path) -> None:
    stored: dict[str, torch.Tensor] = {}
    models = inputs()
    halves = {name: {key: value.bfloat16() for key, value in model.items()} for name, model in models.items()}
    for name, model in models.items():
        stored[f"input/{name}"] = torch.cat([model[key].reshape(-1) for key in sorted(model)])
    with tempfile.TemporaryDirectory() as place:
        full = write_models(models, Path(place) / "full")
        half = write_models(halves, Path(place) / "half")
        for name, case in CASES.items():
            stored[f"output/{name}"] = merged({**case, "dtype": "float32"}, full)
        for name in HALF:
            stored[f"half/{name}"] = merged({**CASES[name], "dtype": "bfloat16"}, half)
    _, stored["random/a"], stored["random/b"] = random_inputs()
    for method, more in RANDOM.items():
        stored |= {f"random/{method}/{key}": value for key, value in random_outcomes(method, more).items()}
    about = {
        "mergekit": version("mergekit"),
        "torch": version("torch"),
        "shapes": json.dumps(SHAPES),
        "config": json.dumps(CONFIG),
        "cases": json.dumps(CASES),
        "random": json.dumps({method: {**RANDOM_SETTINGS, **more} for method, more in RANDOM.items()}),
        "runs": str(RUNS),
    }
    save_file(stored, target, metadata=about)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
