"""`pagoda top`: what it shows of a server, in a terminal of any size and in a pipe."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import sys
import threading
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from pagoda.cli.top import Screen, as_text, run
from pagoda.engine.health import EngineState
from pagoda.errors import PagodaError
from pagoda.monitoring.figures import Figures, ModelFigures, Part, figures
from pagoda.monitoring.server import Server, look
from tests.support.ports import free_port
from tests.support.rest_harness import RestHarness

MODEL = ModelFigures(
    name="m",
    state="ready",
    running=3,
    waiting=2,
    kv_usage=0.5,
    requests=1.5,
    output_tokens=1234.0,
    steps=80.0,
    step_seconds=0.0123,
    ttft=(0.04, 1.5),
    acceptance_share=0.5,
    acceptance_length=2.5,
)
FOUND = Figures(
    state="ready", stage="", detail="", cause=None, models=[MODEL], parts=[], error_rates={"queue_full": 2.0}, seconds=1
)


@settings(max_examples=40)
@given(
    st.integers(1, 12),
    st.integers(0, 40),
    st.text("ab é漢", max_size=200),
    st.sampled_from(["ready", "starting", "dead"]),
    st.integers(24, 50),
)
def test_it_fits_the_terminal(num_models: int, num_parts: int, cause: str, state: str, height: int) -> None:
    models = [replace(MODEL, name=f"model-{number}" * 4, state=state) for number in range(num_models)]
    parts = [
        Part(name=f"rank {number}", model="m", is_up=bool(number % 2), note="x" * 90) for number in range(num_parts)
    ]
    screen = Screen("http://localhost:8080")
    screen.found = replace(FOUND, models=models, parts=parts, state=state, cause=cause, stage="weights")
    out = io.StringIO()
    Console(file=out, width=80, height=height).print(screen.draw(height))
    lines = out.getvalue().rstrip("\n").split("\n")
    assert len(lines) <= height
    assert lines[-1].startswith("q quits")
    assert all(len(line) <= 80 for line in lines)
    assert any("model-0" in line for line in lines)


def test_the_figures_are_of_what_happened_between_two_looks() -> None:
    with RestHarness() as rest:
        server = Server(rest.url)
        then = look(server)
        for _ in range(3):
            rest.client.post("/v1/completions", json={"prompt": "a b c", "max_tokens": 7})
        rest.client.post("/v1/completions", json={"prompt": ""})
        now = look(server)
        now.time = then.time + 2.0
        found = figures(now, then)
        (model,) = found.models
        assert (model.name, model.state, model.requests, model.output_tokens) == ("demo", "ready", 1.5, 10.5)
        assert model.ttft is not None
        assert found.error_rates == {"invalid_request": 0.5}
        assert "10.5/s out" in as_text(found, rest.url)
        rest.call(rest.engine.health.transition, EngineState.DEGRADED, "less memory")
        assert "degraded" in as_text(figures(look(server), now), rest.url)


def test_once_is_for_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    with RestHarness() as rest:
        assert run(["--once", "--interval", "0.1", "--base-url", rest.url]) == 0
        assert "KV cache" in capsys.readouterr().out
        assert run(["--once", "--json", "--interval", "0.1", "--base-url", rest.url]) == 0
        assert json.loads(capsys.readouterr().out)["models"][0]["name"] == "demo"
        rest.call(rest.engine.health.transition, EngineState.DEAD, "killed")
        assert run(["--once", "--interval", "0.1", "--base-url", rest.url]) == 1
        assert "dead: killed" in capsys.readouterr().out
    with pytest.raises(PagodaError, match="nothing listens there"):
        run(["--once", "--base-url", f"http://127.0.0.1:{free_port()}"])
    with pytest.raises(PagodaError, match="--interval"):
        run(["--interval", "0"])


def test_keys_pause_and_end_it_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    with RestHarness() as rest:
        ours, theirs = pty.openpty()
        seen: list[str] = []

        def read() -> None:
            while True:
                try:
                    seen.append(os.read(ours, 65536).decode(errors="replace"))
                except OSError:
                    return

        def wait_for(text: str) -> None:
            deadline = time.monotonic() + 20
            while text not in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", "".join(seen)):
                assert time.monotonic() < deadline, "".join(seen)[-500:]
                time.sleep(0.01)

        with open(theirs, closefd=False) as stdin, open(theirs, "w", closefd=False) as stdout:
            monkeypatch.setattr(sys, "stdin", stdin)
            monkeypatch.setattr(sys, "stdout", stdout)
            monkeypatch.setenv("TERM", "xterm")
            monkeypatch.setenv("COLUMNS", "80")
            monkeypatch.setenv("LINES", "24")
            ended: list[int] = []
            reader = threading.Thread(target=read, daemon=True)
            top = threading.Thread(target=lambda: ended.append(run(["--base-url", rest.url, "--interval", "0.2"])))
            reader.start()
            top.start()
            wait_for("KV cache")
            os.write(ours, b"p")
            wait_for("PAUSED")
            os.write(ours, b"+")
            wait_for("every 0.4 s")
            os.write(ours, b"q")
            top.join(20)
            assert ended == [0]
            monkeypatch.undo()
        os.close(theirs)
        reader.join(5)
        os.close(ours)
