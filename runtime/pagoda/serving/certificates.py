"""Certificate renewal without a restart: cert-manager replaces the files of a mounted Secret every few weeks."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable
from pathlib import Path

from pagoda.config.schema import PagodaConfig
from pagoda.errors import ConfigError

logger = logging.getLogger(__name__)

CHECK_SECONDS = 10.0


class CertificateFiles:
    """The PEM files of a certificate chain and its private key."""

    def __init__(self, certfile: str, keyfile: str) -> None:
        self.certfile = certfile
        self.keyfile = keyfile

    @classmethod
    def from_config(cls, config: PagodaConfig) -> CertificateFiles | None:
        """Those of `ssl_certfile` and `ssl_keyfile`; None without TLS."""
        if config.ssl_certfile is None or config.ssl_keyfile is None:
            return None
        return cls(config.ssl_certfile, config.ssl_keyfile)

    def check(self) -> None:
        """Raise `ConfigError` for files that cannot be read or do not fit each other."""
        for name, path in (("ssl_certfile", self.certfile), ("ssl_keyfile", self.keyfile)):
            try:
                Path(path).read_bytes()
            except OSError as error:
                raise ConfigError(f"{name}: cannot read {path}: {error.strerror}") from error
        try:
            # In a context of its own: one that a certificate was loaded into without its key completes no handshake.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.certfile, self.keyfile)
        except OSError as error:  # ssl.SSLError is one
            raise ConfigError(f"ssl_certfile, ssl_keyfile: {error}") from error

    async def reload_when_renewed(self, load: Callable[[], None], server: str) -> None:
        """Call `load()` whenever the files have changed and fit each other; runs until it is cancelled.

        Files that do not fit, as while only one of them is written, are logged and tried again; the loaded ones stay. `server`
        is named in the log.
        """
        loaded = self._state()
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            state = self._state()
            if state == loaded:
                continue
            try:
                self.check()
                load()
            except (ConfigError, OSError) as error:
                logger.warning("%s cannot load the renewed certificate: %s", server, error)
                continue
            loaded = state
            logger.info("%s loaded the renewed certificate %s", server, self.certfile)

    def _state(self) -> list[tuple[int, int, int]]:
        """What changes when a file is replaced or rewritten, through symbolic links; empty while one is missing."""
        try:
            stats = [Path(path).stat() for path in (self.certfile, self.keyfile)]
        except OSError:
            return []
        return [(stat.st_ino, stat.st_mtime_ns, stat.st_size) for stat in stats]
