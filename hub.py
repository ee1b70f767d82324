"""Where a model is: a directory, or a hub id that is fetched into the usual cache."""

from __future__ import annotations

from pathlib import Path

from psacpo.errors import InputError


def model_directory(name: str | Path, *, what: str = "base") -> Path:
    """The local directory of a model; a hub id (`owner/name`) is downloaded or found in the cache.

    Raises:
        InputError: There is no such model, or the directory is not one (no config.json).
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"{what}: {path} is not a model directory (it holds no config.json)")
        return path
    text = str(name)
    if path.exists() or text.startswith((".", "/", "~")) or text.count("/") > 1 or not text:
        raise InputError(f"{what}: no model directory at {text}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(text))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{what}: no model directory at {text}, and as a hub id it cannot be had: {reason}") from error
