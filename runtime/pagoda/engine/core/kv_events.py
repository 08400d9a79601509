"""Changes of the prefix cache on a ZeroMQ socket, as vLLM publishes them and llm-d's endpoint picker reads them.

    frames       topic | sequence number, 8 bytes, big endian | message
    message      msgpack: [timestamp, events, data parallel rank]; an event is a map with its `type`
    replay       a ROUTER socket: asked with a sequence number, it sends every message from there on that it still has, as
                 frames (empty | sequence number | message), and then one with sequence number -1

Block hashes are this engine's own; a reader takes them as names and may make others from `token_ids`.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from typing_extensions import override

from pagoda.adapters import adapter_name
from pagoda.config.kv_events import KVEventsConfig
from pagoda.errors import ConfigError
from pagoda.scheduling.cache_events import CacheEvent, CacheEventLog, CacheEventSink, Cleared, Stored
from pagoda.scheduling.kv_groups import FullGroup, GroupRule

logger = logging.getLogger(__name__)

END_OF_REPLAY = (-1).to_bytes(8, "big", signed=True)
_POLL_MILLISECONDS = 100
_LINGER_MILLISECONDS = 200
_SALT = "salt="
_MEDIUM = {"cpu": "CPU", "cuda": "GPU"}


class BlockStored(msgspec.Struct, tag=True, tag_field="type", kw_only=True):
    """Blocks that can be found now. `extra_keys`: one entry a block, of the first of a prompt the request's `cache_salt`.

    A router hashes these with the tokens and compares with the salt in a request's body. It knows nothing of tenants, and they
    are not published. `group_idx`: the group of layers; with several, a prefix can be found where all of them have what they
    need of it.
    """

    block_hashes: list[bytes]
    parent_block_hash: bytes | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None = None
    medium: str | None
    lora_name: str | None = None
    extra_keys: list[list[str] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None


class BlockRemoved(msgspec.Struct, tag=True, tag_field="type", kw_only=True):
    """Blocks that cannot be found any more."""

    block_hashes: list[bytes]
    medium: str | None
    group_idx: int | None = None


class AllBlocksCleared(msgspec.Struct, tag=True, tag_field="type"):
    """No block can be found."""


class KVEventPublisher(CacheEventSink):
    """Sends what `log` has collected, from a thread of its own: a step waits for no socket.

    Raises `ConfigError` where a socket cannot be bound, or ZeroMQ is not installed.
    """

    def __init__(
        self,
        config: KVEventsConfig,
        log: CacheEventLog,
        *,
        block_size: int,
        device: str,
        rules: Sequence[GroupRule] = (FullGroup(),),
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._config = config
        self._log = log
        self._block_size = block_size
        self._rules = rules
        self._medium = _MEDIUM[device]
        self._clock = clock
        self._queue: queue.Queue[bytes] = queue.Queue(config.max_queue_size)
        self._buffer: deque[tuple[int, bytes]] = deque(maxlen=config.buffer_steps)
        self._num_sent = 0
        self._num_lost = 0
        self._is_closed = False
        self._open()
        self._thread = threading.Thread(target=self._run, name="kv-events", daemon=True)
        self._thread.start()

    @override
    def flush(self) -> None:
        """Queue the events as one message. When the queue is full, the message is lost, and counted."""
        events = self._log.take()
        if not events:
            return
        message = [self._clock(), [self._encoded(event) for event in events], self._config.data_parallel_rank]
        try:
            self._queue.put_nowait(msgspec.msgpack.encode(message))
        except queue.Full:
            self._num_lost += 1
            if self._num_lost.bit_count() == 1:  # 1, 2, 4, 8 …
                logger.warning("KV events: the queue of %d is full; %d lost", self._queue.maxsize, self._num_lost)

    @override
    def close(self) -> None:
        self._is_closed = True
        self._thread.join()

    def _open(self) -> None:
        try:
            import zmq  # only where it is asked for
        except ImportError as error:
            raise ConfigError(f"kv_events_config: ZeroMQ is not installed ({error}): pip install pyzmq") from error
        context = zmq.Context()
        self._context = context
        self._publisher = context.socket(zmq.PUB)
        self._publisher.set_hwm(self._config.hwm)
        self._replay: Any = None
        self._poller = zmq.Poller()
        try:
            (self._publisher.bind if self._config.binds else self._publisher.connect)(self._config.endpoint)
            if self._config.replay_endpoint is not None:
                self._replay = context.socket(zmq.ROUTER)
                self._replay.bind(self._config.replay_endpoint)
                self._poller.register(self._replay, zmq.POLLIN)
        except zmq.ZMQError as error:
            context.destroy(linger=0)
            name = "endpoint" if self._replay is None else "replay_endpoint"
            raise ConfigError(f"kv_events_config: {name} cannot be used: {error}") from error
        logger.info(
            "KV events: %s %s%s",
            "published on" if self._config.binds else "sent to",
            self._config.endpoint,
            f", replayed on {self._config.replay_endpoint}" if self._replay is not None else "",
        )

    def _run(self) -> None:
        try:
            while not (self._is_closed and self._queue.empty()):
                if self._replay is not None and self._poller.poll(0):
                    self._send_again()
                try:
                    message = self._queue.get(timeout=_POLL_MILLISECONDS / 1000)
                except queue.Empty:
                    continue
                sequence = self._num_sent.to_bytes(8, "big")
                self._publisher.send_multipart([self._config.topic.encode(), sequence, message])
                self._buffer.append((self._num_sent, message))
                self._num_sent += 1
        finally:
            self._context.destroy(linger=_LINGER_MILLISECONDS)

    def _send_again(self) -> None:
        """Answer one request for old messages; one of another form is left unanswered, as a ROUTER has no other way."""
        peer, *frames = self._replay.recv_multipart()
        start = frames[-1] if frames else b""
        if len(frames) != 2 or frames[0] or len(start) != 8:
            logger.warning("KV events: a replay request of %d frames, the last of %d bytes", len(frames), len(start))
            return
        first = int.from_bytes(start, "big")
        for number, message in self._buffer:
            if number >= first:
                self._replay.send_multipart([peer, b"", number.to_bytes(8, "big"), message])
        self._replay.send_multipart([peer, b"", END_OF_REPLAY, b""])

    def _encoded(self, event: CacheEvent) -> msgspec.Struct:
        if isinstance(event, Stored):
            salts = [key.removeprefix(_SALT) for key in event.cache_keys if key.startswith(_SALT)]
            adapters = [adapter_name(key) for key in event.cache_keys]
            keys = salts if event.parent is None and salts else None
            rule = self._rules[event.group]
            return BlockStored(
                block_hashes=list(event.block_hashes),
                parent_block_hash=event.parent,
                token_ids=list(event.token_ids),
                block_size=self._block_size,
                lora_name=next((name for name in adapters if name is not None), None),
                medium=self._medium,
                extra_keys=None if keys is None else [keys, *[None] * (len(event.block_hashes) - 1)],
                group_idx=event.group,
                kv_cache_spec_kind=rule.kind,
                kv_cache_spec_sliding_window=rule.window,
            )
        if isinstance(event, Cleared):
            return AllBlocksCleared()
        return BlockRemoved(block_hashes=list(event.block_hashes), medium=self._medium, group_idx=event.group)
