"""Blocks for requests: prefix lookup, all-or-nothing allocation, publishing of computed prefixes, release.

    token position:  0        bs       2·bs      3·bs           num_tokens
                     │ hit     │ hit     │ new     │ new …         │
    lease.blocks:    [ shared ][ shared ][ own    ][ own, partial ]
    published:       ────────────────────▶ full blocks whose KV is planned or computed, and whose tokens are known

A request gets the blocks for *all* its known tokens when it is admitted, not chunk by chunk. So chunked prefill never runs out
of blocks half-way, and only decoding can need more.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import takewhile

from pagoda.scheduling.block_pool import Block, BlockLease, BlockPool
from pagoda.scheduling.cache_events import CacheEvents
from pagoda.scheduling.prefix_hash import extend_hashes, root_hash
from pagoda.scheduling.request import Request


class KVCacheManager:
    """KV blocks of one engine. All operations are O(blocks that change)."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        enable_prefix_caching: bool = True,
        sliding_window: int | None = None,
        watermark: float = 0.0,
        events: CacheEvents | None = None,
    ) -> None:
        """`sliding_window` is set when *every* layer has that window; blocks outside of it are then freed.

        `watermark` is the share of blocks that an admission must leave available while others run. `events`: is told what
        happens to the prefix cache.
        """
        self._events = events or CacheEvents()
        self.pool = BlockPool(num_blocks, self._events)
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.num_prefix_queries = 0
        self.num_prefix_hits = 0
        self.sliding_window = sliding_window
        self._watermark_blocks = int(watermark * self.pool.num_usable)

    @property
    def max_tokens_of_a_request(self) -> int:
        """Tokens that fit when a request has all blocks to itself; its last sampled token needs no KV."""
        return self.pool.num_usable * self.block_size + 1

    def allocate_for(self, request: Request, *, leave_watermark: bool) -> bool:
        """Give a waiting request a lease on blocks for all its tokens, beginning with those of a cached prefix.

        Sets `lease`, `num_computed_tokens` and `num_shared_blocks`. False, and no change, when the blocks are not there (or,
        with `leave_watermark`, when too few would be left for those that run).
        """
        assert request.lease is None
        hits = self._find_prefix(request)
        needed = self.blocks_for(request.num_tokens) - len(hits)
        # A cached block that is hit leaves the free list as well.
        taken = needed + sum(block.ref_count == 0 for block in hits)
        left = self._watermark_blocks if leave_watermark else 0
        if taken + left > self.pool.num_available:
            return False
        lease = BlockLease(self.pool)
        lease.adopt(hits)
        extended = lease.extend(needed)
        assert extended
        request.lease = lease
        request.num_computed_tokens = len(hits) * self.block_size
        request.num_published_blocks = request.num_shared_blocks = len(hits)
        if self.enable_prefix_caching and request.num_preemptions == 0:
            request.num_cached_tokens = request.num_computed_tokens
            self.num_prefix_queries += request.num_tokens
            self.num_prefix_hits += request.num_computed_tokens
        return True

    def extend(self, request: Request, num_tokens: int) -> bool:
        """Allocate blocks for `num_tokens` tokens in all; False, and no change, when there are too few."""
        lease = request.lease
        assert lease is not None
        num_held = len(lease.blocks)
        return num_tokens <= num_held * self.block_size or lease.extend(self.blocks_for(num_tokens) - num_held)

    def extend_for_drafts(self, request: Request, num_drafts: int, reserve: int) -> int:
        """Allocate blocks for up to `num_drafts` tokens more than are planned, and return for how many there is room.

        No block is taken that would leave fewer than `reserve` available.
        """
        lease = request.lease
        assert lease is not None
        room = len(lease.blocks) * self.block_size - request.num_computed_tokens
        if num_drafts > room:
            missing = -(-(num_drafts - room) // self.block_size)
            missing = min(missing, max(0, self.pool.num_available - reserve))
            lease.extend(missing)
            room += missing * self.block_size
        return min(num_drafts, room)

    def publish(self, requests: Iterable[Request]) -> None:
        """Add to the prefix cache the full blocks of running requests that are computed once the plans made so far have run.

        Only known tokens count, so a block is published when its last token is known, not when its step is planned.
        """
        if not self.enable_prefix_caching:
            return
        for request in requests:
            computed = min(request.num_computed_tokens, len(request.token_ids))
            full_blocks = computed // self.block_size
            if full_blocks > request.num_published_blocks:
                self._publish_up_to(request, full_blocks)

    def _publish_up_to(self, request: Request, full_blocks: int) -> None:
        assert request.lease is not None
        self._hash_blocks(request)
        first = request.num_published_blocks
        for index in range(first, full_blocks):
            block = request.lease.blocks[index]
            if block is self.pool.null_block or not self.pool.publish(block, request.block_hashes[index]):
                self._events.stored(request, first, index)
                first = index + 1
        self._events.stored(request, first, full_blocks)
        request.num_published_blocks = full_blocks

    def drop_out_of_window(self, request: Request) -> None:
        """Free blocks that are outside the window of all tokens still to be planned.

        The token at position p sees positions above p - window. Steps run in the order of their plans, so a block may go to
        another request while steps that read it are still in flight.
        """
        assert self.sliding_window is not None
        assert request.lease is not None
        first_visible = request.num_computed_tokens - self.sliding_window + 1
        if first_visible >= self.block_size:
            request.lease.drop_before(first_visible // self.block_size)

    def release(self, request: Request) -> None:
        """Free all blocks of a request; published ones stay cached until they are evicted."""
        if request.lease is not None:
            request.lease.release()
            request.lease = None
        request.num_published_blocks = 0

    def shares_blocks_from(self, request: Request, writer: Request, position: int) -> bool:
        """Whether a request may have found blocks in the prefix cache that `writer` was to compute from `position` on.

        A block's hash covers all tokens before it, so it is enough to compare the first one. One that another request wrote
        with the same content counts as well.
        """
        index = position // self.block_size
        return (
            request.num_shared_blocks > index
            and len(writer.block_hashes) > index
            and request.block_hashes[index] == writer.block_hashes[index]
        )

    def forget_prefixes(self) -> None:
        self.pool.forget_all()

    def reset(self) -> None:
        """Make all blocks free, whoever holds them, and forget every cached prefix. Leases given before are of no use."""
        self.pool = BlockPool(len(self.pool.blocks), self._events)
        self._events.cleared()

    def check_integrity(self, requests: Iterable[Request]) -> None:
        """Assert that the leases of `requests` are all there are. O(num_blocks); for tests."""
        self.pool.check_integrity([request.lease for request in requests if request.lease is not None])

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks so many tokens fill."""
        return -(-num_tokens // self.block_size)

    def _hash_blocks(self, request: Request) -> None:
        extend_hashes(request.block_hashes, root_hash(request.spec.cache_keys), request.token_ids, self.block_size)

    def _find_prefix(self, request: Request) -> list[Block]:
        """The blocks of the longest cached prefix; at least one token is left to compute, or there are no logits.

        With a sliding window the blocks that no token still to be computed can see need not be cached: the null block
        replaces them.
        """
        if not self.enable_prefix_caching or request.spec.params.prompt_logprobs is not None:
            return []
        self._hash_blocks(request)
        hashes = request.block_hashes[: (request.num_tokens - 1) // self.block_size]
        if self.sliding_window is None:
            return list(takewhile(lambda block: block is not None, map(self.pool.find, hashes)))  # type: ignore[arg-type]
        return self._find_window(hashes, -(-(self.sliding_window - 1) // self.block_size))

    def _find_window(self, hashes: list[bytes], num_visible: int) -> list[Block]:
        """The longest prefix whose last `num_visible` blocks are cached, or all of it if it is shorter than that."""
        run: list[Block] = []
        for index in range(len(hashes) - 1, -1, -1):
            block = self.pool.find(hashes[index])
            if block is None:
                run = []
                continue
            run.append(block)
            if len(run) >= num_visible:
                return [self.pool.null_block] * index + run[::-1]
        return run[::-1]
