"""Files that a run's judges are made of, found from another directory than the one that the run was made in."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from os.path import exists, relpath
from pathlib import Path
from typing import Any

# Settings of judges that are places on this machine. `spec` and `model` may be names instead.
PLACES = ("model", "path", "rubric_file", "spec", "template_file")


def home_of(run: Path, saved: Mapping[str, Any]) -> Path | None:
    """The directory that a run was made in, None where its settings do not tell.

    They hold where it is as that directory sees it: a run at /a/b/c whose `out` is b/c was made in /a.
    """
    out, here = saved.get("out"), run.resolve()
    parts = Path(out).parts if isinstance(out, str) else ()
    if not parts or Path(*parts).is_absolute() or here.parts[-len(parts) :] != parts:
        return None
    return here.parents[len(parts) - 1]


def placed(saved: Mapping[str, Any], home: Path | None) -> dict[str, Any]:
    """A run's settings with the files of its judges, metrics and adapters as they are found from here."""
    if home is None:
        return dict(saved)
    found = dict(saved)
    for part, keys in (("judges", PLACES), ("metrics", ("calibration",))):
        if isinstance(saved.get(part), Mapping):
            found[part] = {name: _moved(one, keys, home) for name, one in saved[part].items()}
    if isinstance(saved.get("adapters"), Mapping):
        found["adapters"] = _moved(saved["adapters"], tuple(saved["adapters"]), home)
    return found


def as_said(
    settings: Mapping[str, Any], saved: Mapping[str, Any], *, new: Collection[str], home: Path | None
) -> dict[str, Any]:
    """`placed` settings with the places as `saved` says them, and those of `new` judges as `home` sees them."""
    if home is None:
        return dict(settings)
    judges = dict(settings["judges"])
    for name, one in judges.items():
        if name not in new:
            judges[name] = one | {key: saved["judges"][name][key] for key in PLACES if key in saved["judges"][name]}
        elif home != Path.cwd():
            judges[name] = one | {
                key: relpath(one[key], home) for key in PLACES if _is_place(one, key) and exists(one[key])
            }
    kept = {part: saved[part] for part in ("metrics", "adapters", "out") if part in saved}
    return {**settings, **kept, "judges": judges}


def _moved(settings: Any, keys: tuple[str, ...], home: Path) -> Any:
    if not isinstance(settings, Mapping):
        return settings
    found = dict(settings)
    for key in keys:
        if _is_place(found, key) and not exists(found[key]) and exists(home / found[key]):
            found[key] = str(home / found[key])
    return found


def _is_place(settings: Mapping[str, Any], key: str) -> bool:
    """Whether a setting may be a relative place; the model of a judge behind an endpoint is a name there."""
    value = settings.get(key)
    named = key == "model" and settings.get("kind") == "llm"
    return isinstance(value, str) and bool(value) and not named and not Path(value).is_absolute()
