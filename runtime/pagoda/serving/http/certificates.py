"""Certificate renewal without a restart: cert-manager replaces the files of a mounted secret every few weeks."""

from __future__ import annotations

import asyncio
import logging
import ssl
from pathlib import Path

logger = logging.getLogger(__name__)

CHECK_SECONDS = 10.0


async def reload_when_renewed(context: ssl.SSLContext, certfile: str, keyfile: str) -> None:
    """Load the files into `context`, for connections from then on, whenever they have changed; runs until it is cancelled.

    Files that do not fit each other, as while only one of them is written, are logged and tried again; the loaded ones stay.
    """
    loaded = _state_of(certfile, keyfile)
    while True:
        await asyncio.sleep(CHECK_SECONDS)
        state = _state_of(certfile, keyfile)
        if state == loaded:
            continue
        try:
            # First elsewhere: a context that a certificate was loaded into without its key completes no handshake.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certfile, keyfile)
            context.load_cert_chain(certfile, keyfile)
        except OSError as error:  # ssl.SSLError is one
            logger.warning("cannot load the renewed certificate (ssl_certfile, ssl_keyfile): %s", error)
            continue
        loaded = state
        logger.info("loaded the renewed certificate %s", certfile)


def _state_of(*paths: str) -> list[tuple[int, int, int]]:
    """What changes when a file is replaced or rewritten, through symbolic links; empty while one is missing."""
    try:
        stats = [Path(path).stat() for path in paths]
    except OSError:
        return []
    return [(stat.st_ino, stat.st_mtime_ns, stat.st_size) for stat in stats]
