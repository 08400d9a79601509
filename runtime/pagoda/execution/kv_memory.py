"""How much memory the KV cache of a CPU takes where nothing is asked for."""

from __future__ import annotations

from collections.abc import Sequence

from pagoda.config.values import format_bytes
from pagoda.platform.choice import GIVEN, Choice
from pagoda.scheduling.kv_groups import GroupRule, most_blocks_of_all

# On CPU the KV cache shares memory with everything else of the machine, so it takes a part of what is free.
CPU_KV_SHARE = 0.5
OWN_SHARE = 0.8  # of what an engine may take itself (engine_memory_bytes), once its weights are there
CPU_KV_CAP_BYTES = 16 * 2**30
# Prompt and output of a request as they usually are; few are as long as the model allows.
TYPICAL_SEQUENCE_TOKENS = 2048


def choose_cpu_kv_cache_bytes(
    asked: int | None,
    *,
    memory_available: int,
    block_bytes: int,
    block_size: int,
    rules: Sequence[GroupRule],
    max_num_seqs: int,
    max_model_len: int,
    max_step_tokens: int,
) -> Choice:
    """Memory of the KV cache on CPU, once weights are loaded.

    What `max_num_seqs` sequences of a typical length take, or one of `max_model_len` tokens where that is more; at most half
    of the memory that is free now, and 16 GiB. `memory_available`: bytes. `max_model_len`: what is asked for, else the model's
    own limit. `max_step_tokens`: the most that a step computes.
    """
    if asked is not None:
        return Choice("kv_cache_memory_bytes", asked, GIVEN)
    typical = min(max_model_len, TYPICAL_SEQUENCE_TOKENS)
    of_typical = most_blocks_of_all(rules, max_num_seqs, typical, max_step_tokens, block_size)
    of_longest = most_blocks_of_all(rules, 1, max_model_len, max_step_tokens, block_size)
    needed = (
        f"for {max_num_seqs} sequences of {typical} tokens"
        if of_typical >= of_longest
        else f"for a sequence of {max_model_len} tokens"
    )
    bounds = {
        f"{CPU_KV_SHARE:.0%} of {format_bytes(memory_available)} free": int(memory_available * CPU_KV_SHARE),
        f"the most that is taken unasked, {format_bytes(CPU_KV_CAP_BYTES)}": CPU_KV_CAP_BYTES,
        needed: (max(of_typical, of_longest) + 1) * block_bytes,
    }
    reason = min(bounds, key=lambda name: bounds[name])
    return Choice("kv_cache_memory_bytes", bounds[reason], reason)
