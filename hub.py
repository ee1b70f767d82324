"""Where a model is: a directory, or a hub id that is fetched into the usual cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from psacpo.errors import InputError

# Weights in other formats than safetensors: never read, so never fetched.
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".pkl")


def is_path(name: str) -> bool:
    """Whether a name can only be a path: a hub id is `name` or `owner/name`."""
    return not name or name.startswith(("/", ".", "~")) or "\\" in name or name.count("/") > 1


def model_directory(name: str | Path, *, what: str = "base", revision: str | None = None) -> Path:
    """The local directory of a model; a hub id is found in the cache, or downloaded unless the machine is offline.

    Args:
        name: Directory or hub id.
        what: What error lines call it.
        revision: Of a hub model.

    Raises:
        InputError: There is no such model, or the directory is not one (no config.json).
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"{what} {path} is not a model directory: no config.json in it")
        return path
    if path.exists() or is_path(str(name)):
        raise InputError(f"no {what} model directory at {name}", allowed="a model directory or a hub id")
    return _fetch(str(name), what, revision)


def load_tokenizer(path: Path, *, what: str = "base") -> Any:
    """The tokenizer in a model directory; whatever is wrong with it is one line."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # the library raises what its parsers raise
        raise InputError(f"cannot load the tokenizer of {what} {path}: {_first_line(error)}") from error


def load_model(loader: Any, path: Path, *, what: str = "base", **options: Any) -> Any:
    """A model from safetensors by one of transformers' Auto classes, refused unless every weight of it is there.

    A missing weight would be drawn at random, and its numbers would look like any others.
    """
    try:
        model, found = loader.from_pretrained(path, use_safetensors=True, output_loading_info=True, **options)
    except Exception as error:
        raise InputError(f"cannot load {what} {path}: {_first_line(error)}") from error
    missing = sorted(found["missing_keys"])
    if missing:
        kind = loader.__name__.removeprefix("AutoModelFor")
        raise InputError(f"{what} {path} is no {kind} model: it lacks the weight {missing[0]}")
    return model


def load_config(path: Path, *, what: str = "base") -> Any:
    """config.json of a model directory as transformers reads it."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        raise InputError(f"cannot read config.json of {what} {path}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _fetch(name: str, what: str, revision: str | None) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                local_files_only=constants.HF_HUB_OFFLINE,
                ignore_patterns=[f"*{suffix}" for suffix in OTHER_WEIGHTS] + ["original/*"],
            )
        )
    except Exception as error:  # the hub's client raises errors of a dozen unrelated classes
        offline = "it is not in the hub's cache, and the hub is not reached (offline)"
        why = offline if isinstance(error, LocalEntryNotFoundError) else f"the hub says: {_first_line(error)}"
        raise InputError(
            f"no {what} model {name}: there is no directory {name}, and {why}",
            allowed="a model directory or a hub id",
        ) from error
