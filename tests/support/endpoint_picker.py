"""An endpoint picker, written from the contract that llm-d's has with a model server: it knows nothing else of Pagoda.

It reads `vllm:` metrics, follows KV events over ZeroMQ, has a server render prompts, and has hashes of its own for blocks.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import msgspec
import zmq

_SAMPLE = re.compile(r"^vllm:(\w+)\{[^}]*\} (\S+)$", re.MULTILINE)
_BLOCK_SIZE = re.compile(r'^vllm:cache_config_info\{[^}]*block_size="(\d+)"', re.MULTILINE)
PREFIX_WEIGHT, KV_WEIGHT, QUEUE_WEIGHT = 3.0, 2.0, 2.0


@dataclass
class Pod:
    """A server, and what of its cache is known: the picker's keys of its blocks, and whose of the server's names they are."""

    name: str
    client: httpx.Client
    blocks: set[int] = field(default_factory=set)
    keys: dict[bytes, int] = field(default_factory=dict)
    next_sequence: int = 0

    def read(self, sequence: int, message: bytes) -> None:
        """Follow one message of events."""
        assert sequence == self.next_sequence, f"{self.name}: message {sequence} after {self.next_sequence - 1}"
        self.next_sequence += 1
        _, events, _ = msgspec.msgpack.decode(message)
        for event in events:
            if event["type"] == "BlockStored":
                parent = event["parent_block_hash"]
                key = 0 if parent is None else self.keys[parent]
                size = event["block_size"]
                for index, name in enumerate(event["block_hashes"]):
                    key = hash((key, *event["token_ids"][index * size : (index + 1) * size]))
                    self.keys[name] = key
                    self.blocks.add(key)
            elif event["type"] == "BlockRemoved":
                for name in event["block_hashes"]:
                    self.blocks.discard(self.keys.pop(name))
            else:
                assert event["type"] == "AllBlocksCleared"
                self.blocks.clear()
                self.keys.clear()


class EndpointPicker:
    """Chooses a pod for a prompt by what it has cached, how full its KV cache is, and how many requests it has."""

    def __init__(self, model: str, context: zmq.Context[Any]) -> None:
        self.model = model
        self.pods: dict[str, Pod] = {}
        self._socket = context.socket(zmq.SUB)
        self.endpoint = f"tcp://127.0.0.1:{self._socket.bind_to_random_port('tcp://127.0.0.1')}"
        self._socket.subscribe(b"kv@")

    def add(self, name: str, client: httpx.Client) -> None:
        """Route to another pod."""
        self.pods[name] = Pod(name, client)

    def read_events(self, milliseconds: int = 0) -> int:
        """Follow the events that have come, or come so soon; how many messages."""
        count = 0
        while self._socket.poll(0 if count else milliseconds):
            topic, sequence, message = self._socket.recv_multipart()
            kind, name, model = topic.decode().split("@", 2)
            assert (kind, model) == ("kv", self.model)
            self.pods[name].read(int.from_bytes(sequence, "big"), message)
            count += 1
        return count

    def pick(self, prompt: str) -> Pod:
        """The pod for a prompt."""
        self.read_events()
        pods = list(self.pods.values())
        body = {"model": self.model, "prompt": prompt}
        (rendered,) = pods[0].client.post("/v1/completions/render", json=body).json()
        tokens = rendered["token_ids"]
        metrics = {pod.name: pod.client.get("/metrics").text for pod in pods}
        (block_size,) = {int(_BLOCK_SIZE.search(text)[1]) for text in metrics.values()}  # type: ignore[index]
        keys = _keys_of(tokens, block_size)

        def score(pod: Pod) -> float:
            samples: dict[str, float] = defaultdict(float, {n: float(v) for n, v in _SAMPLE.findall(metrics[pod.name])})
            num_cached = next((i for i, key in enumerate(keys) if key not in pod.blocks), len(keys))
            load = samples["num_requests_waiting"] + samples["num_requests_running"]
            return (
                PREFIX_WEIGHT * num_cached / max(1, len(keys))
                + KV_WEIGHT * (1 - samples["kv_cache_usage_perc"])
                + QUEUE_WEIGHT / (1 + load)
            )

        best = max(map(score, pods))
        # Of equals the one with the fewest blocks.
        return min((pod for pod in pods if score(pod) == best), key=lambda pod: len(pod.blocks))


def _keys_of(tokens: Sequence[int], block_size: int) -> list[int]:
    keys, key = [], 0
    for start in range(0, len(tokens) - block_size + 1, block_size):
        key = hash((key, *tokens[start : start + block_size]))
        keys.append(key)
    return keys
