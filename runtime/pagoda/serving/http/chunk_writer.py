"""Writes the chunks of a streamed response straight to their connection, past the layers of the ASGI application.

Every layer wraps `send` to see how a response starts. The thousands of chunks that follow need none of them, and most need no
wait: writing one costs less than calling through the layers.
"""

from __future__ import annotations

from typing import Protocol

CHUNK_WRITER = "pagoda.chunk_writer"
"""The entry of a request's scope that holds its `ChunkWriter`, where the server has one."""


class ChunkWriter(Protocol):
    """Writes pieces of a response (`transfer-encoding: chunked`) whose first piece was sent already."""

    def write_chunk(self, piece: bytes) -> bool:
        """Write `piece`, not empty, if that takes no wait; False where it was not written and must be sent."""
