"""`pagoda bench serve` against a real server, at every kind of endpoint, and against servers that misbehave."""

from __future__ import annotations

import json
import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pagoda.cli.main import main
from tests.support.server import ServerProcess

HTTP_ENDPOINTS = ("openai-completions", "openai-chat", "v2-generate", "v2-infer")
STREAMS = ("openai-completions", "openai-chat", "v2-generate", "v2-grpc")


@pytest.fixture(scope="module")
def server():
    with ServerProcess() as running:
        running.wait_until_ready()
        yield running


def bench(server, endpoint, *options):
    address = f"127.0.0.1:{server.grpc_port}" if endpoint == "v2-grpc" else f"http://127.0.0.1:{server.port}"
    fixed = ["--model", "demo", "--num-prompts", "6", "--input-len", "8:12", "--output-len", "5"]
    return main(["bench", "serve", "--base-url", address, "--endpoint-type", endpoint, *fixed, *options])


@pytest.mark.parametrize("endpoint", [*HTTP_ENDPOINTS, "v2-grpc"])
def test_every_kind_of_endpoint_is_measured_to_the_last_token(server, endpoint, tmp_path):
    path = tmp_path / "result.json"
    assert bench(server, endpoint, "--request-rate", "50", "--json", str(path), "--goodput", "e2el:600000") == 0
    report = json.loads(path.read_text())
    results = report["results"]
    assert results["completed"] == 6
    assert results["errors"] == {}
    assert results["output_tokens"] == 30
    assert results["prompt_tokens"] >= 48
    assert results["goodput"]["share"] == 1.0
    assert 0 < results["ttft_ms"]["p50"] <= results["e2el_ms"]["p99"]
    assert (results["itl_ms"]["p50"] is not None) == (endpoint in STREAMS)
    assert report["kind"] == "serve"
    assert report["arguments"]["endpoint_type"] == endpoint
    assert report["versions"]["pagoda"]
    assert report["cpu"]["logical_cores"] >= 1


def test_token_ids_make_prompt_lengths_exact(server, tmp_path):
    path = tmp_path / "result.json"
    assert bench(server, "openai-completions", "--input-len", "11", "--json", str(path)) == 0
    assert json.loads(path.read_text())["results"]["prompt_tokens"] == 66


@pytest.mark.parametrize("workload", ["shared-prefix", "multi-turn", "agent", "file"])
@pytest.mark.parametrize("endpoint", ["openai-chat", "v2-generate"])
def test_every_workload_runs_in_a_closed_loop(server, endpoint, workload, tmp_path):
    path, prompts = tmp_path / "result.json", tmp_path / "prompts.txt"
    prompts.write_text("Once upon a time\nThe sky is\n")
    options = {
        "shared-prefix": ["--num-prefixes", "2", "--prefix-len", "32"],
        "multi-turn": ["--num-turns", "2"],
        "agent": ["--num-turns", "2", "--num-prefixes", "1", "--prefix-len", "32"],
        "file": ["--dataset-path", str(prompts)],
    }[workload]
    closed = ["--max-concurrency", "2", "--num-prompts", "4", "--json", str(path)]
    assert bench(server, endpoint, "--workload", workload, *options, *closed) == 0
    results = json.loads(path.read_text())["results"]
    assert results["completed"] == (8 if workload in ("multi-turn", "agent") else 4)
    if workload == "agent" and endpoint == "openai-chat":
        assert 0 < results["cached_share"] < results["cached_share_of_later_turns"] < 1
    assert results["max_concurrent_requests"] == 2


def test_the_report_on_the_terminal_has_every_metric_and_the_plot_is_written(server, capsys, tmp_path):
    plot = tmp_path / "plot.svg"
    # Few tokens may come in one event on a busy machine, and have no time between them.
    assert bench(server, "v2-generate", "--output-len", "64", "--plot", str(plot), "--progress") == 0
    printed = capsys.readouterr()
    for name in ("(ttft)", "(tpot)", "(itl)", "(e2el)", "event loop"):
        assert name in printed.out
    assert "6/6" in printed.err
    assert plot.read_text().startswith("<svg")


def error_of(capsys, *arguments) -> str:
    assert main(["bench", *arguments]) == 2
    return capsys.readouterr().err


def test_wrong_uses_are_one_sentence_each(server, capsys, tmp_path):
    there = ["serve", "--base-url", f"http://127.0.0.1:{server.port}"]
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{unused.getsockname()[1]}"
        assert "connection refused" in error_of(capsys, "serve", "--base-url", nowhere)
    assert "it has demo" in error_of(capsys, *there, "--model", "other")
    assert "the model takes 512" in error_of(capsys, *there, "--input-len", "600")
    assert "NAME:MILLISECONDS" in error_of(capsys, *there, "--goodput", "itl:5")
    assert "--request-rate" in error_of(capsys, *there, "--request-rate", "0")
    assert "go together" in error_of(capsys, *there, "--workload", "file")
    assert "takes text" in error_of(capsys, *there, "--endpoint-type", "openai-chat", "--prompt-format", "ids")
    assert "needs --model" in error_of(capsys, *there, "--endpoint-type", "v2-grpc")
    assert "unknown kind" in error_of(capsys, "latencies")


class Misbehaving(BaseHTTPRequestHandler):
    """Lists a model `m`; the first completion is right, and those after it fail each in its own way."""

    def do_GET(self):
        self._whole(200, b'{"data": [{"id": "m"}]}')

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.path != "/v1/completions":
            self._whole(404, b"{}")
            return
        number = next(self.server.numbers)
        if number == 1:
            self._whole(429, b'{"error": "full"}')
            return
        self.send_response(200)
        self.end_headers()
        self._event(b'{"choices": [{"text": "a", "finish_reason": null}]}')
        if number == 2:
            self._event(b'{"error": {"message": "lost"}}')
        elif number == 3:
            self._event(b"{nonsense")
        elif number != 4:  # the fourth breaks off
            self._event(b'{"choices": [{"text": "b", "finish_reason": "length"}]}')
            self._event(b"[DONE]")

    def log_message(self, *_):
        pass

    def _event(self, data: bytes) -> None:
        self.wfile.write(b"data: " + data + b"\n\n")

    def _whole(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def misbehaving_server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Misbehaving) as running:
        running.numbers = iter(range(100))
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{running.server_port}"
        finally:
            running.shutdown()
            thread.join()


def test_failures_are_counted_by_kind_and_the_rest_is_measured(capsys, tmp_path):
    path = tmp_path / "result.json"
    with misbehaving_server() as address:
        options = ["--num-prompts", "6", "--max-concurrency", "1", "--json", str(path)]
        assert main(["bench", "serve", "--base-url", address, *options]) == 1
    results = json.loads(path.read_text())["results"]
    assert results["errors"] == {"HTTP 429": 1, "error in stream": 1, "not JSON": 1, "incomplete": 1}
    assert results["completed"] == 2
    assert results["output_tokens"] == 4  # without counts of the server's, pieces of text
    assert "approximate" in capsys.readouterr().err
