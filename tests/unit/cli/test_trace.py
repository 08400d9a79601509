"""The file of `pagoda trace`: what a trace viewer reads of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pagoda.cli.trace import Trace, run
from pagoda.errors import PagodaError
from tests.support.server import ServerProcess

STEP = {
    "step": 7,
    "time": 100.0,
    "seconds": 0.5,
    "waiting": 2,
    "preempted": 1,
    "ended": [["b#1", "stop"]],
    "rows": [["a#0", 0, 64, 0, 1], ["b#1", 30, 4, 3, 2]],
}


def test_a_step_is_an_event_of_its_engine_and_of_each_request() -> None:
    trace = Trace()
    trace.take({"type": "trace", "model": "m", "replica": 1, "steps": [STEP]})
    events = trace.as_json()["traceEvents"]
    names = {(event["pid"], event["tid"]): event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert sorted(names.values()) == ["a#0", "b#1", "steps"]
    spans = {names[event["pid"], event["tid"]]: event for event in events if event["ph"] == "X"}
    assert {name: (span["name"], span["ts"], span["dur"]) for name, span in spans.items()} == {
        "steps": ("step: prefill", 100e6, 0.5e6),
        "a#0": ("prefill", 100e6, 0.5e6),
        "b#1": ("decode", 100e6, 0.5e6),
    }
    assert spans["steps"]["args"] == {"step": 7, "rows": 2, "tokens": 68, "drafts": 3, "waiting": 2, "preempted": 1}
    (end,) = (event for event in events if event["ph"] == "i")
    assert (end["name"], names[end["pid"], end["tid"]], end["ts"]) == ("ended: stop", "b#1", 100.5e6)


def test_engines_and_requests_are_kept_apart() -> None:
    trace = Trace()
    for model, replica in (("m", 0), ("m", 1), ("n", 0), ("m", 0)):
        trace.take({"type": "trace", "model": model, "replica": replica, "steps": [STEP]})
    events = trace.as_json()["traceEvents"]
    assert [event["args"]["name"] for event in events if event["name"] == "process_name"] == [
        *("m, replica 0", "m, replica 1", "n, replica 0"),
    ]
    assert (trace.num_steps, trace.num_requests) == (4, 6)
    trace.take({"type": "lost", "events": 3})
    assert trace.num_lost == 3


def test_kernels_are_in_the_threads_and_streams_that_ran_them() -> None:
    trace = Trace()
    kernels = [["aten::mm", 100.1, 0.2, 7, False, None], ["attention", 100.2, 0.1, 3, True, 1]]
    trace.take({"type": "trace", "model": "m", "replica": 0, "steps": [STEP], "kernels": kernels, "lost_kernels": 5})
    events = trace.as_json()["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    found = {event["name"]: (names[event["tid"]], event["dur"]) for event in events if event["ph"] == "X"}
    assert found["aten::mm"] == ("CPU thread 7", 0.2e6)
    assert found["attention"] == ("rank 1, GPU stream 3", 0.1e6)
    assert (trace.num_kernels, trace.num_lost, trace.num_requests) == (2, 5, 2)


def test_a_running_server_is_recorded(tmp_path: Path) -> None:
    with ServerProcess() as server:
        server.wait_until_ready()
        out = tmp_path / "trace.json"
        assert run(["--seconds", "0.2", "--out", str(out), "--base-url", f"http://127.0.0.1:{server.port}"]) == 0
        events = json.loads(out.read_text())["traceEvents"]
        assert {"KV blocks", "requests"} <= {event["name"] for event in events}


def test_a_server_that_is_not_there_is_a_sentence() -> None:
    with pytest.raises(PagodaError, match="connection refused"):
        run(["--base-url", "http://127.0.0.1:9", "--seconds", "1"])
