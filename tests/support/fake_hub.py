"""A small server on this machine that speaks the part of the Hugging Face hub's interface which a download uses.

It has one model, whose safetensors and tokenizer are in large file storage: `resolve` redirects to the place of those.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """What the server has, how it misbehaves, and what it was asked."""

    files: dict[str, bytes]
    repository: str = "lab/policy"
    branches: dict[str, str] = field(default_factory=lambda: {"main": COMMIT})
    address: str = ""
    gated: bool = False
    status: int = 0
    """Answer everything with this HTTP status, unless it is 0."""
    others: list[dict[str, Any]] = field(default_factory=list)
    """More entries for the list of files."""
    endless: bool = False
    """The list of files never ends."""
    sent: dict[str, bytes] = field(default_factory=dict)
    """What is sent in the place of a file's content."""
    cut: dict[str, int] = field(default_factory=dict)
    """Close the connection after so many bytes of a file, once."""
    stalled: dict[str, int] = field(default_factory=dict)
    """Send so many bytes of a file, and no more until `resumed`."""
    resumed: threading.Event = field(default_factory=threading.Event)
    asked: list[str] = field(default_factory=list)
    """Method, path and range of every request."""

    @property
    def storage(self) -> str:
        """The address of the large file storage, which is another host."""
        return self.address.replace("127.0.0.1", "localhost")

    def tree(self) -> list[dict[str, Any]]:
        entries = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": "assets"}, *self.others]
        if self.endless:
            entries += [{"type": "file", "path": f"{i}.txt", "size": 1, "oid": "0" * 40} for i in range(5000)]
        for path, content in self.files.items():
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
            if in_large_storage(path):
                entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 132}
            entries.append(entry)
        return entries


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def in_large_storage(path: str) -> bool:
    return path.endswith((".safetensors", ".bin", "tokenizer.json"))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.asked.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
        repository = re.escape(hub.repository)
        if hub.status:
            return self.send(b"{}", status=hub.status)
        if found := re.fullmatch(rf"/api/models/{repository}(?:/revision/(.+))?", path):
            commit = hub.branches.get(found[1] or "main", found[1])
            if commit not in hub.branches.values():
                return self.send(b"{}", status=404, error="RevisionNotFound")
            return self.send(json.dumps({"id": hub.repository, "sha": commit, "siblings": []}).encode())
        if re.fullmatch(rf"/api/models/{repository}/tree/{COMMIT}", path):
            link = {"Link": f'<{hub.address}{path}?recursive=true&cursor=a>; rel="next"'} if hub.endless else {}
            return self.send(json.dumps(hub.tree()).encode(), headers=link)
        if found := re.fullmatch(rf"/{repository}/resolve/{COMMIT}/(.+)", path):
            return self.resolve(found[1])
        if (found := re.fullmatch("/storage/(.+)", path)) and found[1] in hub.files:
            return self.send_file(found[1], {})
        self.send(b"{}", status=401)  # as the hub answers for what is not there, or private

    def resolve(self, name: str) -> None:
        hub = self.hub
        if hub.gated:
            return self.send(b"{}", status=403, error="GatedRepo")
        if name not in hub.files:
            return self.send(b"{}", status=404, error="EntryNotFound")
        content = hub.files[name]
        if not in_large_storage(name):
            return self.send_file(name, {"ETag": f'"{git_hash(content)}"', "X-Repo-Commit": COMMIT})
        linked = {"X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Linked-Size": str(len(content))}
        moved = {"Location": f"{hub.storage}/storage/{name}", "X-Repo-Commit": COMMIT}
        self.send(b"", status=302, headers=linked | moved)

    def send_file(self, name: str, headers: dict[str, str]) -> None:
        content = self.hub.sent.get(name, self.hub.files[name])
        status = 200
        if found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(found[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            content, status = content[start:], 206
        cut, stall = self.hub.cut.pop(name, None), self.hub.stalled.pop(name, None)
        self.send(content, status, headers=headers, cut=cut, stall=stall)

    def send(
        self,
        content: bytes,
        status: int = 200,
        error: str | None = None,
        headers: dict[str, str] | None = None,
        cut: int | None = None,
        stall: int | None = None,
    ) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        if error is not None:
            self.send_header("X-Error-Code", error)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            if cut is not None or stall is not None:
                raise AssertionError("a file is not cut in answer to HEAD")
            return
        with contextlib.suppress(OSError):
            if stall is not None:
                self.wfile.write(content[:stall])
                self.hub.resumed.wait(60)
                content = content[stall:]
            self.wfile.write(content if cut is None else content[:cut])
        self.close_connection = cut is not None


@contextlib.contextmanager
def serving(hub: FakeHub) -> Iterator[FakeHub]:
    """The server answers at `hub.address` until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.resumed.set()
        server.shutdown()
        server.server_close()
        thread.join()
