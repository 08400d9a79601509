"""The framings of a body: whatever the pieces in which its bytes arrive, the same body and the same rest."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pagoda.serving.http.head import RequestError, parse_head
from pagoda.serving.http.request_body import ChunkedBody, RequestBody, SizedBody

MAX_TRAILER_BYTES = 200
REST = b"GET / HTTP/1.1\r\n"


def feed(body: RequestBody, sent: bytes, sizes: list[int]) -> bytes:
    """Feed `sent` in pieces, and what follows the body as a connection keeps it."""
    received = b""
    position = 0
    for size in [*sizes, len(sent)]:
        if position < len(sent) and not body.is_complete:
            received += body.feed(sent[position : position + size])
            position += size
    assert body.is_complete
    assert body.rest + sent[position:] == REST
    return received


sizes = st.lists(st.integers(1, 9), max_size=60)
pieces = st.lists(st.binary(min_size=1, max_size=20), max_size=6)
extensions = st.sampled_from([b"", b";a", b' ; a="b"', b";\xff"])
trailers = st.lists(st.sampled_from([b"A: b", b"Content-Length: 3", b"X:"]), max_size=3)


@given(pieces, extensions, trailers, sizes)
def test_chunks_are_their_pieces(
    pieces: list[bytes], extension: bytes, trailers: list[bytes], sizes: list[int]
) -> None:
    chunks = b"".join(b"%X%b\r\n%b\r\n" % (len(piece), extension, piece) for piece in pieces)
    sent = chunks + b"0\r\n" + b"".join(line + b"\r\n" for line in trailers) + b"\r\n" + REST
    assert feed(ChunkedBody(MAX_TRAILER_BYTES), sent, sizes) == b"".join(pieces)


@given(st.binary(min_size=1, max_size=60), sizes)
def test_a_sized_body_ends_at_its_length(content: bytes, sizes: list[int]) -> None:
    assert feed(SizedBody(len(content)), content + REST, sizes) == content


alphabet = st.sampled_from([b"0", b"1", b"a", b";", b"\r\n", b"\r", b"\n", b" ", b":", b"\0", b"f" * 16])


@given(st.lists(alphabet, max_size=30), sizes)
def test_any_bytes_are_a_body_or_an_error_however_they_arrive(tokens: list[bytes], sizes: list[int]) -> None:
    sent = b"".join(tokens)
    assert outcome(sent, sizes) == outcome(sent, [])


def outcome(sent: bytes, sizes: list[int]) -> object:
    """The body, whether it is complete; or that it is wrong."""
    body = ChunkedBody(MAX_TRAILER_BYTES)
    received = b""
    position = 0
    for size in [*sizes, len(sent)]:
        if position < len(sent) and not body.is_complete:
            try:
                received += body.feed(sent[position : position + size])
            except RequestError:
                return "wrong"
            position += size
    return received, body.is_complete


@given(
    st.lists(
        st.sampled_from([b"GET ", b"/", b" HTTP/1.1", b"\r\n", b"Host: x", b" ", b":", b"\xff", b"\0", b"a", b"%"])
    )
)
def test_any_bytes_are_a_head_or_an_error(tokens: list[bytes]) -> None:
    head = b"".join(tokens) + b"\r\n\r\n"
    try:
        request = parse_head(head[: head.find(b"\r\n\r\n") + 4], max_headers=9)
    except RequestError:
        return
    assert head.startswith(b"GET /")
    assert [name for name, _ in request.headers].count(b"host") == 1
