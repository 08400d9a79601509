"""A way from a stream of events to its connection that is as short as it can be.

Every layer of an ASGI application wraps `send` to see how an answer starts. The thousands of pieces that follow need none of
them, and most need not wait for anything: they cost less than the way there.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.flow_control import FlowControl

CHUNK_WRITER = "pagoda.chunk_writer"
"""The entry of a request's scope that holds the connection's `ChunkWriter`, where the server has one."""


class ChunkWriter:
    """Writes pieces of an answer of unknown length (`transfer-encoding: chunked`) whose start was sent already."""

    def __init__(self, transport: asyncio.Transport, flow: FlowControl) -> None:
        self._transport = transport
        self._flow = flow

    def write(self, piece: bytes) -> bool:
        """Write `piece`, not empty, if that takes no wait; False where it was not written and must be sent."""
        if self._flow.write_paused or self._transport.is_closing():
            return False
        self._transport.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        return True
