"""`pagoda config` against a running server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from pagoda.cli.main import main
from tests.support.rest_harness import RestHarness


@pytest.fixture(scope="module")
def harness() -> Iterator[RestHarness]:
    with RestHarness(max_num_waiting=9) as running:
        yield running


def config(harness: RestHarness, *words: str) -> int:
    return main(["config", *words, "--base-url", harness.url])


def test_get_set_and_diff(harness: RestHarness, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert config(harness, "get", "max-num-waiting", "block_size") == 0
    assert capsys.readouterr().out.splitlines() == [
        "max_num_waiting = 9  (test; between two steps of the engine)",
        "block_size = 16  (test; needs a restart)",
    ]
    file = tmp_path / "pagoda.yaml"
    file.write_text("max_num_waiting: 9\nblock-size: 16\n")
    assert config(harness, "diff", str(file)) == 0
    assert config(harness, "set", "max_num_waiting=4", "request-timeout-seconds=2.5") == 0
    out = capsys.readouterr().out
    assert "max_num_waiting: 9 -> 4" in out
    assert "request_timeout_seconds: null -> 2.5" in out
    assert config(harness, "diff", str(file)) == 1
    assert "max_num_waiting: 9 -> 4  (PATCH by" in capsys.readouterr().out
    assert config(harness, "diff", "--json") == 1
    assert json.loads(capsys.readouterr().out)["max_num_waiting"]["running"] == 4
    assert config(harness, "get", "--json") == 0
    assert json.loads(capsys.readouterr().out)["generation"] == 2


@pytest.mark.parametrize(
    ("words", "piece"),
    [
        (("set", "block_size=32"), "block_size: cannot change while the server runs"),
        (("set", "max_num_waiting"), "write NAME=VALUE"),
        (("get", "max_num_wating"), "did you mean max_num_waiting"),
        (("get", "--model", "other"), "is not served here"),
    ],
)
def test_what_is_refused_is_one_sentence(
    harness: RestHarness, words: tuple[str, ...], piece: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert config(harness, *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("pagoda config: ")
    assert piece in error


def test_a_server_that_is_not_there_or_asks_for_a_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "get", "--base-url", "http://127.0.0.1:9"]) == 2
    assert "127.0.0.1:9" in capsys.readouterr().err
    with RestHarness(api_keys=("secret-key-1",), anonymous_scopes=("read",)) as harness:
        assert config(harness, "get", "api_keys") == 0
        assert "secret-key-1" not in capsys.readouterr().out
        assert config(harness, "set", "max_num_waiting=4") == 2
        assert (
            config(harness, "set", "max_num_waiting=4", "--api-key", "secret-key-1") == 2
        )  # it may infer, and nothing else
        assert "admin" in capsys.readouterr().err
