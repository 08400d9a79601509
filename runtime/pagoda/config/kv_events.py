"""`kv_events_config`: the keys that vLLM's has."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

_PORT = re.compile(r":(\d{1,5})$")
_VARIABLE = re.compile(r"\$\{(\w+)\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class KVEventsConfig:
    """How changes of the prefix cache are published over ZeroMQ. Names and meaning are vLLM's.

    `endpoint`: the PUB socket is bound there if it names no single peer (`tcp://*:5557`, `ipc://…`), else connected to it.
    `replay_endpoint`: where the ROUTER socket is bound that sends the last `buffer_steps` messages again; None: nowhere.
    `hwm`: messages kept for a subscriber that is slow. `max_queue_size`: messages waiting to be sent. `topic`: first frame
    of every message. `data_parallel_rank`: of the replica; its ports are so many above those that are given. In the endpoints
    and the topic `${NAME}` is an environment variable, for what only a pod knows: `kv@${POD_IP}@MODEL`.
    """

    enable_kv_cache_events: bool = False
    publisher: str = "zmq"
    endpoint: str = "tcp://*:5557"
    replay_endpoint: str | None = None
    buffer_steps: int = 10_000
    hwm: int = 100_000
    max_queue_size: int = 100_000
    topic: str = ""
    data_parallel_rank: int = 0

    @classmethod
    def parse(cls, value: Mapping[str, Any], environ: Mapping[str, str] | None = None) -> KVEventsConfig:
        """Of the JSON object that a user gave; `environ`: the process's own if None.

        Raises `ValueError` with a sentence on the first key that is wrong.
        """
        known = [field.name for field in fields(cls)]
        for key in value:
            if key not in known:
                raise ValueError(f"{str(key)[:80]!r} is no key of it; there are {', '.join(known)}")
        environ = os.environ if environ is None else environ
        texts = {key: value[key] for key in _EXPANDED if isinstance(value.get(key), str)}
        config = cls(**{**value, **{key: _expanded(key, text, environ) for key, text in texts.items()}})
        config._check()
        return config

    def of_replica(self, index: int) -> dict[str, Any]:
        """The JSON object of replica `index`, whose TCP ports are `index` above those of the first."""
        values = asdict(self) | {"data_parallel_rank": index}
        for name in ("endpoint", "replay_endpoint"):
            if values[name] is not None:
                values[name] = _PORT.sub(lambda match: f":{int(match[1]) + index}", values[name])
        return values

    @property
    def is_on(self) -> bool:
        """Whether anything is published."""
        return self.enable_kv_cache_events and self.publisher == "zmq"

    @property
    def binds(self) -> bool:
        """Whether the PUB socket is bound to `endpoint`."""
        return any(mark in self.endpoint for mark in ("*", "::", "0.0.0.0", "ipc://", "inproc://"))

    def _check(self) -> None:
        if not isinstance(self.enable_kv_cache_events, bool):
            raise ValueError(f"enable_kv_cache_events={self.enable_kv_cache_events!r} must be true or false")
        if self.publisher not in ("zmq", "null"):
            raise ValueError(f"publisher={self.publisher!r} must be zmq or null")
        for name in ("endpoint", "replay_endpoint"):
            value = getattr(self, name)
            if name == "replay_endpoint" and value is None:
                continue
            if not isinstance(value, str) or not re.match(r"(tcp|ipc|inproc)://.", value):
                raise ValueError(f"{name}={value!r} must begin with tcp://, ipc:// or inproc://")
            port = _PORT.search(value)
            if value.startswith("tcp://") and (port is None or not 0 < int(port[1]) < 65536):
                raise ValueError(f"{name}={value!r} must end with a port from 1 to 65535")
        for name in ("buffer_steps", "hwm", "max_queue_size", "data_parallel_rank"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name}={value!r} must be an integer of at least 0")
        if not isinstance(self.topic, str):
            raise ValueError(f"topic={self.topic!r} must be a string")


_EXPANDED = ("endpoint", "replay_endpoint", "topic")


def _expanded(key: str, text: str, environ: Mapping[str, str]) -> str:
    def value_of(match: re.Match[str]) -> str:
        if match[1] not in environ:
            raise ValueError(f"{key}={text!r}: the environment has no variable {match[1]}")
        return environ[match[1]]

    return _VARIABLE.sub(value_of, text)
