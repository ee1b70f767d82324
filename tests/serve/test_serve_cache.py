"""The policies on disk: built once, bounded in bytes, safe between processes and after kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from psacpo.errors import InputError
from psacpo.serve.cache import CacheFull, PolicyCache

SIZE = 10_000


def writer(log: list[Path] | None = None, size: int = SIZE) -> Callable[[Path], None]:
    def build(place: Path) -> None:
        (place / "adapter_config.json").write_text("{}")
        (place / "adapter_model.safetensors").write_bytes(b"x" * (size - 1000))
        if log is not None:
            log.append(place)

    return build


def fill(cache: PolicyCache, *names: str) -> None:
    for name in names:
        cache.lease("k", name, SIZE, writer()).close()
        time.sleep(0.01)  # entries are ordered by their times


def test_built_once_and_found_again(tmp_path: Path) -> None:
    built: list[Path] = []
    for _ in range(3):
        lease = PolicyCache(tmp_path, 10 * SIZE).lease("k", "policy@0.30", SIZE, writer(built))
        assert lease.path == tmp_path / "k" / "policy@0.30"
        assert (lease.path / "adapter_model.safetensors").is_file()
        lease.close()
        lease.close()
    assert len(built) == 1
    assert PolicyCache(tmp_path, 10 * SIZE).names("k") == ["policy@0.30"]
    assert PolicyCache(tmp_path, 10 * SIZE).names("other") == []


def test_the_least_recently_used_makes_room(tmp_path: Path) -> None:
    cache = PolicyCache(tmp_path, 3 * SIZE)
    fill(cache, "policy@0.10", "policy@0.20", "policy@0.30", "policy@0.10", "policy@0.40")
    assert sorted(cache.names("k")) == ["policy@0.10", "policy@0.30", "policy@0.40"]
    assert cache.size() <= 3 * SIZE


def test_other_adapters_entries_count_and_go_too(tmp_path: Path) -> None:
    cache = PolicyCache(tmp_path, 2 * SIZE)
    cache.lease("other", "policy@0.10", SIZE, writer()).close()
    time.sleep(0.01)
    fill(cache, "policy@0.20", "policy@0.30")
    assert cache.names("other") == []
    assert sorted(cache.names("k")) == ["policy@0.20", "policy@0.30"]


def test_what_is_in_use_stays_and_the_limit_holds(tmp_path: Path) -> None:
    cache = PolicyCache(tmp_path, 2 * SIZE)
    leases = [cache.lease("k", name, SIZE, writer()) for name in ("policy@0.10", "policy@0.20")]
    with pytest.raises(CacheFull, match="in use by running servers; allowed: a larger --cache-size"):
        PolicyCache(tmp_path, 2 * SIZE).lease("k", "policy@0.30", SIZE, writer())
    assert sorted(cache.names("k")) == ["policy@0.10", "policy@0.20"]
    leases[0].close()
    cache.lease("k", "policy@0.30", SIZE, writer()).close()
    assert sorted(cache.names("k")) == ["policy@0.20", "policy@0.30"]
    leases[1].close()


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    cache = PolicyCache(tmp_path, 5 * SIZE)

    def broken(place: Path) -> None:
        (place / "adapter_config.json").write_text("{}")
        raise InputError("no space left on the device")

    with pytest.raises(InputError, match="no space"):
        cache.lease("k", "policy@0.30", SIZE, broken)
    assert list((tmp_path / "k").iterdir()) == []


@pytest.mark.parametrize("damage", ["truncate", "no manifest", "manifest", "missing"])
def test_a_damaged_entry_is_built_anew(tmp_path: Path, damage: str) -> None:
    cache = PolicyCache(tmp_path, 5 * SIZE)
    fill(cache, "policy@0.30")
    entry = tmp_path / "k" / "policy@0.30"
    if damage == "truncate":
        (entry / "adapter_model.safetensors").write_bytes(b"x")
    elif damage == "manifest":
        (entry / "psacpo.json").write_text("{")
    elif damage == "no manifest":
        (entry / "psacpo.json").unlink()
    else:
        (entry / "adapter_config.json").unlink()
    lease = cache.lease("k", "policy@0.30", SIZE, writer())
    assert (lease.path / "adapter_model.safetensors").stat().st_size == SIZE - 1000
    assert json.loads((lease.path / "psacpo.json").read_text())["sizes"]["adapter_config.json"] == 2
    lease.close()


def test_threads_build_a_policy_once(tmp_path: Path) -> None:
    cache, built = PolicyCache(tmp_path, 50 * SIZE), []
    names = [f"policy@0.{number}0" for number in (1, 2, 3)] * 6
    threads = [
        threading.Thread(target=lambda name=name: cache.lease("k", name, SIZE, writer(built)).close()) for name in names
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 3


CHILD = """
import sys, time
from pathlib import Path
from psacpo.serve.cache import PolicyCache
cache = PolicyCache(Path(sys.argv[1]), 20_000)
def build(place):
    (place / "adapter_config.json").write_text("{}")
    (place / "adapter_model.safetensors").write_bytes(b"x" * 9000)
    if sys.argv[2] == "slow":
        print("building", flush=True)
        time.sleep(60)
lease = cache.lease("k", "policy@0.50", 10_000, build)
print("held", flush=True)
time.sleep(60)
"""


def test_a_process_keeps_its_policy_until_it_is_killed(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path), "fast"], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    cache = PolicyCache(tmp_path, 2 * SIZE)
    try:
        fill(cache, "policy@0.10", "policy@0.20")
        assert sorted(cache.names("k")) == ["policy@0.20", "policy@0.50"]
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
    fill(cache, "policy@0.20", "policy@0.30")
    assert sorted(cache.names("k")) == ["policy@0.20", "policy@0.30"]


def test_a_kill_in_the_middle_of_a_build_leaves_no_entry_and_no_rubbish(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path), "slow"], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "building\n"
    with pytest.raises(InputError, match=r"locked by another process.*--cache-dir"):
        PolicyCache(tmp_path, 2 * SIZE, patience=0.05)
    assert len(list((tmp_path / "k").iterdir())) == 1
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    cache = PolicyCache(tmp_path, 2 * SIZE)
    assert list((tmp_path / "k").iterdir()) == []
    fill(cache, "policy@0.50")
    assert cache.names("k") == ["policy@0.50"]


def test_nothing_but_policies_is_ever_removed(tmp_path: Path) -> None:
    treasure = tmp_path / "k" / "policy@home"
    treasure.mkdir(parents=True)
    (treasure / "thesis.txt").write_text("years")
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    (outside / "psacpo.json").write_text("{}")
    os.symlink(outside, tmp_path / "k" / "policy@0.99")
    cache = PolicyCache(tmp_path, 2 * SIZE)
    fill(cache, "policy@0.10", "policy@0.20", "policy@0.30")
    assert (treasure / "thesis.txt").is_file()
    assert (outside / "psacpo.json").is_file()


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        PolicyCache(tmp_path / "file" / "cache", SIZE)
