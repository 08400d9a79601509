"""What happens to the prefix cache, for those outside who route by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from typing_extensions import override

from pagoda.request import EngineRequest


class HashedRequest(Protocol):
    """What is read of a request."""

    block_hashes: list[bytes]
    token_ids: list[int]
    spec: EngineRequest


class CacheEvents:
    """None of it is kept."""

    def stored(self, request: HashedRequest, first: int, end: int, group: int) -> None:
        """Blocks `first` to `end - 1` of a request, if there are any, can be found by their hashes now, in the layers of
        `group`."""

    def removed(self, block_hash: bytes, group: int) -> None:
        """A block of `group` was taken for something else."""

    def cleared(self) -> None:
        """No block can be found any more."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Blocks that follow each other. `parent`: the hash of the block before them; None: they begin a prompt.

    `token_ids`: of all of them, `block_size` each. `cache_keys`: without equal ones no request finds them.
    """

    block_hashes: Sequence[bytes]
    parent: bytes | None
    token_ids: Sequence[int]
    cache_keys: tuple[str, ...]
    group: int = 0


@dataclass(frozen=True, slots=True)
class Removed:
    """Blocks that can be found no longer, in the layers of `group`."""

    block_hashes: Sequence[bytes]
    group: int = 0


@dataclass(frozen=True, slots=True)
class Cleared:
    """All blocks are gone."""


CacheEvent = Stored | Removed | Cleared


class CacheEventSink:
    """Where a log's events go: nowhere."""

    def flush(self) -> None:
        """Send the events since the last call; called between two steps, so it must not wait."""

    def close(self) -> None:
        """Send what is left."""


class CacheEventLog(CacheEvents):
    """Keeps events, in order, until they are taken."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._events: list[CacheEvent] = []
        self._removed: list[bytes] = []
        self._removed_from = 0  # group

    @override
    def stored(self, request: HashedRequest, first: int, end: int, group: int) -> None:
        if first == end:
            return
        self._close_removed()
        size = self._block_size
        self._events.append(
            Stored(
                request.block_hashes[first:end],
                request.block_hashes[first - 1] if first else None,
                request.token_ids[first * size : end * size],
                request.spec.prefix_keys,
                group,
            )
        )

    @override
    def removed(self, block_hash: bytes, group: int) -> None:
        if group != self._removed_from:
            self._close_removed()
            self._removed_from = group
        self._removed.append(block_hash)

    @override
    def cleared(self) -> None:
        self._removed.clear()
        self._events.append(Cleared())

    def take(self) -> list[CacheEvent]:
        """The events since the last call."""
        self._close_removed()
        events, self._events = self._events, []
        return events

    def _close_removed(self) -> None:
        if self._removed:
            self._events.append(Removed(self._removed, self._removed_from))
            self._removed = []
