"""One end of the connection between the driver and a rank: frames over a socket that only the two hold.

    send ──▶ straight into the socket while it takes them, else ──▶ writer thread
    reader thread ──▶ `deliver`, heartbeats excepted, which are only noted

Sending never waits: a rank that reads nothing, because it is stopped, must not stop the driver too. What a channel holds back
is bounded by the number of steps that may be under way.
"""

from __future__ import annotations

import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pagoda.distributed.rank_messages import KINDS, Heartbeat, Message, RankHeartbeat
from pagoda.framing import HEADER, FrameCodec, FrameError

_BEATS_PER_TIMEOUT = 5
_LONGEST_PAUSE_SECONDS = 1.0

CODEC = FrameCodec(KINDS)


@dataclass(frozen=True, slots=True)
class ChannelEnded:
    """The last thing that a channel delivers: the other side disconnected, or sent an invalid frame."""

    reason: str


class RankChannel:
    """A connected stream socket, which the channel owns from now on."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        if connected.family in (socket.AF_INET, socket.AF_INET6):
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._stream = connected.makefile("rb")
        self._unsent: deque[memoryview] = deque()
        self._changed = threading.Condition()
        self._is_closing = False
        self.last_received = time.monotonic()
        self.heartbeat = RankHeartbeat(0, 0)

    def start(self, deliver: Callable[[Message | ChannelEnded], None]) -> None:
        """Start both threads; `deliver` is called from the reader's, for every message and once for the end."""
        threading.Thread(target=self._read, args=(deliver,), name="rank-reader", daemon=True).start()
        threading.Thread(target=self._write, name="rank-writer", daemon=True).start()

    def send(self, message: Message) -> None:
        """Send a message; dropped after a disconnect, which is delivered anyway."""
        self.send_frame(CODEC.encode(message))

    def send_frame(self, frame: bytes) -> None:
        """Send a message that was encoded before, for several channels."""
        with self._changed:
            if self._is_closing:
                return
            num_sent = 0 if self._unsent else self._send_now(frame)
            if num_sent < len(frame):
                self._unsent.append(memoryview(frame)[num_sent:])
                self._changed.notify_all()

    def send_heartbeat(self, heartbeat: Heartbeat | RankHeartbeat) -> None:
        """Send a heartbeat, unless something is still unsent: that will serve as one."""
        if not self._unsent:
            self.send(heartbeat)

    def close(self, patience_seconds: float = 0.0) -> None:
        """Give what is unsent so much time, then close. May be called twice."""
        with self._changed:
            self._changed.wait_for(lambda: not self._unsent, timeout=patience_seconds)
            if not self._is_closing:
                self._end()
        self._socket.close()

    def _send_now(self, frame: bytes) -> int:
        """How many bytes the socket took without waiting."""
        try:
            return self._socket.send(frame, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        except OSError:
            self._end()
            return len(frame)

    def _end(self) -> None:
        """Stop both threads and let the other side read the end; the condition is held."""
        self._is_closing = True
        self._unsent.clear()
        self._changed.notify_all()
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # the other side has closed it already

    def _read(self, deliver: Callable[[Message | ChannelEnded], None]) -> None:
        with self._stream:
            try:
                while True:
                    message = self._receive()
                    self.last_received = time.monotonic()
                    if isinstance(message, RankHeartbeat):
                        self.heartbeat = message
                    elif not isinstance(message, Heartbeat):
                        deliver(message)
            except EOFError:
                deliver(ChannelEnded("the connection was closed"))
            except (OSError, FrameError) as error:
                deliver(ChannelEnded(f"the connection failed: {error}"))

    def _receive(self) -> Message:
        header = self._stream.read(HEADER.size)
        if len(header) < HEADER.size:
            raise EOFError
        size = CODEC.payload_size(header)
        payload = self._stream.read(size)
        if len(payload) < size:
            raise EOFError
        message: Message = CODEC.decode(header, payload)
        return message

    def _write(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._unsent or self._is_closing)
                if self._is_closing:
                    return
                piece = self._unsent[0]  # stays there while it is sent, so that nothing overtakes it
            try:
                self._socket.sendall(piece)
            except OSError:
                with self._changed:
                    self._end()
                return
            with self._changed:
                if self._unsent:
                    self._unsent.popleft()
                self._changed.notify_all()


class HeartbeatThread:
    """Sends heartbeats over all channels, five of them within the heartbeat timeout."""

    def __init__(
        self,
        channels: Sequence[RankChannel],
        make_heartbeat: Callable[[], Heartbeat | RankHeartbeat],
        timeout_seconds: float,
        on_beat: Callable[[], None] | None = None,
    ) -> None:
        """`on_beat` is called after each round, from the thread."""
        self._channels = channels
        self._make_heartbeat = make_heartbeat
        self._pause = min(_LONGEST_PAUSE_SECONDS, timeout_seconds / _BEATS_PER_TIMEOUT)
        self._on_beat = on_beat
        self._stopped = threading.Event()

    def start(self) -> None:
        """Start the thread."""
        threading.Thread(target=self._run, name="rank-heartbeats", daemon=True).start()

    def stop(self) -> None:
        """Send no more."""
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(self._pause):
            heartbeat = self._make_heartbeat()
            for channel in self._channels:
                channel.send_heartbeat(heartbeat)
            if self._on_beat is not None:
                self._on_beat()
