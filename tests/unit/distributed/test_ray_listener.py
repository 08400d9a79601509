"""Ranks that come back over TCP are who they say they are, and nobody else gets in."""

import socket
import threading
import time
from collections.abc import Callable

import pytest

from pagoda.distributed.ray import listener as ray_listener
from pagoda.distributed.ray.listener import RankListener, connect_to_driver
from pagoda.errors import CommunicationError
from tests.support.ports import free_port


def come(listener: RankListener, rank: int, secret: bytes | None = None) -> threading.Thread:
    def connect() -> None:
        connected = connect_to_driver(
            listener.address,
            listener.port,
            rank=rank,
            host=f"host-{rank}",
            secret=listener.secret if secret is None else secret,
            timeout_seconds=10,
        )
        connected.sendall(bytes([rank]))

    thread = threading.Thread(target=connect)
    thread.start()
    return thread


def soon(seconds: float = 20.0) -> float:
    return time.monotonic() + seconds


def nothing(missing: list[int]) -> None:
    pass


def test_ranks_are_handed_out_in_their_order_whatever_order_they_come_in() -> None:
    with RankListener("127.0.0.1", 3) as listener:
        threads = [come(listener, rank) for rank in (2, 0, 1)]
        connected = listener.accept_all(soon(), nothing)
    for thread in threads:
        thread.join()
    assert [item.host for item in connected] == ["host-0", "host-1", "host-2"]
    assert [item.socket.recv(1) for item in connected] == [b"\0", b"\1", b"\2"]


def silent(address: tuple[str, int]) -> socket.socket:
    return socket.create_connection(address)


def talking(address: tuple[str, int]) -> socket.socket:
    connected = socket.create_connection(address)
    connected.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(200))
    return connected


def leaving(address: tuple[str, int]) -> socket.socket:
    connected = socket.create_connection(address)
    connected.close()
    return connected


@pytest.mark.parametrize("stranger", [silent, talking, leaving])
def test_strangers_neither_get_in_nor_keep_ranks_out(
    stranger: Callable[[tuple[str, int]], socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_listener, "_HANDSHAKE_SECONDS", 1.0)
    with RankListener("127.0.0.1", 1) as listener:
        strangers = [stranger((listener.address, listener.port)) for _ in range(5)]
        thread = come(listener, 0)
        connected = listener.accept_all(soon(), nothing)
        thread.join()
    assert [item.host for item in connected] == ["host-0"]
    for connected in strangers:
        connected.close()


def impostor_or_victim(address: str, port: int, secret: bytes, heard: list[str]) -> None:
    try:
        connect_to_driver(address, port, rank=0, host="x", secret=secret, timeout_seconds=5)
    except CommunicationError as error:
        heard.append(str(error))


def test_a_rank_with_another_secret_is_refused_and_hears_it() -> None:
    heard: list[str] = []
    with RankListener("127.0.0.1", 1) as listener:
        thread = threading.Thread(target=impostor_or_victim, args=(listener.address, listener.port, b"wrong", heard))
        thread.start()
        with pytest.raises(CommunicationError, match=r"rank 0 did not connect to 127\.0\.0\.1:"):
            listener.accept_all(soon(1.0), nothing)
        thread.join()
    assert "rank 0 on x cannot reach the engine" in heard[0]


def test_a_rank_does_not_talk_to_somebody_who_only_pretends_to_be_the_engine() -> None:
    with socket.create_server(("127.0.0.1", 0)) as false_engine:

        def answer() -> None:
            connected, _ = false_engine.accept()
            with connected:
                connected.sendall(bytes(32))
                connected.recv(4096)
                connected.sendall(bytes(32))
                connected.recv(1)

        thread = threading.Thread(target=answer)
        thread.start()
        address, port = false_engine.getsockname()
        with pytest.raises(CommunicationError, match="handshake failed: not the engine that launched this rank"):
            connect_to_driver(address, port, rank=0, host="x", secret=b"s", timeout_seconds=5)
        thread.join()


def test_the_proof_of_one_connection_is_worth_nothing_on_another() -> None:
    """A listener that replays what a rank sent it to the real engine is refused: the challenges differ."""
    with RankListener("127.0.0.1", 1) as listener, socket.create_server(("127.0.0.1", 0)) as middle:
        address, port = middle.getsockname()
        victim = threading.Thread(target=impostor_or_victim, args=(address, port, listener.secret, []))
        victim.start()
        connected, _ = middle.accept()
        connected.sendall(bytes(32))  # not the engine's challenge
        recorded = connected.recv(4096)
        replay = socket.create_connection((listener.address, listener.port))
        replay.sendall(recorded)
        with pytest.raises(CommunicationError, match="did not connect"):
            listener.accept_all(soon(1.0), nothing)
        connected.close()
        replay.close()
        victim.join()


def test_missing_ranks_are_named_in_time() -> None:
    with RankListener("127.0.0.1", 3) as listener:
        thread = come(listener, 1)
        seen: list[list[int]] = []
        with pytest.raises(CommunicationError, match=r"ranks 0, 2 did not connect to .* set network_interface"):
            listener.accept_all(soon(2.0), seen.append)
        thread.join()
    assert seen[0] == [0, 1, 2]
    assert seen[-1] == [0, 2]


def test_a_second_rank_of_the_same_number_is_refused() -> None:
    with RankListener("127.0.0.1", 2) as listener:
        threads = [come(listener, rank) for rank in (0, 0, 1)]
        connected = listener.accept_all(soon(), nothing)
        for thread in threads:
            thread.join()
    assert [item.host for item in connected] == ["host-0", "host-1"]


def test_what_the_launcher_sees_meanwhile_ends_the_wait() -> None:
    def died(missing: list[int]) -> None:
        raise CommunicationError(f"rank {missing[0]} died")

    with RankListener("127.0.0.1", 1) as listener, pytest.raises(CommunicationError, match="rank 0 died"):
        listener.accept_all(soon(), died)


def test_an_engine_that_is_not_there_is_a_sentence() -> None:
    port = free_port()
    with pytest.raises(CommunicationError, match=f"rank 4 on h cannot reach the engine at 127.0.0.1:{port}: "):
        connect_to_driver("127.0.0.1", port, rank=4, host="h", secret=b"s", timeout_seconds=5)
