"""Models from the hub: the real client against a small local server."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PROGRAM = """
import json, sys
from shared.errors import EngineUnavailable
from workers.engines.stable_diffusion.model_files import find_model
try:
    files = find_model(sys.argv[1], sys.argv[2] or None)
    names = sorted(p.relative_to(files.path).as_posix() for p in files.path.glob("*/*"))
    print(json.dumps([files.revision, files.variant, names]))
except EngineUnavailable as error:
    print(json.dumps(str(error)))
"""


class Hub(ThreadingHTTPServer):
    """One model, ``someone/tiny``, at branch ``main`` and one commit."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), RequestHandler)
        files = [path for path in folder.glob("**/*") if path.is_file()]
        self.files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
        self.files["vae/diffusion_pytorch_model.bin"] = b"a pickle"
        self.files["unet/diffusion_pytorch_model.fp16.safetensors"] = b"never fetched"


class RequestHandler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.respond(body=False)

    def do_GET(self) -> None:
        self.respond(body=True)

    def respond(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        if not path.startswith(("/api/models/someone/tiny", "/someone/tiny/")):
            self.send(404, b"", {"X-Error-Code": "RepoNotFound"}, body=body)
        elif "/absent" in path:
            self.send(404, b"", {"X-Error-Code": "RevisionNotFound"}, body=body)
        elif path.startswith("/api/"):
            self.send(200, self.listing(path), {}, body=body)
        else:
            data = self.server.files[path.split(f"/resolve/{COMMIT}/")[1]]
            etag = hashlib.sha1(data).hexdigest()
            self.send(200, data, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, body=body)

    def listing(self, path: str) -> bytes:
        sizes = {name: len(data) for name, data in self.server.files.items()}
        if "/tree/" in path:
            rows = [{"type": "file", "path": n, "size": s, "oid": "0"} for n, s in sizes.items()]
            return json.dumps(rows).encode()
        siblings = [{"rfilename": name} for name in sizes]
        return json.dumps({"id": "someone/tiny", "sha": COMMIT, "siblings": siblings}).encode()

    def send(self, status: int, data: bytes, headers: dict[str, str], *, body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def hub(tiny_model: Path) -> Iterator[str]:
    with Hub(tiny_model) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def find(model: str, revision: str, *, endpoint: str, cache: Path) -> object:
    """Call find_model in a process of its own: the client reads its settings once, on import."""
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, model, revision],
        env={
            **os.environ,
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(cache),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_XET": "1",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def test_a_model_is_downloaded_once_and_its_revision_is_the_commit(
    hub: str, tmp_path: Path
) -> None:
    files = find("someone/tiny", "main", endpoint=hub, cache=tmp_path)
    assert isinstance(files, list), files
    revision, variant, names = files
    assert (revision, variant) == (COMMIT, None)
    assert "unet/diffusion_pytorch_model.safetensors" in names
    assert not [name for name in names if name.endswith(".bin") or "fp16" in name]
    unreachable = "http://127.0.0.1:9"
    assert find("someone/tiny", "main", endpoint=unreachable, cache=tmp_path) == files


def test_unknown_models_and_revisions_are_refused(hub: str, tmp_path: Path) -> None:
    unknown = find("someone/else", "", endpoint=hub, cache=tmp_path)
    assert unknown == (
        "someone/else: neither a folder here nor a model on the hub; check the id or the path"
    )
    invalid = find("a b/c", "", endpoint=hub, cache=tmp_path)
    assert "neither a folder here nor a model on the hub" in str(invalid)
    absent = find("someone/tiny", "absent", endpoint=hub, cache=tmp_path)
    assert "no revision 'absent'" in str(absent)


def test_a_hub_that_does_not_answer_is_one_line(tmp_path: Path) -> None:
    text = find("someone/tiny", "", endpoint="http://127.0.0.1:9", cache=tmp_path)
    assert "the hub does not answer" in str(text)
    assert "\n" not in str(text)
