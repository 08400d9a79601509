"""Which LoRA adapters run: at most `max_loras` in a step, of at most `max_cpu_loras` whose weights are in memory.

    waiting queue ──admits?──▶ running              running    adapters with requests in request slots, the oldest first
          ▲          │ no                           parked     requests whose adapter has to wait, by adapter
          └─unpark── parked                         slots      where an adapter's weights are, or are being read to

A request whose adapter may not run steps aside, so that those behind it can go on. As long as it waits it has a claim: where
no place is free, the adapter that has run the longest takes no requests that come after the claim. It ends with those that it
has, and its place goes to the one that claims it. So an adapter waits at most until the requests before it, and those that
were running, have ended, however many others come.

Weights are read by the ranks (`take_loads`), where `loaded` and `failed` say what came of it. A slot is taken from the adapter
that was used least recently: one without requests, or one that has had its turn since it was read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from pagoda.adapters import LoraAdapter
from pagoda.scheduling.request import Request


class AdapterGate:
    """Asked before a request is admitted; told of all that happens to requests."""

    def __init__(self, max_loras: int, max_cpu_loras: int, order: Callable[[Request], Any]) -> None:
        """`order`: a key by which requests of different adapters come before each other."""
        assert max_cpu_loras >= max_loras
        self._max_loras = max_loras
        self._order = order
        self._slots: dict[LoraAdapter, int] = {}  # the least recently used first
        self._free_slots = list(range(max_cpu_loras - 1, -1, -1))
        self._loading: set[LoraAdapter] = set()
        self._had_turn: set[LoraAdapter] = set()  # since it was loaded
        self._retired: set[LoraAdapter] = set()
        self._loads: list[tuple[int, LoraAdapter]] = []
        self._unloads: list[int] = []
        self._num_requests: Counter[LoraAdapter] = Counter()
        self._running: dict[LoraAdapter, int] = {}  # the longest first
        self._parked: dict[LoraAdapter, dict[Request, None]] = {}

    # ---- requests --------------------------------------------------------------------------------------------------

    @property
    def num_parked(self) -> int:
        """Requests that have stepped aside."""
        return sum(map(len, self._parked.values())) if self._parked else 0

    @property
    def parked(self) -> Iterator[Request]:
        """These requests."""
        return (request for requests in self._parked.values() for request in requests)

    @property
    def running(self) -> list[str]:
        """Names of the adapters with running requests."""
        return [adapter.name for adapter in self._running]

    @property
    def waiting(self) -> list[str]:
        """Names of the adapters with waiting requests."""
        return [adapter.name for adapter, count in self._num_requests.items() if count > self._running.get(adapter, 0)]

    def admits(self, request: Request) -> bool:
        """Whether the adapter of `request`, which is about to be admitted, may run; else it is to be parked."""
        adapter = request.spec.adapter
        if adapter is None:
            return True
        if adapter not in self._slots or adapter in self._loading:
            return False
        num_free = self._max_loras - len(self._running)
        ahead = self._claims_before(request) if self._parked else []
        if adapter in self._running:
            return not self._is_closed(adapter, len(ahead) - num_free)
        # What is not in memory cannot take the place, and may be waiting for the slot of this one.
        return sum(each in self._slots for each in ahead) < num_free

    def add(self, request: Request) -> None:
        """A request was accepted."""
        if request.spec.adapter is not None:
            self._num_requests[request.spec.adapter] += 1
            self._retired.discard(request.spec.adapter)

    def park(self, request: Request) -> None:
        """A request that is not admitted steps aside."""
        adapter = request.spec.adapter
        assert adapter is not None
        self._parked.setdefault(adapter, {})[request] = None
        if adapter not in self._slots:
            self._begin_load(adapter)

    def unpark(self) -> list[Request]:
        """Take out the requests whose adapters may run by now, those first that came first."""
        if not self._parked:
            return []
        num_free, num_unserved = self._max_loras - len(self._running), 0
        found: list[Request] = []
        for adapter in sorted(self._parked, key=lambda each: self._order(next(iter(self._parked[each])))):
            if adapter in self._loading or (adapter not in self._slots and self._begin_load(adapter)):
                continue
            if adapter in self._running:
                if self._is_closed(adapter, num_unserved):
                    continue
            elif adapter in self._slots and num_free > 0:
                num_free -= 1
            else:
                num_unserved += 1
                continue
            found += self._parked.pop(adapter)
        return sorted(found, key=lambda request: request.sequence_number)

    def enter(self, request: Request) -> None:
        """A request got a request slot."""
        adapter = request.spec.adapter
        if adapter is not None:
            self._running[adapter] = self._running.get(adapter, 0) + 1
            self._slots[adapter] = self._slots.pop(adapter)
            self._had_turn.add(adapter)

    def leave(self, request: Request) -> None:
        """A request leaves its request slot."""
        adapter = request.spec.adapter
        if adapter is not None:
            self._running[adapter] -= 1
            if not self._running[adapter]:
                del self._running[adapter]

    def remove(self, request: Request) -> bool:
        """A request has ended, after it left its request slot; whether it was parked."""
        adapter = request.spec.adapter
        if adapter is None:
            return False
        self._num_requests[adapter] -= 1
        if not self._num_requests[adapter]:
            del self._num_requests[adapter]
            if adapter in self._retired:
                self.retire(adapter)
        parked = self._parked.get(adapter)
        if parked is None or request not in parked:
            return False
        del parked[request]
        if not parked:
            del self._parked[adapter]
        return True

    def forget_requests(self) -> None:
        """There are no requests any more."""
        self._num_requests.clear()
        self._running.clear()
        self._parked.clear()

    def _claims_before(self, request: Request) -> list[LoraAdapter]:
        """The other adapters that wait for a place to run, or for a slot, with requests that come before this one."""
        own, order = request.spec.adapter, self._order(request)
        return [
            adapter
            for adapter, parked in self._parked.items()
            if adapter != own
            and adapter not in self._running
            and adapter not in self._loading
            and self._order(next(iter(parked))) < order
        ]

    def _is_closed(self, adapter: LoraAdapter, num_unserved: int) -> bool:
        """Whether so many claims without a free place are one for that of `adapter`, which runs."""
        if num_unserved <= 0:
            return False
        return any(adapter == oldest for oldest, _ in zip(self._running, range(num_unserved), strict=False))

    # ---- weights ---------------------------------------------------------------------------------------------------

    @property
    def has_changes(self) -> bool:
        """Whether there are weights to read, being read, or to drop."""
        return bool(self._loading or self._unloads)

    @property
    def is_loading(self) -> bool:
        """Whether weights are being read."""
        return bool(self._loading)

    def want(self, adapter: LoraAdapter) -> bool:
        """Read an adapter before there are requests for it; False where it is there, or has no slot now."""
        self._retired.discard(adapter)
        return adapter not in self._slots and self._begin_load(adapter)

    def retire(self, adapter: LoraAdapter) -> None:
        """Give the slot of an adapter back, once it has no requests."""
        self._retired.add(adapter)
        if adapter in self._slots and adapter not in self._loading and not self._num_requests[adapter]:
            self._unloads.append(self._release(adapter))

    def take_unloads(self) -> list[int]:
        """The slots to empty since the last call, before those of `take_loads` are filled."""
        unloads, self._unloads = self._unloads, []
        return unloads

    def take_loads(self) -> list[tuple[int, LoraAdapter]]:
        """The adapters to read since the last call, and the slots that they are for."""
        loads, self._loads = self._loads, []
        return loads

    def loaded(self, adapter: LoraAdapter) -> None:
        """An adapter is in its slot, on all ranks."""
        self._loading.discard(adapter)
        self._had_turn.discard(adapter)
        if adapter in self._retired:
            self.retire(adapter)

    def failed(self, adapter: LoraAdapter) -> None:
        """An adapter could not be read; its slot is emptied on the ranks that could."""
        self._loading.discard(adapter)
        self._unloads.append(self._release(adapter))

    def forget_weights(self) -> None:
        """All slots are empty, as when the model's weights were given back; there are no requests."""
        for adapter in list(self._slots):
            self._release(adapter)

    def _begin_load(self, adapter: LoraAdapter) -> bool:
        slot = self._free_slots.pop() if self._free_slots else self._evict()
        if slot is None:
            return False
        self._slots[adapter] = slot
        self._loading.add(adapter)
        self._loads.append((slot, adapter))
        return True

    def _evict(self) -> int | None:
        for adapter in self._slots:
            is_used = adapter in self._loading or adapter in self._running
            if not is_used and (not self._num_requests[adapter] or adapter in self._had_turn):
                self._unloads.append(self._release(adapter))
                return self._free_slots.pop()
        return None

    def _release(self, adapter: LoraAdapter) -> int:
        slot = self._slots.pop(adapter)
        self._free_slots.append(slot)
        self._retired.discard(adapter)
        self._had_turn.discard(adapter)
        return slot

    def check_integrity(self, requests: list[Request]) -> None:
        """Assert what must hold between requests, places and slots. O(everything); for tests."""
        running = Counter(each.spec.adapter for each in requests if each.req_index >= 0 and each.spec.adapter)
        assert running == Counter(self._running)
        assert len(running) <= self._max_loras
        assert set(running) <= set(self._slots) - self._loading
        assert Counter(each.spec.adapter for each in requests if each.spec.adapter) == self._num_requests
        assert sorted([*self._slots.values(), *self._free_slots]) == list(
            range(len(self._slots) + len(self._free_slots))
        )
        assert all(requests for requests in self._parked.values())
