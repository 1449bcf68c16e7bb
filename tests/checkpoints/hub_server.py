"""A local HTTP server that speaks as much of the Hugging Face hub's API as a download needs."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest


@dataclass
class Hub:
    """What the server holds and what it has been asked.

    Attributes:
        repos: id → revision → file name → content.
        gated: ids that need ``token``.
        token: the token that opens gated repositories.
        cut: names of files whose transfer breaks off half-way.
        requests: ``(method, path, authorization header)`` of every request.
    """

    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    token: str = "hf_secret"
    cut: set[str] = field(default_factory=set)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    url: str = ""

    def find(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Returns the commit and the files of a branch, tag or commit."""
        for name, files in self.repos[repo].items():
            commit = hashlib.sha1(f"{repo}@{name}".encode()).hexdigest()
            if revision in (name, commit):
                return commit, files
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        authorization = self.headers.get("authorization")
        self.hub.requests.append((self.command, path, authorization))
        api = path.startswith("/api/models/")
        parts = path.removeprefix("/api/models").strip("/").split("/")
        repo = "/".join(parts[:2])
        if repo not in self.hub.repos:
            return self._fail(404, "RepoNotFound")
        if repo in self.hub.gated and authorization != f"Bearer {self.hub.token}":
            return self._fail(401, "GatedRepo")
        found = self.hub.find(repo, parts[3] if len(parts) > 3 else "main")
        if found is None:
            return self._fail(404, "RevisionNotFound")
        commit, files = found
        if api and len(parts) > 2 and parts[2] == "tree":
            return self._json([{"type": "file", "path": n, "size": len(c), "oid": _etag(c)} for n, c in files.items()])
        if api:
            return self._json({"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in files]})
        name = "/".join(parts[4:])
        if name not in files:
            return self._fail(404, "EntryNotFound")
        content = files[name]
        headers = {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": commit}
        self._send(200, content, headers, body, len(content) // 2 if name in self.hub.cut else None)

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _fail(self, status: int, code: str) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

    def _send(
        self, status: int, content: bytes, headers: dict[str, str], body: bool = True, cut: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content[:cut])
        if cut is not None:
            self.close_connection = True


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextmanager
def serve(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Runs the server on a free local port for the duration of the block; the environment names it, and no token."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
