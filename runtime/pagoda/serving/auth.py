"""API keys: one check for REST (`Authorization` header) and gRPC (`authorization` metadata), and whose requests they are."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from contextvars import ContextVar

from pagoda.errors import AuthenticationError

SCHEME = "bearer"
TENANT_CHARACTERS = 16

tenant_var: ContextVar[str] = ContextVar("pagoda_tenant", default="")
"""Whose request the current task serves: a name made from the API key, empty where there are not several keys. Set where the
key is checked and read where a job starts, so that no route in between can forget it.
"""


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
        """Let the current task speak for the key's tenant.

        Raises `AuthenticationError` unless `authorization` is `Bearer KEY` with a known key, or none is required.
        """
        if not self._digests:
            return
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != SCHEME or not key.strip():
            raise AuthenticationError("an API key is required: send the header `Authorization: Bearer <key>`")
        given = _digest(key.strip())
        matches = [hmac.compare_digest(given, known) for known in self._digests]
        if not any(matches):
            raise AuthenticationError("the API key is not known here")
        if len(self._digests) > 1:
            tenant_var.set(given.hex()[:TENANT_CHARACTERS])


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
