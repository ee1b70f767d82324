"""mergekit's files as people write them, and the settings of methods: read, resolved, refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psacpo.config import validate
from psacpo.errors import InputError
from psacpo.merge.mergekit import MergekitSpec, ModelReference, is_mergekit, read_mergekit, require_models_fit
from psacpo.merge.models import ModelDirectory
from psacpo.merge.parameters import MethodSettings, count_layers, method_settings, settings_at
from psacpo.merge.signatures import SIGNATURES
from psacpo.merge.tensorfiles import Entry

# SACPO's own files look so (github.com/line/sacpo, config/merge).
SACPO = """
models:
  - model: output/30K_helpful_dpo_safety/helpful_dpo_0.1
    parameters:
      weight: 0.75
  - model: output/30K_helpful_dpo_safety/helpful_dpo_safety_dpo_0.01
    parameters:
      weight: 0.25
merge_method: linear
dtype: bfloat16
"""
# The slerp file that most model cards on the hub show.
SLERP = """
slices:
  - sources:
      - model: OpenPipe/mistral-ft-optimized-1218
        layer_range: [0, 32]
      - model: mlabonne/NeuralHermes-2.5-Mistral-7B
        layer_range: [0, 32]
merge_method: slerp
base_model: mlabonne/NeuralHermes-2.5-Mistral-7B
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5 # fallback for rest of tensors
dtype: bfloat16
"""
TIES = """
models:
  - model: psmathur/orca_mini_v3_13b
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: garage-bAInd/Platypus2-13B
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1] # weight gradient
  - model: WizardLM/WizardMath-13B-V1.0
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: TheBloke/Llama-2-13B-fp16
parameters:
  normalize: true
  int8_mask: true
dtype: float16
"""
LAYERS = {"model.layers": 5}

WriteFile = Callable[[str], Path]


@pytest.fixture
def write_file(tmp_path: Path) -> WriteFile:
    def write(text: str) -> Path:
        path = tmp_path / "merge.yaml"
        path.write_text(text)
        return path

    return write


def attention(layer: int) -> str:
    return f"model.layers.{layer}.self_attn.q_proj.weight"


# --- files


def test_sacpo(write_file: WriteFile, tmp_path: Path) -> None:
    for name in ("helpful_dpo_0.1", "helpful_dpo_safety_dpo_0.01"):
        (tmp_path / "output/30K_helpful_dpo_safety" / name).mkdir(parents=True)
    spec = read_mergekit(write_file(SACPO))
    place = tmp_path / "output/30K_helpful_dpo_safety"
    assert [model.name for model in spec.models] == [
        str(place / "helpful_dpo_0.1"),
        str(place / "helpful_dpo_safety_dpo_0.01"),
    ]
    assert (spec.base, spec.layout, spec.dtype, spec.layers) == (None, spec.models[0], "BF16", None)
    assert spec.settings.method == "linear"
    assert spec.settings.resolve("lm_head.weight", LAYERS).per_model == {"weight": (0.75, 0.25)}


def test_slerp_of_whole_models(write_file: WriteFile) -> None:
    spec = read_mergekit(write_file(SLERP))
    # t runs from the base to the other.
    assert [str(model) for model in spec.models] == [
        "mlabonne/NeuralHermes-2.5-Mistral-7B",
        "OpenPipe/mistral-ft-optimized-1218",
    ]
    assert (spec.base, spec.layout, spec.layers) == (None, spec.models[0], 32)
    values = [spec.settings.resolve(attention(layer), LAYERS).shared["t"] for layer in range(5)]
    assert values == pytest.approx([0, 0.5, 0.3, 0.7, 1])
    assert spec.settings.resolve("model.layers.1.mlp.up_proj.weight", LAYERS).shared["t"] == 0.5
    assert spec.settings.resolve("model.layers.1.input_layernorm.weight", LAYERS).shared["t"] == 0.5


def test_ties_with_gradients(write_file: WriteFile) -> None:
    spec = read_mergekit(write_file(TIES))
    assert str(spec.base) == "TheBloke/Llama-2-13B-fp16"
    assert spec.dtype == "F16"
    first = spec.settings.resolve("model.embed_tokens.weight", LAYERS)
    assert first.per_model == {"weight": (1, 0, 0), "density": (1, 0.5, 0.33)}
    assert first.shared == {"normalize": True, "rescale": False, "lambda": 1}
    third = spec.settings.resolve("model.layers.2.mlp.up_proj.weight", LAYERS)
    assert third.per_model["weight"] == pytest.approx((1, 0.5, 0.5))  # half way from 0.3 to 0.7
    assert third.per_model["density"] == pytest.approx((0.7, 0.5, 0.33))
    assert (
        spec.settings.resolve("lm_head.weight", LAYERS).per_model["density"][0] == 1
    )  # as the embedding: mergekit's rule


def test_the_base_may_be_listed(write_file: WriteFile) -> None:
    text = "merge_method: {}\nbase_model: o/base\nmodels:\n- model: o/base\n- model: o/a\n- model: o/b\n"
    spec = read_mergekit(write_file(text.format("model_stock")))
    assert ([str(model) for model in spec.models], str(spec.base)) == (["o/a", "o/b"], "o/base")
    # For linear the base is one of the models, also where the list does not have it.
    more = "merge_method: linear\nbase_model: o/base\nparameters: {weight: 2}\nmodels:\n- model: o/a\n- model: o/b\n"
    spec = read_mergekit(write_file(more))
    assert [str(model) for model in spec.models] == ["o/a", "o/b", "o/base"]
    assert (spec.base, str(spec.layout)) == (None, "o/base")
    assert spec.settings.resolve("x", {}).per_model["weight"] == (2, 2, 2)
    with pytest.raises(InputError, match="linear needs a weight for each model; given: none for model 1"):
        read_mergekit(write_file(text.format("linear")))


def test_names_of_models(write_file: WriteFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "merge_method: linear\nparameters: {weight: 1}\nmodels:\n- model: '%s'\n- model: o/b\n"

    def first(name: str) -> ModelReference:
        return read_mergekit(write_file(text % name)).models[0]

    assert first("o/a") == ModelReference(name="o/a")
    assert first("o/a@v1") == ModelReference(name="o/a", revision="v1")
    # A directory is what it is called, whatever is in its name: psacpo's own outputs hold an @.
    for name in ("policy@0.30", "one+two"):
        (tmp_path / name).mkdir()
        assert first(name) == ModelReference(name=str(tmp_path / name))
    # Beside the file comes before the working directory, which is where mergekit looks.
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "there").mkdir(parents=True)
    (elsewhere / "policy@0.30").mkdir()
    monkeypatch.chdir(elsewhere)
    assert first("there") == ModelReference(name="there")
    assert first("policy@0.30") == ModelReference(name=str(tmp_path / "policy@0.30"))


def test_a_slice_has_settings_of_its_own(write_file: WriteFile) -> None:
    text = """
merge_method: linear
slices:
- parameters: {weight: [{filter: mlp, value: 3}], normalize: false}
  sources:
  - {model: o/a, layer_range: [0, 2], parameters: {weight: [{filter: up_proj, value: 5}]}}
  - {model: o/b, layer_range: [0, 2]}
parameters: {weight: 1, normalize: true}
"""
    merge = read_mergekit(write_file(text)).settings
    assert merge.resolve("mlp.up_proj", {}).per_model["weight"] == (5, 3)
    assert merge.resolve("mlp.down_proj", {}).per_model["weight"] == (3, 3)
    assert merge.resolve("lm_head", {}).per_model["weight"] == (1, 1)
    assert merge.resolve("lm_head", {}).shared["normalize"] is False


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ("", None),
        ("dtype: float32\nout_dtype: bfloat16", "BF16"),
        ("out_dtype: torch.float16", "F16"),
        ("dtype: float64", "F64"),
    ],
)
def test_the_output_dtype(write_file: WriteFile, dtypes: str, expected: str | None) -> None:
    text = f"merge_method: linear\nmodels:\n- {{model: o/a, parameters: {{weight: 1}}}}\n{dtypes}\n"
    assert read_mergekit(write_file(text)).dtype == expected


PAIR = "models:\n- {model: o/a, parameters: {weight: 1}}\n- {model: o/b, parameters: {weight: 1}}\n"
ONE_SLICE = "slices:\n- sources:\n  - {model: o/a, layer_range: [0, 4]}\n  - {model: o/b, layer_range: %s}\n"
REFUSED: Mapping[str, tuple[str, str]] = {
    "modules": (
        "merge_method: linear\nmodules: {text_decoder: {models: []}}\n",
        "modules is not read; allowed: models",
    ),
    "tokenizer": (f"merge_method: linear\n{PAIR}tokenizer: {{source: union}}\n", "tokenizer is not read"),
    "chat_template": (f"merge_method: linear\n{PAIR}chat_template: chatml\n", "chat_template is not read"),
    "tokenizer_source": (
        f"merge_method: linear\n{PAIR}tokenizer_source: union\n",
        "tokenizer_source is .*given: union",
    ),
    "no base for it": (
        f"merge_method: linear\n{PAIR}tokenizer_source: base\n",
        "tokenizer_source: base without a base",
    ),
    "passthrough": (
        "merge_method: passthrough\nslices:\n- sources: [{model: o/a, layer_range: [0, 4]}]\n",
        "passthrough slices .* are not read; use mergekit",
    ),
    "another method": (
        f"merge_method: karcher\n{PAIR}",
        "unknown merge_method 'karcher'; allowed: breadcrumbs, .*mergekit",
    ),
    "a misspelt method": (f"merge_method: liner\n{PAIR}", "did you mean 'linear'"),
    "lora": (
        "merge_method: linear\nmodels:\n- {model: o/a+o/lora, parameters: {weight: 1}}\n",
        r"the model\+lora syntax is not read; given: o/a\+o/lora; allowed: full models; merge adapters with psacpo merge",
    ),
    "a misspelt key": (
        f"merge_method: linear\n{PAIR}paramters: {{}}\n",
        "unknown key 'paramters', did you mean 'parameters'",
    ),
    "an old key": (
        f"merge_method: linear\n{PAIR}parameters: {{normalize: [{{pattern: mlp, value: true}}]}}\n",
        "parameters.normalize: unknown key 'pattern'",
    ),
    "an unknown setting": (
        f"merge_method: ties\nbase_model: o/c\n{PAIR}parameters: {{densty: 1}}\n",
        "unknown setting of ties for all models 'densty', did you mean 'density'.*lambda",
    ),
    "another method's setting": (
        "merge_method: linear\nmodels:\n- {model: o/a, parameters: {weight: 1, density: 0.5}}\n",
        "unknown setting of linear for model 1 'density'; allowed: weight",
    ),
    "no weight in slerp": (
        f"merge_method: slerp\nbase_model: o/a\n{PAIR}parameters: {{t: 0}}\n",
        "slerp takes no settings",
    ),
    "density": (
        f"merge_method: ties\nbase_model: o/c\n{PAIR}parameters: {{density: [0.5, 1.5]}}\n",
        "density is out of range; given: 1.5; allowed: from 0 to 1",
    ),
    "t": (
        "merge_method: slerp\nbase_model: o/a\nmodels: [{model: o/a}, {model: o/b}]\nparameters: {t: 1.01}\n",
        "t is out of range; given: 1.01",
    ),
    "no t": ("merge_method: slerp\nbase_model: o/a\nmodels: [{model: o/b}]\n", "slerp needs t"),
    "three for slerp": (
        "merge_method: slerp\nbase_model: o/a\nmodels: [{model: o/b}, {model: o/c}]\nparameters: {t: 0.5}\n",
        "slerp merges exactly 2 models",
    ),
    "one for model_stock": (
        "merge_method: model_stock\nbase_model: o/a\nmodels: [{model: o/b}]\n",
        "model_stock merges at least 2 models besides a base; given: 1",
    ),
    "no base": (f"merge_method: ties\n{PAIR}", "ties needs a base_model"),
    "a number for a flag": (
        f"merge_method: linear\n{PAIR}parameters: {{normalize: 1}}\n",
        "normalize is wrong.*true or false",
    ),
    "words for a number": (
        "merge_method: linear\nmodels:\n- {model: o/a, parameters: {weight: much}}\n",
        "weight: 'much' is not a number",
    ),
    "not a number": (
        "merge_method: linear\nmodels:\n- {model: o/a, parameters: {weight: .nan}}\n",
        "'nan' is not a number",
    ),
    "an empty gradient": ("merge_method: linear\nmodels:\n- {model: o/a, parameters: {weight: []}}\n", "an empty list"),
    "a part of a model": ("merge_method: linear\n" + ONE_SLICE % "[1, 5]", r"do not cover.*given: \[0, 4\], \[1, 5\]"),
    "many slices": (
        "merge_method: linear\n" + ONE_SLICE % "[0, 4]" + "- sources: [{model: o/a, layer_range: [4, 8]}]\n",
        "several slices is not read; use mergekit; given: 2 slices",
    ),
    "residual_weight": (
        "merge_method: linear\n" + ONE_SLICE % "[0, 4]" + "  residual_weight: 0.1\n",
        "residual_weight is not",
    ),
    "a model twice": (
        "merge_method: linear\nmodels: [{model: o/a}, {model: o/a}]\n",
        "names a model twice; given: o/a",
    ),
    "no models": ("merge_method: linear\n", "either models or slices"),
    "both": (f"merge_method: linear\n{PAIR}{ONE_SLICE % '[0, 4]'}", "either models or slices"),
    "a dtype": (f"merge_method: linear\n{PAIR}dtype: bfloat\n", "unknown dtype 'bfloat', did you mean 'bfloat16'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_refused_by_name(write_file: WriteFile, name: str) -> None:
    text, words = REFUSED[name]
    with pytest.raises(InputError, match=words) as raised:
        read_mergekit(write_file(text))
    assert "\n" not in str(raised.value)
    assert "merge.yaml" in str(raised.value)


def test_a_recipe_is_no_mergekit_file() -> None:
    assert is_mergekit({"merge_method": "linear"})
    assert not is_mergekit({"base": "x", "ratios": [0.5]})


def directory(path: Path, layers: int, vocabulary: Mapping[str, int] | None = None) -> ModelDirectory:
    """A model directory of which only names and tokenizer matter."""
    path.mkdir()
    if vocabulary is not None:
        tokenizer = {"model": {"vocab": vocabulary}, "added_tokens": [{"content": "<s>", "id": 0}]}
        (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    entries = {attention(layer): Entry("F32", (0,), 0, 0) for layer in range(layers)}
    return ModelDirectory(path, {}, None, {"model.safetensors": (8, entries)})


def test_what_a_file_says_of_its_models_is_checked(write_file: WriteFile, tmp_path: Path) -> None:
    spec = read_mergekit(write_file(SLERP))
    whole, short = directory(tmp_path / "a", 32), directory(tmp_path / "b", 24)
    require_models_fit([whole, whole], layers=spec.layers, one_vocabulary=spec.tokenizer_source is not None)
    with pytest.raises(InputError, match=r"b has 24 layers; given: layer_range \[0, 32\]; allowed: \[0, 24\]"):
        require_models_fit([whole, short], layers=spec.layers, one_vocabulary=spec.tokenizer_source is not None)


def test_one_vocabulary_where_the_tokenizer_is_the_bases(write_file: WriteFile, tmp_path: Path) -> None:
    text = f"merge_method: ties\nbase_model: o/c\n{PAIR}"
    one = directory(tmp_path / "one", 1, {"a": 1, "b": 2})
    same = directory(tmp_path / "same", 1, {"b": 2, "a": 1})
    other = directory(tmp_path / "other", 1, {"a": 2, "b": 1})
    require_models_fit([one, other], layers=None, one_vocabulary=False)
    spec = read_mergekit(write_file(text + "tokenizer_source: base\n"))
    require_models_fit([one, same], layers=spec.layers, one_vocabulary=spec.tokenizer_source is not None)
    with pytest.raises(InputError, match="other has another vocabulary than"):
        require_models_fit([one, other], layers=spec.layers, one_vocabulary=spec.tokenizer_source is not None)


# --- settings


def t_at(value: Any, tensor: str, layers: Mapping[str, int] = LAYERS) -> Any:
    return method_settings("slerp", [{}, {}], {"t": value}).resolve(tensor, layers).shared["t"]


def test_gradients_by_hand() -> None:
    # Five layers, three values: layers lie at 0, 1/4, ... 1 and the values at 0, 1/2, 1.
    assert [t_at([0, 1, 0.5], attention(layer)) for layer in range(5)] == pytest.approx([0, 0.5, 1, 0.75, 0.5])
    # Outside the layers it is the first value; of a single layer the last.
    for tensor in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert t_at([0.25, 1], tensor) == 0.25
    assert t_at([0.25, 1], attention(0), {"model.layers": 1}) == 1
    assert t_at([0.25], attention(3)) == t_at(0.25, attention(3)) == 0.25
    # YAML 1.1 reads 1e-3 as text.
    assert t_at(["1e-3", 0.5], "lm_head.weight") == 0.001
    with pytest.raises(
        InputError, match=r"layers\.5\..* is in a layer that the model does not have; allowed: layers 0 to 4"
    ):
        t_at([0, 1], attention(5))


def test_flags_take_the_value_before() -> None:
    merge = method_settings("linear", [{"weight": 1}], {"normalize": [True, False, True]})
    found = [merge.resolve(attention(layer), LAYERS).shared["normalize"] for layer in range(5)]
    assert found == [True, True, False, False, True]


def test_filters_by_hand() -> None:
    cases = [{"filter": "q_proj", "value": 0.1}, {"filter": "layers.1.", "value": 0.2}, {"filter": "*", "value": 0.3}]
    assert t_at(cases, attention(1)) == 0.1  # the first that holds
    assert t_at(cases, "model.layers.1.mlp.up_proj.weight") == 0.2
    assert t_at(cases, "lm_head.weight") == 0.3
    assert t_at({"filter": "self_attn", "value": [0, 1]}, attention(2)) == 0.5
    with pytest.raises(InputError, match="slerp has no t for lm_head.weight"):
        t_at(cases[:1], "lm_head.weight")
    # Of a setting with a default, what no filter holds for has that.
    merge = method_settings("ties", [{"weight": 1, "density": {"filter": "mlp", "value": 0.5}}])
    assert merge.resolve("lm_head.weight", {}).per_model["density"] == (1.0,)


def test_layers_are_counted_by_what_holds_them() -> None:
    names = [
        "transformer.h.0.attn.weight",
        "transformer.h.11.attn.weight",
        "visual.blocks.2.weight",
        "wte.weight",
        "h.1.x",
    ]
    assert count_layers(names) == {"transformer.h": 12, "visual.blocks": 3, "h": 2}
    # An expert's number is not a layer's.
    assert count_layers(["model.layers.3.block_sparse_moe.experts.7.w1.weight"]) == {"model.layers": 4}


@given(st.floats(0, 1) | st.lists(st.floats(0, 1), min_size=1, max_size=4))
@settings(max_examples=25, deadline=None)
def test_settings_survive_being_stored(value: Any) -> None:
    for given_value in (value, {"filter": "mlp", "value": value}, [{"filter": "mlp", "value": value}, {"value": 0.5}]):
        merge = method_settings("nuslerp", [{"weight": given_value}, {"weight": 1}])
        stored = json.loads(json.dumps(merge.model_dump(mode="json")))
        assert validate(MethodSettings, stored, where="psacpo.json") == merge


def test_settings_at_a_ratio() -> None:
    for method, takes in SIGNATURES.items():
        if takes.ratio == "weight":
            found = settings_at(method, 0.3).resolve("x", {})
            assert found.per_model["weight"] == (0.7, 0.3), method
    assert settings_at("slerp", 0.3).resolve("x", {}).shared["t"] == 0.3
    found = settings_at("ties", 0.25, {"density": 0.5, "lambda": 2}).resolve("x", {})
    assert (found.per_model["density"], found.shared["lambda"]) == ((0.5, 0.5), 2)
    assert settings_at("linear", 1.5).resolve("x", {}).per_model["weight"] == (-0.5, 1.5)
    with pytest.raises(InputError, match="t is out of range; given: 1.5"):
        settings_at("slerp", 1.5)
    with pytest.raises(InputError, match="model_stock takes no ratio"):
        settings_at("model_stock", 0.5)
    with pytest.raises(InputError, match="linear takes its weight from the ratio"):
        settings_at("linear", 0.5, {"weight": 1})
    with pytest.raises(InputError, match="unknown merge method 'tie', did you mean 'ties'"):
        settings_at("tie", 0.5)


def test_values_that_do_not_fit_each_other() -> None:
    with pytest.raises(InputError, match="the weights of x sum to zero and cannot be normalised"):
        method_settings("linear", [{"weight": 1}, {"weight": -1}]).resolve("x", {})
    method_settings("linear", [{"weight": 1}, {"weight": -1}], {"normalize": False}).resolve("x", {})
    with pytest.raises(InputError, match=r"given: density 0\.9, epsilon 0\.15; allowed: both ends between 0 and 1"):
        method_settings("della", [{"weight": 1, "density": 0.9}]).resolve("x", {})
    method_settings("della", [{"weight": 1}]).resolve("x", {})  # whole: nothing is drawn


def test_what_changes_nothing_in_mergekit_changes_nothing() -> None:
    plain = method_settings("task_arithmetic", [{"weight": 1}])
    more = method_settings("task_arithmetic", [{"weight": 1, "density": 0.1}], {"rescale": True, "int8_mask": True})
    assert plain.resolve("x", {}) == more.resolve("x", {})
    assert "int8_mask" not in method_settings("ties", [{"weight": 1}], {"int8_mask": True}).resolve("x", {}).shared


def test_a_spec_is_settings_too(write_file: WriteFile) -> None:
    spec = read_mergekit(write_file(TIES))
    assert validate(MergekitSpec, json.loads(spec.model_dump_json()), where="psacpo.json") == spec
