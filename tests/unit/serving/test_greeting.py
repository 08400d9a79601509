"""What `pagoda serve` shows on a terminal, and that it shows nothing elsewhere."""

from __future__ import annotations

import io
import logging
from typing import Any

import pytest

from pagoda.config.schema import PagodaConfig
from pagoda.engine.health import EngineHealth
from pagoda.engine.messages import EngineReady
from pagoda.serving.greeting import STAGES, Greeting, address_for_people, share_done

READY = EngineReady(
    max_model_len=8,
    max_num_seqs=1,
    max_num_batched_tokens=8,
    num_blocks=2,
    block_size=8,
    vocab_size=9,
    dtype="bfloat16",
    kv_equation="KV cache: 1.00 MiB / 2 blocks",
)


class Screen(io.StringIO):
    def __init__(self, *, tty: bool = True) -> None:
        super().__init__()
        self._tty = tty

    def isatty(self) -> bool:
        return self._tty


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("NO_COLOR", raising=False)


def greeted(screen: Screen, **settings: Any) -> str:
    greeting = Greeting.on_terminal(PagodaConfig(**settings), screen)
    assert greeting is not None
    health = EngineHealth()
    greeting.follow(health)  # type: ignore[arg-type]  # as of a server it has phase, detail and subscribe
    health.enter_phase("weights", "40 %")
    record = logging.makeLogRecord({"levelno": logging.INFO})
    assert not greeting.lets_pass(record)
    assert greeting.lets_pass(logging.makeLogRecord({"levelno": logging.WARNING}))
    greeting.listening("http://localhost:8080", "localhost:8081")
    greeting.ready(READY)
    assert greeting.lets_pass(record)
    health.enter_phase("restart")  # nobody listens any more
    return screen.getvalue()


def test_it_says_what_is_served_on_what_and_where() -> None:
    shown = greeted(Screen(), model_aliases=("other",), device="cpu")
    for text in (
        "demo, the built-in demo model",
        "other",
        "cpu, bfloat16",
        "1.00 MiB / 2 blocks",
        "http://localhost:8080/v1",
        "localhost:8081",
        "http://localhost:8080/docs",
    ):
        assert text in shown
    assert "\x1b[" in shown


def test_names_are_no_markup(tmp_path: Any) -> None:
    shown = greeted(Screen(), model=str(tmp_path), model_name="[red]x[/]")
    assert "[red]x[/]" in shown


def test_no_color_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    shown = greeted(Screen())
    assert "\x1b[1;32m" not in shown
    assert "\x1b[32m" not in shown


@pytest.mark.parametrize(
    ("tty", "term", "settings"), [(False, "xterm", {}), (True, "dumb", {}), (True, "xterm", {"log_format": "json"})]
)
def test_there_is_none_elsewhere(
    tty: bool, term: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", term)
    assert Greeting.on_terminal(PagodaConfig(**settings), Screen(tty=tty)) is None


def test_the_start_goes_forward_stage_by_stage() -> None:
    shares = [share_done(stage, "") for stage in STAGES]
    assert shares == sorted(shares)
    assert share_done("weights", "") < share_done("weights", "40 %") < share_done("kv", "")
    assert share_done("restart", "") == 0


def test_addresses_are_such_as_a_browser_here_takes() -> None:
    assert address_for_people("0.0.0.0", 8080) == "localhost:8080"
    assert address_for_people("::", 8080) == "localhost:8080"
    assert address_for_people("::1", 8080) == "[::1]:8080"
    assert address_for_people("10.0.0.7", 1) == "10.0.0.7:1"
