"""Tensor-parallel ranks on the CPUs of one host: collectives through memory that they share, instead of sockets.

Each rank writes its values into a part of its own and posts a count; whoever has seen the counts of the others reads theirs:

    rank 0   ▓▓▓▓ ····   count 7      values of collectives with odd and even numbers lie in two halves in turn: a rank that
    rank 1   ▓▓▓▓ ░░░░   count 8      posts 8 has read all of 7's, so 9 may be written over 7 once all have posted 8

Sums are made by every rank for itself, in the order of ranks and in float32, so they are the same to the last bit on each.

The memory is a memfd of the first rank, which the others open in /proc: it has no name that could be left over, and ranks in
other containers or on other hosts cannot open it. These, and ranks without compiled kernels, use gloo.
"""

from __future__ import annotations

import logging
import mmap
import os
import secrets
import select
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Protocol

import torch
from typing_extensions import override

from pagoda.errors import CommunicationError
from pagoda.parallel.tensor_group import TensorParallelGroup
from pagoda.platform.hardware import cpu_report
from pagoda_kernels.cpu.build import BuildError

logger = logging.getLogger(__name__)

_HALF_BYTES = 1 << 20  # of a rank's values that lie in shared memory at a time
_LINE_BYTES = 64
_TOKEN_BYTES = 32
_LOOK_SECONDS = 0.1  # between looks at whether the others are still there
_SPIN_MICROSECONDS = 50
_REFUSED = "no"


class Store(Protocol):
    """What ranks of a rendezvous tell each other: torch's `TCPStore`."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...


def share_memory(store: Store, ranks: range, rank: int, timeout_seconds: float) -> SharedMemoryGroup | None:
    """The group of `ranks`, which all call this; None, on all of them, where one cannot share memory with the first."""
    key = f"pagoda/memory/{ranks.start}-{ranks.step}"
    with ExitStack() as undo:
        memory: _SharedMemory | None = None
        try:
            counts = _rank_counts()
            if rank == ranks[0]:
                memory = _SharedMemory.create(len(ranks))
                undo.callback(memory.close)
                os.close(os.pidfd_open(os.getpid()))  # raises where the system cannot tell that a process has ended
                said = f"{os.getpid()} {memory.fd} {memory.token}"
            else:
                said = store.get(f"{key}/{ranks[0]}").decode()
                if said.startswith(_REFUSED):
                    raise OSError(said.removeprefix(_REFUSED).strip())
                memory = _SharedMemory.open(said, len(ranks))
                undo.callback(memory.close)
                said = str(os.getpid())
        except (BuildError, OSError, ValueError) as error:
            said = f"{_REFUSED} rank {rank}: {error}"
        store.set(f"{key}/{rank}", said)
        answers = [store.get(f"{key}/{other}").decode() for other in ranks]
        refused = [answer for answer in answers if answer.startswith(_REFUSED)]
        if refused or memory is None:
            logger.info(
                "collectives of ranks %s go over gloo: no shared memory (%s)",
                ", ".join(map(str, ranks)),
                refused[0].removeprefix(_REFUSED).strip(),
            )
            return None
        # A rank that could not be opened as a process has ended since.
        peers = {other: os.pidfd_open(int(answer.split()[0])) for other, answer in zip(ranks, answers, strict=True)}
        undo.pop_all()
    logger.info("collectives of ranks %s go through shared memory", ", ".join(map(str, ranks)))
    return SharedMemoryGroup(ranks, rank, memory, counts, peers, timeout_seconds)


class SharedMemoryGroup(TensorParallelGroup):
    """Several ranks. Every method must be called by all of them, in the same order, with equal shapes."""

    def __init__(
        self,
        ranks: range,
        rank: int,
        memory: _SharedMemory,
        counts: _RankCounts,
        peers: dict[int, int],
        timeout_seconds: float,
    ) -> None:
        """`peers`: a file descriptor of each rank's process, which is readable when it has ended."""
        self.rank = ranks.index(rank)
        self.size = len(ranks)
        self._ranks = ranks
        self._memory = memory
        self._counts = counts
        self._peers = peers
        self._timeout_seconds = timeout_seconds
        self._what = f"of rank {rank} with ranks {', '.join(map(str, ranks))}"
        # Of collectives that have begun, in pieces that fit the memory.
        self._count = 0
        cpu = cpu_report()
        self._spin_microseconds = _SPIN_MICROSECONDS if cpu.quota is None and self.size <= cpu.logical_cores else 0

    @override
    def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        self.num_operations += 1
        for piece in self._pieces(values.view(-1)):
            parts = self._exchange("all-reduce", piece)
            if self.size == 2:
                torch.add(*parts, out=piece)
            else:
                piece.copy_(_sum(parts))
        return values

    @override
    def all_gather(self, values: torch.Tensor, dim: int) -> torch.Tensor:
        self.num_operations += 1
        gathered = self._gathered("all-gather", values)
        return torch.cat(gathered, dim)

    @override
    def gather(self, values: torch.Tensor, dim: int) -> torch.Tensor | None:
        self.num_operations += 1
        gathered = self._gathered("gather", values, is_reading=self.rank == 0)
        return torch.cat(gathered, dim) if self.rank == 0 else None

    @override
    def broadcast(self, values: torch.Tensor) -> torch.Tensor:
        self.num_operations += 1
        for piece in self._pieces(values.view(-1)):
            parts = self._exchange("broadcast", piece, writers=1, is_reading=self.rank != 0)
            if self.rank != 0:
                piece.copy_(parts[0])
        return values

    def close(self) -> None:
        """Leave: whoever waits for this rank fails. The memory goes with the last one that has it."""
        self._memory.leave(self.rank)
        for peer in self._peers.values():
            os.close(peer)
        self._peers = {}
        self._memory.close()

    def _gathered(self, name: str, values: torch.Tensor, *, is_reading: bool = True) -> list[torch.Tensor]:
        flat = values.contiguous().view(-1)
        gathered = [torch.empty_like(flat) for _ in range(self.size if is_reading else 0)]
        start = 0
        for piece in self._pieces(flat):
            parts = self._exchange(name, piece, is_reading=is_reading)
            for whole, part in zip(gathered, parts, strict=False):
                whole[start : start + len(piece)] = part
            start += len(piece)
        return [whole.view(values.shape) for whole in gathered]

    def _pieces(self, flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.split(flat, _HALF_BYTES // flat.element_size())

    def _exchange(
        self, name: str, piece: torch.Tensor, *, writers: int | None = None, is_reading: bool = True
    ) -> list[torch.Tensor]:
        """What ranks up to `writers` gave for this piece, to be read before the next call; nothing if not `is_reading`."""
        writers = self.size if writers is None else writers
        # All have posted the count before: so they have read what lies in the half that is written to now.
        self._wait(name, 0, self.size, self._count)
        self._count += 1
        half = self._count % 2
        if self.rank < writers:
            self._memory.part(self.rank, half, piece).copy_(piece)
        self._counts.post(self._memory.counts, self.rank, self._count)
        if not is_reading:
            return []
        self._wait(name, 0, writers, self._count)
        return [self._memory.part(rank, half, piece) for rank in range(writers)]

    def _wait(self, name: str, first: int, last: int, count: int) -> None:
        """Until the counts are there. Raises `CommunicationError` when a rank has ended, or does not come in time."""
        deadline = time.monotonic() + self._timeout_seconds
        microseconds = int(1e6 * min(_LOOK_SECONDS, self._timeout_seconds))
        while True:
            behind = self._counts.wait(self._memory.counts, first, last, count, self._spin_microseconds, microseconds)
            if behind < 0:
                return
            rank = self._ranks[behind]
            if self._has_ended(behind):
                raise CommunicationError(f"{name} {self._what} failed: rank {rank} has ended")
            if time.monotonic() >= deadline:
                raise CommunicationError(
                    f"{name} {self._what} failed: rank {rank} did not come within {self._timeout_seconds:g} s"
                )

    def _has_ended(self, index: int) -> bool:
        if self._memory.has_left(index):
            return True
        poll = select.poll()
        poll.register(self._peers[self._ranks[index]], select.POLLIN)
        return bool(poll.poll(0))


class _SharedMemory:
    """A token; a line of each rank's count; and for each rank two halves of values."""

    def __init__(self, fd: int, num_ranks: int) -> None:
        self.fd = fd
        self._num_ranks = num_ranks
        self._mapped = mmap.mmap(fd, self.num_bytes(num_ranks))
        memory = torch.frombuffer(self._mapped, dtype=torch.uint8)
        self._token = memory[:_TOKEN_BYTES]
        lines = memory[_LINE_BYTES : _LINE_BYTES * (1 + num_ranks)].view(num_ranks, _LINE_BYTES)
        self.counts = lines.view(torch.int32)  # the first of a line; the second is 1 when its rank has left
        self._values = memory[mmap.PAGESIZE * self._num_pages(num_ranks) :].view(num_ranks, 2, _HALF_BYTES)

    @classmethod
    def create(cls, num_ranks: int) -> _SharedMemory:
        """Raises `OSError` where the system has no such memory."""
        if sys.platform != "linux":
            raise OSError("there is none on other systems than Linux")
        fd = os.memfd_create("pagoda-ranks", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, cls.num_bytes(num_ranks))
            memory = cls(fd, num_ranks)
        except BaseException:  # raised on: nobody else closes it
            os.close(fd)
            raise
        memory._token.copy_(torch.frombuffer(bytearray(secrets.token_bytes(_TOKEN_BYTES)), dtype=torch.uint8))
        return memory

    @classmethod
    def open(cls, said: str, num_ranks: int) -> _SharedMemory:
        """What another rank of this host has created. Raises `OSError` or `ValueError` where it is not that."""
        pid, number, token = said.split()
        fd = os.open(f"/proc/{int(pid)}/fd/{int(number)}", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            if os.fstat(fd).st_size != cls.num_bytes(num_ranks):
                raise OSError(f"process {pid} of this host is not the rank's")
            memory = cls(fd, num_ranks)
            if memory.token != token:
                raise OSError(f"process {pid} of this host is not the rank's")
            return memory
        except BaseException:  # raised on: nobody else closes it
            os.close(fd)
            raise

    @staticmethod
    def num_bytes(num_ranks: int) -> int:
        return mmap.PAGESIZE * _SharedMemory._num_pages(num_ranks) + num_ranks * 2 * _HALF_BYTES

    @staticmethod
    def _num_pages(num_ranks: int) -> int:
        """Before the values."""
        return -(-_LINE_BYTES * (1 + num_ranks) // mmap.PAGESIZE)

    @property
    def token(self) -> str:
        return bytes(self._token.numpy()).hex()

    def part(self, rank: int, half: int, like: torch.Tensor) -> torch.Tensor:
        """Where a rank's values lie, of the dtype and length of `like`."""
        return self._values[rank, half, : like.nbytes].view(like.dtype)

    def leave(self, rank: int) -> None:
        self.counts[rank, 1] = 1

    def has_left(self, rank: int) -> bool:
        return bool(self.counts[rank, 1])

    def close(self) -> None:
        """Give up the descriptor; the mapping goes with the last tensor that looks at it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class _RankCounts:
    """The two operations of the compiled kernels that this needs."""

    def __init__(self, post: Callable[..., Any], wait: Callable[..., Any]) -> None:
        self.post, self.wait = post, wait


def _rank_counts() -> _RankCounts:
    """Raises `BuildError` or `OSError` where the kernels are not compiled."""
    from pagoda_kernels.cpu import operators  # noqa: F401 (loads the library)

    return _RankCounts(torch.ops.pagoda_cpu.post_count.default, torch.ops.pagoda_cpu.wait_for_counts.default)


def _sum(parts: list[torch.Tensor]) -> torch.Tensor:
    """In the order of ranks, in float32 for what is shorter."""
    total = parts[0].float() if parts[0].dtype.is_floating_point and parts[0].element_size() < 4 else parts[0].clone()
    for part in parts[1:]:
        total += part
    return total
