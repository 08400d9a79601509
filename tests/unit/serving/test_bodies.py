"""Large and compressed bodies are decoded beside the event loop, small ones in it."""

from __future__ import annotations

import asyncio
import gzip
import threading
from typing import Any

import pytest
from starlette.requests import Request

from pagoda.errors import InvalidRequestError, RequestTooLargeError
from pagoda.serving.http.bodies import THREAD_ABOVE_BYTES, decode_body

LIMIT = 4 * THREAD_ABOVE_BYTES


def request_of(body: bytes, **headers: str) -> Request:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "path": "/", "headers": raw}, receive)


@pytest.mark.parametrize(
    ("body", "encoding"),
    [
        (b"x" * (THREAD_ABOVE_BYTES + 1), "identity"),
        (gzip.compress(b"x" * LIMIT), "gzip"),
        (gzip.compress(b"x"), "gzip"),
    ],
    ids=["large", "compressed and large", "compressed"],
)
async def test_the_event_loop_goes_on_while_a_body_is_decoded(body: bytes, encoding: str) -> None:
    """The decoder waits for the loop, which would be a deadlock if it kept the loop from running."""
    loop, has_run = asyncio.get_running_loop(), threading.Event()

    def decode(content: bytes) -> int:
        loop.call_soon_threadsafe(has_run.set)
        assert has_run.wait(10), "the event loop stands still"
        return len(content)

    size = len(gzip.decompress(body)) if encoding == "gzip" else len(body)
    assert await decode_body(request_of(body, content_encoding=encoding), LIMIT, decode) == size


async def test_a_small_body_is_decoded_without_a_thread() -> None:
    thread = await decode_body(request_of(b"x" * THREAD_ABOVE_BYTES), LIMIT, lambda content: threading.get_ident())
    assert thread == threading.get_ident()


async def test_errors_and_limits_are_those_of_a_small_body() -> None:
    def refuse(content: bytes) -> None:
        raise InvalidRequestError(f"{len(content)} bytes")

    with pytest.raises(InvalidRequestError, match=f"^{2 * THREAD_ABOVE_BYTES} bytes$"):
        await decode_body(request_of(b"x" * 2 * THREAD_ABOVE_BYTES), LIMIT, refuse)
    with pytest.raises(RequestTooLargeError):
        await decode_body(request_of(b"x" * (LIMIT + 1)), LIMIT, refuse)
    with pytest.raises(RequestTooLargeError):
        await decode_body(request_of(gzip.compress(b"x" * (LIMIT + 1)), content_encoding="gzip"), LIMIT, refuse)
