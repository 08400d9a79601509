"""One connection of the gRPC port: HTTP/2 (RFC 9113) by `h2`, and on it calls.

What arrives is cut into frames and counted before `h2` sees it, for a frame costs more than its bytes: a connection has a
budget of frames that bring nothing, and takes turns with others after a few milliseconds. All deadlines are looked at by
`Connections.watch`, but those of calls, which clients set.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from urllib.parse import quote

import grpc
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    DataReceived,
    Event,
    RemoteSettingsChanged,
    RequestReceived,
    StreamEnded,
    StreamReset,
    WindowUpdated,
)
from h2.exceptions import H2Error
from h2.settings import SettingCodes, Settings
from hyperframe.frame import GoAwayFrame

from pagoda.serving.grpc.call import WINDOW_BYTES, Call, CallError
from pagoda.serving.http.connections import Connections, PortConnection

logger = logging.getLogger("pagoda.serving.grpc")
logging.getLogger("hpack").setLevel(logging.INFO)  # below, its lines have the API keys

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
MAX_FRAME_BYTES = 2**14
MAX_CONCURRENT_STREAMS = 1024
"""Calls at once on one connection; more wait in the client. The engine's bounded queue is the limit over all."""
CONNECTION_WINDOW_BYTES = 2**24
"""Each stream has a window of its own that bounds what is held; this one only must not be in the way."""
MAX_IDLE_FRAMES = 2 * MAX_CONCURRENT_STREAMS
IDLE_FRAMES_PER_SECOND = 256
"""Frames that bring nothing (resets, pings, settings, empty data, calls that are reset): what a connection may have at once,
and what it gets back. Those that a response of ours brings about are given back with it.
"""
TURN_SECONDS = 0.002
KEEPALIVE_SECONDS = 60.0
KEEPALIVE_TIMEOUT_SECONDS = 20.0
IDLE_SECONDS = 300.0
"""Time without a call after which a connection is closed; a client of gRPC opens another when it needs one."""
CONTENT_TYPE = "application/grpc"
INTERNAL_ERROR = "an internal error ended this call; see the server log"

Handler = Callable[[Call], Awaitable[bytes | None]]
"""Responds to a call: with messages that it writes, and one that it returns. Raises `CallError` for another status than OK."""

_HEADER_BYTES = 9
_DATA, _HEADERS, _GOAWAY, _CONTINUATION = 0, 1, 7, 9
_END_HEADERS = 4
_PING_DATA = b"pagoda\0\0"
_TIMEOUT = re.compile(r"(\d{1,8})([HMSmun])")
_UNITS = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_UNESCAPED = "".join(character for character in map(chr, range(0x20, 0x7F)) if character != "%")
_HEAD = (
    (":status", "200"),
    ("content-type", CONTENT_TYPE),
    ("grpc-accept-encoding", "identity,deflate,gzip"),
)
_LEFT = CallError(grpc.StatusCode.CANCELLED, "the client has left")


class GrpcConnection(PortConnection):
    """A connection that `connections` has admitted. `handlers`: by the path of a method."""

    def __init__(
        self,
        handlers: Mapping[str, Handler],
        connections: Connections,
        address: tuple[str, int],
        max_calls: int,
    ) -> None:
        """`max_calls`: of all connections together."""
        super().__init__(address)
        self._handlers = handlers
        self._connections = connections
        self._limits = connections.limits
        self._max_calls = max_calls
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._http: H2Connection | None = None  # once the client has shown that it speaks HTTP/2
        self._incoming = bytearray()
        self._is_taking_turns = False  # what has arrived is gone on with in the loop's next iteration
        self._is_ending = False
        self._calls: dict[int, Call] = {}
        self._num_working = 0
        self._last_worked = 0  # the last stream of a call that was admitted
        self._num_head_bytes = 0  # of a call whose head has more frames
        self._num_unacknowledged = 0  # bytes of the connection's window
        self._num_idle_frames = MAX_IDLE_FRAMES
        self._is_reading = True
        self._drained: asyncio.Event | None = None  # while the client reads too slowly
        self._num_unsent = 0
        now = self._loop.time()
        self._opened = self._unsent_since = self._received = self._last_call = now
        self._pinged: float | None = None
        self._checked = now

    # ---- the event loop's calls

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The connection is open; its TLS handshake, if any, is done."""
        self._transport = transport
        self._opened = self._received = self._last_call = self._loop.time()

    def data_received(self, data: bytes) -> None:
        """Bytes of frames."""
        self._received, self._pinged = self._loop.time(), None
        self._incoming += data
        if not self._is_taking_turns:
            self._take_frames()

    def eof_received(self) -> bool:
        """The client has closed; no half of a connection is kept."""
        return False

    def connection_lost(self, error: Exception | None) -> None:
        """Calls end with their connection."""
        self._connections.remove(self)
        self._transport = None
        if self._drained is not None:
            self._drained.set()
        for call in list(self._calls.values()):
            self._cancel(call)

    def pause_writing(self) -> None:
        """The client reads more slowly than calls respond: nothing more is taken from it meanwhile."""
        self._drained = asyncio.Event()
        self._read_if_free()

    def resume_writing(self) -> None:
        """What was written has gone out."""
        if self._drained is not None:
            self._drained.set()
            self._drained = None
        self._read_if_free()

    # ---- the registry's calls

    def check(self, now: float) -> None:
        """Abort where the client reads nothing or is gone; close where it sends no preface, or has no call for long."""
        transport = self._transport
        if transport is None:
            return  # the handshake has a timeout of its own
        earned = int((now - self._checked) * IDLE_FRAMES_PER_SECOND)
        if earned:
            self._num_idle_frames = min(MAX_IDLE_FRAMES, self._num_idle_frames + earned)
            self._checked = now
        num_unsent = transport.get_write_buffer_size()
        if num_unsent != self._num_unsent:
            self._num_unsent, self._unsent_since = num_unsent, now
        elif num_unsent and now - self._unsent_since >= self._limits.send_timeout:
            logger.debug("%s has read nothing for %g s (send_timeout_seconds)", self.peer, self._limits.send_timeout)
            transport.abort()
            return
        if self._http is None:
            if now - self._opened >= self._limits.header_timeout:
                transport.abort()
        elif self._pinged is not None and now - self._pinged >= KEEPALIVE_TIMEOUT_SECONDS:
            logger.debug("%s does not answer pings", self.peer)
            transport.abort()
        elif not self._calls and now - self._last_call >= IDLE_SECONDS:
            self.end()
        elif self._pinged is None and now - self._received >= KEEPALIVE_SECONDS:
            self._pinged = now
            self._http.ping(_PING_DATA)
            self._flush()

    def end(self) -> None:
        """Take no more calls, and close when those there are have ended."""
        if self._transport is None:
            self.evict()
            return
        self._last_worked = max(self._calls, default=self._last_worked)  # they are all served
        self._go_away(ErrorCodes.NO_ERROR)
        self._is_ending = True
        self._close_if_done()

    def evict(self) -> None:
        """Close at once; a client whose calls have not begun may send them again."""
        if self._transport is None or self._transport.get_write_buffer_size():
            super().evict()
            return
        self._go_away(ErrorCodes.NO_ERROR)
        self._transport.close()

    def abort(self) -> None:
        """Cut the connection."""
        if self._transport is not None:
            self._transport.abort()

    # ---- frames

    def _take_frames(self) -> None:
        """Take what has arrived, frame by frame, for a few milliseconds; then others have their turn."""
        self._is_taking_turns = False
        if self._http is None and not self._begin():
            return
        incoming, position = self._incoming, 0
        started = time.perf_counter()
        while len(incoming) - position >= _HEADER_BYTES:
            size = int.from_bytes(incoming[position : position + 3], "big")
            if size > MAX_FRAME_BYTES:
                self._fail(ErrorCodes.FRAME_SIZE_ERROR)
                return
            end = position + _HEADER_BYTES + size
            if end > len(incoming):
                break
            frame = bytes(memoryview(incoming)[position:end])
            position = end
            if not self._take_frame(frame[3], frame):
                return
            if position < len(incoming) and time.perf_counter() - started > TURN_SECONDS:
                self._is_taking_turns = True
                break
        del incoming[:position]
        self._flush()
        if not self._num_working:
            self._hold_head()
        if self._is_taking_turns:
            self._loop.call_soon(self._take_frames)
        self._read_if_free()

    def _read_if_free(self) -> None:
        """Read from the client, or let it wait: for its turn, or until it has read."""
        is_free = self._drained is None and not self._is_taking_turns
        if is_free != self._is_reading and self._transport is not None and not self._transport.is_closing():
            self._is_reading = is_free
            (self._transport.resume_reading if is_free else self._transport.pause_reading)()

    def _begin(self) -> bool:
        """Whether the client has sent HTTP/2's preface."""
        sent = bytes(self._incoming[: len(PREFACE)])
        if not PREFACE.startswith(sent):
            logger.debug("%s does not speak HTTP/2", self.peer)
            self.abort()
            return False
        if len(sent) < len(PREFACE):
            return False
        http = self._http = H2Connection(
            # A header that is not right is one call's affair, and would end them all.
            H2Configuration(
                client_side=False,
                header_encoding=None,
                validate_inbound_headers=False,
                validate_outbound_headers=False,
                normalize_outbound_headers=False,
            )
        )
        http.local_settings = Settings(
            client=False,
            initial_values={
                SettingCodes.MAX_CONCURRENT_STREAMS: MAX_CONCURRENT_STREAMS,
                SettingCodes.MAX_HEADER_LIST_SIZE: self._limits.max_header_bytes,
                SettingCodes.INITIAL_WINDOW_SIZE: WINDOW_BYTES,
                SettingCodes.MAX_FRAME_SIZE: MAX_FRAME_BYTES,
                SettingCodes.ENABLE_PUSH: 0,
            },
        )
        http.decoder.max_header_list_size = self._limits.max_header_bytes
        http.initiate_connection()
        http.increment_flow_control_window(CONNECTION_WINDOW_BYTES - WINDOW_BYTES)
        http.receive_data(PREFACE)
        del self._incoming[: len(PREFACE)]
        return True

    def _hold_head(self) -> None:
        """Tell how much this connection holds of what is no call yet."""
        num_bytes = self._num_head_bytes + len(self._incoming)
        if num_bytes:
            self._connections.holds_head(self, num_bytes)
        else:
            self._connections.drop_head(self)

    def _take_frame(self, kind: int, frame: bytes) -> bool:
        """Whether the connection goes on."""
        if kind in (_HEADERS, _CONTINUATION):
            self._num_head_bytes = 0 if frame[4] & _END_HEADERS else self._num_head_bytes + len(frame)
            if self._num_head_bytes > self._limits.max_header_bytes:
                self._fail(ErrorCodes.ENHANCE_YOUR_CALM)
                return False
        if kind == _GOAWAY:
            return True  # the client will close; `h2` would let the responses under way go no further
        if kind != _DATA or len(frame) == _HEADER_BYTES:
            self._num_idle_frames -= 1
            if self._num_idle_frames < 0:
                logger.info("%s sends too many frames that bring nothing; its connection is closed", self.peer)
                self._fail(ErrorCodes.ENHANCE_YOUR_CALM)
                return False
        assert self._http is not None
        try:
            for event in self._http.receive_data(frame):
                self._take_event(event)
        except H2Error as error:
            logger.debug("%s: %s", self.peer, error)
            self._fail(ErrorCodes.PROTOCOL_ERROR)
            return False
        return True

    def _take_event(self, event: Event) -> None:
        if isinstance(event, DataReceived):
            num_bytes = event.flow_controlled_length or 0
            self._num_unacknowledged += num_bytes
            if self._num_unacknowledged >= CONNECTION_WINDOW_BYTES // 4:
                assert self._http is not None
                self._http.increment_flow_control_window(self._num_unacknowledged)
                self._num_unacknowledged = 0
            call = self._calls.get(event.stream_id or 0)
            if call is not None:
                call.feed(event.data or b"", num_bytes)
        elif isinstance(event, RequestReceived):
            self._open(event.stream_id or 0, event.headers or ())
        elif isinstance(event, StreamEnded):
            call = self._calls.get(event.stream_id or 0)
            if call is not None:
                call.end_input()
        elif isinstance(event, StreamReset):
            call = self._calls.get(event.stream_id or 0)
            if call is not None:
                call.has_status = True  # the client has its own
                self._cancel(call)
        elif isinstance(event, WindowUpdated) and event.stream_id:
            call = self._calls.get(event.stream_id)
            if call is not None:
                _wake(call)
        elif isinstance(event, WindowUpdated | RemoteSettingsChanged):
            for call in self._calls.values():
                _wake(call)

    def _fail(self, code: ErrorCodes) -> None:
        """End the connection for what the client does."""
        self._incoming.clear()
        self._go_away(code)
        if self._transport is not None:
            self._transport.close()

    def _go_away(self, code: ErrorCodes) -> None:
        if self._http is None or self._transport is None or self._is_ending:
            return
        # Not by `h2`, which would send nothing more of the calls under way.
        self._flush()
        self._transport.write(GoAwayFrame(last_stream_id=self._last_worked, error_code=code).serialize())

    def _flush(self) -> None:
        if self._http is not None:
            data = self._http.data_to_send()
            if data and self._transport is not None:
                self._transport.write(data)

    # ---- calls

    def _open(self, stream_id: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
        assert self._http is not None
        if self._is_ending:
            self._http.reset_stream(stream_id, ErrorCodes.REFUSED_STREAM)
            return
        metadata = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}
        if ":path" not in metadata:
            self._http.reset_stream(stream_id, ErrorCodes.PROTOCOL_ERROR)
            return
        if metadata.get(":method") != "POST":
            self._http.send_headers(stream_id, [(":status", "405"), ("allow", "POST")], end_stream=True)
            return
        if not metadata.get("content-type", "").startswith(CONTENT_TYPE):
            self._http.send_headers(stream_id, [(":status", "415")], end_stream=True)
            return
        now = self._loop.time()
        timeout = metadata.get("grpc-timeout")
        match = None if timeout is None else _TIMEOUT.fullmatch(timeout)
        deadline = None if match is None else now + int(match[1]) * _UNITS[match[2]]
        call = Call(self, stream_id, metadata[":path"], metadata, self.client[0], deadline)
        self._calls[stream_id] = call
        if timeout is not None and match is None:
            error = CallError(
                grpc.StatusCode.INTERNAL, "grpc-timeout is up to eight digits and one of H, M, S, m, u, n"
            )
            self._end_call(call, error)
            return
        handler = self._handlers.get(call.path)
        if handler is None:
            error = CallError(grpc.StatusCode.UNIMPLEMENTED, f"there is no method {call.path[:200]!r} here")
            self._end_call(call, error)
        elif len(self._connections.tasks) >= self._max_calls:
            message = f"{self._max_calls} calls are under way, as many as the server takes"
            self._end_call(call, CallError(grpc.StatusCode.RESOURCE_EXHAUSTED, message))
        else:
            task = call.task = self._loop.create_task(self._respond(call, handler))
            self._connections.tasks.add(task)
            task.add_done_callback(self._connections.tasks.discard)
            if deadline is not None:
                call.timer = self._loop.call_at(deadline, self._expire, call)

    async def _respond(self, call: Call, handler: Handler) -> None:
        error: CallError | None = None
        try:
            message = await handler(call)
            if message is not None:
                async with asyncio.timeout(None) as patience:
                    data = len(message).to_bytes(5, "big") + message
                    if not self._queue(call, data):
                        patience.reschedule(self._loop.time() + self._limits.send_timeout)
                        await self.send(call, data)
        except CallError as failure:
            error = failure
        except TimeoutError:
            error = CallError(
                grpc.StatusCode.DEADLINE_EXCEEDED, f"the response was not read within {self._limits.send_timeout:g} s"
            )
        except asyncio.CancelledError:
            error = CallError(grpc.StatusCode.UNAVAILABLE, "the server has ended the call")
            raise
        except Exception:  # any: it is logged, the call ends and the server goes on
            logger.exception("%s failed", call.path)
            error = CallError(grpc.StatusCode.INTERNAL, INTERNAL_ERROR)
        finally:
            self._end_call(call, error)

    def _expire(self, call: Call) -> None:
        self._cancel(call, CallError(grpc.StatusCode.DEADLINE_EXCEEDED, "the call's deadline is over"))

    def _cancel(self, call: Call, error: CallError = _LEFT) -> None:
        """End the call now, and its task, which may not have begun."""
        self._end_call(call, error)
        if call.task is not None:
            call.task.cancel()

    def _end_call(self, call: Call, error: CallError | None) -> None:
        """Send the status, if the client has none yet; may be called twice."""
        if self._calls.pop(call.stream_id, None) is None:
            return
        if call.timer is not None:
            call.timer.cancel()
        if error is not None:
            call.code = error.code
        if not call.has_status and self._transport is not None:
            self._send_status(call, error)
        call.has_status = True
        self._last_call = self._loop.time()
        if call.is_working:
            self._num_working -= 1
            if not self._num_working:
                self._connections.is_waiting(self)
        self._close_if_done()

    def _send_status(self, call: Call, error: CallError | None) -> None:
        assert self._http is not None
        headers = [] if call.has_head else [*_HEAD]
        headers.append(("grpc-status", str((error.code if error else grpc.StatusCode.OK).value[0])))
        if error is not None:
            headers.append(("grpc-message", quote(str(error), safe=_UNESCAPED)))
            headers += error.trailers
        try:
            self._http.send_headers(call.stream_id, headers, end_stream=True)
            if not call.is_received:
                self._http.reset_stream(call.stream_id)  # what it still sends is dropped
        except H2Error as problem:
            logger.debug("%s: the status of a call was not sent: %s", self.peer, problem)
        self._num_idle_frames += 1
        self._flush()

    def _close_if_done(self) -> None:
        if self._is_ending and not self._calls and self._transport is not None:
            self._transport.close()

    # ---- the calls' calls

    def works(self, call: Call) -> None:
        """It was admitted."""
        if call.stream_id not in self._calls:
            return
        call.is_working = True
        self._last_worked = max(self._last_worked, call.stream_id)
        self._num_working += 1
        if self._num_working == 1:
            self._connections.is_busy(self)

    def grant(self, stream_id: int, num_bytes: int) -> None:
        """Let the client send more of a stream."""
        if self._http is not None and self._transport is not None and stream_id in self._calls:
            self._http.increment_flow_control_window(num_bytes, stream_id)
            self._flush()

    def try_send(self, call: Call, data: bytes) -> bool:
        """Send `data` if that takes no wait."""
        if not self._queue(call, data):
            return False
        self._flush()
        return True

    def _queue(self, call: Call, data: bytes) -> bool:
        """Let `data` go with the next that is sent, if that takes no wait."""
        http = self._http
        if http is None or self._drained is not None or self._transport is None or call.has_status:
            return False
        if call.may_send is not None or len(data) > http.max_outbound_frame_size:
            return False
        if len(data) > http.local_flow_control_window(call.stream_id):
            return False
        if not call.has_head:
            call.has_head = True
            http.send_headers(call.stream_id, _HEAD)
        http.send_data(call.stream_id, data)
        self._num_idle_frames = min(MAX_IDLE_FRAMES, self._num_idle_frames + 1)
        return True

    async def send(self, call: Call, data: bytes) -> None:
        """Send `data` as fast as the client takes it; waits forever for one that has left, whose call is cancelled."""
        http = self._http
        assert http is not None
        rest = memoryview(data)
        while rest:
            while self._drained is not None:
                await self._drained.wait()
            room = 0
            if self._transport is not None and not call.has_status:
                room = min(http.local_flow_control_window(call.stream_id), http.max_outbound_frame_size)
            if room <= 0:
                await _until_window(call, self._loop)
            elif self._queue(call, bytes(rest[:room])):
                self._flush()
                rest = rest[room:]


async def _until_window(call: Call, loop: asyncio.AbstractEventLoop) -> None:
    call.may_send = loop.create_future()
    try:
        await call.may_send
    finally:
        call.may_send = None


def _wake(call: Call) -> None:
    if call.may_send is not None and not call.may_send.done():
        call.may_send.set_result(None)
