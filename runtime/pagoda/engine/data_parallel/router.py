"""Which replica takes a request: the one expected to finish it first.

    cost of a replica = tokens it still has to compute + tokens of the prompt that it does not have cached

So requests that share a prefix stay together as long as that saves more work than waiting costs; a prompt that no replica has
goes to the least loaded, and among equals to the one with fewest remembered blocks, which spreads prefixes over all caches.

The router estimates what a replica has cached, by the block hashes of the prompts (and their outputs) that were sent to it: an
LRU list as long as its KV cache has blocks. A wrong estimate costs time only: each replica
looks up its own cache.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from pagoda.request import EngineRequest
from pagoda.scheduling.prefix_hash import extend_hashes, root_hash

# The length of an output is unknown; a moving average estimates it. Its first value, and the weight of a new one.
FIRST_TYPICAL_OUTPUT = 64.0
_OUTPUT_WEIGHT = 0.05


@dataclass(slots=True, eq=False)
class Placement:
    """A request that was sent to a replica, and the tokens that the replica still has to compute for it."""

    replica: int
    token_ids: list[int]
    hashes: list[bytes]
    root: bytes
    num_cached_tokens: int
    num_prompt_tokens_left: int
    num_output_tokens_left: int
    num_output_tokens: int = 0

    @property
    def num_tokens_left(self) -> int:
        """Tokens of prompt and output that are still to be computed."""
        return self.num_prompt_tokens_left + self.num_output_tokens_left


@dataclass(slots=True)
class _Replica:
    """The router's state of one replica. `prefixes`: block hashes in LRU order, the next to be evicted first."""

    capacity: int = 0
    num_tokens_left: int = 0
    num_requests: int = 0
    prefixes: OrderedDict[bytes, None] = field(default_factory=OrderedDict)

    def num_hits(self, hashes: Sequence[bytes]) -> int:
        """The number of leading blocks that are cached."""
        for index, block in enumerate(hashes):
            if block not in self.prefixes:
                return index
        return len(hashes)

    def remember(self, hashes: Sequence[bytes]) -> None:
        """Add blocks. The end of a prefix is evicted before its beginning, without which it could not be found."""
        for block in reversed(hashes):
            self.prefixes[block] = None
            self.prefixes.move_to_end(block)
        while len(self.prefixes) > self.capacity:
            self.prefixes.popitem(last=False)


class PrefixRouter:
    """Estimates load and cached prefixes of `num_replicas` replicas. `block_size`: tokens; 0: prefixes are not cached."""

    def __init__(self, num_replicas: int, block_size: int) -> None:
        self._replicas = [_Replica() for _ in range(num_replicas)]
        self._block_size = block_size
        self.typical_output = FIRST_TYPICAL_OUTPUT  # tokens, a moving average

    def num_tokens_left(self, replica: int) -> int:
        """The estimated number of tokens that a replica still has to compute."""
        return self._replicas[replica].num_tokens_left

    def num_requests(self, replica: int) -> int:
        """Requests that a replica is running."""
        return self._replicas[replica].num_requests

    def num_remembered(self, replica: int) -> int:
        """Blocks that a replica is thought to have cached."""
        return len(self._replicas[replica].prefixes)

    def set_capacity(self, replica: int, num_blocks: int, block_size: int) -> None:
        """A replica has started: its cache is empty, and holds so many blocks of so many tokens.

        They may be other sizes than the setting says: a model that keeps states has blocks as large as one of these.
        """
        if self._block_size:
            self._block_size = block_size
        self._replicas[replica].capacity = num_blocks
        self._replicas[replica].prefixes.clear()

    def place(self, request: EngineRequest, candidates: Collection[int]) -> Placement:
        """Choose one of `candidates` (at least one) and count the request there; `remove` undoes that."""
        root = root_hash(request.prefix_keys)
        hashes: list[bytes] = []
        num_prompt_tokens = len(request.prompt_token_ids)
        if self._block_size and not request.needs_every_token:  # those need every position computed
            extend_hashes(hashes, root, request.prompt_token_ids, self._block_size)
        # The last token is computed in any case, for what comes after it.
        findable = hashes[: (num_prompt_tokens - 1) // self._block_size] if hashes else hashes
        hits = {index: self._replicas[index].num_hits(findable) * self._block_size for index in candidates}
        chosen = min(hits, key=lambda index: (*self._cost(index, num_prompt_tokens - hits[index]), index))
        placement = Placement(
            replica=chosen,
            token_ids=list(request.prompt_token_ids),
            hashes=hashes,
            root=root,
            num_cached_tokens=hits[chosen],
            num_prompt_tokens_left=num_prompt_tokens - hits[chosen],
            num_output_tokens_left=max(1, min(request.max_tokens, round(self.typical_output))),
        )
        replica = self._replicas[chosen]
        replica.num_tokens_left += placement.num_tokens_left
        replica.num_requests += 1
        replica.remember(hashes)
        return placement

    def note_output(self, placement: Placement, token_ids: Sequence[int]) -> None:
        """The replica has computed these tokens, so it is done with the prompt too."""
        before = placement.num_tokens_left
        placement.num_prompt_tokens_left = 0
        # An output longer than estimated counts as one more token.
        placement.num_output_tokens_left = max(1, placement.num_output_tokens_left - len(token_ids))
        placement.num_output_tokens += len(token_ids)
        placement.token_ids += token_ids
        self._replicas[placement.replica].num_tokens_left += placement.num_tokens_left - before

    def remove(self, placement: Placement, *, has_failed: bool = False) -> None:
        """The request has ended; its output is cached too, for the next turn of the conversation.

        `has_failed`: refused, or its replica failed; the estimates do not change.
        """
        replica = self._replicas[placement.replica]
        replica.num_tokens_left -= placement.num_tokens_left
        replica.num_requests -= 1
        if has_failed or placement.num_output_tokens == 0:
            return
        self.typical_output += _OUTPUT_WEIGHT * (placement.num_output_tokens - self.typical_output)
        if placement.hashes:
            # The last token was sampled and never run.
            extend_hashes(placement.hashes, placement.root, placement.token_ids[:-1], self._block_size)
            replica.remember(placement.hashes)

    def _cost(self, index: int, num_prompt_tokens: int) -> tuple[int, int, int]:
        replica = self._replicas[index]
        return replica.num_tokens_left + num_prompt_tokens, replica.num_requests, len(replica.prefixes)
