"""The base model under the adapters: where it is, whether it is the one they were made on, how it lies on disk."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from psacpo.errors import InputError
from psacpo.files import digest_model
from psacpo.hub import is_path, model_directory
from psacpo.merge.adapter_files import Adapter
from psacpo.merge.changes import locate, require_fitting, tied_partner
from psacpo.merge.models import ADAPTER_CONFIG, INDEX, WEIGHTS, ModelDirectory, read_model, require_model
from psacpo.merge.stored import StoredTensor, stored_in
from psacpo.merge.tensorfiles import read_json

_OVERRIDE = "--allow-different-base takes it all the same"


@dataclass(frozen=True)
class Base:
    """The base model that adapters belong to.

    Attributes:
        name: Hub id, or the absolute path of a local directory.
        path: Its directory; None for a hub model that was not needed on disk.
        digest: Of its weights and configuration, None where it is not on disk, or was not wanted.
    """

    name: str
    path: Path | None
    digest: str | None


def find_base(
    name: str | None,
    adapters: Mapping[str, Adapter],
    *,
    on_disk: bool,
    allow_different_base: bool = False,
    digested: bool = True,
) -> Base:
    """The base of some adapters, once it is certain that each was made on it and fits it.

    A digest of the base in an adapter's manifest decides, where the base is a local directory; the name that
    adapter_config.json gives decides elsewhere. Whenever the base's weights are on disk, what the adapters change is
    looked for in their headers, and must be there in the same shape.

    Args:
        name: Directory or hub id; None takes what the first adapter names.
        adapters: What to call each -> the adapter.
        on_disk: Whether a hub model is fetched (or taken from the local cache).
        allow_different_base: Take adapters that were made on another base, if only their shapes fit this one.
        digested: Whether the base's digest is wanted also where no adapter names one to hold it against; every byte of
            the base is read for it.

    Raises:
        InputError: There is no such model, it is no model directory, or an adapter is for another base.
    """
    (_, first), *_ = adapters.items()
    wanted = first.base if name is None else name
    try:
        wanted = os.path.expanduser(wanted) if name is not None else wanted
        wanted.encode()  # it will be written down
        local = Path(wanted).is_dir()
    except (OSError, ValueError) as error:
        shown = ascii(wanted if len(wanted) <= 80 else f"{wanted[:77]}...")
        raise InputError(f"no base model can be at {shown}", allowed="a model directory or hub id") from error
    if local:
        path: Path | None = Path(wanted)
    elif is_path(wanted):
        raise InputError(
            f"no base model directory at {wanted}" + (", which the adapter names" if name is None else ""),
            allowed="--base with a model directory or hub id",
        )
    else:
        needed = on_disk or any(adapter.copies or adapter.saved for adapter in adapters.values())
        path = model_directory(wanted, revision=first.revision) if needed else None
    if path is not None:
        require_model(path)
    if not allow_different_base:
        _require_same_name_or_digest(wanted, adapters, local=local)
    headers = path or _cached(wanted, first.revision)
    if headers is not None and _has_headers(headers):
        require_fitting(read_model(headers), adapters)
    digest = digest_model(path) if path and (digested or any(a.base_digest for a in adapters.values())) else None
    if local and not allow_different_base:
        for role, adapter in adapters.items():
            if adapter.base_digest is not None and adapter.base_digest != digest:
                raise InputError(
                    f"adapter for another base: {role} adapter {adapter.path} was made on weights that are not those "
                    f"in {wanted}",
                    given=f"base digest {digest}",
                    allowed=f"{adapter.base_digest}; {_OVERRIDE}",
                )
    if path is not None:
        _require_unchanged_copies(path, adapters)
    return Base(name=os.path.abspath(wanted) if local else wanted, path=path, digest=digest)


def _has_headers(path: Path) -> bool:
    """Whether there are float weights in safetensors by whose headers adapters can be checked."""
    quantised = read_json(path / "config.json").get("quantization_config")
    return not quantised and ((path / WEIGHTS).is_file() or (path / INDEX).is_file())


def _cached(name: str, revision: str | None) -> Path | None:
    """The directory of a hub model that is in the local cache, whole; nothing is fetched."""
    from huggingface_hub import snapshot_download

    try:
        path = Path(snapshot_download(name, revision=revision, local_files_only=True))
        require_model(path)
        read_model(path)
    except (OSError, ValueError):  # not there, in part, or not to be read: what is not needed is not missed
        return None
    return path


def _require_same_name_or_digest(base: str, adapters: Mapping[str, Adapter], *, local: bool) -> None:
    digests = {role: adapter.base_digest for role, adapter in adapters.items() if adapter.base_digest}
    if len(set(digests.values())) > 1:
        found = ", ".join(f"{role} on {digest[:12]}" for role, digest in digests.items())
        raise InputError(
            f"adapter for another base: the adapters were made on different base weights ({found})",
            allowed=f"adapters on one base; {_OVERRIDE}",
        )
    for role, adapter in adapters.items():
        if local and role in digests:
            continue  # its digest will be held against the base's: a project may have moved
        if not _same_model(adapter.base, base):
            raise InputError(
                f"adapter for another base: {role} adapter {adapter.path} is for {adapter.base}",
                given=f"base {base}",
                allowed=f"the base that base_model_name_or_path in its {ADAPTER_CONFIG} names; {_OVERRIDE}",
            )


def _same_model(one: str, other: str) -> bool:
    return one == other or _canonical(one) == _canonical(other)


def _canonical(name: str) -> str:
    """The hub id of a directory in the hub's cache, the real path of another directory, else the name."""
    try:
        if not Path(name).is_dir():
            return name
    except (OSError, ValueError):  # no path could be called so
        return name
    real = os.path.realpath(name)
    cached = re.search(r"[/\\]models--([^/\\]+)[/\\]snapshots[/\\]", real + os.sep)
    return cached[1].replace("--", "/") if cached else real


def _require_unchanged_copies(path: Path, adapters: Mapping[str, Adapter]) -> None:
    """Refuse an adapter that brings an embedding of its own: only a copy of the base's says nothing new."""
    if not any(adapter.copies for adapter in adapters.values()):
        return
    model = read_model(path)
    for role, adapter in adapters.items():
        for module in sorted(adapter.copies):
            copy, weight = adapter.copy_of(module), _weight_of(model, module)
            if weight is None or not _same_values(copy, weight):
                raise InputError(
                    f"{role} adapter {adapter.path} changes the whole weight of {module}, not only by LoRA factors",
                    allowed="an adapter whose saved copy of it equals the base's",
                )


def _weight_of(model: ModelDirectory, module: str) -> StoredTensor | None:
    """The weight of a module; of a tied head, the embedding's."""
    name = locate(model, f"{module}.weight") or tied_partner(model, module)
    return stored_in(model, name) if name is not None else None


def _same_values(copy: StoredTensor, weight: StoredTensor) -> bool:
    """Whether two tensors are equal in one of their dtypes: the narrower is the one that values were rounded to."""
    if copy.shape != weight.shape:
        return False
    narrow = wide = True
    for rows in copy.blocks():
        one, other = copy.read(rows), weight.read(rows)
        narrow = narrow and torch.equal(one.to(other.dtype), other)
        wide = wide and torch.equal(other.to(one.dtype), one)
    return narrow or wide
