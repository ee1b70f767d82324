"""--push-to-hub against a small server that speaks the part of the hub's protocol which an upload uses."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest


class Hub(ThreadingHTTPServer):
    """Keeps what was asked of it: repositories, and files by their path in them."""

    def __init__(self) -> None:
        self.repositories: list[str] = []
        self.files: dict[str, bytes] = {}
        self.token = "hf_test"
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: Any) -> None: ...

    def do_GET(self) -> None:
        if self.path.startswith("/api/whoami") and self.headers.get("Authorization") != f"Bearer {self.server.token}":
            return self.answer(401, {"error": "Invalid credentials"})
        self.answer(200, {"id": "me/policy", "name": "me", "siblings": [], "sha": "0" * 40})

    def do_POST(self) -> None:
        body = self.body()
        if self.headers.get("Authorization") != f"Bearer {self.server.token}":
            return self.answer(401, {"error": "Invalid credentials"})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            self.server.repositories.append(f"{asked.get('organization') or 'me'}/{asked['name']}")
            return self.answer(
                200,
                {
                    "url": f"http://127.0.0.1:{self.server.server_port}/me/policy",
                    "id": "me/policy",
                    "name": "me/policy",
                },
            )
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]]
            return self.answer(200, {"files": [f | {"shouldIgnore": False} for f in files]})
        if "/commit/" in self.path:
            for line in body.decode().splitlines():
                item = json.loads(line)
                if item["key"] == "file":
                    self.server.files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
            return self.answer(
                200,
                {
                    "commitUrl": f"http://127.0.0.1:{self.server.server_port}/me/policy/commit/1",
                    "commitOid": "1" * 40,
                    "hookOutput": "",
                },
            )
        return self.answer(404, {"error": self.path})

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def answer(self, code: int, value: object) -> None:
        text = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def online(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The environment in which the command finds this hub."""
    for name, value in {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_TOKEN": hub.token,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    return hub


def test_one_policy_becomes_the_repository(
    online: Hub, psacpo: Any, two_adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    reward, safety = two_adapters
    out = tmp_path / "policy"
    arguments = ("merge", "--reward", reward, "--safety", safety, "--ratio", "0.3", "--out", out)
    done = psacpo(*arguments, "--push-to-hub", "me/policy")
    assert done.returncode == 0, done.stderr
    assert online.repositories == ["me/policy"]
    written = {file.relative_to(out).as_posix(): file.read_bytes() for file in out.rglob("*") if file.is_file()}
    assert online.files == written
    assert "adapter_model.safetensors" in written
    assert "/me/policy" in done.stderr


def test_several_policies_become_folders(
    online: Hub, psacpo: Any, two_adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    reward, safety = two_adapters
    arguments = ("merge", "--reward", reward, "--safety", safety, "--ratios", "0:1:0.5", "--out", tmp_path / "p")
    done = psacpo(*arguments, "--push-to-hub", "me/policy")
    assert done.returncode == 0, done.stderr
    assert {path.split("/")[0] for path in online.files} == {"policy@0.00", "policy@0.50", "policy@1.00"}


@pytest.mark.parametrize("name", ["not a name", "a/b/c"])
def test_a_bad_repository_name_stops_before_the_work(
    online: Hub, psacpo: Any, two_adapters: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    reward, safety = two_adapters
    arguments = ("merge", "--reward", reward, "--safety", safety, "--ratio", "0.3", "--out", tmp_path / "p")
    done = psacpo(*arguments, "--push-to-hub", name)
    assert done.returncode == 2
    assert f"cannot write to the hub repository {name}" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "p").exists()


def test_a_refused_token_stops_before_the_work(
    online: Hub, psacpo: Any, two_adapters: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    reward, safety = two_adapters
    arguments = ("merge", "--reward", reward, "--safety", safety, "--ratio", "0.3", "--out", tmp_path / "p")
    done = psacpo(*arguments, "--push-to-hub", "me/policy")
    assert done.returncode == 2
    assert "cannot write to the hub repository me/policy" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "p").exists()
