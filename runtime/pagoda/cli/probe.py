"""`pagoda probe`: the exec probes of a pod.

Kubernetes starts this again and again, so it imports nothing heavy and needs a fraction of a second. It asks the server over
loopback, under the port and scheme that the configuration's sources name, and never enqueues work.

    startup  passes once the engine has been started, for good: a later fault is the other probes' affair
    ready    passes while requests are taken
    live     fails when only a restart can help

With `--rank` the question is about a worker node: about `pagoda join` and the ranks that run under it, which say what they are
at in small files (see `distributed.node_state`).
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from pagoda.cli.parser import CommandParser, settings_names
from pagoda.config.command_line import parse_command_line
from pagoda.config.names import Given
from pagoda.config.rules import Problem, raise_problems
from pagoda.config.schema import option_defaults, rules
from pagoda.config.sources import gather

PATHS = {"startup": "/health", "ready": "/v2/health/ready", "live": "/v2/health/live"}
DEFAULT_TIMEOUT_SECONDS = 3.0
MAX_ANSWER_BYTES = 65536


def run(arguments: Sequence[str]) -> int:
    """Print one line with the server's answer; exit status 0 if the probe passes, 1 if not.

    Settings of the server may be on the command line too (`--http-port`, `--config`); only port and TLS are looked at.
    """
    line = parse_command_line(arguments)
    parser = CommandParser(prog="pagoda probe", description="Ask the server on this machine.", further=settings_names)
    parser.add_argument("probe", choices=PATHS)
    parser.add_argument("--rank", action="store_true", help="ask about the ranks of this worker node, not for a server")
    parser.add_argument("--state-directory", type=Path, metavar="DIR", help="as given to `pagoda join`; needs --rank")
    parser.add_argument("--timeout", type=float, default=DEFAULT_TIMEOUT_SECONDS, metavar="SECONDS")
    own = parser.parse_args(line.others)
    if own.state_directory is not None and not own.rank:
        parser.error("--state-directory needs --rank")
    if own.rank:
        return _print(own.probe, *_probe_ranks(own.probe, own.state_directory))
    given, _ = gather(line, os.environ)  # other errors in it are reported by the server
    raise_problems(line.problems)
    port = _port(given)
    scheme = "https" if "ssl_certfile" in given else "http"
    try:
        passed, answer = probe(own.probe, port, scheme, own.timeout)
    except (OSError, ValueError) as error:
        passed, answer = False, f"{scheme}://127.0.0.1:{port}{PATHS[own.probe]}: {error or type(error).__name__}"
    return _print(own.probe, passed, answer)


def _print(name: str, passed: bool, answer: str) -> int:
    print(f"{name}: {'yes' if passed else 'no'}: {answer}")
    return 0 if passed else 1


def _probe_ranks(name: str, directory: Path | None) -> tuple[bool, str]:
    from pagoda.distributed.node_state import evaluate_probe, published
    from pagoda.distributed.private_directory import default_directory, trouble_with_directory

    if directory is None:
        directory = default_directory()
        if trouble := trouble_with_directory(directory):
            return False, trouble
    return evaluate_probe(name, *published(directory))


def probe(name: str, port: int, scheme: str, timeout: float) -> tuple[bool, str]:
    """Whether the probe `name` passes, and the server's answer in words. `timeout`: seconds.

    Raises:
        OSError: no answer in time. ValueError: an answer that is not Pagoda's.
    """
    status, body = _get(PATHS[name], port, scheme, timeout)
    if name != "startup":
        return status == 200, f"status {status}{_reason(body)}"
    health = json.loads(body)
    if not isinstance(health, dict) or "state" not in health:
        raise ValueError(f"status {status}, and the answer has no state: another server listens there")
    words = [f"state {health['state']}"]
    words += [f"{key} {health[key]}" for key in ("stage", "detail", "cause") if health.get(key)]
    return health.get("started") is True, ", ".join(words)


def _reason(body: bytes) -> str:
    """The reason in a response; empty where it has none that can be parsed."""
    try:
        answer = json.loads(body)
    except ValueError:
        return ""
    return f", {answer['error']}" if isinstance(answer, dict) and isinstance(answer.get("error"), str) else ""


def _get(path: str, port: int, scheme: str, timeout: float) -> tuple[int, bytes]:
    """Status and body of an answer. HTTP/1.0 over a socket: `http.client` would take a third of the probe's time to import."""
    deadline = time.monotonic() + timeout
    plain = socket.create_connection(("127.0.0.1", port), timeout)
    with _over_tls(plain) if scheme == "https" else plain as connection:
        connection.sendall(f"GET {path} HTTP/1.0\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
        answer = bytearray()
        while len(answer) < MAX_ANSWER_BYTES:
            connection.settimeout(max(0.001, deadline - time.monotonic()))
            received = connection.recv(MAX_ANSWER_BYTES)
            if not received:
                break
            answer += received
    head, _, body = bytes(answer).partition(b"\r\n\r\n")
    words = head.split(None, 2)
    if len(words) < 2 or not words[0].startswith(b"HTTP/") or not words[1].isdigit():
        raise ValueError("the answer is not HTTP: another server listens there, or one with TLS")
    return int(words[1]), body


def _over_tls(plain: socket.socket) -> socket.socket:
    """Unverified, as the kubelet's own probes: the certificate is made out to the service's name, not to 127.0.0.1."""
    import ssl

    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context.wrap_socket(plain)


def _port(given: dict[str, Given]) -> int:
    """The server's REST port; a `ConfigError` for one that is none, as the server itself would raise."""
    value = given.get("http_port")
    if value is None:
        return int(option_defaults()["http_port"])
    try:
        port = int(value.raw)
    except (TypeError, ValueError):
        port = -1
    values = {**option_defaults(), "http_port": port, "grpc_port": 0}
    if port == 0:
        raise_problems([Problem("http_port", "0", "a probe needs the port that the server listens on", value.source)])
    if rules().value_problems(values):
        allowed = f"must be {rules().allowed_values('http_port')}"
        raise_problems([Problem("http_port", str(value.raw), allowed, value.source)])
    return port
