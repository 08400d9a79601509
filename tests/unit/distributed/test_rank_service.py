"""What a rank does with its device, on a machine that has none: torch's calls are faked."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pagoda.config.schema import PagodaConfig
from pagoda.distributed import rank_service
from pagoda.distributed.rank_messages import EndRank, JoinGroup
from pagoda.distributed.rank_service import RankService


@pytest.fixture
def service() -> Iterator[RankService]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        service = RankService(ours, rank=1)
        service._config = PagodaConfig(device="cuda", tensor_parallel_size=2, max_num_batched_tokens=512)
        service._model_config = SimpleNamespace()  # type: ignore[assignment]
        service._start = SimpleNamespace(device_index=3)  # type: ignore[assignment]
        yield service


def test_groups_and_worker_get_the_index_of_the_gpu(service: RankService, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.device] = []

    def connect_groups(*_: Any, device: torch.device, **__: Any) -> str:
        seen.append(device)
        return "groups"

    monkeypatch.setattr(rank_service, "connect_groups", connect_groups)
    monkeypatch.setattr(rank_service, "Worker", lambda config, model, groups, device: seen.append(device))
    monkeypatch.setattr(service._channel, "send", lambda message: None)
    service._join(JoinGroup(host="127.0.0.1", port=1))
    assert seen == [torch.device("cuda", 3)] * 2


def test_graphs_are_gone_before_the_groups_whose_collectives_they_captured(service: RankService) -> None:
    order: list[str] = []
    service._worker = SimpleNamespace(shutdown=lambda: order.append("worker"))  # type: ignore[assignment]
    service._groups = SimpleNamespace(close=lambda: order.append("groups"))  # type: ignore[assignment]
    service._end(EndRank("the test is over"))
    assert order == ["worker", "groups"]


def test_a_rank_that_has_no_worker_yet_ends_too(service: RankService) -> None:
    service._end(EndRank("the test is over"))


def test_the_thread_of_results_works_on_the_gpu_of_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", seen.append)
    executor: ThreadPoolExecutor = rank_service.results_executor(3)
    with executor:
        executor.submit(seen.append, -1).result()
    assert seen == [3, -1]
