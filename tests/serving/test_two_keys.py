"""Two keys on a real engine: what the cache tells one of them of what the other asked."""

from __future__ import annotations

import json
from collections.abc import Iterator

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


def test_the_log_has_no_key(server: ServerProcess) -> None:
    server.client.get("/v1/models?api_key=key-of-alice", headers={"Authorization": "Bearer key-of-bob"})
    server.wait_for_log(r"GET /v1/models")
    assert not any(str(key["key"]) in server.log for key in KEYS)
    assert "3 are in force" in server.log
