"""Writes the chunks of a streamed response straight to their connection, past the layers of the ASGI application.

Every layer wraps `send` to see how a response starts. The thousands of chunks that follow need none of them, and most need no
wait: writing one costs less than calling through the layers.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.flow_control import FlowControl

CHUNK_WRITER = "pagoda.chunk_writer"
"""The entry of a request's scope that holds the connection's `ChunkWriter`, where the server has one."""


class ChunkWriter:
    """Writes chunks of a response (`transfer-encoding: chunked`) whose headers were sent already."""

    def __init__(self, transport: asyncio.Transport, flow: FlowControl) -> None:
        self._transport = transport
        self._flow = flow

    def write(self, piece: bytes) -> bool:
        """Write `piece`, not empty, if that takes no wait; False where it was not written and must be sent."""
        if self._flow.write_paused or self._transport.is_closing():
            return False
        self._transport.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        return True
