"""What is told of ranks on a Ray cluster: names of hosts, and how a rank ended, out of Ray's own words."""

import socket

import pytest

from pagoda.config.schema import PagodaConfig
from pagoda.distributed.ray.executor import RayLauncher, _describe_end, _names
from pagoda.distributed.ray.listener import ConnectedRank
from pagoda.errors import CommunicationError

KILLED = """The actor died unexpectedly before finishing this task.
	class_name: PagodaRank
	actor_id: 1f2e
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker unexpectedly
exits with a connection error code 2. End of file. Some common causes include: (1) the process was killed by the OOM killer"""
NODE_LOST = """The actor died unexpectedly before finishing this task.
The actor died because its node has died. Node Id: 5ac1. the actor's node was terminated unexpectedly: health check failed due
to missing too many heartbeats"""


def connected(host: str, address: str) -> ConnectedRank:
    return ConnectedRank(socket.socket(), host, address)


def test_hosts_of_one_name_are_told_apart_by_address() -> None:
    ranks = [
        connected("a", "10.0.0.1"),
        connected("a", "10.0.0.1"),
        connected("b", "10.0.0.2"),
        connected("b", "10.0.0.3"),
    ]
    assert _names(ranks) == ["a", "a", "b (10.0.0.2)", "b (10.0.0.3)"]
    for rank in ranks:
        rank.socket.close()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (KILLED, "was killed by SIGKILL (OOM killer or operator)"),
        (NODE_LOST, "ended with its node, which Ray reports dead (no heartbeat of the node)"),
        ("GetTimeoutError: no answer", "ended: GetTimeoutError: no answer"),
    ],
)
def test_the_end_of_a_rank_in_words(text: str, words: str) -> None:
    assert _describe_end(Exception(text)) == words


def test_a_rank_that_was_never_launched_has_no_death() -> None:
    assert RayLauncher(PagodaConfig()).death_of(0) is None


def test_a_launch_without_a_cluster_fails_in_words_and_ends_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object) -> None:
        raise CommunicationError("the Ray head at h:6379 cannot be reached")

    monkeypatch.setattr("pagoda.distributed.ray.executor.connect_cluster", unreachable)
    launcher = RayLauncher(PagodaConfig())
    with pytest.raises(CommunicationError, match="cannot be reached"):
        launcher.launch(2, 1.0, lambda words: None)
    launcher.terminate(0.0)
