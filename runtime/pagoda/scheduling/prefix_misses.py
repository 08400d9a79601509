"""Why prompt tokens were not found in the prefix cache, in tokens by reason.

prompt          [ hit … ][ block ][ block ][ block ][ rest ]
                          evicted  behind_gap  new    partial_block
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from hashlib import blake2b
from typing import TypeVar

_Value = TypeVar("_Value")


class MissReason(StrEnum):
    """`NEW`: not seen before, or too long ago to be known. `EVICTED`: the block went to another request. `RESET`: the cache
    was emptied. `BEHIND_GAP`: it is cached, and a block before it is not. `OTHER_CACHE_KEYS`: another tenant, salt or adapter
    had the same beginning. `PARTIAL_BLOCK`: behind the last full block, or the last token, which is always computed.
    `EVERY_TOKEN`: the request needs every token computed, as for prompt log-probabilities.
    """

    NEW = "new"
    EVICTED = "evicted"
    RESET = "reset"
    BEHIND_GAP = "behind_gap"
    OTHER_CACHE_KEYS = "other_cache_keys"
    PARTIAL_BLOCK = "partial_block"
    EVERY_TOKEN = "every_token"


class PrefixMisses:
    """Counts by reason; to know it, the last `capacity` blocks that left the cache, and as many beginnings, are remembered."""

    def __init__(self, capacity: int) -> None:
        self.num_tokens: dict[str, int] = dict.fromkeys((reason.value for reason in MissReason), 0)
        self._capacity = capacity
        self._gone: OrderedDict[bytes, MissReason] = OrderedDict()
        self._roots: OrderedDict[bytes, bytes] = OrderedDict()  # of the last request that began with these tokens

    def note_gone(self, block_hashes: Iterable[bytes], reason: MissReason) -> None:
        """Blocks with these hashes can be found no longer."""
        for block_hash in block_hashes:
            _keep(self._gone, block_hash, reason, self._capacity)

    def count(
        self,
        token_ids: Sequence[int],
        hashes: Sequence[bytes],
        num_hits: int,
        *,
        block_size: int,
        root: bytes,
        is_cached: Callable[[bytes], bool],
    ) -> None:
        """Count the tokens of a prompt of which the first `num_hits` blocks were found.

        `hashes`: of its full blocks, `root`: of its cache keys; `is_cached`: whether a block with a hash is there.
        """
        num_usable = (len(token_ids) - 1) // block_size  # one token is left to compute, or there are no logits
        self.num_tokens[MissReason.PARTIAL_BLOCK.value] += len(token_ids) - num_usable * block_size
        if not num_usable:
            return
        start = blake2b(array("q", token_ids[:block_size]).tobytes(), digest_size=16).digest()
        before = self._roots.get(start)
        _keep(self._roots, start, root, self._capacity)
        is_others = num_hits == 0 and before is not None and before != root and hashes[0] not in self._gone
        for block_hash in hashes[num_hits:num_usable]:
            if is_cached(block_hash):
                reason = MissReason.BEHIND_GAP
            else:
                unseen = MissReason.OTHER_CACHE_KEYS if is_others else MissReason.NEW
                reason = self._gone.get(block_hash, unseen)
            self.num_tokens[reason.value] += block_size

    def count_all(self, num_tokens: int, reason: MissReason) -> None:
        """Count all tokens of a prompt that was not looked up."""
        self.num_tokens[reason.value] += num_tokens


def _keep(entries: OrderedDict[bytes, _Value], key: bytes, value: _Value, capacity: int) -> None:
    """Put an entry last, and drop the first ones of too many."""
    entries[key] = value
    entries.move_to_end(key)
    while len(entries) > capacity:
        entries.popitem(last=False)
