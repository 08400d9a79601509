"""How many KV blocks there are and how long a sequence they carry: plain arithmetic, printed as an equation.

blocks:    | 0: null | 1 | 2 | … | num_blocks - 1 |      block 0 holds no tokens (docs/architecture.md, invariant 6)
tokens     = (num_blocks - 1) * block_size
a sequence of max_model_len tokens needs ceil(max_model_len / block_size) blocks, and must fit alone
"""

from __future__ import annotations

from typing import NamedTuple

from pagoda.config.values import format_bytes
from pagoda.errors import ConfigError


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
) -> KVFit:
    """Fit the longest sequence to the KV memory there is.

    `block_bytes`: one block in all layers. `available_bytes`: memory for the whole KV cache. `block_size`: tokens a block.
    `model_max_len`: the model's own limit. `max_model_len`: the configured one, None for the most that fits.
    `num_blocks_override`: exactly so many blocks, for any `available_bytes`.

    Raises:
        ConfigError: the length asked for is beyond the model or the memory, or not one block fits; says what to change.
    """
    num_blocks = available_bytes // block_bytes if num_blocks_override is None else num_blocks_override
    usable_tokens = max(0, num_blocks - 1) * block_size
    if usable_tokens == 0:
        raise ConfigError(
            f"the KV cache needs {format_bytes(2 * block_bytes)} for one block of {block_size} tokens and the null block, and "
            f"{format_bytes(available_bytes)} are available: {_give_more_memory(2 * block_bytes)}"
        )
    if max_model_len is not None:
        _check_length(max_model_len, model_max_len, usable_tokens, block_size, block_bytes, num_blocks_override)
        length, reason = max_model_len, "as asked for"
    elif model_max_len <= usable_tokens:
        length, reason = model_max_len, "the model's own limit"
    else:
        length, reason = usable_tokens, f"all that fits; the model's own limit is {model_max_len}"
    if num_blocks_override is None:
        origin = f"{format_bytes(available_bytes)} / {format_bytes(block_bytes)} a block = {num_blocks} blocks"
    else:
        origin = f"num_gpu_blocks_override = {num_blocks} blocks of {format_bytes(block_bytes)}"
    equation = (
        f"KV cache: {origin}; ({num_blocks} - 1 null block) * {block_size} = {usable_tokens} tokens; "
        f"max_model_len = {length} ({reason}), so {usable_tokens / length:.1f} sequences of full length"
    )
    return KVFit(num_blocks, length, equation)


def check_model_limit(max_model_len: int, model_max_len: int) -> None:
    """Refuse a length beyond the model's own limit."""
    if max_model_len > model_max_len:
        raise ConfigError(
            f"max_model_len={max_model_len} is beyond the model's own limit: must be at most {model_max_len}, "
            "or the checkpoint's config.json must scale its rotary embedding"
        )


def _check_length(
    asked: int, model_max_len: int, usable_tokens: int, block_size: int, block_bytes: int, override: int | None
) -> None:
    """Refuse a length beyond the model's limit or the KV cache."""
    check_model_limit(asked, model_max_len)
    blocks_needed = -(-asked // block_size) + 1
    if asked > usable_tokens:
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
        f"raise kv_cache_memory_bytes (on a GPU gpu_memory_utilization) so that {needed_bytes} bytes are available, "
        "or give the container more memory"
    )
