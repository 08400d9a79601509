"""`pagoda probe` against a server that says what the test wants."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from pagoda.cli.main import main
from tests.support.ports import free_port


@contextmanager
def server(answer: Callable[[str], bytes]) -> Iterator[int]:
    """A port on which one connection after another is answered with `answer(path)`."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                request = connection.recv(65536)
                connection.sendall(answer(request.split()[1].decode()))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)


def answering(statuses: dict[str, int], health: object = None) -> Callable[[str], bytes]:
    def answer(path: str) -> bytes:
        return f"HTTP/1.1 {statuses[path]} X\r\nContent-Type: application/json\r\n\r\n{json.dumps(health)}".encode()

    return answer


@pytest.mark.parametrize(
    ("state", "passes"),
    [
        ("starting", False),
        ("starting", True),
        ("ready", True),
        ("draining", False),
        ("draining", True),
        ("dead", False),
    ],
)
def test_startup_passes_once_the_engine_was_started(
    state: str, passes: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    health = {"state": state, "started": passes, "stage": "weights", "cause": None}
    with server(answering({"/health": 503 if not passes else 200}, health)) as port:
        status = main(["probe", "startup", f"--http-port={port}"])
    assert status == (0 if passes else 1)
    assert capsys.readouterr().out == f"startup: {'yes' if passes else 'no'}: state {state}, stage weights\n"


@pytest.mark.parametrize(("probe", "path"), [("ready", "/v2/health/ready"), ("live", "/v2/health/live")])
def test_ready_and_live_ask_their_own_route(probe: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with server(answering({"/v2/health/ready": 503, "/v2/health/live": 503} | {path: 200})) as port:
        monkeypatch.setenv("PAGODA_HTTP_PORT", str(port))
        assert main(["probe", probe]) == 0
    with server(answering({path: 503})) as port:
        monkeypatch.setenv("PAGODA_HTTP_PORT", str(port))
        assert main(["probe", probe]) == 1


def test_a_probe_that_fails_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    with server(
        answering({"/v2/health/ready": 503}, {"ready": False, "error": "not ready: starting, weights"})
    ) as port:
        assert main(["probe", "ready", f"--http-port={port}"]) == 1
    assert capsys.readouterr().out == "ready: no: status 503, not ready: starting, weights\n"


def test_no_server_fails_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    assert main(["probe", "live", "--http-port", str(port)]) == 1
    assert f"live: no: http://127.0.0.1:{port}/v2/health/live: " in capsys.readouterr().out


def test_a_server_that_hangs_fails_in_time(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        assert main(["probe", "live", "--http-port", str(port), "--timeout", "0.2"]) == 1
    assert "timed out" in capsys.readouterr().out


@pytest.mark.parametrize(
    "answer", [b"", b"SSH-2.0-OpenSSH\r\n", b"HTTP/1.1 200 OK\r\n\r\n[]", b"HTTP/1.1 200 OK\r\n\r\n<html>"]
)
def test_another_server_on_the_port_fails(answer: bytes) -> None:
    with server(lambda path: answer) as port:
        assert main(["probe", "startup", f"--http-port={port}"]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--http-port=x"], "http_port=x (command line --http-port)"), (["--http-port=0"], "a probe needs the port")],
)
def test_a_wrong_port_is_an_error(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", "live", *arguments]) == 2
    assert message in capsys.readouterr().err
