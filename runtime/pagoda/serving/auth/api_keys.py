"""The API keys in force: one check for REST (`Authorization` header) and gRPC (`authorization` metadata)."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from pagoda.config.schema import PagodaConfig
from pagoda.errors import AuthenticationError, ConfigError, PermissionDeniedError
from pagoda.serving.auth.attempts import FailedAttempts
from pagoda.serving.auth.key_files import parse_contents, read_contents
from pagoda.serving.auth.keys import ANONYMOUS, EVERYBODY, ApiKey, KeySet, nameless_key, parse_secret
from pagoda.serving.auth.scopes import Access, Scope

logger = logging.getLogger(__name__)

SCHEME = "bearer"
RELOAD_SECONDS = 5.0
REMIND_SECONDS = 60.0
"""How often a file that cannot be used is logged again."""

caller_var: ContextVar[ApiKey] = ContextVar("pagoda_caller", default=ANONYMOUS)
"""Whom the current task serves. Set where the key is checked and read where a job starts, so that no route in between can
forget it.
"""


@dataclass(slots=True)
class KeyUse:
    """How often a key was used since the server began; `last`: when, in seconds since the epoch."""

    requests: int = 0
    last: float | None = None


class ApiKeys:
    """The keys of the settings and of `api_keys_file`; with neither everybody may do everything.

    `anonymous_scopes`: what those may do who send no key, where there are keys.
    """

    def __init__(
        self,
        keys: tuple[str, ...] = (),
        file: Path | None = None,
        anonymous_scopes: frozenset[Scope] = frozenset(),
        *,
        attempts: FailedAttempts | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises `ConfigError` for a file that cannot be used."""
        self._given = [nameless_key(parse_secret(key)) for key in keys]
        self._attempts = FailedAttempts(clock) if attempts is None else attempts
        self._sleep = sleep
        self._clock = clock
        self._keys = KeySet(self._given)
        self.file = None if file is None else KeyFile(file)
        if self.file is not None:
            self._keys = self._joined(self.file.read() or ())
            self.file.succeed()
        self.uses: dict[str, KeyUse] = {}  # by the key's name
        self._anonymous = ANONYMOUS
        if not self.are_required:
            self._anonymous = EVERYBODY
        elif anonymous_scopes:
            self._anonymous = ApiKey(name=ANONYMOUS.name, digest=b"", scopes=anonymous_scopes, tenant="")

    @classmethod
    def from_config(cls, config: PagodaConfig) -> ApiKeys:
        """Those that the settings name. Raises `ConfigError` for a file that cannot be used."""
        file = None if config.api_keys_file is None else Path(config.api_keys_file)
        return cls(config.api_keys, file, frozenset(map(Scope, config.anonymous_scopes)))

    @property
    def are_required(self) -> bool:
        """Whether there are keys."""
        return len(self._keys) > 0

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[ApiKey]:
        return iter(self._keys)

    def is_known(self, word: str) -> bool:
        """Whether a word is one of the keys, for the logs to mask it."""
        return self._keys.find(word) is not None

    async def admit(self, access: Access, authorization: str | None, peer: str) -> ApiKey:
        """Let the current task speak for the caller, whose record is returned. `peer`: the address it came from.

        Raises `AuthenticationError` for a missing or unknown key (an unknown one later and later), `PermissionDeniedError` for
        one without the scope. To what is public an unknown key is as good as none.
        """
        caller = self._caller(authorization)
        if caller is None and access is not Access.PUBLIC:
            await self._sleep(self._attempts.delay(peer))
            raise AuthenticationError("the API key is not known here")
        caller = caller or self._anonymous
        caller_var.set(caller)
        _require(caller, access)
        if caller.digest:
            use = self.uses.setdefault(caller.name, KeyUse())
            use.requests += 1
            use.last = time.time()
        return caller

    def check_again(self, access: Access) -> None:
        """For another request in the stream of a caller who was admitted: the key may have been revoked or changed since.

        Raises what `admit` does.
        """
        caller = caller_var.get()
        if not caller.digest:
            return
        current = self._keys.of_digest(caller.digest)
        if current is None:
            raise AuthenticationError("the API key is not known here any more")
        caller_var.set(current)
        _require(current, access)

    def _caller(self, authorization: str | None) -> ApiKey | None:
        """Who sent this header; None for an unknown key."""
        if not self.are_required or not authorization:
            return self._anonymous
        scheme, _, sent = authorization.partition(" ")
        if scheme.lower() != SCHEME or not sent.strip():
            return self._anonymous  # a proxy's own scheme, perhaps: no key of ours was tried
        return self._keys.find(sent.strip())

    def reload(self) -> None:
        """Read the file again; if it has changed, its keys are in force from now on, unless it cannot be used.

        Then the keys stay as they were, and the log and `KeyFile.is_current` say so.
        """
        file = self.file
        if file is None:
            return
        try:
            content = file.read()
            if content is not None:
                before, self._keys = len(self), self._joined(content)
                logger.info(
                    "API keys: %s was read again: %d are in force, %d were before", file.path, len(self), before
                )
            file.succeed()
        except ConfigError as error:
            if file.fail(str(error), self._clock()):
                logger.error("API keys: %s; the %d keys that were in force stay in force", error, len(self))

    async def watch(self) -> None:
        """Call `reload` every few seconds, until cancelled."""
        while self.file is not None:
            await self._sleep(RELOAD_SECONDS)
            await asyncio.to_thread(self.reload)

    def log_state(self, address: str) -> None:
        """Say at start who may come in at `address`."""
        if not self.are_required:
            logger.warning(
                "no API keys: whoever reaches %s may use the model and everything else; set api_keys_file or api_keys",
                address,
            )
            return
        counts = {scope: sum(scope in key.scopes for key in self._keys) for scope in Scope}
        scopes = ", ".join(f"{count} with {scope}" for scope, count in counts.items())
        logger.info("API keys: %d are in force (%s)", len(self), scopes)
        if self._anonymous.scopes:
            logger.warning("anonymous_scopes: without a key there is %s", ", ".join(sorted(self._anonymous.scopes)))

    def _joined(self, of_file: Iterable[ApiKey]) -> KeySet:
        return KeySet([*self._given, *of_file])


class KeyFile:
    """The file or directory of keys, and whether what it holds is what is in force.

    `is_current`: whether the last look at it succeeded; `last_success`: seconds since the epoch.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_current = False
        self.last_success = 0.0
        self._seen = b""
        self._in_force = b""
        self._failure = ""
        self._reminded = 0.0

    def read(self) -> KeySet | None:
        """The keys that it holds, or None where they are those in force. Raises `ConfigError`."""
        contents = read_contents(self.path)
        self._seen = hashlib.sha256(repr(sorted(contents.items())).encode()).digest()
        return None if self._seen == self._in_force else parse_contents(self.path, contents)

    def succeed(self) -> None:
        """What was read is in force."""
        self._in_force, self._failure = self._seen, ""
        self.is_current, self.last_success = True, time.time()

    def fail(self, reason: str, now: float) -> bool:
        """What was read cannot be used; whether to log it: it is new, or was logged some time ago."""
        is_due = reason != self._failure or now - self._reminded >= REMIND_SECONDS
        self.is_current, self._failure = False, reason
        if is_due:
            self._reminded = now
        return is_due


def _require(caller: ApiKey, access: Access) -> None:
    if access.admits(caller.scopes):
        return
    if not caller.digest:
        raise AuthenticationError("an API key is required: send the header `Authorization: Bearer <key>`")
    raise PermissionDeniedError(f"the API key does not have the scope `{access.name.lower()}`, which this needs")
