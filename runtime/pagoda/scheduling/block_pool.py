"""Blocks of KV cache: who holds them, which are free, and which free ones still hold a known prefix.

A block is in exactly one of three places:

    in use    ref_count > 0     held by one or more leases
    cached    ref_count == 0    in the free list, with a hash: a prefix hit takes it back, an allocation evicts it
    free      ref_count == 0    in the free list, no hash

The free list is the LRU of the prefix cache. It is an intrusive doubly linked list, so that taking from its head, appending
to its tail, and taking a block out of its middle (a prefix hit) are all O(1):

    head ─▶ [free] ⇄ [free] ⇄ [cached, oldest] ⇄ … ⇄ [cached, newest] ─▶ tail

Block 0 is the null block. It is never allocated: padding of block tables and positions outside a sliding window point to
it, and what it holds is never read as a value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from pagoda.scheduling.cache_events import CacheEvents
from pagoda.scheduling.prefix_misses import MissReason, PrefixMisses

NULL_BLOCK_ID = 0


class Block:
    """One block. `block_hash` is set while the block's content is known to be the KV of a hashed prefix, in `group`."""

    __slots__ = ("block_hash", "block_id", "group", "next_free", "previous_free", "ref_count")

    def __init__(self, block_id: int) -> None:
        self.block_id = block_id
        self.ref_count = 0
        self.block_hash: bytes | None = None
        self.group = 0
        self.previous_free: Block | None = None
        self.next_free: Block | None = None

    def __repr__(self) -> str:
        return f"Block({self.block_id}, ref_count={self.ref_count}, cached={self.block_hash is not None})"


class _FreeList:
    """Intrusive doubly linked list between two sentinels; every operation is O(1)."""

    def __init__(self) -> None:
        self._head = Block(-1)
        self._tail = Block(-2)
        self._head.next_free = self._tail
        self._tail.previous_free = self._head
        self.length = 0

    def append(self, block: Block) -> None:
        last = self._tail.previous_free
        assert last is not None
        self._insert(last, block, self._tail)

    def prepend(self, block: Block) -> None:
        first = self._head.next_free
        assert first is not None
        self._insert(self._head, block, first)

    def _insert(self, before: Block, block: Block, after: Block) -> None:
        before.next_free, after.previous_free = block, block
        block.previous_free, block.next_free = before, after
        self.length += 1

    def remove(self, block: Block) -> None:
        before, after = block.previous_free, block.next_free
        assert before is not None, f"{block} is not in the free list"
        assert after is not None
        before.next_free, after.previous_free = after, before
        block.previous_free = block.next_free = None
        self.length -= 1

    def pop_first(self) -> Block:
        first = self._head.next_free
        assert first is not None
        assert first is not self._tail, "the free list is empty"
        self.remove(first)
        return first

    def __iter__(self) -> Iterator[Block]:
        block = self._head.next_free
        while block is not None and block is not self._tail:
            yield block
            block = block.next_free


class BlockPool:
    """All KV blocks of an engine. `num_blocks` counts the null block; `num_usable` does not.

    A block is published, and found, as one of a group of layers (`kv_groups`), one of `num_groups`. `events`: is told of
    blocks that can be found by their hashes no longer, and so is `misses`.
    """

    def __init__(
        self,
        num_blocks: int,
        events: CacheEvents | None = None,
        num_groups: int = 1,
        misses: PrefixMisses | None = None,
    ) -> None:
        if num_blocks < 2:
            raise ValueError(f"num_blocks must be at least 2 (one is the null block), got {num_blocks}")
        self.blocks = [Block(block_id) for block_id in range(num_blocks)]
        self.null_block = self.blocks[NULL_BLOCK_ID]
        self.null_block.ref_count = 1
        self.num_usable = num_blocks - 1
        self._events = events or CacheEvents()
        self._misses = misses or PrefixMisses(num_blocks)
        self._free_list = _FreeList()
        for block in self.blocks[1:]:
            self._free_list.append(block)
        self._blocks_of_hashes: list[dict[bytes, Block]] = [{} for _ in range(num_groups)]
        self._num_cached = 0  # blocks in the free list that carry a hash

    @property
    def num_available(self) -> int:
        """Blocks that an allocation could take: free and cached."""
        return self._free_list.length

    @property
    def num_cached(self) -> int:
        """Available blocks that still hold a known prefix."""
        return self._num_cached

    @property
    def num_free(self) -> int:
        """Available blocks that are not cached."""
        return self._free_list.length - self._num_cached

    @property
    def num_in_use(self) -> int:
        """Blocks held by leases."""
        return self.num_usable - self._free_list.length

    def allocate(self, count: int) -> list[Block] | None:
        """`count` blocks, least recently used first, or None (and no change) when there are not that many."""
        if count > self._free_list.length:
            return None
        blocks = [self._free_list.pop_first() for _ in range(count)]
        for block in blocks:
            if block.block_hash is not None:
                self._num_cached -= 1
                self._forget(block)
            block.ref_count = 1
        return blocks

    def share(self, block: Block) -> None:
        """Hold a block that was found by its hash; it leaves the free list if it was there. The null block never does."""
        if block is self.null_block:
            return
        if block.ref_count == 0:
            self._free_list.remove(block)
            self._num_cached -= 1
        block.ref_count += 1

    def release(self, blocks: Iterable[Block]) -> None:
        """Give up one hold on each of `blocks`, in this order: the first will be evicted first."""
        for block in blocks:
            if block is self.null_block:
                continue
            assert block.ref_count > 0, f"{block} was released more often than held"
            block.ref_count -= 1
            if block.ref_count:
                continue
            if block.block_hash is None:
                self._free_list.prepend(block)
            else:
                self._free_list.append(block)
                self._num_cached += 1

    def finder(self, group: int) -> Callable[[bytes], Block | None]:
        """What gives the block, in use or cached, that holds the prefix with a hash in the layers of `group`."""
        return self._blocks_of_hashes[group].get

    def publish(self, block: Block, block_hash: bytes, group: int = 0) -> bool:
        """Let others find `block` by its content; whether it is new. The first block of a hash keeps it: tables are
        append-only, never merged."""
        assert block.ref_count > 0, f"{block} is published with a reference count of 0"
        blocks = self._blocks_of_hashes[group]
        if block.block_hash is not None or block_hash in blocks:
            return False
        block.block_hash, block.group = block_hash, group
        blocks[block_hash] = block
        return True

    def forget_all(self) -> None:
        """Drop every hash, for instance when a failed step may have left published blocks without their content."""
        for blocks in self._blocks_of_hashes:
            self._misses.note_gone(blocks, MissReason.RESET)
            for block in blocks.values():
                block.block_hash = None
            blocks.clear()
        self._num_cached = 0
        self._events.cleared()

    def _forget(self, block: Block) -> None:
        assert block.block_hash is not None
        del self._blocks_of_hashes[block.group][block.block_hash]
        self._events.removed(block.block_hash, block.group)
        self._misses.note_gone((block.block_hash,), MissReason.EVICTED)
        block.block_hash = None

    def states(self, first: int, count: int) -> str:
        """What blocks are, a character each: "." free, "c" cached, "u" in use, "s" in use by several."""
        return "".join(
            ("s" if block.ref_count > 1 else "u") if block.ref_count else ("." if block.block_hash is None else "c")
            for block in self.blocks[first : first + count]
        )

    def check_integrity(self, leases: Sequence[BlockLease] = ()) -> None:
        """Assert that every block is in exactly one place and is held exactly as often as `leases` say. O(num_blocks)."""
        holds = [0] * len(self.blocks)
        for lease in leases:
            for block in lease.blocks:
                holds[block.block_id] += 1
        in_free_list = {block.block_id for block in self._free_list}
        assert len(in_free_list) == self._free_list.length
        for block in self.blocks[1:]:
            assert block.ref_count == holds[block.block_id], f"{block} is held {holds[block.block_id]} times"
            assert (block.ref_count == 0) == (block.block_id in in_free_list), f"{block} is in two places or in none"
            assert block.block_hash is None or self.finder(block.group)(block.block_hash) is block
        assert NULL_BLOCK_ID not in in_free_list
        num_findable = sum(map(len, self._blocks_of_hashes))
        assert num_findable == sum(block.block_hash is not None for block in self.blocks)
        assert self.num_free + self.num_cached + self.num_in_use == self.num_usable


class BlockLease:
    """The blocks of one request in one group of layers, in the order of its tokens. The only owner; `release` gives all back
    and may be repeated.

    The first `num_dropped` are the null block: they are needed no more. `num_sent` were named in a plan.
    """

    __slots__ = ("_pool", "blocks", "num_dropped", "num_sent")

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self.blocks: list[Block] = []
        self.num_dropped = 0
        self.num_sent = 0

    @property
    def num_held(self) -> int:
        """Blocks that are held, the null block not among them."""
        return len(self.blocks) - self.num_dropped

    def extend(self, count: int) -> bool:
        """Append `count` new blocks, all or nothing."""
        blocks = self._pool.allocate(count)
        if blocks is None:
            return False
        self.blocks.extend(blocks)
        return True

    def adopt(self, blocks: Sequence[Block]) -> None:
        """Begin with blocks that were found in the prefix cache."""
        assert not self.blocks
        for block in blocks:
            self._pool.share(block)
        self.blocks.extend(blocks)
        self.num_dropped = sum(block is self._pool.null_block for block in blocks)

    def drop_before(self, count: int) -> None:
        """Give back the first `count` blocks; the null block replaces them."""
        if count <= self.num_dropped:
            return
        dropped = self.blocks[self.num_dropped : count]
        self.blocks[self.num_dropped : count] = [self._pool.null_block] * len(dropped)
        self.num_dropped = count
        self._pool.release(dropped)  # a hit needs the end of a window more than its beginning

    def take_unsent(self) -> list[int]:
        """Ids of the blocks that no plan has named; marks them as sent."""
        unsent = self.blocks[self.num_sent :]
        self.num_sent = len(self.blocks)
        return [block.block_id for block in unsent]

    def release(self) -> None:
        """Give back all blocks, the tail first: the beginning of a prefix is more likely to be hit than its end."""
        blocks, self.blocks = self.blocks, []
        self.num_dropped = 0
        self._pool.release(reversed(blocks))
