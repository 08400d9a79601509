"""KV events over real sockets: a reader that joins at the start, or late by a replay, knows what the prefix cache holds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from pagoda.config.sources import from_kwargs
from pagoda.engine.core.kv_events import END_OF_REPLAY
from pagoda.engine.core.loop import EngineCore
from pagoda.engine.core.startup import start_core
from pagoda.errors import ConfigError
from pagoda.models.dummy import DummySpec
from pagoda.request import EngineRequest
from pagoda.sampling.params import SamplingParams
from tests.support.checkpoints import SMALL, shared_checkpoint
from tests.support.ports import free_port

BLOCK_SIZE = 4


class Reader:
    """Rebuilds the set of cached blocks from events, as a router does."""

    def __init__(self) -> None:
        self.cached: dict[tuple[int, bytes], list[int]] = {}
        self.events: list[dict[str, Any]] = []

    def read(self, message: bytes) -> None:
        _, events, rank = msgspec.msgpack.decode(message)
        assert rank == 0
        for event in events:
            self.events.append(event)
            if event["type"] == "BlockStored":
                assert event["block_size"] == BLOCK_SIZE
                assert len(event["token_ids"]) == BLOCK_SIZE * len(event["block_hashes"])
                for index, block_hash in enumerate(event["block_hashes"]):
                    block = event["group_idx"], block_hash
                    assert block not in self.cached
                    self.cached[block] = event["token_ids"][index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE]
            elif event["type"] == "BlockRemoved":
                for block_hash in event["block_hashes"]:
                    del self.cached[event["group_idx"], block_hash]
            else:
                assert event["type"] == "AllBlocksCleared"
                self.cached.clear()


@contextmanager
def engine(spec: DummySpec = SMALL, **events: Any) -> Iterator[EngineCore]:
    core = start_core(
        from_kwargs(
            {
                "model": str(shared_checkpoint(spec)),
                "dtype": "float32",
                "threads": 1,
                "block_size": BLOCK_SIZE,
                "num_gpu_blocks_override": 40,
                "max_model_len": 64,
                "max_num_seqs": 4,
                "kv_events_config": {"enable_kv_cache_events": True, **events},
            }
        )
    )
    try:
        yield core
    finally:
        core.shutdown()


def run(core: EngineCore, prompt: list[int], **changes: Any) -> None:
    core.add_request(
        EngineRequest(
            request_id=f"request-{time.monotonic_ns()}",
            prompt_token_ids=prompt,
            params=SamplingParams(temperature=0.0, ignore_eos=True),
            max_tokens=9,
            **changes,
        )
    )
    while core.has_work:
        core.step()


def prompts() -> Iterator[list[int]]:
    """Some that share beginnings, and more than the cache holds."""
    for number in range(12):
        yield [7, 8, 9, 10] * 2 + [number + 11] * 12


def in_cache(core: EngineCore) -> set[tuple[int, bytes]]:
    groups = enumerate(core._scheduler.kv.pool._blocks_of_hashes)
    return {(group, block_hash) for group, blocks in groups for block_hash in blocks}


def read_until(reader: Reader, socket: zmq.Socket, expected: set[tuple[int, bytes]]) -> list[int]:
    """Read messages until the reader knows what is expected; their sequence numbers."""
    numbers = []
    while set(reader.cached) != expected:
        assert socket.poll(20_000), "no further message"
        topic, sequence, message = socket.recv_multipart()
        assert topic == b"kv@10.0.0.1@tale"
        numbers.append(int.from_bytes(sequence, "big"))
        reader.read(message)
    return numbers


@pytest.fixture
def context() -> Iterator[zmq.Context]:
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


@pytest.mark.parametrize("windows", [[None], [None, 8]])
def test_a_reader_of_the_events_knows_the_cache(
    windows: list[int | None], context: zmq.Context, tmp_path: Path
) -> None:
    spec = SMALL if len(windows) == 1 else DummySpec(num_layers=2, sliding_window=8, max_window_layers=1)
    endpoint, replay_port = f"ipc://{tmp_path}/events", free_port()
    reader = Reader()
    replay = f"tcp://127.0.0.1:{replay_port}"
    with engine(spec, endpoint=endpoint, replay_endpoint=replay, topic="kv@10.0.0.1@tale") as core:
        for prompt in prompts():
            run(core, prompt)
        run(core, [1, 2, 3, 4, 5], cache_keys=("tenant=t", "salt=a"))
        expected = in_cache(core)
        # One that comes late asks for all that was sent before it subscribed.
        asking = context.socket(zmq.DEALER)
        asking.connect(f"tcp://127.0.0.1:{replay_port}")
        while set(reader.cached) != expected:  # the last message may still be queued
            reader = Reader()
            asking.send_multipart([b"", (0).to_bytes(8, "big")])
            number = 0
            while True:
                assert asking.poll(20_000)
                _, sequence, message = asking.recv_multipart()
                if sequence == END_OF_REPLAY:
                    break
                assert int.from_bytes(sequence, "big") == number
                reader.read(message)
                number += 1
        stored = [event for event in reader.events if event["type"] == "BlockStored"]
        found = {event["group_idx"]: event["kv_cache_spec_sliding_window"] for event in stored}
        assert [found[group] for group in range(len(found))] == windows
        kinds = {event["type"] for event in reader.events}
        assert kinds == {"BlockStored", "BlockRemoved"}
        assert any(event.get("extra_keys") == [["a"]] for event in reader.events)
        # And from then on it reads what is published.
        socket = context.socket(zmq.SUB)
        socket.connect(endpoint)
        socket.subscribe(b"kv@")
        while not socket.poll(50):  # until it has joined
            run(core, [21, 22, 23, 24, number % 200, 25, 26, 27])
            number += 1
        core._scheduler.kv.forget_prefixes()
        run(core, [31, 32, 33, 34, 35])
        behind = Reader()
        while not any(event["type"] == "AllBlocksCleared" for event in behind.events):
            assert socket.poll(20_000)
            _, _, message = socket.recv_multipart()
            behind.cached = {block: [] for block in _removed(message)}  # removed ones from before it joined
            behind.read(message)
        read_until(behind, socket, in_cache(core))


def _removed(message: bytes) -> list[tuple[int, bytes]]:
    _, events, _ = msgspec.msgpack.decode(message)
    removed = [event for event in events if event["type"] == "BlockRemoved"]
    return [(event["group_idx"], block_hash) for event in removed for block_hash in event["block_hashes"]]


def test_events_are_sent_to_a_reader_that_listens(context: zmq.Context) -> None:
    socket = context.socket(zmq.SUB)
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    socket.subscribe(b"")
    with engine(endpoint=f"tcp://127.0.0.1:{port}", topic="kv@10.0.0.1@tale") as core:
        number = 0
        while not socket.poll(50):  # until it has connected
            number += 1
            run(core, [number, 2, 3, 4, 5])
        topic, _, message = socket.recv_multipart()
    assert topic == b"kv@10.0.0.1@tale"
    assert msgspec.msgpack.decode(message)[1][0]["medium"] == "CPU"


def test_a_port_that_is_taken_is_named(context: zmq.Context, tmp_path: Path) -> None:
    socket = context.socket(zmq.PUB)
    address = f"tcp://127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}"
    taken = "kv_events_config: replay_endpoint cannot be used: Address already"
    with pytest.raises(ConfigError, match=taken), engine(endpoint=f"ipc://{tmp_path}/e", replay_endpoint=address):
        pass


def test_a_malformed_replay_request_changes_nothing(context: zmq.Context, tmp_path: Path) -> None:
    replay_port = free_port()
    with engine(endpoint=f"ipc://{tmp_path}/events", replay_endpoint=f"tcp://127.0.0.1:{replay_port}") as core:
        run(core, [1, 2, 3, 4, 5])
        asking = context.socket(zmq.DEALER)
        asking.connect(f"tcp://127.0.0.1:{replay_port}")
        for frames in ([b""], [b"x", b"0" * 8], [b"", b"short"], [b"", b"0" * 8, b"more"]):
            asking.send_multipart(frames)
        asking.send_multipart([b"", (10**6).to_bytes(8, "big")])
        assert asking.poll(20_000)
        assert asking.recv_multipart() == [b"", END_OF_REPLAY, b""]
