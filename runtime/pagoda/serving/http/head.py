"""The head of an HTTP/1.1 request: parsed by llhttp (`httptools`), then held to what RFC 9110 and RFC 9112 ask of a server.

llhttp refuses what is ambiguous: line ends other than CRLF, folded lines, whitespace before a colon, control characters,
Content-Length twice or beside Transfer-Encoding. It is given whole heads and nothing else, each with a parser of its own: no
body and no trailer is ever read as a header, and an upgrade that is not made (RFC 9110, 7.8) does not take the body away.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from http import HTTPStatus
from urllib.parse import unquote

import httptools

CRLF = b"\r\n"
HEAD_END = b"\r\n\r\n"
SPACES_OF_REQUEST_LINE = 2
_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_METHOD = re.compile(rb"(?:%b) " % _TOKEN)
_IMPOSSIBLE = re.compile(rb"\A[^!#$%&'*+\-.^_`|~0-9A-Za-z]|(?<!\r)\n")
"""What no complete head can begin with, or have: no method, or a line that does not end in CRLF."""
_HTTP_2 = re.compile(rb"PRI \* HTTP/2")
_HOST = re.compile(rb"[A-Za-z0-9\-._~!$&'()*+,;=%:\[\]]*")

Header = tuple[bytes, bytes]


class RequestError(Exception):
    """A request that is refused with `status` before the application sees it, and whose connection is closed."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(slots=True)
class RequestHead:
    """A request as its head tells it. Names in `headers` are in lower case.

    `content_length`: bytes of the body, None where it comes in chunks. `keeps_alive`: whether the client lets the connection
    go on. `expects_continue`: whether it waits for `100 Continue` before it sends the body.
    """

    method: str
    version: str
    path: str
    raw_path: bytes
    query: bytes
    headers: list[Header]
    content_length: int | None = 0
    keeps_alive: bool = True
    expects_continue: bool = False


def parse_head(head: bytes, max_headers: int) -> RequestHead:
    """The request whose head, up to and with the empty line, is `head`; raises `RequestError`."""
    collected = _Collected()
    parser = httptools.HttpRequestParser(collected)
    try:
        parser.feed_data(head)
    except httptools.HttpParserUpgrade:
        pass  # an upgrade is an offer that the server may ignore
    except httptools.HttpParserInvalidMethodError:
        if _METHOD.match(head):
            raise RequestError(HTTPStatus.NOT_IMPLEMENTED, "the method is not known here") from None
        raise RequestError(HTTPStatus.BAD_REQUEST, "the request is not HTTP/1.1: it begins with no method") from None
    except httptools.HttpParserError as error:
        if _HTTP_2.match(head):
            raise _unsupported_version("2.0") from None
        raise RequestError(HTTPStatus.BAD_REQUEST, f"the request is not valid HTTP/1.1: {error}") from None
    version = parser.get_http_version()
    if version not in ("1.1", "1.0"):
        raise _unsupported_version(version)
    if not collected.is_complete or head.count(b" ", 0, head.find(CRLF)) != SPACES_OF_REQUEST_LINE:
        raise RequestError(HTTPStatus.BAD_REQUEST, "the request is not valid HTTP/1.1: its first line is not one")
    if len(collected.headers) > max_headers:
        raise RequestError(
            HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
            f"the request has {len(collected.headers)} headers; {max_headers} are allowed (max_header_count)",
        )
    method = parser.get_method().decode("ascii")
    path, raw_path, query = _split_target(collected.target, method)
    request = RequestHead(method, version, path, raw_path, query, collected.headers, keeps_alive=version != "1.0")
    _read_headers(request)
    return request


def check_beginning(part: bytearray, start: int) -> None:
    """Raise `RequestError` where no head can begin with `part`, of which all before `start` was checked already."""
    if _IMPOSSIBLE.search(part, start):
        raise RequestError(HTTPStatus.BAD_REQUEST, "the request is not valid HTTP/1.1")


class _Collected:
    """What the parser reports."""

    def __init__(self) -> None:
        self.target = b""
        self.headers: list[Header] = []
        self.is_complete = False

    def on_url(self, target: bytes) -> None:
        self.target += target

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self.is_complete = True


def _split_target(target: bytes, method: str) -> tuple[str, bytes, bytes]:
    """Path (decoded, and as it came) and query of a target in origin-form, in absolute-form, or `*`."""
    if method == "CONNECT":
        raise RequestError(HTTPStatus.METHOD_NOT_ALLOWED, "CONNECT is not allowed: this server is no proxy")
    if target == b"*" and method == "OPTIONS":
        return "*", target, b""
    try:
        url = httptools.parse_url(target)
        raw_path = url.path or b"/"
        path = raw_path.decode("ascii")
    except (httptools.HttpParserInvalidURLError, UnicodeDecodeError):
        raise RequestError(HTTPStatus.BAD_REQUEST, "the request's target is not valid") from None
    if url.fragment is not None:
        raise RequestError(HTTPStatus.BAD_REQUEST, "the request's target must have no fragment (#)")
    return unquote(path) if "%" in path else path, raw_path, url.query or b""


def _read_headers(request: RequestHead) -> None:
    """Check the headers that concern the connection, and set what they say."""
    num_hosts = 0
    is_chunked = False
    for name, value in request.headers:
        if name == b"host":
            num_hosts += 1
            if not _HOST.fullmatch(value):
                raise RequestError(HTTPStatus.BAD_REQUEST, "the header Host is not valid")
        elif name == b"content-length":
            request.content_length = int(value)
        elif name == b"transfer-encoding":
            if request.version == "1.0":
                raise RequestError(HTTPStatus.BAD_REQUEST, "HTTP/1.0 has no Transfer-Encoding")
            if is_chunked or value.lower() != b"chunked":
                raise RequestError(HTTPStatus.NOT_IMPLEMENTED, "Transfer-Encoding must be chunked, and nothing else")
            is_chunked = True
            request.content_length = None
        elif name == b"connection":
            options = [option.strip() for option in value.lower().split(b",")]
            if b"close" in options:
                request.keeps_alive = False
            elif request.version == "1.0" and b"keep-alive" in options:
                request.keeps_alive = True
        elif name == b"expect":
            if value.lower() != b"100-continue":
                raise RequestError(HTTPStatus.EXPECTATION_FAILED, "Expect must be 100-continue")
            request.expects_continue = request.version != "1.0"
    if num_hosts > 1 or (num_hosts == 0 and request.version != "1.0"):
        raise RequestError(HTTPStatus.BAD_REQUEST, f"the request must have one header Host, got {num_hosts}")


def _unsupported_version(version: str) -> RequestError:
    return RequestError(
        HTTPStatus.HTTP_VERSION_NOT_SUPPORTED,
        f"HTTP/{version} is not spoken here: this port speaks HTTP/1.1, and the port of gRPC HTTP/2",
    )
