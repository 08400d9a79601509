"""A corpus of what clients, proxies and attackers send, byte by byte, against the real server.

Every case is data: what is sent, the statuses of all responses, and whether the connection goes on. Where it does, a request
that follows is served as if nothing had been; where it does not, nothing that was sent is taken for a request.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.support.raw_http import Pause, RawClient
from tests.support.rest_harness import RestHarness
from tests.support.waiting import wait_until

KEY = "sk-of-this-test"
AUTHORIZED = f"Authorization: Bearer {KEY}\r\n".encode()
MAX_HEADER_BYTES = 8192
TIMEOUT = 0.4
SHORT = Pause(TIMEOUT / 4)

BODY = b'{"text_input": "a", "max_tokens": 2}'
LIVE = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"
SECRET = b"GET /v2/models/demo HTTP/1.1\r\nHost: x\r\n\r\n"
"""A request that is answered 401: seen in a list of statuses, something was taken for a request."""


def get(
    *lines: bytes, path: bytes = b"/v2/health/live", version: bytes = b"HTTP/1.1", host: bytes = b"Host: x\r\n"
) -> bytes:
    return b"GET %b %b\r\n%b%b\r\n" % (path, version, host, b"".join(line + b"\r\n" for line in lines))


def post(*lines: bytes, body: bytes = b"", key: bytes = AUTHORIZED) -> bytes:
    head = b"POST /v2/models/demo/generate HTTP/1.1\r\nHost: x\r\n" + key
    return head + b"".join(line + b"\r\n" for line in lines) + b"\r\n" + body


def chunks(*pieces: bytes, trailers: bytes = b"") -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n" + trailers + b"\r\n"


LENGTH = b"Content-Length: %d" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked"


@dataclass(frozen=True)
class Case:
    """`sent` is answered with `statuses`; then the connection is open, or closed by the server."""

    sent: bytes | tuple[bytes | Pause, ...]
    statuses: tuple[int, ...] = (200,)
    is_open: bool = False


def refused(sent: bytes | tuple[bytes | Pause, ...], status: int = 400) -> Case:
    return Case(sent, (status,))


def served(sent: bytes | tuple[bytes | Pause, ...], *statuses: int) -> Case:
    return Case(sent, statuses or (200,), is_open=True)


CASES = {
    # Heads
    "a request": served(get()),
    "a head byte by byte": served(tuple(get()[i : i + 1] for i in range(len(get())))),
    "empty lines before the request line": served(b"\r\n\r\n" + get()),
    "an empty line in two packets": served((b"\r", SHORT, b"\n" + get())),
    "garbage": refused(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
    "garbage without an end of line": refused(b"\0" * 64),
    "no HTTP at all": refused(b"hello\n"),
    "HTTP/0.9": refused(b"GET /v2/health/live\r\n\r\n", 505),
    "HTTP/2.0 in the request line": refused(get(version=b"HTTP/2.0"), 505),
    "HTTP/3.0 in the request line": refused(get(version=b"HTTP/3.0")),
    "HTTP/2 with prior knowledge": refused(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    "an unknown version": refused(get(version=b"HTTP/1.9")),
    "a version in lower case": refused(get(version=b"http/1.1")),
    "HTTP/1.0 closes": Case(get(version=b"HTTP/1.0", host=b"")),
    "HTTP/1.0 goes on where it is asked to": served(get(b"Connection: Keep-Alive", version=b"HTTP/1.0")),
    "close": Case(get(b"Connection: close")),
    "close among other options": Case(get(b"Connection: x, Close")),
    "an unknown method": refused(b"BREW / HTTP/1.1\r\nHost: x\r\n\r\n", 501),
    "a method in lower case": refused(b"get / HTTP/1.1\r\nHost: x\r\n\r\n", 501),
    "CONNECT": refused(b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n", 405),
    "TRACE": served(b"TRACE / HTTP/1.1\r\nHost: x\r\n" + AUTHORIZED + b"\r\n", 405),
    "TRACE without a key": served(b"TRACE / HTTP/1.1\r\nHost: x\r\n\r\n", 401),
    "OPTIONS of the server": served(b"OPTIONS * HTTP/1.1\r\nHost: x\r\n" + AUTHORIZED + b"\r\n", 404),
    "an absolute target": served(get(path=b"http://other/v2/health/live")),
    "an absolute target without a path": served(get(path=b"http://other")),
    "a query": served(get(path=b"/v2/health/live?a=b&c")),
    "an escaped path": served(get(path=b"/v2/health/%6cive")),
    "an escape that is none": served(get(AUTHORIZED[:-2], path=b"/v2/%zz"), 404),
    "a NUL in the path, escaped": served(get(AUTHORIZED[:-2], path=b"/v2/%00"), 404),
    "a fragment": refused(get(path=b"/v2/health/live#x")),
    "a space in the target": refused(get(path=b"/v2/health/live x")),
    "bytes beyond ASCII in the target": refused(get(path=b"/\xc3\xa9")),
    "a NUL in the target": refused(get(path=b"/\0")),
    "a tab for a space": refused(b"GET\t/ HTTP/1.1\r\nHost: x\r\n\r\n"),
    "two spaces": refused(b"GET  / HTTP/1.1\r\nHost: x\r\n\r\n"),
    "no Host": refused(get(host=b"")),
    "two Hosts": refused(get(host=b"Host: x\r\nHost: x\r\n")),
    "an empty Host": served(get(host=b"Host:\r\n")),
    "a Host with a port": served(get(host=b"Host: [::1]:8080\r\n")),
    "a Host with a path": refused(get(host=b"Host: x/y\r\n")),
    "a Host with a space": refused(get(host=b"Host: x y\r\n")),
    "a folded header": refused(get(b"A: b", b" c")),
    "a folded header before the first": refused(get(host=b" Host: x\r\n")),
    "a space before the colon": refused(get(b"A : b")),
    "no colon": refused(get(b"A")),
    "a header without a name": refused(get(b": b")),
    "a header without a value": served(get(b"A:")),
    "a NUL in a value": refused(get(b"A: b\0")),
    "a NUL in a name": refused(get(b"A\0: b")),
    "a control character in a value": refused(get(b"A: \x01")),
    "bytes beyond ASCII in a value": served(get(b"A: \xe9")),
    "ends of lines without CR": refused(b"GET / HTTP/1.1\nHost: x\n\n"),
    "one end of a line without CR": refused(b"GET / HTTP/1.1\r\nHost: x\nA: b\r\n\r\n"),
    "an end of a line without LF": refused(b"GET / HTTP/1.1\r\nHost: x\rA: b\r\n\r\n"),
    "an end of the head without CR": refused(b"GET / HTTP/1.1\r\nHost: x\r\n\n" + SECRET),
    "a head as large as allowed": served(get(b"A: " + b"a" * (MAX_HEADER_BYTES - len(get()) - 5))),
    "a head one byte larger": refused(get(b"A: " + b"a" * (MAX_HEADER_BYTES - len(get()) - 4)), 431),
    "a header without an end": refused(b"GET / HTTP/1.1\r\nA: " + b"a" * 2 * MAX_HEADER_BYTES, 431),
    "a target without an end": refused(b"GET /" + b"a" * 2 * MAX_HEADER_BYTES, 414),
    "a method without an end": refused(b"G" * 2 * MAX_HEADER_BYTES, 414),
    "as many headers as allowed": served(get(*[b"A:b"] * 255)),
    "one header more": refused(get(*[b"A:b"] * 256), 431),
    # Framing
    "a body": served(post(LENGTH, body=BODY)),
    "a body byte by byte": served((post(LENGTH), *(BODY[i : i + 1] for i in range(len(BODY))))),
    "an empty line behind a body": served(post(LENGTH, body=BODY + b"\r\n")),
    "no body": served(post(b"Content-Length: 0"), 400),
    "no length": served(post(), 400),
    "a length twice": refused(post(LENGTH, LENGTH, body=BODY)),
    "two lengths": refused(post(LENGTH, b"Content-Length: 0", body=BODY)),
    "a list of lengths": refused(post(b"Content-Length: 36, 36", body=BODY)),
    "a length with a sign": refused(post(b"Content-Length: +36", body=BODY)),
    "a negative length": refused(post(b"Content-Length: -1")),
    "a hexadecimal length": refused(post(b"Content-Length: 0x24", body=BODY)),
    "a length with a space in it": refused(post(b"Content-Length: 3 6", body=BODY)),
    "an empty length": refused(post(b"Content-Length:", body=BODY)),
    "a length beyond 64 bits": refused(post(b"Content-Length: 99999999999999999999")),
    "a length beyond the limit": Case(post(b"Content-Length: 9999999999", body=b"x"), (413,)),
    "a length and chunks": refused(post(b"Content-Length: 4", CHUNKED, body=chunks(BODY))),
    "chunks and a length": refused(post(CHUNKED, b"Content-Length: 4", body=chunks(BODY))),
    "chunks": served(post(CHUNKED, body=chunks(BODY[:9], BODY[9:]))),
    "chunks of one byte": served(post(CHUNKED, body=chunks(*(BODY[i : i + 1] for i in range(len(BODY)))))),
    "chunks byte by byte": served(
        (post(CHUNKED), *(chunks(BODY[:9], BODY[9:])[i : i + 1] for i in range(len(chunks(BODY[:9], BODY[9:])))))
    ),
    "Chunked in capitals": served(post(b"Transfer-Encoding: Chunked", body=chunks(BODY))),
    "gzip, chunked": refused(post(b"Transfer-Encoding: gzip, chunked", body=chunks(BODY)), 501),
    "gzip and chunked in two headers": refused(post(b"Transfer-Encoding: gzip", CHUNKED, body=chunks(BODY)), 501),
    "chunked, gzip": refused(post(b"Transfer-Encoding: chunked, gzip", body=chunks(BODY))),
    "chunked twice": refused(post(CHUNKED, CHUNKED, body=chunks(BODY))),
    "identity": refused(post(b"Transfer-Encoding: identity", body=BODY)),
    "an empty coding": refused(post(b"Transfer-Encoding:", body=BODY)),
    "chunked with a vertical tab": refused(post(b"Transfer-Encoding: \x0bchunked", body=chunks(BODY))),
    "chunked with a parameter": refused(post(b"Transfer-Encoding: chunked;a=b", body=chunks(BODY))),
    "chunks in HTTP/1.0": refused(post(CHUNKED, body=chunks(BODY)).replace(b"HTTP/1.1", b"HTTP/1.0")),
    "chunk extensions": served(post(CHUNKED, body=b'24;a="b c";d\r\n' + BODY + b"\r\n0;x\r\n\r\n")),
    "a chunk size with zeros before it": served(post(CHUNKED, body=b"0000024\r\n" + BODY + b"\r\n00\r\n\r\n")),
    "a chunk size beyond 64 bits": refused(post(CHUNKED, body=b"1" * 17 + b"\r\n")),
    "a chunk size that is none": refused(post(CHUNKED, body=b"xyz\r\n")),
    "an empty chunk size": refused(post(CHUNKED, body=b"\r\n")),
    "a chunk size with a sign": refused(post(CHUNKED, body=b"+24\r\n" + BODY + b"\r\n0\r\n\r\n")),
    "a chunk size with 0x": refused(post(CHUNKED, body=b"0x24\r\n" + BODY + b"\r\n0\r\n\r\n")),
    "a chunk size with an underscore": refused(post(CHUNKED, body=b"2_4\r\n" + BODY + b"\r\n0\r\n\r\n")),
    "a chunk size with a space before it": refused(post(CHUNKED, body=b" 24\r\n" + BODY + b"\r\n0\r\n\r\n")),
    "a chunk longer than its size": refused(post(CHUNKED, body=b"3\r\n" + BODY + b"\r\n0\r\n\r\n")),
    "a chunk without an end": refused(post(CHUNKED, body=b"24\r\n" + BODY + b"0\r\n\r\n")),
    "a chunk size that ends without CR": refused(post(CHUNKED, body=b"24\n" + BODY + b"\r\n0\r\n\r\n")),
    "an extension with LF in it": refused(post(CHUNKED, body=b"24;a\nb\r\n" + BODY + b"\r\n0\r\n\r\n")),
    "an extension with CR in it": refused(post(CHUNKED, body=b"24;a\rb\r\n" + BODY + b"\r\n0\r\n\r\n")),
    "a chunk that ends without CR": refused(post(CHUNKED, body=b"24\r\n" + BODY + b"\n0\r\n\r\n")),
    "an extension without an end": refused(post(CHUNKED, body=b"24;" + b"a" * 20_000)),
    "an extension to every byte": refused(
        post(CHUNKED, body=b"".join(b"1;%b\r\n \r\n" % (b"x" * 200) for _ in range(200)))
    ),
    "a huge chunk that does not come": Case(post(CHUNKED, body=b"ffffffffffffffff\r\nabc"), (408,)),
    "trailers": served(post(CHUNKED, body=chunks(BODY, trailers=b"Digest: x\r\nA:\r\n"))),
    "a key in a trailer": served(post(CHUNKED, key=b"", body=chunks(BODY, trailers=AUTHORIZED)), 401),
    "a length in a trailer": served(post(CHUNKED, body=chunks(BODY, trailers=b"Content-Length: 99\r\n"))),
    "a trailer that is none": refused(post(CHUNKED, body=chunks(BODY, trailers=b"GET / HTTP/1.1\r\n"))),
    "a folded trailer": refused(post(CHUNKED, body=chunks(BODY, trailers=b"A: b\r\n c\r\n"))),
    "trailers without an end": refused(post(CHUNKED, body=b"0\r\n" + b"A: b\r\n" * 4000), 431),
    "a trailer without an end": refused(post(CHUNKED, body=b"0\r\nA: " + b"b" * 40_000), 431),
    # Upgrades, expectations
    "h2c from a GET": served(get(b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABk")),
    "h2c from a POST": served(post(b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", LENGTH, body=BODY)),
    "h2c, and the body later": served((post(b"Connection: Upgrade", b"Upgrade: h2c", LENGTH), SHORT, BODY)),
    "h2c in chunks": served(post(b"Connection: Upgrade", b"Upgrade: h2c", CHUNKED, body=chunks(BODY))),
    "a WebSocket": served(get(b"Connection: Upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Version: 13")),
    "an upgrade and the next request": served(get(b"Connection: Upgrade", b"Upgrade: h2c") + LIVE, 200, 200),
    "100-continue": served((post(b"Expect: 100-continue", LENGTH), SHORT, BODY), 100, 200),
    "100-continue and the body at once": served(post(b"Expect: 100-continue", LENGTH, body=BODY), 100, 200),
    "100-continue without a key": Case(post(b"Expect: 100-continue", LENGTH, key=b""), (401,)),
    "another expectation": refused(post(b"Expect: 200-ok", LENGTH, body=BODY), 417),
    # Several requests
    "pipelined requests": served(LIVE * 20, *[200] * 20),
    "pipelined bodies": served(post(LENGTH, body=BODY) * 3 + post(CHUNKED, body=chunks(BODY)) * 3, *[200] * 6),
    "a request behind one that closes": Case(get(b"Connection: close") + SECRET, (200,)),
    "a request behind a bad one": refused(get(b"A : b") + SECRET),
    "a request in a body": served(post(b"Content-Length: %d" % len(SECRET), body=SECRET), 400),
    "a request in a refused body": Case(post(LENGTH, LENGTH, body=SECRET), (400,)),
    "a body beyond its length": served(post(LENGTH, body=BODY + LIVE), 200, 200),
    "a body shorter than its length": Case(post(LENGTH, body=BODY[:-1]), (408,)),
    "no key and no body": Case(post(LENGTH, key=b""), (401,)),
    "no key and a request for a body": Case((post(LENGTH, key=b""), SHORT, SECRET), (401,)),
    "no key and a large body": Case((post(b"Content-Length: 10000000", key=b""), SHORT, b"x" * 1_000_000), (401,)),
    # HEAD
    **{
        f"HEAD {path.decode()}": served(b"HEAD %b HTTP/1.1\r\nHost: x\r\n%b\r\n" % (path, AUTHORIZED))
        for path in (b"/", b"/health", b"/v2/health/live", b"/v2/health/ready", b"/v2/models/demo/ready")
    },
    "HEAD of what takes POST": served(b"HEAD /v1/completions HTTP/1.1\r\nHost: x\r\n" + AUTHORIZED + b"\r\n", 405),
    "HEAD of nothing": served(b"HEAD /none HTTP/1.1\r\nHost: x\r\n" + AUTHORIZED + b"\r\n", 404),
    # Time
    "nothing at all": Case((), ()),
    "a head that stops": Case((get()[:-2],), (408,)),
    "a head that drips": Case(tuple(part for byte in get()[:20] for part in (bytes([byte]), SHORT)), (408,)),
    "empty lines that drip": Case(tuple(part for _ in range(12) for part in (b"\r\n", SHORT)), ()),
    "a body that drips": Case((post(LENGTH), *(part for byte in BODY[:20] for part in (bytes([byte]), SHORT))), (408,)),
    "chunks that drip": Case((post(CHUNKED), *(part for _ in range(20) for part in (b"1\r\n \r\n", SHORT))), (408,)),
    "trailers that drip": Case(
        (post(CHUNKED, body=b"1\r\n \r\n0\r\n"), *(part for _ in range(20) for part in (b"A: b\r\n", SHORT))), (408,)
    ),
}


@pytest.fixture(scope="module")
def harness() -> Iterator[RestHarness]:
    with RestHarness(
        api_keys=(KEY,),
        max_header_bytes=MAX_HEADER_BYTES,
        keep_alive_timeout_seconds=2 * TIMEOUT,
        header_timeout_seconds=TIMEOUT,
        body_timeout_seconds=TIMEOUT,
        send_timeout_seconds=2 * TIMEOUT,
    ) as running:
        yield running


@pytest.mark.parametrize("name", CASES)
def test_what_is_sent_is_answered_as_the_corpus_says(harness: RestHarness, name: str) -> None:
    case = CASES[name]
    parts = case.sent if isinstance(case.sent, tuple) else (case.sent,)
    is_head = name.startswith("HEAD ")
    with RawClient(harness.port) as client:
        client.send(*parts)
        if case.is_open:
            statuses = [response.status for _ in case.statuses if (response := client.read(is_head=is_head))]
            assert statuses == list(case.statuses)
            client.send(LIVE)
            following = client.read()
            assert following is not None
            assert (following.status, following.json()) == (200, {"live": True})
        else:
            responses = client.read_all(is_head=is_head)
            assert [response.status for response in responses] == list(case.statuses)
            for response in responses:
                assert response.headers["connection"] == "close"
                if response.status >= 400:
                    assert response.json()["error"]
    wait_until(lambda: harness.engine.num_running == 0)
