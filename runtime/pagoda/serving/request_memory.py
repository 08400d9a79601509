"""How many bytes of requests are held while they are received and decoded: of all clients, and of each tenant.

A tenant may hold as much as is free (Choudhury and Hahne, dynamic queue length thresholds): alone half of all there is, two of
them a third each. So some is left for who comes next, however much others send.
"""

from __future__ import annotations

from pagoda.config.sizes import exact_bytes
from pagoda.errors import QueueFullError
from pagoda.serving.auth.api_keys import caller_var

UNCOUNTED_BYTES = 64 * 1024
"""A body up to here is never refused for others'; connections and calls have bounds, and with them these."""


class RequestMemory:
    """Holds at most `limit` bytes; REST bodies and gRPC messages count together."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used: dict[str, int] = {}  # by tenant
        self._total = 0

    @property
    def num_bytes(self) -> int:
        """What is held now."""
        return self._total

    def reserve(self, size: int) -> Reservation:
        """Room for `size` bytes of the current task's caller. Raises `QueueFullError` where there is none."""
        reservation = Reservation(self, caller_var.get().tenant)
        reservation.grow(size)
        return reservation

    def take(self, tenant: str, size: int) -> None:
        """Count `size` more bytes of a tenant. Raises `QueueFullError`."""
        own, free = self._used.get(tenant, 0), self._limit - self._total
        if own + size > free:
            whose = "this API key holds" if tenant else "clients without an API key hold"
            raise QueueFullError(
                f"too much is being received: request bodies take {exact_bytes(self._total)} of {exact_bytes(self._limit)} "
                f"(max_inflight_body_bytes); {whose} {exact_bytes(own)} and may hold as much as is free; this body has "
                f"{exact_bytes(size)}"
            )
        self._used[tenant] = own + size
        self._total += size

    def give_back(self, tenant: str, size: int) -> None:
        """They are not held any more."""
        self._total -= size
        self._used[tenant] -= size
        if not self._used[tenant]:
            del self._used[tenant]


class Reservation:
    """The room of one body."""

    __slots__ = ("_counted", "_memory", "_size", "_tenant")

    def __init__(self, memory: RequestMemory, tenant: str) -> None:
        self._memory = memory
        self._tenant = tenant
        self._size = self._counted = 0

    def grow(self, size: int) -> None:
        """`size` more bytes. Raises `QueueFullError`."""
        self._size += size
        if self._size > UNCOUNTED_BYTES:
            self._memory.take(self._tenant, self._size - self._counted)
            self._counted = self._size

    def release(self) -> None:
        """The body was decoded, or will not be; may be called twice."""
        if self._counted:
            self._memory.give_back(self._tenant, self._counted)
        self._size = self._counted = 0
