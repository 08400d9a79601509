"""Blocks for requests: prefix lookup, all-or-nothing allocation, publishing of computed prefixes, release.

    token position:  0        bs       2·bs      3·bs           num_tokens
                     │ hit     │ hit     │ new     │ new …         │
    lease.blocks:    [ shared ][ shared ][ own    ][ own, partial ]
    published:       ────────────────────▶ full blocks whose KV is planned or computed, and whose tokens are known

A request has a lease in every group of layers (`kv_groups`). Where a group keeps all tokens, it gets the blocks for *all* its
known tokens when it is admitted, not chunk by chunk; so chunked prefill never runs out of these half-way. In a group with a
window it gets what a chunk and the window take, and from then on gives back what is behind the window for what is new.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from pagoda.scheduling.block_pool import Block, BlockLease, BlockPool
from pagoda.scheduling.cache_events import CacheEvents
from pagoda.scheduling.kv_groups import LONGEST_REQUEST, FullGroup, GroupRule, most_blocks, most_tokens
from pagoda.scheduling.plan import NewBlocks
from pagoda.scheduling.prefix_hash import extend_hashes, root_hash
from pagoda.scheduling.prefix_misses import MissReason, PrefixMisses
from pagoda.scheduling.request import Request

# Of blocks that left the prefix cache, as many times the blocks that there are: by them it is known why a prefix missed.
_BLOCKS_REMEMBERED = 2


class KVCacheManager:
    """KV blocks of one engine. All operations are O(blocks that change)."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        groups: Sequence[GroupRule] = (FullGroup(),),
        max_step_tokens: int = sys.maxsize,
        enable_prefix_caching: bool = True,
        watermark: float = 0.0,
        events: CacheEvents | None = None,
    ) -> None:
        """`groups`: which blocks each group of layers needs; none where nothing is kept of a request.

        `max_step_tokens`: a plan moves a request forward by no more, drafts for its next step included. `watermark` is the
        share of blocks that an admission must leave available while others run. `events`: is told what happens to the
        prefix cache.
        """
        self._events = events or CacheEvents()
        self.groups = tuple(groups)
        self.prefix_misses = PrefixMisses(_BLOCKS_REMEMBERED * num_blocks)
        self.pool = BlockPool(num_blocks, self._events, len(self.groups), self.prefix_misses)
        self.block_size = block_size
        self.max_step_tokens = max_step_tokens
        self.enable_prefix_caching = enable_prefix_caching
        self.num_prefix_queries = 0
        self.num_prefix_hits = 0
        self._watermark_blocks = int(watermark * self.pool.num_usable)
        self._grown: dict[Request, None] = {}  # got blocks since `take_new_blocks`
        # Of groups whose rows do not all write first: what the plan that is being made fills, from which block on.
        self._to_publish: dict[Request, int] = {}
        self._publishes_later = not all(group.is_written_first for group in self.groups)
        self.max_tokens_of_a_request = 1 + most_tokens(self.groups, self.pool.num_usable, max_step_tokens, block_size)
        """Tokens that fit when a request has all blocks to itself; its last sampled token needs no KV."""

    def allocate_for(self, request: Request, step_tokens: int, *, leave_watermark: bool) -> bool:
        """Give a waiting request leases on the blocks that it needs, beginning with those of a cached prefix; its first step
        computes up to `step_tokens` tokens.

        Sets `leases`, `num_computed_tokens` and `num_shared_blocks`. False, and no change, when the blocks are not there (or,
        with `leave_watermark`, when too few would be left for those that run).
        """
        assert not request.leases
        hits = self._find_prefix(request)
        num_hits = len(hits[0]) if hits else 0
        # A window may begin with the null block: there the request holds less than its table is long.
        missing = [
            group.first_needed(num_hits * self.block_size, self.block_size)
            + group.most_blocks(request.num_tokens, step_tokens, self.block_size)
            for group in self.groups
        ]
        all_blocks = self.blocks_for(request.num_tokens)
        missing = [min(length, all_blocks) - num_hits for length in missing]
        # A cached block that is hit leaves the free list as well.
        taken = sum(missing) + sum(block.ref_count == 0 for found in hits for block in found)
        left = self._watermark_blocks if leave_watermark else 0
        if taken + left > self.pool.num_available:
            return False
        request.leases = tuple(BlockLease(self.pool) for _ in self.groups)
        # All hits are held before any block is allocated, or one could be taken for another.
        for lease, found in zip(request.leases, hits, strict=True):
            lease.adopt(found)
        for lease, count in zip(request.leases, missing, strict=True):
            extended = lease.extend(count)
            assert extended
        self._note_ready(request)
        request.num_computed_tokens = num_hits * self.block_size
        request.num_published_blocks = request.num_shared_blocks = num_hits
        if self.enable_prefix_caching and request.num_preemptions == 0:
            request.num_cached_tokens = request.num_computed_tokens
            self.num_prefix_queries += request.num_tokens
            self.num_prefix_hits += request.num_computed_tokens
            self._count_misses(request, num_hits)
        return True

    def _count_misses(self, request: Request, num_hits: int) -> None:
        if request.spec.needs_every_token:
            self.prefix_misses.count_all(request.num_tokens, MissReason.EVERY_TOKEN)
            return
        finders = [self.pool.finder(number) for number in range(len(self.groups))]
        self.prefix_misses.count(
            request.token_ids,
            request.block_hashes,
            num_hits,
            block_size=self.block_size,
            root=root_hash(request.spec.prefix_keys),
            is_cached=lambda block_hash: all(find(block_hash) is not None for find in finders),
        )

    def advance(self, request: Request, num_tokens: int) -> bool:
        """Have blocks for the next `num_tokens` tokens, and give back those that no token still to be planned can see.

        False when there are too few; then none was allocated. Steps run in the order of their plans, so a block that is given
        back may go to another request while steps that read it are still in flight. But only before the request has a row in
        the plan that is being made: what another row of this plan writes there, this one would read.
        """
        end = request.num_computed_tokens + num_tokens
        if end <= request.num_ready_tokens:
            return True
        for group, lease in zip(self.groups, request.leases, strict=True):
            lease.drop_before(group.first_needed(request.num_computed_tokens, self.block_size))
        return self.extend(request, end)

    def extend(self, request: Request, num_tokens: int) -> bool:
        """Allocate blocks for `num_tokens` tokens in all; False, and no change, when there are too few."""
        missing = self._num_missing(request, num_tokens)
        if missing > self.pool.num_available:
            return False
        if missing:
            num_blocks = self.blocks_for(num_tokens)
            for lease in request.leases:
                if len(lease.blocks) < num_blocks:
                    lease.extend(num_blocks - len(lease.blocks))
            self._grown[request] = None
        self._note_ready(request)
        return True

    def extend_for_drafts(self, request: Request, num_drafts: int, num_running: int) -> int:
        """Allocate blocks for up to `num_drafts` tokens more than are planned, and return for how many there is room.

        No block is taken that one of `num_running` requests may need for its next token.
        """
        spare = max(0, self.pool.num_available - num_running * len(self.groups))
        end = request.num_computed_tokens + num_drafts
        while self._num_missing(request, end) > spare:
            end = (end - 1) // self.block_size * self.block_size
        if end > request.num_computed_tokens:
            self.extend(request, end)
        return max(0, end - request.num_computed_tokens)

    def take_new_blocks(self, entering: Iterable[Request]) -> list[NewBlocks]:
        """The blocks that running requests have got since they were last named in a plan; those `entering` are in none yet."""
        if not self._grown:
            return []
        grown, self._grown = self._grown, {}
        new_blocks = []
        for request in grown:
            if request in entering:
                continue
            for group, lease in enumerate(request.leases):
                if len(lease.blocks) > lease.num_sent:
                    offset = lease.num_sent
                    new_blocks.append(NewBlocks(request.req_index, group, offset, lease.take_unsent()))
        return new_blocks

    def _num_missing(self, request: Request, num_tokens: int) -> int:
        """Blocks that the groups lack for so many tokens."""
        num_blocks = self.blocks_for(num_tokens)
        missing = 0
        for lease in request.leases:
            if len(lease.blocks) < num_blocks:
                missing += num_blocks - len(lease.blocks)
        return missing

    def _note_ready(self, request: Request) -> None:
        ready = LONGEST_REQUEST
        for group, lease in zip(self.groups, request.leases, strict=True):
            ready = min(ready, group.ready_tokens(len(lease.blocks), lease.num_dropped, self.block_size))
        request.num_ready_tokens = ready

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

    def finish_plan(self) -> None:
        """Let later plans find what this one leaves in groups that are not written before they are read."""
        if self._to_publish:
            to_publish, self._to_publish = self._to_publish, {}
            for request, first in to_publish.items():
                self._publish_blocks(request, first, is_written_first=False)

    def _publish_up_to(self, request: Request, full_blocks: int) -> None:
        self._hash_blocks(request)
        first, request.num_published_blocks = request.num_published_blocks, full_blocks
        self._publish_blocks(request, first, is_written_first=True)
        if self._publishes_later:
            self._to_publish.setdefault(request, first)

    def _publish_blocks(self, request: Request, first: int, *, is_written_first: bool) -> None:
        """Publish blocks from `first` on, in the groups of which this is so."""
        full_blocks = request.num_published_blocks
        for group, (rule, lease) in enumerate(zip(self.groups, request.leases, strict=True)):
            if rule.is_written_first != is_written_first:
                continue
            begin = first
            for index in range(first, full_blocks):
                block = lease.blocks[index]
                if block is self.pool.null_block or not self.pool.publish(block, request.block_hashes[index], group):
                    self._events.stored(request, begin, index, group)
                    begin = index + 1
            self._events.stored(request, begin, full_blocks, group)

    def release(self, request: Request) -> None:
        """Free all blocks of a request; published ones stay cached until they are evicted."""
        for lease in request.leases:
            lease.release()
        request.leases = ()
        request.num_published_blocks = request.num_ready_tokens = 0
        self._grown.pop(request, None)
        self._to_publish.pop(request, None)

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
        self.pool = BlockPool(len(self.pool.blocks), self._events, len(self.groups), self.prefix_misses)
        self._grown.clear()
        self._to_publish.clear()
        self._events.cleared()

    def check_integrity(self, requests: Iterable[Request]) -> None:
        """Assert that the leases of `requests` are all there are. O(num_blocks); for tests."""
        self.pool.check_integrity([lease for request in requests for lease in request.leases])

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks so many tokens fill, in each group."""
        return -(-num_tokens // self.block_size)

    def most_blocks(self, num_tokens: int) -> int:
        """The most blocks that a request of so many tokens holds at once."""
        return most_blocks(self.groups, num_tokens, self.max_step_tokens, self.block_size)

    def _hash_blocks(self, request: Request) -> None:
        extend_hashes(request.block_hashes, root_hash(request.spec.prefix_keys), request.token_ids, self.block_size)

    def _find_prefix(self, request: Request) -> list[list[Block]]:
        """The blocks, in each group, of the longest prefix that all groups can go on from; at least one token is left to
        compute, or there are no logits.

        Of a group with a window the blocks that no token still to be computed can see need not be cached: the null block
        replaces them.
        """
        if not self.enable_prefix_caching or request.spec.needs_every_token:
            return [[] for _ in self.groups]
        self._hash_blocks(request)
        hashes = request.block_hashes[: (request.num_tokens - 1) // self.block_size]
        hits: list[list[Block]] = []
        while True:
            # What is shorter by one group's rule may be none by another's, so they are asked until they agree.
            for number, group in enumerate(self.groups):
                found = group.find_prefix(self.pool.finder(number), hashes, self.block_size, self.pool.null_block)
                hits.append(found)
                hashes = hashes[: len(found)]
            if all(len(found) == len(hashes) for found in hits):
                return hits
            hits = []
