"""Collectives through memory that the ranks of one host share. Ranks are threads here, except where one is killed."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from pagoda.errors import CommunicationError
from pagoda.parallel import shared_memory
from pagoda.parallel.shared_memory import SharedMemoryGroup, share_memory
from tests.support.cpu_kernels import require_cpu_kernels

require_cpu_kernels()


class Store:
    """What ranks tell each other; `changed` stands for what they would read instead."""

    def __init__(self, **changed: str) -> None:
        self._values: dict[str, str] = {}
        self._changed = changed
        self._set = threading.Condition()

    def set(self, key: str, value: str) -> None:
        with self._set:
            self._values[key] = self._changed.get(f"rank{key.rpartition('/')[2]}", value)
            self._set.notify_all()

    def get(self, key: str) -> bytes:
        with self._set:
            assert self._set.wait_for(lambda: key in self._values, 30)
            return self._values[key].encode()


def groups_of(size: int, timeout: float = 30.0, store: Store | None = None) -> list[SharedMemoryGroup | None]:
    store = store or Store()
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: share_memory(store, range(size), rank, timeout), range(size)))


@pytest.fixture(params=[2, 3])
def groups(request: pytest.FixtureRequest) -> Iterator[list[SharedMemoryGroup]]:
    made = groups_of(request.param)
    assert all(group is not None for group in made)
    yield made  # type: ignore[misc]
    for group in made:
        group.close()  # type: ignore[union-attr]


def together(groups: list[SharedMemoryGroup], run: Callable[[SharedMemoryGroup], object]) -> list[object]:
    with ThreadPoolExecutor(len(groups)) as pool:
        return list(pool.map(run, groups))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_collectives_give_what_they_say_for_any_size(groups: list[SharedMemoryGroup], dtype: torch.dtype) -> None:
    """Also where the values are larger than the memory, and one after the other in any order."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((3,), (2, 5), (700, 1000)):
        values = [(100 * torch.randn(shape, generator=generator)).to(dtype) for _ in groups]
        exact = values[0].float() if dtype == torch.bfloat16 else values[0].clone()
        for each in values[1:]:
            exact += each
        expected = exact.to(dtype)
        sums = together(groups, lambda group, values=values: group.all_reduce(values[group.rank].clone()))
        assert all(torch.equal(each, expected) for each in sums)
        everything = torch.cat(values, -1)
        all_gathered = together(groups, lambda group, values=values: group.all_gather(values[group.rank], -1))
        assert all(torch.equal(each, everything) for each in all_gathered)
        first, *others = together(groups, lambda group, values=values: group.gather(values[group.rank], -1))
        assert torch.equal(first, everything)
        assert others == [None] * len(others)
        sent = together(groups, lambda group, values=values: group.broadcast(values[group.rank].clone()))
        assert all(torch.equal(each, values[0]) for each in sent)
    assert {group.num_operations for group in groups} == {12}


def test_a_rank_may_be_ahead_without_writing_over_what_others_still_read(groups: list[SharedMemoryGroup]) -> None:
    """Broadcasts and gathers, in which some wait for nobody, by ranks that pause at times of their own."""

    def run(group: SharedMemoryGroup) -> list[float]:
        seen = []
        for index in range(60):
            if index % (group.rank + 2) == 0:
                time.sleep(0.001)
            seen.append(group.broadcast(torch.tensor([float(index if group.rank == 0 else -1)])).item())
            gathered = group.gather(torch.tensor([float(index)]), 0)
            seen += [] if gathered is None else gathered.unique().tolist()
        return seen

    first, *others = together(groups, run)
    assert first == [value for index in range(60) for value in (index, index)]
    assert others == [list(range(60))] * len(others)


def test_who_does_not_come_is_told_within_the_deadline() -> None:
    late, there = groups_of(2, timeout=0.2)
    assert late is not None
    assert there is not None
    with pytest.raises(
        CommunicationError, match=r"all-reduce of rank 1 with ranks 0, 1 failed: rank 0 did not come within"
    ):
        there.all_reduce(torch.ones(3))
    late.close()
    with pytest.raises(CommunicationError, match="rank 0 has ended"):
        there.all_reduce(torch.ones(3))
    there.close()


def test_a_rank_that_is_killed_ends_the_wait_of_the_others_long_before_the_deadline() -> None:
    with subprocess.Popen(["sleep", "60"]) as other:
        store = Store(rank1=str(other.pid))
        store.set("pagoda/memory/0-1/1", "")
        group = share_memory(store, range(2), 0, 600.0)
        assert group is not None
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(group.all_reduce, torch.ones(3))
            other.kill()
            with pytest.raises(
                CommunicationError, match="all-reduce of rank 0 with ranks 0, 1 failed: rank 1 has ended"
            ):
                waiting.result(timeout=30)
        group.close()


@pytest.mark.parametrize(
    "said", ["{pid} 0 00ff", "999999999 3 00ff", "no rank 0: there is none on other systems than Linux"]
)
def test_ranks_that_cannot_open_the_memory_use_gloo_all_of_them(said: str, caplog: pytest.LogCaptureFixture) -> None:
    """As on two hosts: the process is not there, or another one."""
    caplog.set_level("INFO")
    assert groups_of(2, store=Store(rank0=said.format(pid=os.getpid()))) == [None, None]
    assert "collectives of ranks 0, 1 go over gloo: no shared memory (rank" in caplog.text


def test_without_compiled_kernels_ranks_use_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise OSError("the kernels are not there")

    monkeypatch.setattr(shared_memory, "_rank_counts", absent)
    assert groups_of(2) == [None, None]
