"""The job: read the sources, check everything, write the policy of each mix."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from psacpo.console import progress, say
from psacpo.errors import InputError
from psacpo.files import (
    atomic_directory,
    digest,
    digest_file,
    free_space,
    other_files,
    readable_io_errors,
    require_apart,
    require_free_space,
    require_unused,
    resumable_directory,
    write_manifest,
)
from psacpo.merge.card import render_card
from psacpo.merge.config import MergeConfig, Mix
from psacpo.merge.finished import KEY, is_finished
from psacpo.merge.jobs import Job, prepare
from psacpo.merge.signatures import signature
from psacpo.merge.upload import require_repository, upload

# Card, manifest and configuration of one output, generously.
_SMALL_FILES = 1 << 18


def merge(config: MergeConfig) -> list[Path]:
    """Write the policy of each mix: W(q) = W_base + (1-q) * delta_reward + q * delta_safety for each ratio q.

    Everything is checked before anything is written; each output appears whole or not at all. A merge that was
    interrupted goes on when it is called again with the same sources and settings, and ends in the same bytes; outputs
    that it has written already are left as they are.

    Returns:
        The output directories in the order of the ratios: `config.out` itself for one mix, else directories in it.

    Raises:
        InputError: Bad input, an output that is in use, no space.
    """
    mixes = config.mixes()
    outputs = _places(config, mixes)
    job = prepare(config, mixes)
    for out in outputs.values():
        require_apart(out, job.places, replaced=True)
    left = _left(config, mixes, outputs, job)
    require_free_space(config.out, _needed(job, left))
    if config.push_to_hub is not None:
        require_repository(config.push_to_hub, private=config.private)
    for text in job.warnings:
        say(f"warning: {text}")
    for mix in mixes:
        if mix not in left:
            say(f"{outputs[mix.name]} is there already, with what this merge would write")

    @contextlib.contextmanager
    def directory(mix: Mix) -> Iterator[Path]:
        out = outputs[mix.name]
        with _output(job, out, mix, overwrite=config.overwrite) as place:
            yield place

    def describe(mix: Mix, place: Path, found: Mapping[str, Any]) -> None:
        _describe(place, config, job, mix, found)

    if left:
        with _no_empty_parents(next(iter(outputs.values()))), progress("merge", job.work * len(left)) as advance:
            job.write(left, directory, describe, advance)
    if config.push_to_hub is not None:
        say(f"uploaded to {upload(config.push_to_hub, list(outputs.values()))}")
    return list(outputs.values())


def plan(config: MergeConfig) -> dict[str, Any]:
    """What `merge` would read and write, after all of its checks and before any work.

    Raises:
        InputError: Whatever `merge` would refuse before the work.
    """
    mixes = config.mixes()
    outputs = _places(config, mixes)
    job = prepare(config, mixes)
    for out in outputs.values():
        require_apart(out, job.places, replaced=True)
    left = _left(config, mixes, outputs, job)
    there = [str(outputs[mix.name]) for mix in mixes if mix not in left]
    needed = _needed(job, left)
    require_free_space(config.out, needed)
    return {
        "sources": ", ".join(f"{name} {place}" for name, place in job.sources.items()),
        "base": job.base,
        "as": job.kind,
        "outputs": ", ".join(str(outputs[mix.name]) for mix in left),
        **({"there already": ", ".join(there)} if there else {}),
        "tensors": job.tensors,
        "reads": _size(job.bytes_in),
        "writes": _size(needed),
        "free disk": _size(free_space(config.out)),
        "peak memory": f"about {_size(job.memory)}",
        **({"warnings": "; ".join(job.warnings)} if job.warnings else {}),
    }


def _left(config: MergeConfig, mixes: Sequence[Mix], outputs: Mapping[str, Path], job: Job) -> list[Mix]:
    """The mixes that are still to be written, once it is certain that nothing else is in their places."""
    left = [mix for mix in mixes if not is_finished(outputs[mix.name], _key(job, mix))]
    for mix in left:
        require_unused(outputs[mix.name], overwrite=config.overwrite)
    return left


def _needed(job: Job, mixes: Sequence[Mix]) -> int:
    return sum(job.bytes_out(mix) for mix in mixes) + _SMALL_FILES * len(mixes)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def _output(job: Job, out: Path, mix: Mix, *, overwrite: bool) -> contextlib.AbstractContextManager[Path]:
    """The directory of one output while it is written: full weights take long enough to be worth going on with."""
    if job.kind == "adapter":
        return atomic_directory(out, overwrite=overwrite)
    return resumable_directory(out, key=_key(job, mix), overwrite=overwrite)


def _key(job: Job, mix: Mix) -> str:
    """Digest of everything that decides what one output holds."""
    return digest([job.key, mix.name])


def _places(config: MergeConfig, mixes: Sequence[Mix]) -> dict[str, Path]:
    """Where each output goes, once it is certain that a directory can be put there."""
    if "\0" in str(config.out):
        raise InputError(f"cannot write {str(config.out)!r}: a path holds no zero byte")
    outputs = {mix.name: config.out if len(mixes) == 1 else config.out / mix.name for mix in mixes}
    for out in outputs.values():
        whole = Path(os.path.abspath(out))
        if os.path.realpath(out) == os.getcwd() or os.path.ismount(out) or out.name in ("", ".."):
            what = "the root of a file system" if os.path.ismount(out) else "the working directory, or above it"
            raise InputError(
                f"output {out} cannot be replaced by a new directory: it is {what}", allowed="a directory in it"
            )
        with readable_io_errors(out):
            nearest = next(parent for parent in (whole, *whole.parents) if os.path.lexists(parent))
            if nearest.is_symlink() and not nearest.exists():
                raise InputError(f"cannot write {out}: {nearest} is a symbolic link that leads nowhere, or in a loop")
            if not nearest.is_dir():
                raise InputError(f"cannot write {out}: {nearest} is a file, not a directory")
    return outputs


def _describe(directory: Path, config: MergeConfig, job: Job, mix: Mix, found: Mapping[str, Any]) -> None:
    """Write card and manifest. Neither says where the output lies, so that equal inputs give equal bytes."""
    more = dict(found)
    digests = {**job.digests, **more.pop("inputs", {})}
    dial = job.facts.get("dial")
    card = render_card(
        kind=job.kind,
        base=job.base,
        mix=mix,
        sources=list(job.sources),
        of_adapters=job.of_adapters,
        digests=digests,
        rank=more.get("rank"),
        exact=not more.get("truncation"),
        dial=dial,
    )
    (directory / "README.md").write_text(card, encoding="utf-8")
    said: dict[str, Any] = {"policy": mix.name, "ratio": mix.ratio, "base_digest": job.facts.get("base_digest")}
    if dial is not None and mix.ratio is not None:
        weight, beta = dial.effective(mix.ratio)
        said |= {"lambda": weight, "safety_beta": beta if mix.ratio else None}
    weights = more.get("outputs", {})
    settings = config.model_dump(
        mode="json", by_alias=True, exclude={"out", "overwrite", "ratios", "push_to_hub", "private"}
    )
    settings |= {"as": job.kind, **({"base": job.base} if job.of_adapters else {})}
    settings |= {"ratios": [mix.ratio] if mix.ratio is not None else []}
    sources = {name: os.path.abspath(place) for name, place in job.sources.items()}
    write_manifest(
        directory,
        kind="policy",
        config=settings,
        inputs=digests,
        seeds={"merge": config.seed} if signature(config.method).random else {},
        sources=sources,
        **said,
        **{KEY: _key(job, mix)},
        directories={name: os.path.abspath(place) for name, place in job.directories.items()},
        files={name: digest_file(directory / name) for name in other_files(directory) if name not in weights},
        **({"warnings": list(job.warnings)} if job.warnings else {}),
        **more,
    )


@contextlib.contextmanager
def _no_empty_parents(out: Path) -> Iterator[None]:
    """On failure, remove the parents of `out` that were not there before and that nothing came to lie in."""
    missing = [parent for parent in out.absolute().parents if not parent.exists()]
    try:
        yield
    except BaseException:
        for parent in missing:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise
