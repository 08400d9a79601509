"""An API key's record, and a lookup of several by what a client sends."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass, field

from pagoda.errors import ConfigError
from pagoda.serving.auth.scopes import Scope
from pagoda.tenants import UNLIMITED, TenantLimits

DEFAULT_SCOPES = frozenset({Scope.INFER})
HASH_PREFIX = "sha256:"
MAX_KEY_CHARACTERS = 512
ALLOWED_KEYS = f"1 to {MAX_KEY_CHARACTERS} visible ASCII characters without spaces"

_KEY = re.compile(rf"[!-~]{{1,{MAX_KEY_CHARACTERS}}}")
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_NAME_DIGITS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """A key of which only the SHA-256 is kept.

    `name`: for logs. `tenant`: keys with the same one share turns, limits and cached prefixes; no two others do.
    """

    name: str
    digest: bytes = field(repr=False)
    scopes: Set[Scope] = DEFAULT_SCOPES
    tenant: str
    limits: TenantLimits = UNLIMITED


ANONYMOUS = ApiKey(name="anonymous", digest=b"", scopes=frozenset(), tenant="")
"""Who sends no key."""
EVERYBODY = ApiKey(name="anonymous", digest=b"", scopes=frozenset(Scope), tenant="")
"""Who sends no key to a server that has none."""


def parse_secret(text: str) -> bytes:
    """The digest of a key as it is written in settings and files: the key itself, or `sha256:` and the hexadecimal digest.

    Raises `ValueError`, whose message does not hold the text.
    """
    if text.startswith(HASH_PREFIX):
        return parse_digest(text.removeprefix(HASH_PREFIX))
    if _KEY.fullmatch(text) is None:
        raise ValueError(f"a key must be {ALLOWED_KEYS}")
    return digest_of(text)


def parse_digest(text: str) -> bytes:
    """The digest that 64 hexadecimal digits are. Raises `ValueError`."""
    if _SHA256.fullmatch(text) is None:
        raise ValueError("a hashed key must be the 64 hexadecimal digits of its SHA-256")
    return bytes.fromhex(text)


def digest_of(key: str) -> bytes:
    """The SHA-256 of a key, which is random and long enough that no slower hash is needed."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def nameless_key(digest: bytes) -> ApiKey:
    """The record of a key of which nothing else is known; its name stays the same wherever the key is written."""
    name = f"key-{digest.hex()[:_NAME_DIGITS]}"
    return ApiKey(name=name, digest=digest, tenant=name)


class KeySet:
    """Several keys. A name and a digest occur once; keys of a tenant have the same limits.

    Raises `ConfigError` where that is not so.
    """

    def __init__(self, keys: Iterable[ApiKey]) -> None:
        self._by_digest: dict[bytes, ApiKey] = {}
        names: set[str] = set()
        limits: dict[str, tuple[str, TenantLimits]] = {}
        for key in keys:
            if key.digest in self._by_digest:
                raise ConfigError(f"API keys: {self._by_digest[key.digest].name} and {key.name} are the same key")
            if key.name in names:
                raise ConfigError(f"API keys: the name {key.name} is given twice")
            first, known = limits.setdefault(key.tenant, (key.name, key.limits))
            if key.limits != known:
                raise ConfigError(
                    f"API keys: {first} and {key.name} belong to the tenant {key.tenant} and give it different limits "
                    "(weight, requests_per_minute, tokens_per_minute)"
                )
            names.add(key.name)
            self._by_digest[key.digest] = key

    def __len__(self) -> int:
        return len(self._by_digest)

    def __iter__(self) -> Iterator[ApiKey]:
        return iter(self._by_digest.values())

    def of_digest(self, digest: bytes) -> ApiKey | None:
        """The record of the key with this digest."""
        return self._by_digest.get(digest)

    def find(self, sent: str) -> ApiKey | None:
        """The record of the key that a client sent. How long it takes says nothing of how much of it is right."""
        digest = digest_of(sent)
        found = self._by_digest.get(digest)
        return found if found is not None and hmac.compare_digest(found.digest, digest) else None
