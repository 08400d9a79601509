"""Ranks that meet: where they listen, and what is said when one does not come."""

from __future__ import annotations

import socket
import subprocess
import sys
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


MEET = """
import os, socket, sys, time
import torch
from pagoda.parallel.groups import connect_groups
from pagoda.parallel.layout import ParallelLayout

rank, port = map(int, sys.argv[1:3])
listener = socket.socket(fileno=int(sys.argv[3])) if rank == 0 else None
groups = connect_groups(
    ParallelLayout(2, 1), rank, host="127.0.0.1", port=port, backend="gloo", timeout_seconds=60.0,
    device=torch.device("cpu"), listener=listener,
)
print("met", flush=True)
sys.stdin.readline()
print(groups.tp_group.all_reduce(torch.ones(3)).tolist(), flush=True)
groups.close()
"""


def test_nobody_can_reach_the_rendezvous_once_the_ranks_have_met() -> None:
    with listen_on("127.0.0.1") as listener:
        port = listener.getsockname()[1]
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", MEET, str(rank), str(port), str(listener.fileno())],
                pass_fds=(listener.fileno(),) if rank == 0 else (),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
    try:
        for process in ranks:
            assert process.stdout is not None
            assert process.stdout.readline() == "met\n"
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=5)
        for process in ranks:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        assert [process.communicate(timeout=60)[0] for process in ranks] == ["[2.0, 2.0, 2.0]\n"] * 2
    finally:
        for process in ranks:
            process.kill()
            process.wait()
