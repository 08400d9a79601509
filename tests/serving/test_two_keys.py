"""Two keys on a real engine: what the cache tells one of them of what the other asked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.server import ServerProcess

KEYS = [
    {"name": "alice", "key": "key-of-alice"},
    {"name": "bob", "key": "key-of-bob"},
    {"name": "colleague of bob", "key": "key-of-a-colleague", "tenant": "bob"},
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    file.write_text(json.dumps(KEYS))
    with ServerProcess(api_keys_file=file, block_size=16) as running:
        running.wait_until_ready()
        yield running


def cached(server: ServerProcess, key: str, prompt: list[int], **options: object) -> int:
    """How many tokens of a prompt were cached for a key's request."""
    body = {"prompt": prompt, "max_tokens": 1, **options}
    answer = server.client.post("/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"})
    assert answer.status_code == 200, answer.text
    return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


def cached_by_v2(server: ServerProcess, key: str, text: str) -> int:
    body = {"text_input": text, "parameters": {"max_tokens": 1, "details": True}}
    answer = server.client.post("/v2/models/demo/generate", json=body, headers={"Authorization": f"Bearer {key}"})
    assert answer.status_code == 200, answer.text
    return int(answer.json()["details"]["num_cached_tokens"])


def test_a_cached_prefix_is_its_tenants_alone(server: ServerProcess) -> None:
    prompt = [1 + index % 60 for index in range(64)]
    assert cached(server, "key-of-alice", prompt) == 0
    assert cached(server, "key-of-alice", prompt) >= 48
    assert cached(server, "key-of-bob", prompt) == 0
    assert cached(server, "key-of-a-colleague", prompt) >= 48, "keys that name the same tenant share"


def test_no_salt_reaches_what_another_tenant_has_cached(server: ServerProcess) -> None:
    prompt = [2 + index % 50 for index in range(64)]
    cached(server, "key-of-alice", prompt)
    cached(server, "key-of-alice", prompt, cache_salt="s")
    assert cached(server, "key-of-alice", prompt, cache_salt="s") >= 48
    for salt in ("s", "tenant=alice", "alice", "salt=s"):
        assert cached(server, "key-of-bob", prompt, cache_salt=salt) == 0


def test_v2_tells_no_more_than_openais_routes(server: ServerProcess) -> None:
    text = "once upon a time there was a secret that nobody else should know " * 2
    cached_by_v2(server, "key-of-alice", text)
    assert cached_by_v2(server, "key-of-alice", text) > 0
    assert cached_by_v2(server, "key-of-bob", text) == 0
    assert cached_by_v2(server, "key-of-a-colleague", text) > 0


SECRET = "once upon a time there was a secret that nobody else should know " * 2
MESSAGES = [{"role": "user", "content": SECRET}]

# Where each protocol says how much of a prompt was cached: the path in its answer's usage.
CACHED_TOKENS = {
    "/v1/chat/completions": ({"messages": MESSAGES, "max_tokens": 1}, ("prompt_tokens_details", "cached_tokens")),
    "/v1/responses": ({"input": SECRET, "max_output_tokens": 16}, ("input_tokens_details", "cached_tokens")),
    "/v1/messages": ({"messages": MESSAGES, "max_tokens": 1}, ("cache_read_input_tokens",)),
}


@pytest.mark.parametrize("path", CACHED_TOKENS)
def test_no_protocol_tells_what_another_tenant_has_cached(server: ServerProcess, path: str) -> None:
    body, where = CACHED_TOKENS[path]

    def told(key: str) -> int:
        # Each protocol's first prompt is one that no other has sent.
        system = {"instructions": path} if path == "/v1/responses" else {}
        messages = {} if "messages" not in body else {"messages": [{"role": "user", "content": path + SECRET}]}
        asked = {"model": "demo", **body, **messages, **system}
        answer = server.client.post(path, json=asked, headers={"Authorization": f"Bearer {key}"})
        assert answer.status_code == 200, answer.text
        usage = answer.json()["usage"]
        for name in where:
            usage = usage[name]
        return int(usage)

    told("key-of-alice")
    assert told("key-of-alice") > 0
    assert told("key-of-bob") == 0
    assert told("key-of-a-colleague") > 0


def test_the_log_has_no_key(server: ServerProcess) -> None:
    server.client.get("/v1/models?api_key=key-of-alice", headers={"Authorization": "Bearer key-of-bob"})
    server.wait_for_log(r"GET /v1/models")
    assert not any(str(key["key"]) in server.log for key in KEYS)
    assert "3 are in force" in server.log


@pytest.mark.parametrize("sequences", [{"n": 16}, {"prompt": ["once upon a time"] * 16}], ids=["choices", "prompts"])
def test_requests_of_many_sequences_are_taken_whole(sequences: dict[str, object]) -> None:
    """Sent together they would each get a part of the queue, and all of them be refused for the rest."""
    body = {"prompt": "once upon a time", "max_tokens": 40, "ignore_eos": True, **sequences}
    with ServerProcess(max_num_seqs=4, max_num_waiting=40) as server:
        server.wait_until_ready()
        with ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(lambda _: server.client.post("/v1/completions", json=body), range(8)))
    assert {answer.status_code for answer in answers} == {200, 429}
    assert all(len(answer.json()["choices"]) == 16 for answer in answers if answer.status_code == 200)
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert "16 sequences" in refused.json()["error"]["message"]
