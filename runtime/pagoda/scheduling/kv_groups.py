"""What layers keep of a request's tokens, and which of them share block tables.

Layers that keep alike form groups of at most N layers. A block holds `block_size` tokens of the layers of one group, any one:
all groups take their blocks from one pool.

    layers    F W W W F W W W       F full attention, W sliding window                 N = 2
    groups    full: F F     window: W W     window: W W     window: W W                4 block tables a request
    memory    cache 0 ─▶ first layer of each group       a block id is a group's by who holds the block, so the same
              cache 1 ─▶ second layer of each group      memory may be keys of layer 0 now and of layer 5 later

A group of full attention holds all blocks of a request, one with a window only those that tokens still to be computed can see:

    tokens computed  ─────────────────────────▶│ this step │
    full             [■][■][■][■][■][■][■][■][■][■][■][■][■]
    window           [ ][ ][ ][ ][ ][ ][■][■][■][■][■][■]        the last window and what is computed in a step

A recurrent layer keeps no tokens but its state after the last one, which is in the block of that token's position. What is
computed up to the end of a block is left there, and goes on in the next one: a full block is the state at its end, and never
written again. So a prefix can be continued wherever that block is still cached, and what a state needs is what a window of
the last token would:

    state            [ ][ ][ ][ ][ ][ ][ ][ ][S][S][S][S][S]     read from the first, left at the end of each, kept in the last
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile, zip_longest
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

if TYPE_CHECKING:  # sizes are computed where there is no numpy, which a request needs
    from pagoda.scheduling.block_pool import Block

MAX_GROUPS = 8
"""Each group costs every step one more block table."""

LONGEST_REQUEST = (1 << 31) - 1
"""Tokens. Where all layers have windows, the blocks of a request end no earlier than its positions."""


# ---- what a layer keeps -------------------------------------------------------------------------------------------------


PageShapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class FullAttention:
    """Keys and values of all tokens."""

    num_kv_heads: int
    head_dim: int

    @property
    def rule(self) -> GroupRule:
        """Which blocks of a request the layer needs."""
        return FullGroup()

    def page_shapes(self, block_size: int) -> PageShapes:
        """Shapes of the tensors, keys and values, that a block of so many tokens is in this layer."""
        return ((self.num_kv_heads, block_size, self.head_dim),) * 2

    def element_bytes(self, kv_element_bytes: int) -> int:
        """Bytes of a number of these tensors, where one of keys and values has `kv_element_bytes`."""
        return kv_element_bytes

    def on_rank(self, num_ranks: int) -> FullAttention:
        """What one of so many tensor parallel ranks keeps; with fewer KV heads than ranks, some keep the same one."""
        return replace(self, num_kv_heads=-(-self.num_kv_heads // num_ranks))


@dataclass(frozen=True, slots=True)
class SlidingWindow(FullAttention):
    """Keys and values of the last `size` tokens."""

    size: int

    @property
    @override
    def rule(self) -> GroupRule:
        return WindowGroup(self.size)


@dataclass(frozen=True, slots=True)
class LatentKV:
    """Of all tokens one vector each, from which keys and values are made, and the part of the keys that is rotated."""

    rank: int
    rope_dim: int

    @property
    def rule(self) -> GroupRule:
        """See `FullAttention`."""
        return FullGroup()

    def page_shapes(self, block_size: int) -> PageShapes:
        """One tensor, see `FullAttention`."""
        return ((1, block_size, self.rank + self.rope_dim),)

    def element_bytes(self, kv_element_bytes: int) -> int:
        """See `FullAttention`."""
        return kv_element_bytes

    def on_rank(self, num_ranks: int) -> LatentKV:
        """All ranks keep the same."""
        del num_ranks
        return self


@dataclass(frozen=True, slots=True)
class RecurrentState:
    """The state of a gated delta net (Yang et al., 2024) behind the last token, in float32.

    Of each value head a matrix, and the last `conv_taps` inputs of the convolution, of all its channels.
    """

    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    conv_taps: int

    @property
    def rule(self) -> GroupRule:
        """See `FullAttention`."""
        return StateGroup()

    @property
    def conv_channels(self) -> int:
        """Queries, keys and values of all heads."""
        return 2 * self.num_key_heads * self.key_dim + self.num_value_heads * self.value_dim

    def page_shapes(self, block_size: int) -> PageShapes:
        """The matrices of the first heads and of the others, and the convolution's inputs; of a block, however large.

        In two tensors, so that each lies where keys, or values, do in a block of another group.
        """
        del block_size
        first = -(-self.num_value_heads // 2)
        matrix = (self.key_dim, self.value_dim)
        return (
            (first, *matrix),
            (self.num_value_heads - first, *matrix),
            (self.conv_taps, self.conv_channels),
        )

    def element_bytes(self, kv_element_bytes: int) -> int:
        """Of float32: what is rounded in a state stays there."""
        del kv_element_bytes
        return 4

    def on_rank(self, num_ranks: int) -> RecurrentState:
        """Key heads, with the value heads that belong to them, are shared evenly."""
        return replace(
            self, num_key_heads=self.num_key_heads // num_ranks, num_value_heads=self.num_value_heads // num_ranks
        )


@dataclass(frozen=True, slots=True)
class SharedKV:
    """Nothing: the layer reads what an earlier one, `source`, keeps."""

    source: int

    @property
    def rule(self) -> GroupRule:
        """None of its own: the layer is of its source's group."""
        return FullGroup()

    def page_shapes(self, block_size: int) -> PageShapes:
        """No tensor, see `FullAttention`."""
        del block_size
        return ()

    def element_bytes(self, kv_element_bytes: int) -> int:
        """See `FullAttention`."""
        return kv_element_bytes

    def on_rank(self, num_ranks: int) -> SharedKV:
        """See `FullAttention`."""
        del num_ranks
        return self


KVSpec = FullAttention | LatentKV | RecurrentState | SharedKV
"""What one layer keeps of a request. Equal specs may be of one group."""


# ---- what a group of layers holds of a request --------------------------------------------------------------------------


class GroupRule(ABC):
    """Which blocks of a request the layers of a group need.

    `is_written_first`: in every layer, all rows of a step write what they compute before any reads. Else what a row leaves in
    a block can be used from the next step on. `can_fall_back`: tokens that were computed can be taken back.
    """

    is_written_first: ClassVar[bool] = True
    can_fall_back: ClassVar[bool] = True

    @property
    def window(self) -> int | None:
        """Tokens that a query sees, itself included; None: all, or none."""
        return None

    @property
    @abstractmethod
    def kind(self) -> str:
        """As vLLM's KV events name it."""

    @abstractmethod
    def __str__(self) -> str:
        """What the layers are, for the log."""

    @abstractmethod
    def first_needed(self, num_computed: int, block_size: int) -> int:
        """The first block that a token from position `num_computed` on can see."""

    @abstractmethod
    def most_blocks(self, num_tokens: int, step_tokens: int, block_size: int) -> int:
        """The most that a request of `num_tokens` holds at once, of which a step computes up to `step_tokens`."""

    @abstractmethod
    def find_prefix(
        self, find: Callable[[bytes], Block | None], hashes: Sequence[bytes], block_size: int, null_block: Block
    ) -> list[Block]:
        """The longest prefix of blocks with these hashes that a request can go on from, with `null_block` for those that it
        does not need. `find`: the block with a hash, None where there is none."""

    @abstractmethod
    def ready_tokens(self, num_blocks: int, num_dropped: int, block_size: int) -> int:
        """Tokens that a request may have computed before the group must get or can give back a block, with a table of
        `num_blocks` of which the first `num_dropped` were given back."""


@dataclass(frozen=True, slots=True)
class FullGroup(GroupRule):
    """All blocks."""

    @property
    @override
    def kind(self) -> str:
        return "full_attention"

    @override
    def __str__(self) -> str:
        return "full attention"

    @override
    def first_needed(self, num_computed: int, block_size: int) -> int:
        return 0

    @override
    def most_blocks(self, num_tokens: int, step_tokens: int, block_size: int) -> int:
        return -(-num_tokens // block_size)

    @override
    def find_prefix(
        self, find: Callable[[bytes], Block | None], hashes: Sequence[bytes], block_size: int, null_block: Block
    ) -> list[Block]:
        return list(takewhile(lambda block: block is not None, map(find, hashes)))  # type: ignore[arg-type]

    @override
    def ready_tokens(self, num_blocks: int, num_dropped: int, block_size: int) -> int:
        return num_blocks * block_size


@dataclass(frozen=True, slots=True)
class WindowGroup(GroupRule):
    """Those of the last `size` tokens: the token at position p sees positions above p - size."""

    size: int

    @property
    @override
    def window(self) -> int | None:
        return self.size

    @property
    @override
    def kind(self) -> str:
        return "sliding_window"

    @override
    def __str__(self) -> str:
        return f"a window of {self.size}"

    @override
    def first_needed(self, num_computed: int, block_size: int) -> int:
        return max(0, num_computed - self.size + 1) // block_size

    @override
    def most_blocks(self, num_tokens: int, step_tokens: int, block_size: int) -> int:
        # A window and a step need not begin with a block: one more.
        return min(-(-num_tokens // block_size), -(-(step_tokens + self.size - 1) // block_size) + 1)

    @override
    def find_prefix(
        self, find: Callable[[bytes], Block | None], hashes: Sequence[bytes], block_size: int, null_block: Block
    ) -> list[Block]:
        """The longest prefix whose last window is cached, or all of it if it is shorter than that."""
        num_visible = -(-(self.size - 1) // block_size)
        run: list[Block] = []
        for index in range(len(hashes) - 1, -1, -1):
            block = find(hashes[index])
            if block is None:
                run = []
                continue
            run.append(block)
            if len(run) >= num_visible:
                return [null_block] * index + run[::-1]
        return run[::-1]

    @override
    def ready_tokens(self, num_blocks: int, num_dropped: int, block_size: int) -> int:
        return min(num_blocks * block_size, (num_dropped + 1) * block_size + self.size - 1)


@dataclass(frozen=True, slots=True)
class StateGroup(WindowGroup):
    """The one of the last token, and in a step those up to its last token: see `RecurrentState`."""

    is_written_first: ClassVar[bool] = False
    can_fall_back: ClassVar[bool] = False

    size: int = 2  # as far as a window: the token that is computed, and the one before it

    @property
    @override
    def window(self) -> int | None:
        return None

    @property
    @override
    def kind(self) -> str:
        return "mamba"

    @override
    def __str__(self) -> str:
        return "recurrent state"


def most_blocks(rules: Sequence[GroupRule], num_tokens: int, step_tokens: int, block_size: int) -> int:
    """The most that a request holds at once, in all groups: see `GroupRule.most_blocks`."""
    return sum(rule.most_blocks(num_tokens, step_tokens, block_size) for rule in rules)


def most_blocks_of_all(
    rules: Sequence[GroupRule], num_requests: int, num_tokens: int, step_tokens: int, block_size: int
) -> int:
    """The most that so many requests hold at once, each of `num_tokens`, of which a step computes `step_tokens` in all."""
    of_one = most_blocks(rules, num_tokens, 1, block_size)
    return num_requests * of_one + most_blocks(rules, num_tokens, step_tokens, block_size) - of_one


def most_tokens(rules: Sequence[GroupRule], num_blocks: int, step_tokens: int, block_size: int) -> int:
    """The longest request that `num_blocks` blocks are enough for, whatever a step computes of it up to `step_tokens`."""
    lengths = range(1, LONGEST_REQUEST + 1)
    return bisect_right(lengths, num_blocks, key=lambda length: most_blocks(rules, length, step_tokens, block_size))


# ---- which layers are in which group ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class KVGroups:
    """What the layers of a model keep, and which group each is of. Layers of a group have the same rule.

    `source_of_layer`: whose keys and values a layer reads, its own but for layers with `SharedKV`; their specs and groups here
    are those of their sources. Empty: all read their own.
    """

    layer_specs: tuple[KVSpec, ...]
    group_of_layer: tuple[int, ...]
    source_of_layer: tuple[int, ...] = ()

    @classmethod
    def one(cls, specs: Sequence[KVSpec]) -> KVGroups:
        """One group of all layers, which keeps all tokens."""
        return cls(tuple(specs), (0,) * len(specs))

    def __len__(self) -> int:
        return 1 + max(self.group_of_layer)

    @property
    def rules(self) -> tuple[GroupRule, ...]:
        """The rule of each group."""
        return tuple(self.layer_specs[self.group_of_layer.index(group)].rule for group in range(len(self)))

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each group."""
        return tuple(rule.window for rule in self.rules)

    @property
    def has_state(self) -> bool:
        """Whether there are recurrent layers."""
        return any(isinstance(spec, RecurrentState) for spec in self.layer_specs)

    def caches(self, layers: range, num_ranks: int) -> list[LayerCache]:
        """Where each of these layers keeps what it does, on one of so many tensor parallel ranks. Layers of different groups
        share caches, those of one group never do."""
        seen: Counter[tuple[int, PageShapes | None]] = Counter()
        found: list[LayerCache] = []
        for layer in layers:
            source = self.source_of_layer[layer] if self.source_of_layer else layer
            if source != layer:
                found.append(found[layers.index(source)])
                continue
            spec = self.layer_specs[layer].on_rank(num_ranks)
            form = None if self.has_state else spec.page_shapes(1)
            key = self.group_of_layer[layer], form
            found.append(LayerCache(spec, form, seen[key]))
            seen[key] += 1
        return found

    def one_group_factor(self, block_size: int) -> float:
        """How many times more a block would take if all layers were one group."""
        layers = range(len(self.layer_specs))
        of_one = replace(self, group_of_layer=(0,) * len(layers)).block_bytes(layers, 1, block_size, 1)
        return of_one / self.block_bytes(layers, 1, block_size, 1)

    def block_bytes(self, layers: range, num_ranks: int, block_size: int, kv_element_bytes: int) -> int:
        """Bytes that a block takes in all caches of these layers on a rank."""
        forms = cache_forms(self.caches(layers, num_ranks), block_size, kv_element_bytes)
        return sum(form.num_caches * sum(form.page_bytes) for form in forms.values())

    def state_bytes(self) -> int:
        """Bytes of the states of all recurrent layers, of one sequence."""
        states = [spec for spec in self.layer_specs if isinstance(spec, RecurrentState)]
        return sum(page_elements(spec.page_shapes(1)) * spec.element_bytes(1) for spec in states)

    def least_block_size(self, num_ranks: int, kv_element_bytes: int) -> int:
        """The smallest power of two of tokens whose keys, and values, take as much as half of a state: then blocks of both are
        as large."""
        size = 1
        while any(
            isinstance(spec, RecurrentState)
            and not isinstance(other, RecurrentState)
            and any(
                state > kv
                for state, kv in zip(
                    _page_bytes(spec.on_rank(num_ranks), size, kv_element_bytes),
                    _page_bytes(other.on_rank(num_ranks), size, kv_element_bytes),
                    strict=False,
                )
            )
            for spec in set(self.layer_specs)
            for other in set(self.layer_specs)
        ):
            size *= 2
        return size


@dataclass(frozen=True, slots=True)
class LayerCache:
    """Where a layer keeps what it does: in cache number `index` of those of its form.

    Caches of layers of unlike forms are each their own. Only where there are states, all are of one form, None: a block of a
    cache is then as large as the larger of both.
    """

    spec: KVSpec
    form: PageShapes | None
    index: int


@dataclass(frozen=True, slots=True)
class CacheForm:
    """Caches that are alike: how many there are, and how many bytes each tensor of a block has in one."""

    num_caches: int
    page_bytes: tuple[int, ...]


def cache_forms(
    caches: Sequence[LayerCache], block_size: int, kv_element_bytes: int
) -> dict[PageShapes | None, CacheForm]:
    """What memory these caches are in."""
    forms: dict[PageShapes | None, CacheForm] = {}
    for cache in caches:
        own = _page_bytes(cache.spec, block_size, kv_element_bytes)
        known = forms.get(cache.form, CacheForm(0, ()))
        largest = tuple(max(pair) for pair in zip_longest(known.page_bytes, own, fillvalue=0))
        forms[cache.form] = CacheForm(max(known.num_caches, cache.index + 1), largest)
    return forms


def _page_bytes(spec: KVSpec, block_size: int, kv_element_bytes: int) -> tuple[int, ...]:
    each = spec.element_bytes(kv_element_bytes)
    return tuple(each * page_elements([shape]) for shape in spec.page_shapes(block_size))


def page_elements(shapes: Sequence[Sequence[int]]) -> int:
    """Numbers in tensors of these shapes."""
    total = 0
    for shape in shapes:
        size = 1
        for length in shape:
            size *= length
        total += size
    return total


def group_layers(specs: Sequence[KVSpec], longest: int, block_size: int) -> KVGroups:
    """Put layers into groups so that a sequence of `longest` tokens takes the least memory, in at most `MAX_GROUPS` groups.

    A window that `longest` tokens do not fill is none. Layers of a kind are dealt out to its groups in turn, so that each
    pipeline stage has about as many of every group.
    """
    sources = [spec.source if isinstance(spec, SharedKV) else layer for layer, spec in enumerate(specs)]
    kinds = [_without_idle_window(specs[source], longest) for source in sources]
    counts = Counter(kind for layer, kind in enumerate(kinds) if sources[layer] == layer)
    sizes = range(max(counts.values()), 0, -1)
    size = min(sizes, key=lambda size: _cost(counts, size, longest, block_size))
    first_group: dict[KVSpec, int] = {}
    num_groups: dict[KVSpec, int] = {}
    for kind in sorted(counts, key=lambda kind: kind.rule != FullGroup()):
        first_group[kind] = sum(num_groups.values())
        num_groups[kind] = -(-counts[kind] // size)
    seen: Counter[KVSpec] = Counter()
    group_of_layer: list[int] = []
    for layer, kind in enumerate(kinds):
        if sources[layer] != layer:
            group_of_layer.append(group_of_layer[sources[layer]])
            continue
        group_of_layer.append(first_group[kind] + seen[kind] % num_groups[kind])
        seen[kind] += 1
    return KVGroups(tuple(kinds), tuple(group_of_layer), tuple(sources))


def _without_idle_window(spec: KVSpec, longest: int) -> KVSpec:
    if isinstance(spec, SlidingWindow) and spec.size >= longest:
        return FullAttention(spec.num_kv_heads, spec.head_dim)
    return spec


def _cost(counts: Counter[KVSpec], size: int, longest: int, block_size: int) -> tuple[bool, int]:
    """Numbers that the longest sequence takes while it decodes, in groups of `size` layers; any too many groups cost more."""
    rules = [kind.rule for kind, count in counts.items() for _ in range(-(-count // size))]
    blocks = most_blocks(rules, longest, 1, block_size)
    num_caches: dict[PageShapes, int] = {}
    for kind, count in counts.items():
        shapes = kind.page_shapes(block_size)
        num_caches[shapes] = max(num_caches.get(shapes, 0), min(size, count))
    if any(isinstance(kind, RecurrentState) for kind in counts):
        block = max(num_caches.values())  # of whatever a cache holds
    else:
        block = sum(number * page_elements(shapes) for shapes, number in num_caches.items())
    return len(rules) > max(MAX_GROUPS, len(counts)), block * blocks
