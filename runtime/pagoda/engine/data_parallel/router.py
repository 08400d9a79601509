"""Which replica takes a request: the one that is done with it first, as far as can be told from here.

    cost of a replica = tokens it still has to compute + tokens of the prompt that it does not have cached

So requests that share a beginning stay together as long as that saves more work than waiting costs; a prompt that nobody has
goes to whoever has least to do, and among equals to whoever remembers least, which spreads prefixes over all caches.

What a replica has cached is remembered here, by the block hashes of the prompts (and their outputs) that were sent to it: an
LRU list as long as its KV cache has blocks. It is an estimate. A wrong one costs time and never an answer, for each replica
looks up its own cache.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from pagoda.request import EngineRequest
from pagoda.scheduling.prefix_hash import extend_hashes, root_hash

# How long an output will be is not known; of late they were so long on average. The first guess, and the weight of each one.
FIRST_TYPICAL_OUTPUT = 64.0
_OUTPUT_WEIGHT = 0.05


@dataclass(slots=True, eq=False)
class Placement:
    """A request on its way through a replica, and the tokens that the replica still has to compute for it."""

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
        """Of prompt and output."""
        return self.num_prompt_tokens_left + self.num_output_tokens_left


@dataclass(slots=True)
class _Replica:
    """What is known of one replica. `prefixes`: block hashes, those that will be forgotten first in front."""

    capacity: int = 0
    num_tokens_left: int = 0
    num_requests: int = 0
    prefixes: OrderedDict[bytes, None] = field(default_factory=OrderedDict)

    def num_hits(self, hashes: Sequence[bytes]) -> int:
        """Leading blocks that it has."""
        for index, block in enumerate(hashes):
            if block not in self.prefixes:
                return index
        return len(hashes)

    def remember(self, hashes: Sequence[bytes]) -> None:
        """It will have these blocks. The end of a prefix is forgotten before its beginning: without that it is of no use."""
        for block in reversed(hashes):
            self.prefixes[block] = None
            self.prefixes.move_to_end(block)
        while len(self.prefixes) > self.capacity:
            self.prefixes.popitem(last=False)


class PrefixRouter:
    """Keeps books on `num_replicas` replicas; knows nothing of processes. `block_size`: tokens; 0: nobody caches prefixes."""

    def __init__(self, num_replicas: int, block_size: int) -> None:
        self._replicas = [_Replica() for _ in range(num_replicas)]
        self._block_size = block_size
        self.typical_output = FIRST_TYPICAL_OUTPUT  # tokens, a moving average

    def num_tokens_left(self, replica: int) -> int:
        """Tokens that a replica still has to compute, as far as is known."""
        return self._replicas[replica].num_tokens_left

    def num_requests(self, replica: int) -> int:
        """Requests that are placed there."""
        return self._replicas[replica].num_requests

    def num_remembered(self, replica: int) -> int:
        """Blocks that a replica is thought to have cached."""
        return len(self._replicas[replica].prefixes)

    def set_capacity(self, replica: int, num_blocks: int) -> None:
        """A replica has started: its cache is empty, and holds so many blocks."""
        self._replicas[replica].capacity = num_blocks
        self._replicas[replica].prefixes.clear()

    def place(self, request: EngineRequest, candidates: Collection[int]) -> Placement:
        """Choose one of `candidates` (at least one) and put the request on its books; `remove` takes it off again."""
        root = root_hash(request.cache_keys)
        hashes: list[bytes] = []
        num_prompt_tokens = len(request.prompt_token_ids)
        if self._block_size and request.params.prompt_logprobs is None:  # those need every position computed
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
        # One that goes on beyond what was expected has one more token before it at any time.
        placement.num_output_tokens_left = max(1, placement.num_output_tokens_left - len(token_ids))
        placement.num_output_tokens += len(token_ids)
        placement.token_ids += token_ids
        self._replicas[placement.replica].num_tokens_left += placement.num_tokens_left - before

    def remove(self, placement: Placement, *, has_failed: bool = False) -> None:
        """The request has left its replica, whoever ended it; its output is in the cache too, where a next turn will find it.

        `has_failed`: refused, or lost with its replica; nothing is learned from that.
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
