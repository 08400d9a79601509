"""Ranks that meet: where they listen, and what is said when one does not come."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from pagoda.errors import CommunicationError
from pagoda.parallel.groups import SINGLE_RANK, ParallelGroups, connect_groups
from pagoda.parallel.interfaces import listen_on
from pagoda.parallel.layout import ParallelLayout
from tests.support.ports import free_port


def connect(
    port: int,
    rank: int,
    layout: ParallelLayout | None = None,
    timeout: float = 2.0,
    listener: socket.socket | None = None,
) -> ParallelGroups:
    return connect_groups(
        layout or ParallelLayout(2, 1),
        rank,
        host="127.0.0.1",
        port=port,
        backend="gloo",
        timeout_seconds=timeout,
        device=torch.device("cpu"),
        listener=listener,
    )


def test_single_rank_needs_nobody_and_gives_back_what_it_gets() -> None:
    assert connect(1, 0, ParallelLayout()) is SINGLE_RANK
    values = torch.ones(2, 3)
    tensor = SINGLE_RANK.tp_group
    assert tensor.all_reduce(values) is values
    assert tensor.all_gather(values, 1) is values
    assert tensor.gather(values, 1) is values
    assert tensor.broadcast(values) is values
    SINGLE_RANK.close()


def test_rank_zero_listens_on_its_address_alone_and_says_who_did_not_come() -> None:
    listener = listen_on("127.0.0.1")
    port = listener.getsockname()[1]
    with ThreadPoolExecutor(1) as pool:
        meeting = pool.submit(connect, port, 0, None, 2.0, listener)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port), timeout=1)
        with pytest.raises(
            CommunicationError, match=rf"rank 0 of 2 at the rendezvous on 127.0.0.1:{port} failed: .*1/2"
        ):
            meeting.result(timeout=60)


def test_a_rank_zero_that_is_not_there_is_told_with_its_address() -> None:
    port = free_port()
    with pytest.raises(CommunicationError, match=rf"rank 1 of 2 at the rendezvous on 127.0.0.1:{port} failed"):
        connect(port, 1, timeout=1.0)
