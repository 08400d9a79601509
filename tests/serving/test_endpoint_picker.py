"""A picker written from llm-d's contract over three real servers: requests go where their prefix is cached."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import zmq

from pagoda.models.checkpoint_source import demo_checkpoint
from tests.support.endpoint_picker import EndpointPicker, Pod
from tests.support.server import ServerProcess

MODEL = "publishers/team/models/demo"
BLOCK_SIZE = 16
NUM_GROUPS, NUM_ROUNDS = 9, 4
WORDS = ["river", "lamp", "fox", "stone", "bread", "cloud", "table", "green", "winter", "letter"]


@pytest.fixture(scope="module")
def picker() -> Iterator[EndpointPicker]:
    context = zmq.Context()
    picker = EndpointPicker(MODEL, context)
    with ExitStack() as stack:
        servers = {}
        for number in range(3):
            name = f"10.0.0.{number}"
            events = {"enable_kv_cache_events": True, "endpoint": picker.endpoint, "topic": f"kv@{name}@{MODEL}"}
            servers[name] = stack.enter_context(
                ServerProcess(
                    model=demo_checkpoint(),
                    model_name=MODEL,
                    dtype="float32",
                    block_size=BLOCK_SIZE,
                    max_model_len=512,
                    max_num_seqs=4,
                    kv_cache_memory_bytes="4MiB",  # of each a third of all groups, and some
                    kv_events_config=json.dumps(events),
                )
            )
        for name, server in servers.items():
            server.wait_until_ready()
            picker.add(name, server.client)
        picker.read_events(200)  # a socket subscribes at its peers while it reads
        yield picker
    context.destroy(linger=0)


def requests(seed: int) -> Iterator[str]:
    """Prompts of groups that share a long beginning; every round has all of them, in another order."""
    choose = random.Random(seed)
    groups = [" ".join(choose.choices(WORDS, k=160)) for _ in range(NUM_GROUPS)]
    for number in range(NUM_ROUNDS):
        choose.shuffle(groups)
        for group in groups:
            yield f"{group}. {choose.choice(WORDS)} {number}"


def num_cached_tokens(picker: EndpointPicker, choose: Callable[[str], Pod]) -> int:
    """Prompt tokens that were found in a cache, when requests come one after the other."""
    for pod in picker.pods.values():
        assert pod.client.post("/reset_prefix_cache").status_code == 200
    total = 0
    for prompt in requests(seed=7):
        pod = choose(prompt)
        body = {"model": MODEL, "prompt": prompt, "max_tokens": 2, "temperature": 0}
        answer = pod.client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        usage = answer.json()["usage"]
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        total += cached
        if usage["prompt_tokens"] // BLOCK_SIZE > cached // BLOCK_SIZE:
            assert picker.read_events(20_000), "no event of new blocks came"
    return total


def test_prefix_hits_are_at_least_one_and_a_half_times_those_of_round_robin(picker: EndpointPicker) -> None:
    turns = itertools.cycle(picker.pods.values())
    in_turn = num_cached_tokens(picker, lambda prompt: next(turns))
    picked = num_cached_tokens(picker, picker.pick)
    num_tokens = sum(len(prompt.split()) for prompt in requests(seed=7))
    assert picked >= 1.5 * in_turn, (picked, in_turn)
    assert picked >= 0.5 * num_tokens, (picked, num_tokens)  # of four rounds three find their beginning


def test_the_picker_knows_what_each_cache_holds(picker: EndpointPicker) -> None:
    """What it expects a server to find is what that finds."""
    prompt = next(iter(requests(seed=11)))
    first, second = list(picker.pods.values())[:2]
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 1}
    assert first.client.post("/v1/completions", json=body).status_code == 200
    picker.read_events(20_000)
    assert picker.pick(prompt) is first
    found = [
        pod.client.post("/v1/completions", json=body).json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        for pod in (first, second)
    ]
    assert found[0] >= 100
    assert found[1] == 0
