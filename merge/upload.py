"""Merged policies on the hub: one repository, and a folder a ratio where there are several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from psacpo.errors import InputError


def require_repository(name: str, *, private: bool = False) -> None:
    """Make sure that the repository is there and may be written, before hours of work end at it.

    Raises:
        InputError: The name is no repository's, or the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
        HfApi().whoami()  # an existing repository is found with a bad token too
        HfApi().create_repo(name, private=private, exist_ok=True)
    except Exception as error:  # the hub's client raises errors of a dozen unrelated classes
        raise InputError(
            f"cannot write to the hub repository {name}: {_first_line(error)}",
            allowed="owner/name, with a token that may write there (hf auth login)",
        ) from error


def upload(name: str, outputs: Sequence[Path]) -> str:
    """Upload merged policies and give the repository's address back.

    One output becomes the repository's content; each of several becomes a folder named as its directory, which
    `from_pretrained(..., subfolder=)` opens. The outputs on disk stay whatever happens here.

    Raises:
        InputError: The hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    for out in outputs:
        try:
            api.upload_folder(
                repo_id=name,
                folder_path=out,
                path_in_repo=None if len(outputs) == 1 else out.name,
                commit_message=f"{out.name} by psacpo",
            )
        except Exception as error:
            raise InputError(
                f"the upload of {out} to {name} failed: {_first_line(error)}; what was merged is on disk"
            ) from error
    return f"{api.endpoint}/{name}"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
