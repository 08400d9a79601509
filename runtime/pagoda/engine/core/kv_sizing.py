"""How many KV blocks there are and how long a sequence they carry: plain arithmetic, printed as an equation.

blocks:    | 0: null | 1 | 2 | … | num_blocks - 1 |      block 0 holds no tokens (docs/architecture.md, invariant 6)
tokens     = (num_blocks - 1) * block_size
a sequence of max_model_len tokens needs ceil(max_model_len / block_size) blocks, and must fit alone

With several groups of layers (`scheduling.kv_groups`) a sequence needs so many blocks in each group that keeps all tokens, and
a window's in each that has one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from pagoda.config.sizes import exact_bytes
from pagoda.config.values import format_bytes
from pagoda.errors import ConfigError
from pagoda.scheduling.kv_groups import FullGroup, GroupRule, KVGroups, most_blocks, most_tokens


class KVFit(NamedTuple):
    """`num_blocks` includes the null block; `max_model_len` is in tokens; `equation` is printed at start."""

    num_blocks: int
    max_model_len: int
    equation: str


def fit_max_model_len(
    *,
    block_bytes: int,
    available_bytes: int,
    block_size: int,
    model_max_len: int,
    max_model_len: int | None = None,
    num_blocks_override: int | None = None,
    rules: Sequence[GroupRule] = (FullGroup(),),
    max_step_tokens: int = 1,
    one_group_factor: float = 1.0,
    state_bytes: int = 0,
) -> KVFit:
    """Fit the longest sequence to the KV memory there is.

    `block_bytes`: one block, in the layers of any group. `available_bytes`: memory for the whole KV cache. `block_size`:
    tokens a block. `model_max_len`: the model's own limit. `max_model_len`: the configured one, None for the most that fits.
    `num_blocks_override`: exactly so many blocks, for any `available_bytes`. `rules`: of each group of layers.
    `max_step_tokens`: the most tokens of a sequence that a step computes, which a group with a window keeps besides that.
    `one_group_factor`: how many times more a block would take with all layers in one group. `state_bytes`: the states of all
    recurrent layers, of one sequence.

    Raises:
        ConfigError: the length asked for is beyond the model or the memory, or not one block fits; says what to change.
    """
    num_blocks = available_bytes // block_bytes if num_blocks_override is None else num_blocks_override
    usable_tokens = most_tokens(rules, num_blocks - 1, max_step_tokens, block_size)
    least = len(rules) + 1
    if usable_tokens == 0:
        one = "one block" if len(rules) == 1 else f"{len(rules)} blocks, one a group of layers,"
        raise ConfigError(
            f"the KV cache needs {format_bytes(least * block_bytes)} for {one} of {block_size} tokens and the null block, and "
            f"{format_bytes(available_bytes)} are available: {_give_more_memory(least * block_bytes)}"
        )
    if max_model_len is not None:
        check_model_limit(max_model_len, model_max_len)
        if max_model_len > usable_tokens:
            needed = most_blocks(rules, max_model_len, max_step_tokens, block_size) + 1
            _refuse_length(max_model_len, usable_tokens, needed, block_size, block_bytes, num_blocks_override)
        length, reason = max_model_len, "as asked for"
    elif model_max_len <= usable_tokens:
        length, reason = model_max_len, "the model's own limit"
    else:
        length, reason = usable_tokens, f"all that fits; the model's own limit is {model_max_len}"
    if num_blocks_override is None:
        origin = f"{format_bytes(available_bytes)} / {format_bytes(block_bytes)} a block = {num_blocks} blocks"
    else:
        origin = f"num_gpu_blocks_override = {num_blocks} blocks of {format_bytes(block_bytes)}"
    fitted = f"max_model_len = {length} ({reason}), so"
    if list(rules) == [FullGroup()]:
        of_token = format_bytes(round(block_bytes / block_size))
        equation = (
            f"KV cache: {origin}; ({num_blocks} - 1 null block) * {block_size} = {usable_tokens} tokens, {of_token} a token; "
            f"{fitted} {usable_tokens / length:.1f} sequences of full length"
        )
    else:
        of_sequence = most_blocks(rules, length, 1, block_size)
        # All sequences together compute `max_step_tokens` in a step, and keep these besides their windows.
        of_step = most_blocks(rules, length, max_step_tokens, block_size) - of_sequence
        num_sequences = max(1.0, (num_blocks - 1 - of_step) / of_sequence)
        of_token = format_bytes(round(of_sequence * block_bytes / length))
        saved = one_group_factor * -(-length // block_size) / of_sequence
        part = f"{saved:.1f} times less than if all layers kept all tokens"
        if state_bytes:
            num_states = most_blocks([rule for rule in rules if not rule.can_fall_back], length, 1, block_size)
            part = (
                f"of which {num_states} blocks for its recurrent state of {format_bytes(state_bytes)}, half of them where it "
                "passes from one to the next"
            )
        equation = (
            f"KV cache: {origin} of {block_size} tokens; groups of layers: {_listed(rules)}; {fitted} a sequence takes "
            f"{of_sequence} blocks, {of_token} a token, {part}; beside "
            f"{of_step} blocks for the tokens of a step there is room for {num_sequences:.1f} sequences of full length"
        )
    return KVFit(num_blocks, length, equation)


def fitting_block_size(asked: int, groups: KVGroups, num_ranks: int, kv_element_bytes: int) -> int:
    """`block_size`, raised where a model has recurrent layers: a block is as large in every group, so that it takes as many
    tokens to fill one with keys and values as a state is large."""
    return max(asked, groups.least_block_size(num_ranks, kv_element_bytes))


def check_model_limit(max_model_len: int, model_max_len: int) -> None:
    """Refuse a length beyond the model's own limit."""
    if max_model_len > model_max_len:
        raise ConfigError(
            f"max_model_len={max_model_len} is beyond the model's own limit: must be at most {model_max_len}, "
            "or the checkpoint's config.json must scale its rotary embedding"
        )


def _refuse_length(
    asked: int, usable_tokens: int, blocks_needed: int, block_size: int, block_bytes: int, override: int | None
) -> None:
    """Refuse a length beyond the KV cache."""
    remedy = (
        _give_more_memory(blocks_needed * block_bytes)
        if override is None
        else f"raise num_gpu_blocks_override to {blocks_needed}"
    )
    raise ConfigError(
        f"max_model_len={asked} does not fit: it needs {blocks_needed} KV blocks of {block_size} tokens (the null block "
        f"included) = {format_bytes(blocks_needed * block_bytes)}, and the KV cache holds {usable_tokens} tokens. "
        f"Lower max_model_len to at most {usable_tokens}, or {remedy}"
    )


def _give_more_memory(needed_bytes: int) -> str:
    return (
        f"raise kv_cache_memory_bytes (on a GPU gpu_memory_utilization) so that {exact_bytes(needed_bytes)} are available, "
        "or give the container more memory"
    )


def _listed(rules: Sequence[GroupRule]) -> str:
    return " and ".join(f"{count} of {rule}" for rule, count in Counter(rules).items())
