"""How much memory the KV cache of a CPU takes where nothing is asked for."""

from __future__ import annotations

from pagoda.config.values import format_bytes
from pagoda.platform.choice import GIVEN, Choice

# On CPU the KV cache shares memory with everything else of the machine, so it takes a part of what is free.
CPU_KV_SHARE = 0.5
CPU_KV_CAP_BYTES = 16 * 2**30


def choose_cpu_kv_cache_bytes(
    asked: int | None,
    *,
    memory_available: int,
    block_bytes: int,
    block_size: int,
    max_model_len: int,
    max_num_seqs: int,
) -> Choice:
    """Memory of the KV cache on CPU, once weights are loaded.

    Half of the memory that is free now, at most 16 GiB, and no more than all sequences at their longest could use.
    `memory_available`: bytes. `max_model_len`: what is asked for, else the model's own limit.
    """
    if asked is not None:
        return Choice("kv_cache_memory_bytes", asked, GIVEN)
    blocks_of_all = max_num_seqs * -(-max_model_len // block_size) + 1
    bounds = {
        f"{CPU_KV_SHARE:.0%} of {format_bytes(memory_available)} free": int(memory_available * CPU_KV_SHARE),
        f"the most that is taken unasked, {format_bytes(CPU_KV_CAP_BYTES)}": CPU_KV_CAP_BYTES,
        f"all that {max_num_seqs} sequences of {max_model_len} tokens can use": blocks_of_all * block_bytes,
    }
    reason = min(bounds, key=lambda name: bounds[name])
    return Choice("kv_cache_memory_bytes", bounds[reason], reason)
