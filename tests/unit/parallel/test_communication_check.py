"""The communication check tells a group that works from one that loses or changes what its ranks send, and measures it."""

import pytest
import torch

from pagoda.errors import CommunicationError
from pagoda.parallel.groups import ParallelGroups, PipelineParallelGroup, TensorParallelGroup
from pagoda.parallel.layout import ParallelLayout
from pagoda.parallel.preflight import CommunicationReport, LinkReport, check_communication, communication_table

CPU = torch.device("cpu")


class OtherRank(TensorParallelGroup):
    """A group of ranks 0 and 1 as rank 0 sees it; `gives` is what arrives from rank 1."""

    size = 2

    def __init__(self, gives: float = 2.0) -> None:
        self._gives = gives

    def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        if len(values) == 2:
            values[1] += self._gives
        return values


class StageBefore(PipelineParallelGroup):
    """The link of the second stage of two; `noise` is added to what the first one sends."""

    def __init__(self, noise: int = 0) -> None:
        self._noise = noise

    def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        if len(values) == 2:
            values[0] += 1
        return values

    def receive(self, into: torch.Tensor) -> torch.Tensor:
        torch.arange(len(into), dtype=into.dtype, out=into)
        into[-1] += self._noise
        return into


def tensor_groups(group: TensorParallelGroup) -> ParallelGroups:
    layout = ParallelLayout(2, 1)
    return ParallelGroups(layout, layout.coordinates(0), group, PipelineParallelGroup())


def pipeline_groups(link: PipelineParallelGroup) -> ParallelGroups:
    layout = ParallelLayout(1, 2)
    return ParallelGroups(layout, layout.coordinates(1), TensorParallelGroup(), link)


def test_a_group_that_adds_up_is_measured() -> None:
    report = check_communication(tensor_groups(OtherRank()), CPU)
    assert report.rank == 0
    assert report.pipeline is None
    assert report.tensor is not None
    assert report.tensor.size == 2
    assert report.tensor.latency_seconds > 0
    assert (report.tensor.bytes_per_second or 0) > 0


@pytest.mark.parametrize(("gives", "arrived"), [(0.0, "0"), (2.5, "2.5")])
def test_a_contribution_that_is_missing_or_changed_names_its_rank(gives: float, arrived: str) -> None:
    with pytest.raises(
        CommunicationError,
        match=f"the all-reduce among ranks 0, 1 is wrong on rank 0: rank 1 gave 2 and {arrived} arrived",
    ):
        check_communication(tensor_groups(OtherRank(gives)), CPU)


def test_a_pipeline_that_delivers_is_measured() -> None:
    report = check_communication(pipeline_groups(StageBefore()), CPU)
    assert report.tensor is None
    assert report.pipeline is not None
    assert (report.pipeline.bytes_per_second or 0) > 0


def test_a_message_that_arrives_changed_names_both_ends() -> None:
    with pytest.raises(CommunicationError, match="a message from rank 0 was corrupted on its way to rank 1"):
        check_communication(pipeline_groups(StageBefore(noise=1)), CPU)


def test_the_table_shows_the_slowest() -> None:
    def link(milliseconds: float, megabytes: float | None) -> LinkReport:
        speed = None if megabytes is None else megabytes * 1e6
        return LinkReport(size=2, latency_seconds=milliseconds / 1e3, bytes_per_second=speed)

    reports = [
        CommunicationReport(rank=0, tensor=link(0.2, 900), pipeline=link(1.5, None)),
        CommunicationReport(rank=1, tensor=link(0.4, 1200), pipeline=link(1.0, 80)),
    ]
    assert communication_table(reports) == [
        "tensor groups, all-reduce: 0.40 ms at most (rank 1), 900 MB/s at least (rank 0)",
        "pipeline, stage to stage: 1.50 ms at most (rank 0), 80 MB/s at least (rank 1)",
    ]
    assert communication_table([CommunicationReport(rank=0)]) == []
