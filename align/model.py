"""The base model, its tokenizer and the LoRA adapter on it: found, checked, loaded and written."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from psacpo import hub
from psacpo.align.checks import require_causal, require_finite, require_trainable
from psacpo.align.config import Dtype, Lora
from psacpo.align.lora import add_in_place
from psacpo.align.losses import all_finite
from psacpo.errors import InputError, unknown_name
from psacpo.hub import model_directory

DTYPES: dict[Dtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tekken.json")


@dataclass(frozen=True, slots=True)
class Base:
    """A base model on disk.

    Attributes:
        path: Its directory.
        name: What adapters call it: the absolute path of a local directory, or the hub id.
    """

    path: Path
    name: str


def find_base(name: str) -> Base:
    """The directory of a local model or of the hub's, downloaded where it is not yet.

    Raises:
        InputError: It is no model directory, lacks weights or tokenizer, or the hub does not give it.
    """
    path = model_directory(name)
    # A local path is made absolute but not resolved: a link that points at the current model stays the base.
    base = Base(path, os.path.abspath(path) if Path(name).expanduser().exists() else name)
    if not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")):
        raise InputError(f"base: {base.name} is not a model directory (it holds no weights, *.safetensors)")
    if not any((path / file).is_file() for file in _TOKENIZER_FILES):
        raise InputError(f"base: {base.name} holds no tokenizer", allowed=f"one of {', '.join(_TOKENIZER_FILES)} in it")
    return base


def load_tokenizer(base: Base) -> Any:
    """The base's tokenizer; one without an EOS cannot end an answer and is refused."""
    tokenizer = hub.load_tokenizer(base.path)
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer of {base.name} has no EOS token", allowed="a tokenizer with an eos_token")
    return tokenizer


def require_language_model(base: Base) -> None:
    """Refuse a classifier, such as a judge, by its config.json."""
    require_causal(getattr(_load_config(base), "architectures", None), base.name)


def check_fits(base: Base, lora: Lora | None, *, longest: int, largest_id: int) -> int:
    """Refuse adapter shapes, lengths and token ids that the base does not have, before any weight is loaded.

    Args:
        lora: None trains all weights.
        longest: Tokens of the longest training sequence.
        largest_id: The largest token id in the training data.

    Returns:
        How many parameters a stage leaves.
    """
    config = _load_config(base)
    make: Any = AutoModelForCausalLM.from_config
    try:
        with torch.device("meta"):
            model = make(config, trust_remote_code=False)
    except ValueError as error:
        raise InputError(f"{base.name} is not a causal language model: {_first(error)}") from error
    shapes = {name: _shape(module) for name, module in model.named_modules() if _is_linear(module)}
    if lora is not None and isinstance(lora.target_modules, list):
        names = {name.rsplit(".", 1)[-1] for name in shapes}
        for target in lora.target_modules:
            if not any(_is_target(name, target) for name in shapes):
                raise InputError(f"lora.target_modules of {base.name}: {unknown_name('module', target, names)}")
    if lora is not None:
        _require_low_rank(base, lora, shapes)
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and longest > positions:
        raise InputError(
            f"rows of {longest} tokens are longer than {base.name} can take",
            allowed=f"max_length up to {positions}, in a recipe",
        )
    vocabulary = model.get_input_embeddings().num_embeddings
    if largest_id >= vocabulary:
        raise InputError(
            f"the tokenizer of {base.name} gives token id {largest_id}",
            allowed=f"ids below {vocabulary}, the vocabulary",
        )
    if lora is None:
        return sum(parameter.numel() for parameter in model.parameters())
    return lora.r * sum(sum(shape) for shape in shapes.values())


def _require_low_rank(base: Base, lora: Lora, shapes: dict[str, tuple[int, ...]]) -> None:
    """Refuse factors that are wider than every layer they are for: none would be of low rank."""
    targets = lora.target_modules
    # PEFT leaves the output layer out of all of them.
    head = ("lm_head", "embed_out")
    widths = [
        min(shape)
        for name, shape in shapes.items()
        if (any(_is_target(name, one) for one in targets) if isinstance(targets, list) else not name.endswith(head))
    ]
    if widths and lora.r > max(widths):
        raise InputError(
            f"lora.r {lora.r} is above the width of every layer of {base.name} that it is for",
            allowed=f"at most {max(widths)}, in a recipe",
        )


def _load_config(base: Base) -> Any:
    try:
        # Left open, it would be asked for at the terminal.
        return AutoConfig.from_pretrained(base.path, trust_remote_code=False)
    except Exception as error:
        raise InputError(f"cannot load {base.name}: {_first(error)}") from error


def _first(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _shape(module: nn.Module) -> tuple[int, ...]:
    return tuple(module.weight.shape) if isinstance(module.weight, Tensor) else ()


def _is_target(name: str, target: str) -> bool:
    """PEFT's own rule for a list of targets."""
    return name == target or name.endswith(f".{target}")


def load_causal(base: Base, dtype: Dtype, **options: Any) -> Any:
    """The causal language model in a directory, in evaluation order and without its cache.

    Raises:
        InputError: The weights lack some of a causal language model's, or have another shape than config.json says.
    """
    load: Any = AutoModelForCausalLM.from_pretrained
    try:
        model, loading = load(
            base.path, dtype=DTYPES[dtype], output_loading_info=True, trust_remote_code=False, **options
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # files that are cut short, missing or no weights: each format raises its own
        mismatch = "ignore_mismatched_sizes" in str(error)
        why = "they have other shapes than config.json says" if mismatch else _first(error)
        raise InputError(f"cannot load the weights of {base.name}: {why}", allowed="a whole model") from error
    if missing := sorted(loading["missing_keys"]):
        # transformers fills the gaps with random numbers: a reward model would get a random head.
        raise InputError(f"the weights of {base.name} are not a causal language model's: {missing[0]} is missing")
    model.config.use_cache = False
    return model


def enable_checkpointing(model: Any) -> None:
    """Compute activations a second time in the backward pass in the place of keeping them."""
    # The second name is transformers' own for releases before 5.19.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def load_policy(
    base: Base,
    lora: Lora,
    dtype: Dtype,
    start: Path | None,
    *,
    gradient_checkpointing: bool,
    quantization: Literal["4bit"] | None = None,
    device: str = "cpu",
) -> Any:
    """The base in `dtype`, frozen and without dropout, under a trainable LoRA adapter in float32.

    Args:
        start: An adapter directory whose weights to go on from; None makes a fresh adapter, which changes nothing
            until it is trained (B = 0). Its A is drawn from torch's global generator.
        quantization: Of the base's linear layers; needs bitsandbytes.
        device: "cuda" or "cpu", where a quantised base is put at once.

    Raises:
        InputError: The base's weights lack some of a causal language model's or are not finite, the start is an adapter
            of another base, or nothing would be trained.
    """
    model = load_causal(base, dtype, **quantised(quantization, dtype, device))
    require_finite(model, base.name)
    if quantization is not None:
        # Norms in float32, as QLoRA has it. Recomputing activations is what the settings say.
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # type: ignore[no-untyped-call]
    disable_dropout(model)
    if start is None:
        targets = lora.target_modules
        config = LoraConfig(
            r=lora.r,
            # PEFT types alpha as an int and divides by r; an int keeps adapter_config.json as others write it.
            lora_alpha=int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha,  # type: ignore[arg-type]
            lora_dropout=lora.dropout,
            target_modules=targets if isinstance(targets, str) else list(targets),
            use_rslora=lora.use_rslora,
            use_dora=lora.use_dora,
            task_type="CAUSAL_LM",
        )
        policy: Any = get_peft_model(model, config)
    else:
        try:
            policy = PeftModel.from_pretrained(model, start, is_trainable=True, torch_device="cpu")
        except RuntimeError as error:
            raise InputError(
                f"the start adapter {start} does not fit {base.name}: {_mismatch(error)}",
                allowed="an adapter on this base, with this vocabulary",
            ) from error
    require_trainable(policy, base.name)
    policy.peft_config["default"].base_model_name_or_path = base.name
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    add_in_place(policy)
    if gradient_checkpointing:
        enable_checkpointing(model)
    return policy


def quantised(name: Literal["4bit"] | None, dtype: Dtype, device: str) -> dict[str, Any]:
    """What `from_pretrained` takes for a quantised base: QLoRA's own settings."""
    if name is None:
        return {}
    settings = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[dtype],
    )
    place: int | str = int(os.environ.get("LOCAL_RANK", "0")) if device == "cuda" else device
    return {"quantization_config": settings, "device_map": {"": place}}


def _mismatch(error: Exception) -> str:
    """What torch says of the first tensor that does not fit."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if "size mismatch" in line), lines[0] if lines else type(error).__name__)


def disable_dropout(model: nn.Module) -> None:
    """Switch the base's own dropout off: the reference has none, and the log-ratio must start at 0."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]


def save_adapter(policy: Any, state: dict[str, Tensor], directory: Path, *, stage: str) -> None:
    """Write the adapter as PEFT does, with sorted settings, so that equal adapters are equal bytes.

    Args:
        policy: The PEFT model, for its settings.
        state: Its full state dict, gathered where the model is sharded.

    Raises:
        InputError: A weight is not finite. Nothing is written.
    """
    trained = [tensor for name, tensor in state.items() if "lora_" in name]
    if not all_finite(*trained):
        raise InputError(
            f"stage '{stage}': training ended in weights that are not finite", allowed="a lower learning_rate"
        )
    policy.save_pretrained(directory, state_dict=state, save_embedding_layers=False)
    path = directory / "adapter_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    # PEFT keeps these as sets, whose order changes from process to process.
    for name in ("target_modules", "exclude_modules"):
        if isinstance(settings.get(name), list):
            settings[name].sort()
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    # safetensors leaves a file that its owner alone may read; whoever may read the settings may read the weights.
    (directory / "adapter_model.safetensors").chmod(path.stat().st_mode)
