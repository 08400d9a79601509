"""Of which positions a head's drafter has what it reads: features of the model's hidden states.

It keeps them of every step that it sees, but while it rests it sees none. What was computed then is missing, in the blocks of
the requests that ran and in those that others find in the prefix cache. A head that goes on reads what follows:

    blocks of a request     ▓▓▓▓ ▓▓░░ ░░░░ ░░▓▓ ▓▓▓▓ ▓       ▓ has features     ░ computed while it rested
    read                                   00▓▓ ▓▓▓▓ ▓       0 features of 0, with the token
                            ╰── skipped ──╯
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class KnownStates:
    """Of `num_slots` request slots and `num_blocks` blocks of `block_size` tokens each."""

    def __init__(self, num_slots: int, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.num_skipped = [0] * num_slots
        """Of each request slot its first blocks that are not read."""
        self._is_known = bytearray(num_blocks)
        self._is_known[0] = True  # the null block, which warm-up and calibration run in
        # Slots whose requests ran while nobody looked, and that no step has shown since.
        self._unseen: set[int] = set()

    def enter(self, slot: int, blocks: Sequence[int], num_shared: int, is_full: Sequence[int]) -> None:
        """A request enters with `blocks`, of which others have filled the first `num_shared`.

        `is_full[block]`: the head has computed the block, and so needs no features of it.
        """
        self._unseen.discard(slot)
        self.num_skipped[slot] = self._num_unknown(blocks[:num_shared], is_full)
        self.add(blocks[num_shared:])

    def add(self, blocks: Iterable[int]) -> None:
        """These blocks are filled by steps that are seen."""
        for block in blocks:
            self._is_known[block] = True

    def forget(self, blocks: Iterable[int]) -> None:
        """These blocks are filled by steps that are not seen."""
        for block in blocks:
            self._is_known[block] = block == 0

    def see_again(self, slots: Iterable[int]) -> None:
        """Steps are seen from now on; `slots` are those that hold requests."""
        self._unseen = set(slots)

    def is_unseen(self, slot: int) -> bool:
        return slot in self._unseen

    @property
    def has_unseen(self) -> bool:
        return bool(self._unseen)

    def resume(self, slot: int, blocks: Sequence[int], num_computed: int, is_full: Sequence[int]) -> tuple[int, int]:
        """The request in `slot` is seen again from position `num_computed` on.

        Returns a block and how many of its first positions have no features, and need some all the same; 0 where none do.
        """
        self._unseen.discard(slot)
        index, offset = divmod(num_computed, self.block_size)
        self.num_skipped[slot] = self._num_unknown(blocks[:index], is_full)
        block = blocks[index] if index < len(blocks) else 0
        if offset and not self._is_known[block]:
            self.num_skipped[slot] = index
        else:
            offset = 0
        self.add(blocks[index:])
        return block, offset

    def _num_unknown(self, blocks: Sequence[int], is_full: Sequence[int]) -> int:
        """How many of the first of `blocks` to skip, so that what is needed of the others is there."""
        for number in range(len(blocks), 0, -1):
            if not (self._is_known[blocks[number - 1]] or is_full[blocks[number - 1]]):
                return number
        return 0
