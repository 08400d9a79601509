"""gRPC as frames on a socket, by `h2`: calls without a key, messages that come slowly or not at all."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Callable, Sequence

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings

LIMIT_SECONDS = 20.0
Header = tuple[str, str]


class RawGrpc:
    """One HTTP/2 connection; use as a context. What the server did with each stream stands in `ended`."""

    def __init__(self, port: int, *, source: str = "127.0.0.1", window: int | None = None) -> None:
        """`source`: the address to come from; `window`: bytes of a response that are taken before `widen` is called."""
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=LIMIT_SECONDS, source_address=(source, 0))
        self._http = h2.connection.H2Connection(
            h2.config.H2Configuration(
                client_side=True,
                header_encoding="utf-8",
                validate_outbound_headers=False,
                normalize_outbound_headers=False,
            )
        )
        self._has_window = window is not None
        if window is not None:
            self._http.local_settings = h2.settings.Settings(
                client=True, initial_values={h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window}
            )
        self._http.initiate_connection()
        self.received: dict[int, bytes] = {}
        self.goaway: int | None = None
        self.flush()
        self.ended: dict[int, str] = {}
        """`grpc-status` of each stream that the server has ended, or the error code with which it was reset."""
        self.is_closed = False

    def __enter__(self) -> RawGrpc:
        return self

    def __exit__(self, *exception: object) -> None:
        self._socket.close()

    def open(self, path: str, *headers: Header, flush: bool = True) -> int:
        """Begin a call; returns its stream."""
        stream = self._http.get_next_available_stream_id()
        head = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", path),
            (":authority", "localhost"),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
        ]
        self._http.send_headers(stream, [*head, *headers])
        if flush:
            self.flush()
        return stream

    def reset(self, stream: int) -> None:
        """Give a call up."""
        with contextlib.suppress(h2.exceptions.ProtocolError):
            self._http.reset_stream(stream, h2.errors.ErrorCodes.CANCEL)
        self.flush()

    def widen(self, stream: int, size: int) -> None:
        """Take so many bytes more of a response."""
        with contextlib.suppress(h2.exceptions.ProtocolError):
            self._http.increment_flow_control_window(size, stream)
        self.flush()

    def write(self, data: bytes) -> None:
        """Send these bytes as they are."""
        self.flush()
        self._socket.sendall(data)

    def send(self, stream: int, data: bytes, *, is_last: bool = False) -> bool:
        """Send as much of `data` as the server has room for within a moment; whether that was all of it."""
        view = memoryview(data)
        if not view and is_last:
            self._http.end_stream(stream)
            self.flush()
        while view:
            try:
                window = self._http.local_flow_control_window(stream)
                size = min(window, self._http.max_outbound_frame_size, len(view))
                if size:
                    self._http.send_data(stream, bytes(view[:size]), end_stream=is_last and size == len(view))
                    self.flush()
            except (h2.exceptions.ProtocolError, ConnectionError):
                return False
            view = view[size:]
            if not size and not self.receive(0.05):
                return False
        return True

    def message(self, content: bytes) -> bytes:
        """`content` behind gRPC's five bytes."""
        return struct.pack(">BI", 0, len(content)) + content

    def receive(self, seconds: float) -> bool:
        """Take what the server sends within `seconds`; whether it sent anything."""
        self._socket.settimeout(seconds)
        try:
            data = self._socket.recv(65536)
        except TimeoutError:
            return False
        except ConnectionError:
            data = b""
        if not data:
            self.is_closed = True
            return False
        for event in self._http.receive_data(data):
            if isinstance(event, h2.events.DataReceived):
                self.received[event.stream_id] = self.received.get(event.stream_id, b"") + event.data
                if not self._has_window:
                    self._http.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            elif isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
                headers = dict(event.headers)
                if "grpc-status" in headers:
                    self.ended[event.stream_id] = headers["grpc-status"]  # type: ignore[index]
            elif isinstance(event, h2.events.StreamReset):
                self.ended.setdefault(event.stream_id, f"reset {event.error_code}")
            elif isinstance(event, h2.events.ConnectionTerminated):
                self.is_closed = True
                self.goaway = event.error_code
        self.flush()
        return True

    def wait(self, condition: Callable[[], bool], seconds: float = LIMIT_SECONDS) -> None:
        """Receive until `condition` is true."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"it did not come true within {seconds:g} s; ended: {self.ended}"
            self.receive(0.05)
            if self.is_closed and not condition():
                raise AssertionError(f"the connection was closed; ended: {self.ended}")

    def statuses(self, streams: Sequence[int]) -> list[str]:
        """How each of `streams` has ended, which is waited for."""
        self.wait(lambda: all(stream in self.ended for stream in streams))
        return [self.ended[stream] for stream in streams]

    def flush(self) -> None:
        """Send what was not sent yet."""
        self._send()

    def _send(self) -> None:
        self._socket.settimeout(LIMIT_SECONDS)
        with contextlib.suppress(ConnectionError):
            self._socket.sendall(self._http.data_to_send())
