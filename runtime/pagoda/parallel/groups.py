"""How the ranks of a model talk to each other while it runs: with a deadline on everything.

Pipeline stages, and tensor-parallel ranks on GPUs or on several hosts, do so over torch.distributed; those on the CPUs of one
host through memory that they share (`shared_memory`).

A model holds one `ParallelGroups`. Its parts call `groups.tp_group` and `groups.pp_group` without asking how many ranks there
are: with one rank these are objects whose methods give back what they are given.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from pagoda.errors import CommunicationError
from pagoda.parallel.layout import ParallelLayout, RankCoordinates
from pagoda.parallel.shared_memory import share_memory
from pagoda.parallel.tensor_group import TensorParallelGroup

_Result = TypeVar("_Result")

# From this size on the ranks of a stage each send a part of what all of them hold. Below, one more collective costs more.
_SHARED_FROM_BYTES = 1 << 20


class PipelineParallelGroup:
    """The way to the stages before and after. This one is a single stage, which has neither."""

    num_operations = 0
    """Messages and collectives that were begun."""

    def send(self, values: torch.Tensor) -> None:
        """Send contiguous `values` to the next stage. Does not wait for it; `values` must not be changed any more."""
        raise RuntimeError("there is no next pipeline stage")

    def receive(self, into: torch.Tensor) -> torch.Tensor:
        """Fill contiguous `into` with what the stage before sent, of equal shape and dtype, and return it."""
        raise RuntimeError("there is no pipeline stage before this one")

    def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all stages. For the check before the start: the model itself only sends forward."""
        return values


class _DistributedTensorGroup(TensorParallelGroup):
    """Several ranks. Every method must be called by all of them, in the same order, with equal shapes."""

    def __init__(self, ranks: range, rank: int, group: dist.ProcessGroup) -> None:
        self.rank = ranks.index(rank)
        self.size = len(ranks)
        self._first = ranks[0]
        self._group = group
        self._what = f"of rank {rank} with ranks {', '.join(map(str, ranks))}"

    def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        self.num_operations += 1
        _checked(f"all-reduce {self._what}", dist.all_reduce, values, group=self._group)
        return values

    def all_gather(self, values: torch.Tensor, dim: int) -> torch.Tensor:
        self.num_operations += 1
        values = values.contiguous()
        gathered = [torch.empty_like(values) for _ in range(self.size)]
        _checked(f"all-gather {self._what}", dist.all_gather, gathered, values, group=self._group)
        return torch.cat(gathered, dim)

    def gather(self, values: torch.Tensor, dim: int) -> torch.Tensor | None:
        self.num_operations += 1
        values = values.contiguous()
        gathered = [torch.empty_like(values) for _ in range(self.size)] if self.rank == 0 else None
        _checked(f"gather {self._what}", dist.gather, values, gathered, dst=self._first, group=self._group)
        return torch.cat(gathered, dim) if gathered is not None else None

    def broadcast(self, values: torch.Tensor) -> torch.Tensor:
        self.num_operations += 1
        _checked(f"broadcast {self._what}", dist.broadcast, values, src=self._first, group=self._group)
        return values


class _DistributedPipelineGroup(PipelineParallelGroup):
    """One stage among several, to its neighbours of equal tensor rank."""

    def __init__(self, ranks: range, rank: int, group: dist.ProcessGroup) -> None:
        stage = ranks.index(rank)
        self._rank = rank
        self._before = ranks[stage - 1] if stage > 0 else None
        self._after = ranks[stage + 1] if stage + 1 < len(ranks) else None
        self._max_unsent = len(ranks)
        self._group = group
        # Messages on their way, oldest first: the tensor has to live until the other side has taken it.
        self._unsent: deque[tuple[dist.Work, torch.Tensor]] = deque()

    def send(self, values: torch.Tensor) -> None:
        self.num_operations += 1
        if self._after is None:
            super().send(values)
        what = f"sending from rank {self._rank} to rank {self._after}"
        while self._unsent and (len(self._unsent) >= self._max_unsent or self._unsent[0][0].is_completed()):
            _checked(what, self._unsent.popleft()[0].wait)
        work = _checked(what, dist.isend, values, self._after, group=self._group)
        assert work is not None, "this rank belongs to the group"
        self._unsent.append((work, values))

    def receive(self, into: torch.Tensor) -> torch.Tensor:
        self.num_operations += 1
        if self._before is None:
            super().receive(into)
        what = f"rank {self._rank} receiving from rank {self._before}"
        _checked(what, dist.recv, into, self._before, group=self._group)
        return into

    def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        self.num_operations += 1
        _checked(f"all-reduce of rank {self._rank} with the other stages", dist.all_reduce, values, group=self._group)
        return values


@dataclass(frozen=True, slots=True)
class ParallelGroups:
    """A rank's coordinates, and its groups."""

    layout: ParallelLayout
    coordinates: RankCoordinates
    tp_group: TensorParallelGroup
    pp_group: PipelineParallelGroup

    @property
    def num_operations(self) -> int:
        """Collectives and messages that this rank has begun."""
        return self.tp_group.num_operations + self.pp_group.num_operations

    def send_hidden_states(self, hidden: torch.Tensor) -> None:
        """Send `hidden`, which all ranks of this stage hold, to those of the next. It must not be changed any more.

        Stages may be on different machines: a large tensor goes over once, a part from each rank, and not once a rank.
        """
        self.pp_group.send(self._part(hidden) if self._is_shared(hidden) else hidden)

    def recv_hidden_states(self, into: torch.Tensor) -> torch.Tensor:
        """What the stage before sent, of the shape and dtype of `into`, which may be filled with it."""
        if not self._is_shared(into):
            return self.pp_group.receive(into)
        return self.tp_group.all_gather(self.pp_group.receive(self._part(into)), dim=0).view_as(into)

    def _is_shared(self, hidden: torch.Tensor) -> bool:
        size = self.tp_group.size
        return size > 1 and hidden.nbytes >= _SHARED_FROM_BYTES and hidden.numel() % size == 0

    def _part(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.view(self.tp_group.size, -1)[self.tp_group.rank]

    def close(self) -> None:
        """Leave all groups. Other ranks that still wait for this one fail. May be called twice."""
        self.tp_group.close()
        if self.layout.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()


SINGLE_RANK = ParallelGroups(
    ParallelLayout(), ParallelLayout().coordinates(0), TensorParallelGroup(), PipelineParallelGroup()
)


def connect_groups(
    layout: ParallelLayout,
    rank: int,
    *,
    host: str,
    port: int,
    backend: str,
    timeout_seconds: float,
    device: torch.device,
    rendezvous_timeout_seconds: float | None = None,
    listener: socket.socket | None = None,
    shares_memory: bool = False,
) -> ParallelGroups:
    """Rendezvous with the other ranks at `host`:`port`, where rank 0 listens, and make all groups.

    Args:
        listener: rank 0's, which listens there; it is closed with the groups. None on other ranks.
        backend: "gloo" or "nccl".
        timeout_seconds: bound of every collective and every message.
        rendezvous_timeout_seconds: bound of the meeting itself; None: `timeout_seconds`.
        shares_memory: whether tensor groups whose ranks can share memory do; the same on all ranks.

    Raises:
        CommunicationError: a rank did not come in time, the address cannot be reached.
    """
    if layout.world_size == 1:
        return SINGLE_RANK
    meeting = timedelta(seconds=rendezvous_timeout_seconds or timeout_seconds)
    timeout = timedelta(seconds=timeout_seconds)
    what = f"rank {rank} of {layout.world_size} at the rendezvous on {host}:{port}"
    listening = None if listener is None else listener.detach()
    store = _checked(what, _open_store, layout, host, port, listening, meeting)
    _checked(
        what,
        dist.init_process_group,
        backend,
        store=store,
        rank=rank,
        world_size=layout.world_size,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )
    try:
        groups = _checked(what, _make_groups, layout, rank, timeout, store if shares_memory else None)
        _checked(what, _close_rendezvous, store, layout, rank, listening)
        return groups
    except BaseException:  # raised on: a group that is half made must not stay
        dist.destroy_process_group()
        raise


def _open_store(layout: ParallelLayout, host: str, port: int, listening: int | None, timeout: timedelta) -> Any:
    """A `TCPStore`, which torch does not export to type checkers. `listening`: rank 0's socket, which it takes over."""
    own: dict[str, Any] = {} if listening is None else {"master_listen_fd": listening}
    return dist.TCPStore(  # type: ignore[attr-defined]
        host, port, layout.world_size, is_master=listening is not None, timeout=timeout, **own
    )


def _close_rendezvous(store: Any, layout: ParallelLayout, rank: int, listening: int | None) -> None:
    """Stop listening once all ranks have met: a TCPStore has no authentication, and any peer may read and write it.

    The ranks' connections stay. torch has no call for that, so another socket takes the place of the one that listens, which
    the kernel closes then; the store closes the other one at its end.
    """
    store.set(f"pagoda/met/{rank}", "")
    if listening is None:
        return
    store.wait([f"pagoda/met/{other}" for other in range(layout.world_size)])
    with socket.socket(socket.AF_UNIX) as inert:
        os.dup2(inert.fileno(), listening, inheritable=False)


def _make_groups(layout: ParallelLayout, rank: int, timeout: timedelta, store: Any | None) -> ParallelGroups:
    """Every rank makes every group, its own or not, in the same order: torch.distributed requires it.

    `store`: of the rendezvous, where tensor groups may share memory.
    """
    coordinates = layout.coordinates(rank)
    tensor, pipeline = TensorParallelGroup(), PipelineParallelGroup()
    if layout.tensor_parallel_size > 1:
        for stage in range(layout.pipeline_parallel_size):
            ranks = layout.tensor_group(stage)
            group = dist.new_group(list(ranks), timeout=timeout)
            if stage == coordinates.pipeline_stage:
                shared = None if store is None else share_memory(store, ranks, rank, timeout.total_seconds())
                tensor = shared or _DistributedTensorGroup(ranks, rank, group)
    if layout.pipeline_parallel_size > 1:
        for tensor_rank in range(layout.tensor_parallel_size):
            ranks = layout.pipeline_group(tensor_rank)
            group = dist.new_group(list(ranks), timeout=timeout)
            if tensor_rank == coordinates.tensor_rank:
                pipeline = _DistributedPipelineGroup(ranks, rank, group)
    return ParallelGroups(layout, coordinates, tensor, pipeline)


def _checked(what: str, function: Callable[..., _Result], *args: Any, **kwargs: Any) -> _Result:
    """Call `function`; what goes wrong in it becomes a `CommunicationError` that begins with `what`."""
    try:
        return function(*args, **kwargs)
    except (RuntimeError, OSError) as error:
        raise CommunicationError(f"{what} failed: {str(error).splitlines()[0]}") from error
