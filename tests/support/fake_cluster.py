"""An API server on loopback, with as much of Kubernetes as `pagoda deploy` asks for: real HTTP, real port-forwards.

The test says what the cluster goes through as a list of `Scene`s: each look at the InferenceService shows the next one, and
the last one stays.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import yaml

SERVICES = "/apis/serving.kserve.io/v1beta1/namespaces/(?P<namespace>[^/]+)/inferenceservices/(?P<name>[^/]+)"
PODS = "/api/v1/namespaces/(?P<namespace>[^/]+)/pods"
SECRETS = "/api/v1/namespaces/(?P<namespace>[^/]+)/secrets(?:/(?P<name>[^/]+))?"
POLICIES = "/apis/networking.k8s.io/v1/namespaces/(?P<namespace>[^/]+)/networkpolicies/(?P<name>[^/]+)"
Answer = tuple[int, Any]


@dataclass
class Scene:
    """One moment: KServe's conditions, the pods, and which of the pods' servers can be reached."""

    conditions: list[dict[str, str]] = field(default_factory=list)
    pods: list[dict[str, Any]] = field(default_factory=list)
    on_show: Callable[[], None] = lambda: None
    is_stale: bool = False


def ready_conditions() -> list[dict[str, str]]:
    return [{"type": "Ready", "status": "True"}]


def pod(name: str = "demo-predictor-1", *, container: dict[str, Any] | None = None, **status: Any) -> dict[str, Any]:
    """A pod as the API server gives it; `container`: fields of its container's status."""
    if container is not None:
        given = {"name": "kserve-container", "image": "pagoda:0.1.0", "restartCount": 0, **container}
        status["containerStatuses"] = [given]
    return {"metadata": {"name": name, "creationTimestamp": "2026-01-01T00:00:00Z"}, "status": status}


def running_pod(*, is_ready: bool, restarts: int = 0) -> dict[str, Any]:
    conditions = [{"type": "PodScheduled", "status": "True"}, {"type": "Ready", "status": str(is_ready)}]
    return pod(container={"state": {"running": {}}, "restartCount": restarts}, conditions=conditions)


def status(code: int, message: str, **details: str) -> Answer:
    """An error as Kubernetes words it."""
    return code, {"kind": "Status", "status": "Failure", "message": message, "code": code, "details": details}


class FakeCluster:
    """The server; use as a context. Records `applied` objects with their query, `policies`, `secrets` and `log_requests`."""

    def __init__(self, scenes: list[Scene], *, pod_port: int = 0, refuse: Answer | None = None) -> None:
        self._scenes = scenes
        self._shown = -1
        self.pod_port = pod_port
        self.refuse = refuse
        self.applied: list[tuple[dict[str, Any], dict[str, list[str]]]] = []
        self.policies: list[dict[str, Any]] = []
        self.secrets: dict[str, dict[str, str]] = {}
        self.log_requests: list[dict[str, list[str]]] = []
        self.logs = "first line\nlast line\n"
        self.events: list[dict[str, Any]] = []
        cluster = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                cluster.answer(self)

            def do_POST(self) -> None:
                cluster.answer(self)

            def do_PATCH(self) -> None:
                cluster.answer(self)

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    def __enter__(self) -> FakeCluster:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def write_kubeconfig(self, path: Path, namespace: str | None = "tales") -> Path:
        """A kubeconfig whose only context is this cluster."""
        context = {"cluster": "c", "user": "u"} | ({"namespace": namespace} if namespace else {})
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "x",
            "clusters": [{"name": "c", "cluster": {"server": self.url}}],
            "contexts": [{"name": "x", "context": context}],
            "users": [{"name": "u", "user": {}}],
        }
        path.write_text(yaml.safe_dump(content))
        return path

    @property
    def scene(self) -> Scene:
        return self._scenes[max(self._shown, 0)]

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Handle one request on its own thread."""
        parts = urlparse(request.path)
        query = parse_qs(parts.query)
        if re.fullmatch(PODS + "/[^/]+/portforward", parts.path):
            self._forward(request)
            return
        if re.fullmatch(PODS + "/[^/]+/log", parts.path):
            self.log_requests.append(query)
            self._send(request, 200, self.logs.encode(), "text/plain")
            return
        code, body = self._object(request, parts.path, query)
        self._send(request, code, json.dumps(body).encode(), "application/json")

    def _object(self, request: BaseHTTPRequestHandler, path: str, query: dict[str, list[str]]) -> Answer:
        if match := re.fullmatch(SERVICES, path):
            if request.command == "PATCH":
                sent = request.rfile.read(int(request.headers["Content-Length"]))
                if self.refuse is not None:
                    return self.refuse
                assert request.headers["Content-Type"] == "application/apply-patch+yaml"
                self.applied.append((yaml.safe_load(sent), query))
                return 200, self.applied[-1][0]
            self._shown = min(self._shown + 1, len(self._scenes) - 1)
            self.scene.on_show()
            generation = 1 if self.scene.is_stale else 2
            return 200, {
                "metadata": {"name": match["name"], "generation": 2},
                "status": {"observedGeneration": generation, "conditions": self.scene.conditions},
            }
        if match := re.fullmatch(SECRETS, path):
            return self._secret(request, match["name"])
        if re.fullmatch(POLICIES, path) and request.command == "PATCH":
            self.policies.append(yaml.safe_load(request.rfile.read(int(request.headers["Content-Length"]))))
            return 200, self.policies[-1]
        if re.fullmatch(PODS, path):
            assert query["labelSelector"] == ["serving.kserve.io/inferenceservice=demo"]
            # a field that no client knows yet must not matter
            return 200, {"kind": "PodList", "fieldOfTomorrow": 1, "items": self.scene.pods}
        if match := re.fullmatch(PODS + "/(?P<pod>[^/]+)", path):
            found = [pod for pod in self.scene.pods if pod["metadata"]["name"] == match["pod"]]
            return (200, found[0]) if found else status(404, f'pods "{match["pod"]}" not found', name=match["pod"])
        if path.endswith("/events"):
            return 200, {"kind": "EventList", "items": self.events}
        return status(404, "the server could not find the requested resource")

    def _secret(self, request: BaseHTTPRequestHandler, name: str | None) -> Answer:
        if request.command == "POST":
            document = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
            name = document["metadata"]["name"]
            assert name not in self.secrets
            self.secrets[name] = document["stringData"]
        if name not in self.secrets:
            return status(404, f'secrets "{name}" not found', name=name)
        values = {key: base64.b64encode(value.encode()).decode() for key, value in self.secrets[name].items()}
        return 200, {"kind": "Secret", "metadata": {"name": name}, "data": values}

    def _send(self, request: BaseHTTPRequestHandler, code: int, body: bytes, kind: str) -> None:
        request.send_response(code)
        request.send_header("Content-Type", kind)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    def _forward(self, request: BaseHTTPRequestHandler) -> None:
        """A port-forward: websocket frames whose first byte is the channel, 0 for data and 1 for errors."""
        key = request.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        request.send_response(101)
        request.send_header("Upgrade", "websocket")
        request.send_header("Connection", "Upgrade")
        request.send_header("Sec-WebSocket-Accept", base64.b64encode(hashlib.sha1(key.encode()).digest()).decode())
        request.send_header("Sec-WebSocket-Protocol", "v4.channel.k8s.io")
        request.end_headers()
        request.close_connection = True
        (port,) = parse_qs(urlparse(request.path).query)["ports"]
        for channel in (0, 1):
            _send_frame(request.connection, bytes((channel,)) + struct.pack("<H", int(port)))
        try:
            upstream = socket.create_connection(("127.0.0.1", self.pod_port), 5)
        except OSError as error:
            _send_frame(request.connection, b"\x01" + f"connection refused by the pod: {error}".encode())
            return
        with upstream:
            back = threading.Thread(target=_copy_back, args=(upstream, request.connection), daemon=True)
            back.start()
            while (data := _read_frame(request.rfile)) is not None:
                upstream.sendall(data[1:])


def _copy_back(upstream: socket.socket, client: socket.socket) -> None:
    try:
        while data := upstream.recv(65536):
            _send_frame(client, b"\x00" + data)
    except OSError:
        return  # the other side has gone


def _send_frame(connection: socket.socket, data: bytes) -> None:
    length = bytes((len(data),)) if len(data) < 126 else b"\x7e" + struct.pack(">H", len(data))
    assert len(data) < 65536
    connection.sendall(b"\x82" + length + data)


def _read_frame(stream: Any) -> bytes | None:
    """The payload of a client's binary frame; None at the end."""
    head = stream.read(2)
    if len(head) < 2 or head[0] & 0x0F == 8:
        return None
    length = head[1] & 0x7F
    if length == 126:
        (length,) = struct.unpack(">H", stream.read(2))
    mask = stream.read(4)
    return bytes(byte ^ mask[index % 4] for index, byte in enumerate(stream.read(length)))
