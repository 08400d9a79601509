"""The web page's files, and the stream of what the engine does: to whom, what it says, and that it ends."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from pagoda.serving.ui.events import MAX_UNSENT, MAX_VIEWERS, Unsent
from pagoda.serving.ui.routes import ASSETS
from tests.support.rest_harness import RestHarness
from tests.support.server import ServerProcess

PROMPT = {"model": "demo", "prompt": "Once upon a time", "ignore_eos": True, "temperature": 0}


class Viewer:
    """Reads `/ui/events` in a thread."""

    def __init__(self, port: int) -> None:
        self.events: list[dict[str, Any]] = []
        self._client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._read)

    def __enter__(self) -> Viewer:
        self._thread.start()
        self.wait_for(lambda event: event["type"] == "server")
        return self

    def __exit__(self, *_: object) -> None:
        self._leaving.set()
        self._thread.join(30)
        self._client.close()

    def _read(self) -> None:
        with self._client.stream("GET", "/ui/events") as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            for line in response.iter_lines():
                if line.startswith("data: "):
                    self.events.append(json.loads(line[6:]))
                if self._leaving.is_set():
                    return

    def wait_for(self, wanted: Callable[[dict[str, Any]], bool], seconds: float = 60) -> dict[str, Any]:
        """The first event so far that is `wanted`."""
        deadline = time.monotonic() + seconds
        while True:
            for event in list(self.events):
                if wanted(event):
                    return event
            assert time.monotonic() < deadline, [event["type"] for event in self.events]
            time.sleep(0.02)

    @property
    def steps(self) -> list[dict[str, Any]]:
        """Of all traces."""
        return [step for event in self.events if event["type"] == "trace" for step in event["steps"]]


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess(speculative_config='{"method": "ngram", "num_speculative_tokens": 3}') as running:
        running.wait_until_ready()
        yield running


def test_a_viewer_sees_every_token_of_every_step(server: ServerProcess) -> None:
    with Viewer(server.port) as viewer:
        usage = server.client.post("/v1/completions", json={**PROMPT, "max_tokens": 40}).json()["usage"]
        viewer.wait_for(lambda event: event["type"] == "trace" and any(step["ended"] for step in event["steps"]))
        rows = [row for step in viewer.steps for row in step["rows"]]
        assert len({request for request, *_ in rows}) == 1
        assert sum(new for *_, new in rows) == usage["completion_tokens"] == 40
        prompt = [
            (computed, tokens) for _, computed, tokens, drafts, _ in rows if computed + tokens <= usage["prompt_tokens"]
        ]
        assert sum(tokens for _, tokens in prompt) == usage["prompt_tokens"]
        details = usage.get("completion_tokens_details") or {}
        assert sum(max(0, new - 1) for *_, new in rows) == details.get("accepted_prediction_tokens", 0)
        assert viewer.steps[-1]["ended"] == [[rows[-1][0], "length"]]
        ((name, arrival),) = [pair for event in viewer.events for pair in event.get("arrivals", [])]
        assert name == rows[-1][0]
        assert arrival <= viewer.steps[0]["time"]
        (known,) = viewer.wait_for(lambda event: event["type"] == "requests")["requests"]
        assert known["request"] == name.rpartition("#")[0]
        assert 0 <= known["queue"] <= known["ttft"] <= known["e2el"]
        assert (known["output_tokens"], known["reason"], known["cause"]) == (40, "length", None)
        last = viewer.wait_for(lambda event: event["type"] == "trace" and event["steps"] == [])
        assert last["blocks"]["first"] == 0
        limits = viewer.wait_for(lambda event: event["type"] == "health" and event["limits"] is not None)["limits"]
        assert len(last["blocks"]["states"]) == limits["num_blocks"]


def test_blocks_are_shown_with_who_holds_them_and_as_cached_afterwards(server: ServerProcess) -> None:
    with Viewer(server.port) as viewer:
        server.client.post("/v1/completions", json={**PROMPT, "max_tokens": 200})
        viewer.wait_for(lambda event: event["type"] == "trace" and any(step["ended"] for step in event["steps"]))
        held = [event["blocks"] for event in viewer.events if event["type"] == "trace" and event["blocks"]["holders"]]
        assert held, "steps of 200 tokens take longer than a tenth of a second"
        for blocks in held:
            ((_, ids),) = blocks["holders"].items()
            assert {blocks["states"][block] for block in ids} <= {"u", "s"}
        final = [event["blocks"]["states"] for event in viewer.events if event["type"] == "trace"][-1]
        assert final.count("u") == 1  # the null block
        assert "c" in final


def test_nothing_is_recorded_once_nobody_looks(server: ServerProcess) -> None:
    with Viewer(server.port):
        pass
    server.client.post("/v1/completions", json={**PROMPT, "max_tokens": 5})
    with Viewer(server.port) as viewer:
        viewer.wait_for(lambda event: event["type"] == "trace")
        assert viewer.steps == []


def test_an_engine_that_is_killed_is_seen_and_its_successor_too(server: ServerProcess) -> None:
    with Viewer(server.port) as viewer:
        os.kill(server.engine_pid(), signal.SIGKILL)
        dead = viewer.wait_for(lambda event: event["type"] == "health" and event["health"]["state"] == "starting")
        assert "SIGKILL" in dead["health"]["cause"]
        server.wait_until_ready()
        server.client.post("/v1/completions", json={**PROMPT, "max_tokens": 5})
        viewer.wait_for(lambda event: event["type"] == "trace" and any(step["ended"] for step in event["steps"]))
    with Viewer(server.port) as later:
        (model,) = later.events[0]["models"]
        assert [change["state"] for change in model["history"]][-2:] == ["starting", "ready"]


def test_viewers_are_bounded() -> None:
    with RestHarness() as harness:
        viewers = [httpx.Client(base_url=harness.client.base_url, timeout=30) for _ in range(MAX_VIEWERS)]
        streams = [viewer.stream("GET", "/ui/events") for viewer in viewers]
        try:
            assert {stream.__enter__().status_code for stream in streams} == {200}
            refused = harness.client.get("/ui/events")
            assert refused.status_code == 429
            assert f"{MAX_VIEWERS} viewers" in refused.json()["error"]
        finally:
            for stream in streams:
                stream.__exit__(None, None, None)
            for viewer in viewers:
                viewer.close()


def test_the_page_is_public_and_strict_and_its_events_are_not(tmp_path) -> None:
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps([{"name": "reader", "key": "r", "scopes": ["read"]}]))
    with RestHarness(api_keys_file=str(keys), api_keys=("only-infer",)) as harness:
        page = harness.client.get("/ui")
        assert page.status_code == 200
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        for name in ASSETS:
            answer = harness.client.get(f"/ui/{name}")
            assert answer.status_code == 200
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert "innerHTML" not in answer.text
        for name in ("index.html", "..%2froutes.py", "none.js"):
            assert harness.client.get(f"/ui/{name}", headers={"authorization": "Bearer r"}).status_code == 404
        assert harness.client.get("/ui/events").status_code == 401
        kernels = harness.client.get("/ui/events?kernels=true", headers={"authorization": "Bearer r"})
        assert (kernels.status_code, "scope admin" in kernels.text) == (403, True)
        infer = harness.client.get("/ui/events", headers={"authorization": "Bearer only-infer"})
        assert infer.status_code == 403
        with harness.client.stream("GET", "/ui/events", headers={"authorization": "Bearer r"}) as events:
            assert events.status_code == 200


def test_there_is_no_page_where_it_is_off() -> None:
    with RestHarness(ui=False) as harness:
        assert [harness.client.get(path).status_code for path in ("/ui", "/ui/app.js", "/ui/events")] == [404] * 3


def test_a_viewer_that_reads_too_slowly_is_told_how_much_it_lost() -> None:
    unsent = Unsent()
    for number in range(MAX_UNSENT + 7):
        unsent.put({"type": "trace", "number": number})
    first = unsent.take()
    assert first is not None
    assert (first["type"], first["events"]) == ("lost", 7)
    kept = [event["number"] for event in iter(unsent.take, None)]
    assert kept == list(range(7, MAX_UNSENT + 7))


def test_the_use_of_keys_is_for_administrators(tmp_path) -> None:
    keys = tmp_path / "keys.json"
    limited = {"name": "chat", "key": "c", "scopes": ["infer"], "tenant": "team", "requests_per_minute": 10}
    keys.write_text(json.dumps([{"name": "boss", "key": "b", "scopes": ["admin"]}, limited]))
    with RestHarness(api_keys_file=str(keys)) as harness:
        for _ in range(2):
            body = {"prompt": "a", "max_tokens": 1}
            sent = harness.client.post("/v1/completions", json=body, headers={"authorization": "Bearer c"})
            assert sent.status_code == 200
        assert harness.client.get("/ui/keys").status_code == 401
        assert harness.client.get("/ui/keys", headers={"authorization": "Bearer c"}).status_code == 403
        found = {
            each["name"]: each for each in harness.client.get("/ui/keys", headers={"authorization": "Bearer b"}).json()
        }
        assert found["chat"]["requests"] == 2  # the one that was refused is none
        assert (found["chat"]["tenant"], found["chat"]["scopes"]) == ("team", ["infer"])
        assert found["chat"]["rate_limits"]["x-ratelimit-remaining-requests"] == "8"
        assert found["boss"]["requests"] == 1
        assert '"b"' not in json.dumps(found).replace('"boss"', "")
    with RestHarness() as harness:
        assert harness.client.get("/ui/keys").json() == []
