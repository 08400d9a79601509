"""API keys: one check for REST (`Authorization` header) and gRPC (`authorization` metadata)."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from pagoda.errors import AuthenticationError

SCHEME = "bearer"


class ApiKeys:
    """The keys that let a client in; with none configured everybody is.

    Only digests are kept, and every comparison takes the same time whether and where keys differ.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    @property
    def are_required(self) -> bool:
        """Whether a client must send a key."""
        return bool(self._digests)

    def check(self, authorization: str | None) -> None:
        """Raise `AuthenticationError` unless `authorization` is `Bearer KEY` with a known key, or none is required."""
        if not self._digests:
            return
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != SCHEME or not key.strip():
            raise AuthenticationError("an API key is required: send the header `Authorization: Bearer <key>`")
        given = _digest(key.strip())
        matches = [hmac.compare_digest(given, known) for known in self._digests]
        if not any(matches):
            raise AuthenticationError("the API key is not known here")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
