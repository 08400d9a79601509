"""Logs: one format for every logger, request and model on the line, and never a key."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import warnings
from collections.abc import Iterator

import pytest

from pagoda.logs import UNIFIED_LOGGERS, bind_request_id, configure_logging


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """A stream to log to; afterwards every logger is as it was."""
    loggers = [logging.getLogger(), *map(logging.getLogger, UNIFIED_LOGGERS)]
    before = [(logger, logger.handlers[:], logger.level, logger.propagate, logger.disabled) for logger in loggers]
    yield io.StringIO()
    for logger, handlers, level, propagate, disabled in before:
        logger.handlers[:] = handlers
        logger.setLevel(level)
        logger.propagate, logger.disabled = propagate, disabled
    logging.captureWarnings(False)


def json_lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


@pytest.mark.parametrize("name", UNIFIED_LOGGERS)
def test_every_logger_speaks_once_and_in_the_one_format(stream: io.StringIO, name: str) -> None:
    logger = logging.getLogger(name)
    logger.addHandler(logging.StreamHandler(stream))  # as libraries do at import
    logger.propagate = False
    configure_logging("info", "json", model_name="demo", stream=stream)
    logger.info("hello %s", "there")
    (entry,) = json_lines(stream)
    assert (entry["logger"], entry["level"], entry["message"], entry["model"]) == (name, "info", "hello there", "demo")
    assert str(entry["time"]).endswith("+00:00")


def test_configuring_twice_does_not_double_the_lines(stream: io.StringIO) -> None:
    configure_logging("info", "text", stream=stream)
    configure_logging("info", "text", stream=stream)
    logging.getLogger("pagoda.engine").info("once")
    assert stream.getvalue().count("once") == 1


def test_level_governs_ours_and_other_libraries_speak_from_warning_on(stream: io.StringIO) -> None:
    configure_logging("info", "text", stream=stream)
    logging.getLogger("pagoda").debug("too fine")
    logging.getLogger("httpx").info("chatter")
    logging.getLogger("httpx").warning("trouble")
    logging.getLogger("grpc._cython.cygrpc").debug("loops")
    logging.getLogger("grpc._cython.cygrpc").error("lost")
    logging.getLogger("pagoda").info("news")
    text = stream.getvalue()
    assert "too fine" not in text
    assert "chatter" not in text
    assert "trouble" in text
    assert "loops" not in text
    assert text.count("lost") == 1
    assert "news" in text
    with pytest.raises(KeyError):
        configure_logging("loud", stream=stream)


def test_request_id_is_on_every_line_of_the_request_and_of_the_tasks_it_starts(stream: io.StringIO) -> None:
    configure_logging("info", "json", stream=stream)
    logger = logging.getLogger("pagoda.serving")

    async def child() -> None:
        logger.info("child")

    async def request(name: str) -> None:
        with bind_request_id(name):
            logger.info("start")
            await asyncio.create_task(child())

    async def both() -> None:
        await asyncio.gather(request("a"), request("b"))
        logger.info("outside")

    asyncio.run(both())
    seen = [(entry["message"], entry.get("request_id")) for entry in json_lines(stream)]
    assert sorted(seen, key=str) == [
        ("child", "a"),
        ("child", "b"),
        ("outside", None),
        ("start", "a"),
        ("start", "b"),
    ]


def test_extra_fields_are_kept_in_both_formats(stream: io.StringIO) -> None:
    configure_logging("info", "json", stream=stream)
    logging.getLogger("pagoda").info("done", extra={"tokens": 12, "seconds": 0.5, "path": object})
    (entry,) = json_lines(stream)
    assert entry["tokens"] == 12
    assert entry["seconds"] == 0.5
    assert "object" in str(entry["path"])
    configure_logging("info", "text", stream=stream)
    logging.getLogger("pagoda").info("done", extra={"tokens": 12})
    assert stream.getvalue().splitlines()[-1].endswith("pagoda: done tokens=12")


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_keys_are_masked_in_messages_arguments_extras_and_tracebacks(stream: io.StringIO, log_format: str) -> None:
    configure_logging("debug", log_format, secrets=["sk-secret", "sk-secret-longer"], stream=stream)  # type: ignore[arg-type]
    logger = logging.getLogger("kserve")
    logger.info("key sk-secret-longer")
    logger.info("headers %s", {"authorization": "Bearer some-unknown-key"})
    logger.info("extra", extra={"token": "sk-secret", "nested": ["sk-secret"]})
    try:
        raise ValueError("bad key sk-secret")
    except ValueError:
        logger.exception("failed")
    text = stream.getvalue()
    assert "secret" not in text
    assert "longer" not in text
    assert "some-unknown-key" not in text
    assert "ValueError: bad key ***" in text


def test_a_message_cannot_pass_for_a_record_of_its_own(stream: io.StringIO) -> None:
    configure_logging("info", "text", stream=stream)
    logging.getLogger("pagoda").info("prompt %s", "x\n2026-01-01 00:00:00.000 ERROR pagoda: forged\r")
    assert [line[:4] for line in stream.getvalue().splitlines()[1:]] == ["    "]
    assert "\r" not in stream.getvalue()


def test_json_stays_one_line_with_a_traceback(stream: io.StringIO) -> None:
    configure_logging("info", "json", stream=stream)
    try:
        1 / 0  # noqa: B018
    except ZeroDivisionError:
        logging.getLogger("pagoda").exception("first\nsecond")
    (entry,) = json_lines(stream)
    assert entry["message"] == "first\nsecond"
    assert "ZeroDivisionError" in str(entry["exception"])


def test_access_lines_of_probes_are_left_out_unless_they_fail_or_debugging(stream: io.StringIO) -> None:
    access = logging.getLogger("pagoda.access")
    line = '%s - "%s %s HTTP/%s" %d'

    def log(path: str, status: int) -> None:
        access.info(line, "127.0.0.1:1", "GET", path, "1.1", status)

    configure_logging("info", "text", stream=stream)
    for path in ("/health", "/v2/health/ready", "/v2/models/demo/ready", "/metrics?x=1"):
        log(path, 200)
    assert stream.getvalue() == ""
    log("/v2/health/ready", 503)
    log("/v1/completions", 200)
    assert len(stream.getvalue().splitlines()) == 2
    configure_logging("debug", "text", stream=stream)
    log("/health", 200)
    assert len(stream.getvalue().splitlines()) == 3


def test_access_lines_are_left_out_where_that_is_asked_for(stream: io.StringIO) -> None:
    def log(*paths: str) -> None:
        for path in paths:
            logging.getLogger("pagoda.access").info('%s - "%s %s HTTP/%s" %d', "127.0.0.1:1", "GET", path, "1.1", 500)

    configure_logging("debug", "text", stream=stream, quiet_paths=("/ping", "/v1/models"))
    log("/ping?x=1", "/v1/models", "/v1/models/a", "/health")
    assert [line.split('"')[1].split()[1] for line in stream.getvalue().splitlines()] == ["/v1/models/a", "/health"]
    configure_logging("info", "text", stream=stream, access_log=False)
    log("/v1/completions")
    logging.getLogger("pagoda.serving").info("ready")
    configure_logging("info", "text", stream=stream)
    log("/v1/completions")
    assert [line.split()[3] for line in stream.getvalue().splitlines()[2:]] == ["pagoda.serving:", "pagoda.access:"]


def test_python_warnings_become_log_lines(stream: io.StringIO) -> None:
    configure_logging("info", "json", stream=stream)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old thing", UserWarning, stacklevel=1)
    assert any("old thing" in str(entry["message"]) for entry in json_lines(stream))


def test_levels_have_colors_only_where_they_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    for colors in (False, True):
        stream = io.StringIO()
        configure_logging(stream=stream, colors=colors)
        logging.getLogger("pagoda.x").warning("careful")
        assert ("\x1b[33mWARNING\x1b[0m" in stream.getvalue()) is colors
        assert ("\x1b" in stream.getvalue()) is colors
