"""Bytes as they are on a socket: what a client sends, piece by piece, and the responses that it reads."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import time
from dataclasses import dataclass
from typing import Any

LIMIT_SECONDS = 20.0


@dataclass(frozen=True)
class Pause:
    """Time in which nothing is sent."""

    seconds: float


@dataclass
class RawResponse:
    """One response as it was read."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class RawClient:
    """A connection; use as a context. Names in the headers of responses are in lower case."""

    def __init__(self, port: int, tls: ssl.SSLContext | None = None, *, address: str = "127.0.0.1") -> None:
        """`address`: the client's own, for a server that tells peers apart."""
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=LIMIT_SECONDS, source_address=(address, 0))
        if tls is not None:
            self._socket = tls.wrap_socket(self._socket, server_hostname="localhost")
        self._received = b""

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def send(self, *parts: bytes | Pause) -> None:
        """Send `parts`; a server that has closed meanwhile is no error."""
        with contextlib.suppress(ConnectionError):
            for part in parts:
                if isinstance(part, Pause):
                    time.sleep(part.seconds)
                else:
                    self._socket.sendall(part)

    def read(self, *, is_head: bool = False) -> RawResponse | None:
        """The next response, `100 Continue` included; None where the server closes first."""
        while (end := self._received.find(b"\r\n\r\n")) < 0:
            if not self._receive():
                assert not self._received, f"the connection was closed within a response: {self._received!r}"
                return None
        lines = self._received[:end].decode("latin-1").split("\r\n")
        self._received = self._received[end + 4 :]
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        status = int(lines[0].split()[1])
        body = b"" if is_head or status < 200 or status in (204, 304) else self._read_body(headers)
        return RawResponse(status, headers, body)

    def read_all(self, *, is_head: bool = False) -> list[RawResponse]:
        """All responses until the server closes."""
        responses = []
        while (response := self.read(is_head=is_head)) is not None:
            responses.append(response)
        return responses

    def close(self) -> None:
        self._socket.close()

    @property
    def port(self) -> int:
        """The port on this side."""
        port: int = self._socket.getsockname()[1]
        return port

    def end(self) -> None:
        """Close while another thread sends, which ends that."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def _read_body(self, headers: dict[str, str]) -> bytes:
        if headers.get("transfer-encoding") == "chunked":
            body = b""
            while size := int(self._take_line(), 16):
                body += self._take(size)
                assert self._take(2) == b"\r\n"
            assert self._take_line() == b""
            return body
        if "content-length" in headers:
            return self._take(int(headers["content-length"]))
        while self._receive():
            pass
        body, self._received = self._received, b""
        return body

    def _take(self, size: int) -> bytes:
        while len(self._received) < size:
            assert self._receive(), "the connection was closed within a body"
        taken, self._received = self._received[:size], self._received[size:]
        return taken

    def _take_line(self) -> bytes:
        while (end := self._received.find(b"\r\n")) < 0:
            assert self._receive(), "the connection was closed within a body"
        line, self._received = self._received[:end], self._received[end + 2 :]
        return line

    def _receive(self) -> bool:
        try:
            received = self._socket.recv(65536)
        except ConnectionError:
            return False
        self._received += received
        return bool(received)
