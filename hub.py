"""Where a model is: a directory, or a hub id that is fetched into the usual cache."""

from __future__ import annotations

from pathlib import Path

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


def _fetch(name: str, what: str, revision: str | None) -> Path:
    from huggingface_hub import constants, snapshot_download

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
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"no {what} model {name} here or on the hub: {reason}", allowed="a model directory or a hub id"
        ) from error
