"""The communication check: a test of the ranks' network before weights are loaded.

Every rank runs `check_communication` at the same time, right after rendezvous. It tests the groups that the model uses: an
all-reduce in which each rank's contribution can be distinguished, messages from stage to stage with known content, and the
time that small and large ones take.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from pagoda.errors import CommunicationError
from pagoda.parallel.groups import ParallelGroups

SMALL_ELEMENTS = 1
LARGE_BYTES = 4 * 2**20
NUM_SMALL = 10
NUM_LARGE = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkReport:
    """One group of this rank: `latency_seconds` of a collective of one element (median), `bytes_per_second` of large ones.

    The bandwidth of an all-reduce is that of each rank's link (NCCL's bus bandwidth), that of a pipeline what arrives from the
    stage before. None: not measured, as on the first stage, which receives nothing.
    """

    size: int
    latency_seconds: float
    bytes_per_second: float | None

    def __str__(self) -> str:
        bandwidth = "" if self.bytes_per_second is None else f", {self.bytes_per_second / 1e6:,.0f} MB/s"
        return f"{self.latency_seconds * 1e3:.2f} ms{bandwidth}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CommunicationReport:
    """What one rank measured; a group that it has not is None."""

    rank: int
    tensor: LinkReport | None = None
    pipeline: LinkReport | None = None


def check_communication(groups: ParallelGroups, device: torch.device) -> CommunicationReport:
    """Check and measure all groups of this rank; every rank of the model must call it at the same time.

    `device`: where the tensors live, as the backend of the groups needs it. Each collective is bounded by the timeout of its
    group.

    Raises:
        CommunicationError: something did not arrive, or other than it was sent; the message names the ranks.
    """
    rank = groups.coordinates.rank
    tensor = pipeline = None
    if groups.layout.tensor_parallel_size > 1:
        members = groups.layout.tensor_group(groups.coordinates.pipeline_stage)
        _check_contributions(members, rank, groups.tp_group.all_reduce, device)
        latency = _latency(groups.tp_group.all_reduce, device)
        tensor = LinkReport(
            size=len(members), latency_seconds=latency, bytes_per_second=_all_reduce_bandwidth(groups, device)
        )
    if groups.layout.pipeline_parallel_size > 1:
        members = groups.layout.pipeline_group(groups.coordinates.tensor_rank)
        _check_contributions(members, rank, groups.pp_group.all_reduce, device)
        latency = _latency(groups.pp_group.all_reduce, device)
        bandwidth = _pipeline_bandwidth(groups, device)
        pipeline = LinkReport(size=len(members), latency_seconds=latency, bytes_per_second=bandwidth)
    return CommunicationReport(rank=rank, tensor=tensor, pipeline=pipeline)


def communication_table(reports: Sequence[CommunicationReport]) -> list[str]:
    """A line for each kind of group, with its slowest member: that one sets the pace."""
    lines = []
    for what, links in (
        ("tensor groups, all-reduce", [(item.rank, item.tensor) for item in reports]),
        ("pipeline, stage to stage", [(item.rank, item.pipeline) for item in reports]),
    ):
        measured = [(rank, link) for rank, link in links if link is not None]
        if not measured:
            continue
        slow_rank, slow = max(measured, key=lambda pair: pair[1].latency_seconds)
        line = f"{what}: {slow.latency_seconds * 1e3:.2f} ms at most (rank {slow_rank})"
        bandwidths = [(link.bytes_per_second, rank) for rank, link in measured if link.bytes_per_second is not None]
        if bandwidths:
            lowest, rank = min(bandwidths)
            line += f", {lowest / 1e6:,.0f} MB/s at least (rank {rank})"
        lines.append(line)
    return lines


def _check_contributions(
    members: Sequence[int], rank: int, all_reduce: Callable[[torch.Tensor], torch.Tensor], device: torch.device
) -> None:
    """Each member gives its own number in its own place, so that the sum shows whose is missing or wrong."""
    values = torch.zeros(len(members), device=device)
    values[members.index(rank)] = rank + 1
    received = all_reduce(values).tolist()
    wrong = [
        f"rank {member} gave {member + 1} and {value:g} arrived"
        for member, value in zip(members, received, strict=True)
        if value != member + 1
    ]
    if wrong:
        ranks = ", ".join(map(str, members))
        raise CommunicationError(f"the all-reduce among ranks {ranks} is wrong on rank {rank}: {'; '.join(wrong)}")


def _latency(all_reduce: Callable[[torch.Tensor], torch.Tensor], device: torch.device) -> float:
    return statistics.median(_seconds(all_reduce, SMALL_ELEMENTS, device) for _ in range(NUM_SMALL))


def _all_reduce_bandwidth(groups: ParallelGroups, device: torch.device) -> float:
    fastest = min(_seconds(groups.tp_group.all_reduce, LARGE_BYTES // 4, device) for _ in range(NUM_LARGE))
    size = groups.tp_group.size
    return 2 * (size - 1) / size * LARGE_BYTES / fastest


def _seconds(all_reduce: Callable[[torch.Tensor], torch.Tensor], num_elements: int, device: torch.device) -> float:
    values = torch.zeros(num_elements, device=device)
    started = time.perf_counter()
    all_reduce(values)[0].item()  # reading an element waits for the device
    return time.perf_counter() - started


def _pipeline_bandwidth(groups: ParallelGroups, device: torch.device) -> float | None:
    """Take large messages from the stage before, check them, and pass the like on. The first message starts the clock."""
    coordinates = groups.coordinates
    sent = _pattern(coordinates.rank, device)
    if not coordinates.is_first_stage:
        before = groups.layout.pipeline_group(coordinates.tensor_rank)[coordinates.pipeline_stage - 1]
        expected = _pattern(before, device)
        received = torch.empty_like(expected)
        started = 0.0
        for index in range(NUM_LARGE + 1):
            if index == 1:
                started = time.perf_counter()
            groups.pp_group.receive(received)
            if not torch.equal(received, expected):
                raise CommunicationError(
                    f"a message from rank {before} was corrupted on its way to rank {coordinates.rank}"
                )
        bandwidth = NUM_LARGE * LARGE_BYTES / (time.perf_counter() - started)
    if not coordinates.is_last_stage:
        for _ in range(NUM_LARGE + 1):
            groups.pp_group.send(sent)
    return None if coordinates.is_first_stage else bandwidth


def _pattern(rank: int, device: torch.device) -> torch.Tensor:
    """int32 [LARGE_BYTES / 4], different in every place and for every rank."""
    return torch.arange(LARGE_BYTES // 4, dtype=torch.int32, device=device) * (rank + 1)
