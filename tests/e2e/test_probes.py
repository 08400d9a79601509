"""`pagoda probe` against a real server, as Kubernetes would run it."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.server import ServerProcess
from tests.support.tls import write_self_signed_certificate

SERVICE_VARIABLES = {
    "PAGODA_PORT": "tcp://10.0.0.1:80",
    "PAGODA_SERVICE_HOST": "10.0.0.1",
    "PAGODA_SERVICE_PORT_HTTP1": "80",
    "PAGODA_PORT_80_TCP_ADDR": "10.0.0.1",
}


def probe(server: ServerProcess, name: str, *options: str) -> tuple[int, str]:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pagoda.cli.main",
            "probe",
            name,
            f"--http-port={server.port}",
            "--timeout=10",
            *options,
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout + done.stderr


def test_probes_follow_a_server_from_loading_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SERVICE_VARIABLES.items():  # a Service named pagoda is in the namespace
        monkeypatch.setenv(name, value)
    with ServerProcess() as server:
        status, line = probe(server, "startup")
        if "state starting" in line:
            assert status == 1
            assert probe(server, "live")[0] == 0  # loading is no reason to be restarted
        server.wait_until_ready()
        assert probe(server, "startup") == (
            0,
            "startup: yes: state ready, stage ready, cause the engine core has started\n",
        )
        assert probe(server, "ready") == (0, "ready: yes: status 200\n")
        assert probe(server, "live") == (0, "live: yes: status 200\n")
        server.send_signal(signal.SIGTERM)
        assert server.wait() == 0
        assert probe(server, "live")[0] == 1


def test_probes_speak_tls_where_the_server_does(tmp_path: Path) -> None:
    # Made out to the Service's name: a probe asks 127.0.0.1 and must not mind.
    certificate, key = write_self_signed_certificate(tmp_path, "pagoda.default.svc")
    tls = [f"--ssl-certfile={certificate}", f"--ssl-keyfile={key}"]
    with ServerProcess(ssl_certfile=certificate, ssl_keyfile=key) as server:
        assert probe(server, "live", *tls) == (0, "live: yes: status 200\n")
        assert probe(server, "live")[0] == 1
