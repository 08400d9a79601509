"""How many requests each tenant has in an engine, and places kept for those that belong together."""

from __future__ import annotations

from collections import Counter

from pagoda.fair_turns import has_place


class QueuePlaces:
    """Places for the sequences of one request, which are submitted one by one: all of them have one, or none is submitted.

    Else requests of many sequences that come together would each get a part of the queue, and each be refused for the rest.
    To be used as a context manager, which gives back those that were not taken.
    """

    def __init__(self, queue: RequestQueue, tenant: str, num_left: int) -> None:
        self._queue = queue
        self._tenant = tenant
        self._num_left = num_left
        queue.add(tenant, num_left)

    def take(self) -> None:
        """Give up a place for a sequence that is counted by itself from now on."""
        assert self._num_left > 0, "a request has more sequences than it has places for"
        self._release(1)

    def _release(self, count: int) -> None:
        self._num_left -= count
        self._queue.remove(self._tenant, count)

    def __enter__(self) -> QueuePlaces:
        return self

    def __exit__(self, *_: object) -> None:
        self._release(self._num_left)


class RequestQueue:
    """Requests that were submitted and have not ended, and places that are kept, by tenant."""

    def __init__(self) -> None:
        self._num_of: Counter[str] = Counter()  # of each tenant that has any
        self.num_requests = 0

    def add(self, tenant: str, count: int = 1) -> None:
        """Count so many more."""
        self._num_of[tenant] += count
        self.num_requests += count

    def remove(self, tenant: str, count: int = 1) -> None:
        """Count so many less."""
        self.num_requests -= count
        self._num_of[tenant] -= count
        if not self._num_of[tenant]:
            del self._num_of[tenant]

    def has_room(self, tenant: str, count: int, *, num_running: int, limit: int) -> bool:
        """Whether `count` more may come where `num_running` run at once, whosever they are, and `limit` may wait."""
        num_own = self._num_of.get(tenant, 0)
        num_tenants = len(self._num_of) + (num_own == 0)
        others = count - 1 - num_running
        return has_place(self.num_requests + others, limit, num_own + others, num_tenants)


def queue_full(num_waiting: int, count: int) -> str:
    """The sentence of the error where `count` more have no place."""
    if count > 1:
        return (
            f"{num_waiting} requests are waiting; max_num_waiting leaves no place for the {count} sequences of this one"
        )
    return f"{num_waiting} requests are waiting, as many as max_num_waiting allows"
