"""Why prompt tokens were not in the prefix cache: every token that was no hit has one reason."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pagoda.sampling.params import SamplingParams
from pagoda.scheduling.kv_cache_manager import KVCacheManager
from pagoda.scheduling.prefix_misses import MissReason
from pagoda.scheduling.request import Request
from tests.support.requests import make_request

BLOCK = 4


class Cache:
    """A manager whose requests come and go one at a time."""

    def __init__(self, num_usable: int = 64) -> None:
        self.kv = KVCacheManager(num_usable + 1, BLOCK)

    def run(self, token_ids: list[int], **fields: Any) -> dict[str, int]:
        """What the counts grew by with this prompt."""
        before = dict(self.kv.prefix_misses.num_tokens)
        hits = self.kv.num_prefix_hits
        made = make_request("a", len(token_ids), **fields)
        request = Request(replace(made.spec, prompt_token_ids=token_ids))
        assert self.kv.allocate_for(request, len(token_ids), leave_watermark=False)
        request.num_computed_tokens = len(token_ids)
        self.kv.publish([request])
        self.kv.release(request)
        grown = {
            reason: count - before[reason]
            for reason, count in self.kv.prefix_misses.num_tokens.items()
            if count > before[reason]
        }
        assert sum(grown.values()) + self.kv.num_prefix_hits - hits == len(token_ids)
        return grown


def test_what_was_never_seen_and_what_fills_no_block() -> None:
    cache = Cache()
    assert cache.run(list(range(10))) == {"new": 8, "partial_block": 2}
    assert cache.run(list(range(10))) == {"partial_block": 2}
    # The last token is always computed, and with it its block.
    assert cache.run(list(range(8))) == {"partial_block": 4}
    assert cache.run([*range(4), *range(50, 56)]) == {"new": 4, "partial_block": 2}
    assert cache.run([1, 2]) == {"partial_block": 2}


def test_what_was_evicted_and_what_is_cached_behind_it() -> None:
    cache = Cache(num_usable=5)
    cache.run(list(range(17)))
    cache.run(list(range(100, 110)))  # takes three blocks: the end of the first prompt goes first
    assert cache.run(list(range(17))) == {"evicted": 8, "partial_block": 1}


def test_an_emptied_cache_is_a_reason_of_its_own() -> None:
    cache = Cache()
    cache.run(list(range(9)))
    cache.kv.forget_prefixes()
    assert cache.run(list(range(9))) == {"reset": 8, "partial_block": 1}


def test_the_same_prompt_with_other_cache_keys() -> None:
    cache = Cache()
    cache.run(list(range(9)), cache_keys=("salt=a",))
    assert cache.run(list(range(9)), cache_keys=("salt=b",)) == {"other_cache_keys": 8, "partial_block": 1}
    assert cache.run(list(range(9)), cache_keys=("salt=a",)) == {"partial_block": 1}


def test_a_gap_is_told_from_what_stands_behind_it() -> None:
    cache = Cache()
    cache.run(list(range(13)))
    request = Request(make_request("a", 13).spec)
    request.token_ids = list(range(13))
    cache.kv._hash_blocks(request)
    block = cache.kv.pool.finder(0)(request.block_hashes[0])
    assert block is not None
    cache.kv.pool._forget(block)
    cache.kv.pool._num_cached -= 1
    assert cache.run(list(request.token_ids)) == {"evicted": 4, "behind_gap": 8, "partial_block": 1}


def test_memory_is_bounded() -> None:
    cache = Cache(num_usable=8)
    for number in range(200):
        cache.run(list(range(1000 * number, 1000 * number + 13)))
    misses = cache.kv.prefix_misses
    assert len(misses._gone) <= misses._capacity
    assert len(misses._roots) <= misses._capacity
    assert set(misses.num_tokens) == {reason.value for reason in MissReason}


@pytest.mark.parametrize("count", [0, 3])
def test_prompt_logprobs_need_every_position(count: int) -> None:
    cache = Cache()
    cache.run(list(range(9)))
    assert cache.run(list(range(9)), params=SamplingParams(prompt_logprobs=count)) == {"every_token": 9}
