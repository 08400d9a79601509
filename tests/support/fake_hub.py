"""A Hugging Face hub on loopback with one model, which can be told to stall, to cut connections, and to lie."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL, COMMIT = "owner/name", "1f" * 20


class FakeHub:
    """`files`: content by name. `faults`: for a file, how its next GETs misbehave: `stall`, `cut`, `lie`, or a status.

    `ranges`: the byte ranges that were asked for, by file. Use as a context; `url` is then its address.
    """

    def __init__(self, files: Mapping[str, bytes], revisions: tuple[str, ...] = ("main", "v1.0", COMMIT)) -> None:
        self.files = dict(files)
        self.revisions = revisions
        self.faults: dict[str, list[str | int]] = {}
        self.ranges: dict[str, list[int]] = {}
        self.status = 200
        self.error_code = ""
        self.released = threading.Event()

    def __enter__(self) -> FakeHub:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None: ...

            def do_HEAD(self) -> None:
                hub.answer(self, with_body=False)

            def do_GET(self) -> None:
                hub.answer(self, with_body=True)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def answer(self, request: Any, *, with_body: bool) -> None:
        """What the hub answers."""
        path = request.path.partition("?")[0]
        if self.status != 200:
            self._send(request, self.status, b"{}", {"X-Error-Code": self.error_code}, with_body)
        elif (found := re.fullmatch(rf"/{MODEL}/resolve/[^/]+/(.+)", path)) is not None and found[1] in self.files:
            self._send_file(request, found[1], with_body)
        else:
            self._send(request, *self._description(path), with_body)

    def _description(self, path: str) -> tuple[int, bytes, dict[str, str]]:
        if re.fullmatch(rf"/api/models/{MODEL}/tree/[^/]+", path):
            return 200, json.dumps([_tree_entry(name, content) for name, content in self.files.items()]).encode(), {}
        found = re.fullmatch(rf"/api/models/{MODEL}(?:/revision/([^/]+))?", path)
        if found is None:
            return 404, b"{}", {"X-Error-Code": "EntryNotFound"}
        if (found[1] or "main") not in self.revisions:
            return 404, b"{}", {"X-Error-Code": "RevisionNotFound"}
        siblings = [{"rfilename": name} for name in self.files]
        return 200, json.dumps({"id": MODEL, "sha": COMMIT, "siblings": siblings}).encode(), {}

    def _send_file(self, request: Any, name: str, with_body: bool) -> None:
        content = self.files[name]
        etag = _hash_of(name, content)
        start = int(match[1]) if (match := re.match(r"bytes=(\d+)-", request.headers.get("Range", ""))) else 0
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        body, status = content[start:], 200
        if start:
            headers["Content-Range"], status = f"bytes {start}-{len(content) - 1}/{len(content)}", 206
        if not with_body:
            self._send(request, status, body, headers, False)
            return
        self.ranges.setdefault(name, []).append(start)
        fault = self.faults.get(name, [])[:1]
        del self.faults.get(name, [])[:1]
        if fault and isinstance(fault[0], int):
            self._send(request, fault[0], b"{}", {}, True)
            return
        if fault == ["lie"]:
            body = bytes(len(body))
        half = len(body) // 2 if fault in (["stall"], ["cut"]) else len(body)
        self._send(request, status, body, headers, True, half)
        if fault == ["stall"]:
            self.released.wait(60)
        if half < len(body):
            request.close_connection = True

    @staticmethod
    def _send(
        request: Any, status: int, body: bytes, headers: Mapping[str, str], with_body: bool, end: int | None = None
    ) -> None:
        request.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            request.send_header(name, value)
        request.end_headers()
        if with_body:
            request.wfile.write(body[:end])
            request.wfile.flush()


def _hash_of(name: str, content: bytes) -> str:
    if name.endswith((".safetensors", ".bin")):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()


def _tree_entry(name: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": _hash_of(name, content)[:40]}
    if name.endswith((".safetensors", ".bin")):
        entry["lfs"] = {"oid": _hash_of(name, content), "size": len(content), "pointerSize": 130}
    return entry
