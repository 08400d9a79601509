from __future__ import annotations

import re

import pytest

from pagoda.config.kv_events import KVEventsConfig


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({"endpiont": "tcp://*:1"}, "'endpiont' is no key of it; there are enable_kv_cache_events, publisher"),
        ({"publisher": "kafka"}, "publisher='kafka' must be zmq or null"),
        ({"endpoint": "5557"}, "endpoint='5557' must begin with tcp://"),
        ({"endpoint": "tcp://*"}, "must end with a port"),
        ({"replay_endpoint": "tcp://*:70000"}, "replay_endpoint='tcp://*:70000' must end with a port"),
        ({"buffer_steps": -1}, "buffer_steps=-1"),
        ({"hwm": True}, "hwm=True"),
        ({"topic": 7}, "topic=7 must be a string"),
        ({"enable_kv_cache_events": "yes"}, "enable_kv_cache_events='yes' must be true or false"),
    ],
)
def test_a_wrong_key_or_value_is_named(value: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=re.escape(named)):
        KVEventsConfig.parse(value)


@pytest.mark.parametrize(
    ("endpoint", "binds"),
    [("tcp://*:5557", True), ("tcp://[::]:5557", True), ("ipc:///tmp/events", True), ("tcp://picker:5557", False)],
)
def test_vllm_s_rule_for_binding(endpoint: str, binds: bool) -> None:
    assert KVEventsConfig.parse({"endpoint": endpoint}).binds is binds


def test_replicas_have_ports_of_their_own() -> None:
    config = KVEventsConfig.parse({"endpoint": "tcp://*:5557", "replay_endpoint": "tcp://*:5657"})
    third = KVEventsConfig.parse(config.of_replica(2))
    assert (third.endpoint, third.replay_endpoint, third.data_parallel_rank) == ("tcp://*:5559", "tcp://*:5659", 2)


def test_it_is_off_unless_it_is_turned_on() -> None:
    assert not KVEventsConfig.parse({"endpoint": "tcp://*:5557"}).is_on
    assert not KVEventsConfig.parse({"enable_kv_cache_events": True, "publisher": "null"}).is_on
    assert KVEventsConfig.parse({"enable_kv_cache_events": True}).is_on


def test_what_only_a_pod_knows_comes_from_its_environment() -> None:
    value = {"endpoint": "tcp://${PICKER}:5557", "topic": "kv@${POD_IP}@Qwen/Qwen3"}
    config = KVEventsConfig.parse(value, {"PICKER": "epp", "POD_IP": "10.0.0.7"})
    assert (config.endpoint, config.topic) == ("tcp://epp:5557", "kv@10.0.0.7@Qwen/Qwen3")
    with pytest.raises(ValueError, match=re.escape("the environment has no variable POD_IP")):
        KVEventsConfig.parse(value, {"PICKER": "epp"})
