"""Every kernel as models launch it: argument types, constants and launch options, for compilation without a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from pagoda_kernels.gpu.attention import REDUCE_WARPS, AttentionGeometry, reduce_constants
from pagoda_kernels.gpu.attention_kernels import paged_attention_kernel, reduce_segments_kernel
from pagoda_kernels.gpu.delta_net import (
    CONV_TILE,
    CONV_TOKENS,
    CONV_WARPS,
    KEEP_TILE,
    KEEP_WARPS,
    NORM_WARPS,
    STATE_TILE,
    STATE_WARPS,
)
from pagoda_kernels.gpu.delta_net_kernels import (
    convolve_kernel,
    delta_rule_kernel,
    gated_norm_kernel,
    keep_inputs_kernel,
)
from pagoda_kernels.gpu.elementwise import (
    ACTIVATION_TILE,
    ACTIVATION_WARPS,
    CLAMPED_SWIGLU,
    GELU,
    ROTATE_WARPS,
    SILU,
    head_constants,
    rms_norm_constants,
    rms_norm_warps,
    rotate_constants,
)
from pagoda_kernels.gpu.elementwise_kernels import (
    gated_activation_kernel,
    rms_norm_kernel,
    rotate_and_store_kernel,
    rotate_kernel,
)
from pagoda_kernels.gpu.expert_kernels import combine_experts_kernel, expert_down_kernel, expert_gate_up_kernel
from pagoda_kernels.gpu.experts import (
    COMBINE_TILE,
    COMBINE_WARPS,
    EXPERT_STAGES,
    EXPERT_WARPS,
    TILE_K,
    TILE_M,
    columns_of_tile,
)
from pagoda_kernels.gpu.latent_attention import REDUCE_WARPS as LATENT_REDUCE_WARPS
from pagoda_kernels.gpu.latent_attention import LatentGeometry
from pagoda_kernels.gpu.latent_attention_kernels import latent_attention_kernel
from pagoda_kernels.gpu.lora import (
    EXPAND_WARPS,
    MAX_PARTS,
    SHRINK_WARPS,
    STAGES,
    expand_constants,
    shrink_constants,
)
from pagoda_kernels.gpu.lora_kernels import lora_expand_kernel, lora_shrink_kernel
from pagoda_kernels.gpu.sampling import BITMASK_TILE, BITMASK_WARPS, SAMPLING_TILE, SAMPLING_WARPS, num_tiles
from pagoda_kernels.gpu.sampling_kernels import greedy_kernel, sample_top_p_kernel, token_bitmask_kernel
from pagoda_kernels.gpu.step import GATHER_TILE, GATHER_WARPS
from pagoda_kernels.gpu.step_kernels import gather_step_kernel
from pagoda_kernels.gpu.tuning import AttentionTiles, TuningTable, load_table, table_name

TRITON_TYPES = {
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "float8_e4m3fn": "fp8e4nv",
    "float8_e5m2": "fp8e5",
}
FIRST_ARCH_WITH_BFLOAT16 = 80
# Of each float8 type, the first compute capability for which Triton has conversions.
FIRST_ARCH_WITH_FLOAT8 = {"float8_e4m3fn": 89, "float8_e5m2": 80}
DTYPES_OF_SIZE = {2: ("bfloat16", "float16"), 4: ("float32",)}

# Query heads a KV head, sliding window, soft cap and sinks of a layer, beside the head dimension of the table's entry.
ATTENTION_VARIANTS = (
    (4, None, False, False),
    (8, None, False, False),
    (3, None, False, False),
    (4, 4096, False, False),
    (4, None, True, False),
    (8, 128, False, True),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelBuild:
    """One kernel to compile. `types`: Triton's type of each argument that is not in `constants`."""

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned_integers: frozenset[str] = frozenset()
    num_warps: int = 4
    num_stages: int = 3
    is_decode: bool = field(default=False)


def tuned_builds(arch: int) -> Iterator[KernelBuild]:
    """Every configuration that the table for compute capability `arch` (80 for 8.0) can lead to."""
    table = load_table(table_name(divmod(arch, 10)))
    for decode in (True, False):
        for tiles in table.decode_attention if decode else table.prefill_attention:
            for dtype in _dtypes_served(table, tiles, decode=decode):
                if dtype != "bfloat16" or arch >= FIRST_ARCH_WITH_BFLOAT16:
                    yield from attention_builds(table, tiles, dtype, decode=decode)
    for head_dim in (64, 128, 256):
        yield _reduce_build(table, head_dim)
        yield _reduce_build(table, head_dim, short=True)
        tiles = table.prefill_tiles(head_dim, 2)
        yield from attention_builds(
            table, tiles, "float16" if arch < FIRST_ARCH_WITH_BFLOAT16 else "bfloat16", decode=False, short=True
        )
    for dtype in ("float16",) if arch < FIRST_ARCH_WITH_BFLOAT16 else ("bfloat16", "float16", "float32"):
        yield from _norm_builds(dtype)
        yield from _activation_builds(dtype)
        yield from _rotate_builds(dtype, dtype)
        yield from _latent_builds(table, dtype)
        yield from _expert_builds(dtype)
        yield from _lora_builds(dtype)
        yield from _delta_net_builds(dtype, interleaved=dtype == "bfloat16")
    yield from _sampling_builds()
    yield _step_build()
    for kv_dtype, first_arch in FIRST_ARCH_WITH_FLOAT8.items():
        if arch >= first_arch:
            yield from _rotate_builds("bfloat16", kv_dtype)
            for head_dim in (64, 128, 256):
                for decode, tiles in (
                    (True, table.decode_tiles(head_dim, 1)),
                    (False, table.prefill_tiles(head_dim, 1)),
                ):
                    yield from attention_builds(table, tiles, "bfloat16", decode=decode, kv_dtype=kv_dtype)


def _dtypes_served(table: TuningTable, tiles: AttentionTiles, *, decode: bool) -> Iterator[str]:
    """The types that `tiles` are taken for: its own, and smaller ones where the table has nothing smaller."""
    for element_bytes, dtypes in DTYPES_OF_SIZE.items():
        chosen = table.decode_tiles if decode else table.prefill_tiles
        if element_bytes <= tiles.element_bytes and chosen(tiles.head_dim, element_bytes) is tiles:
            yield from dtypes


def attention_builds(
    table: TuningTable,
    tiles: AttentionTiles,
    dtype: str,
    *,
    decode: bool,
    short: bool = False,
    kv_dtype: str | None = None,
) -> Iterator[KernelBuild]:
    """The attention kernel with `tiles`, in each of `ATTENTION_VARIANTS`."""
    of_element, of_cache = TRITON_TYPES[dtype], TRITON_TYPES[kv_dtype or dtype]
    # With float8 the commonest heads only: the rest of the kernel is the same.
    for heads_per_kv, window, has_soft_cap, has_sinks in ATTENTION_VARIANTS[:2] if kv_dtype else ATTENTION_VARIANTS:
        geometry = AttentionGeometry(8 * heads_per_kv, 8, tiles.head_dim, 16, window, has_soft_cap, has_sinks)
        kind = "short" if short else "decode" if decode else "prefill"
        extra = (
            f" window={window}" * bool(window)
            + " soft_cap" * has_soft_cap
            + " sinks" * has_sinks
            + f" kv={kv_dtype}" * bool(kv_dtype)
        )
        yield KernelBuild(
            name=f"{kind}_attention {dtype} head_dim={tiles.head_dim} heads_per_kv={heads_per_kv}{extra}",
            kernel=paged_attention_kernel,
            types={
                **dict.fromkeys(("output", "query"), f"*{of_element}"),
                **dict.fromkeys(("k_cache", "v_cache"), f"*{of_cache}"),
                **dict.fromkeys(("partial_output", "partial_max", "partial_sum", "sinks"), "*fp32"),
                **dict.fromkeys(("block_table", "seq_lens", "query_start_loc"), "*i32"),
                **dict.fromkeys(("first_row", "num_rows", "query_stride", "table_stride"), "i32"),
                **dict.fromkeys(("scale", "soft_cap", "k_scale", "v_scale"), "fp32"),
            },
            constants=geometry.constants(tiles, table.segments, decode=decode, short=short),
            aligned_integers=frozenset({"query_stride"}),
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
            is_decode=decode,
        )


def _reduce_build(table: TuningTable, head_dim: int, *, short: bool = False) -> KernelBuild:
    geometry = AttentionGeometry(32, 8, head_dim, 16, None, False, False)
    constants = geometry.reduce_constants(table.segments, short=short)
    return _reduction(table, f"reduce_segments head_dim={head_dim}" + " short" * short, constants, REDUCE_WARPS)


def _reduction(table: TuningTable, name: str, constants: Mapping[str, Any], num_warps: int) -> KernelBuild:
    return KernelBuild(
        name=name,
        kernel=reduce_segments_kernel,
        types={
            "output": "*bf16" if table.name != "default" else "*fp16",
            **dict.fromkeys(("partial_output", "partial_max", "partial_sum", "sinks"), "*fp32"),
            **dict.fromkeys(("seq_lens", "query_start_loc"), "*i32"),
            "first_row": "i32",
            "v_scale": "fp32",
        },
        constants=constants,
        num_warps=num_warps,
        is_decode=True,
    )


def _latent_builds(table: TuningTable, dtype: str) -> Iterator[KernelBuild]:
    """DeepSeek's latents of 512 + 64, with 16 and 128 heads, and what turns their last 64."""
    pointer, rank, rope_dim = f"*{TRITON_TYPES[dtype]}", 512, 64
    element_bytes = 4 if dtype == "float32" else 2
    for num_heads in (16, 128):
        geometry = LatentGeometry(num_heads, rank + rope_dim, rank, 16)
        kinds = {"decode": 1, "short": geometry.short_query_len, "prefill": 1}
        for kind, query_len in kinds.items():
            if kind == "short" and query_len == 1:
                continue
            chosen = table.latent_decode_tiles if kind == "decode" else table.latent_prefill_tiles
            tiles = chosen(geometry.latent_dim, element_bytes)
            decode = kind != "prefill"
            yield KernelBuild(
                name=f"{kind}_latent_attention {dtype} heads={num_heads}",
                kernel=latent_attention_kernel,
                types={
                    **dict.fromkeys(("output", "query", "cache"), pointer),
                    **dict.fromkeys(("partial_output", "partial_max", "partial_sum"), "*fp32"),
                    **dict.fromkeys(("block_table", "seq_lens", "query_start_loc"), "*i32"),
                    **dict.fromkeys(("first_row", "num_rows", "table_stride"), "i32"),
                    "scale": "fp32",
                },
                constants=geometry.constants(tiles, table.segments, decode=decode, query_len=query_len),
                num_warps=tiles.num_warps,
                num_stages=tiles.num_stages,
                is_decode=kind == "decode",
            )
        if dtype == "float16":  # once: its sums are float32 in any
            constants = reduce_constants(num_heads, rank, table.segments)
            yield _reduction(table, f"reduce_latents heads={num_heads}", constants, LATENT_REDUCE_WARPS)
        yield KernelBuild(
            name=f"rotate {dtype} heads={num_heads}",
            kernel=rotate_kernel,
            types={
                **dict.fromkeys(("rotated_query", "rotated_key", "query", "key"), pointer),
                **dict.fromkeys(("cos", "sin"), "*fp32"),
                **dict.fromkeys(("query_stride", "key_stride"), "i32"),
            },
            constants=head_constants(num_heads, 1, rope_dim, rope_dim // 2, interleaved=True),
            aligned_integers=frozenset({"query_stride", "key_stride"}),
            num_warps=ROTATE_WARPS,
            is_decode=True,
        )


def _norm_builds(dtype: str) -> Iterator[KernelBuild]:
    """Norms of a residual stream, and of heads."""
    pointer = f"*{TRITON_TYPES[dtype]}"
    for size, heads, has_residual in (
        (1024, 1, True),
        (4096, 1, True),
        (5120, 1, True),
        (4096, 1, False),
        (128, 8, False),
    ):
        yield KernelBuild(
            name=f"rms_norm {dtype} size={size}" + " residual" * has_residual,
            kernel=rms_norm_kernel,
            types={
                **dict.fromkeys(("normed", "stream", "x", "residual", "weight"), pointer),
                "eps": "fp32",
                "token_stride": "i32",
            },
            constants=rms_norm_constants(size, heads, has_residual=has_residual),
            aligned_integers=frozenset({"token_stride"}),
            num_warps=rms_norm_warps(size),
            is_decode=True,
        )


def _activation_builds(dtype: str) -> Iterator[KernelBuild]:
    for activation, name in ((SILU, "silu"), (GELU, "gelu"), (CLAMPED_SWIGLU, "clamped_swiglu")):
        yield KernelBuild(
            name=f"{name}_and_mul {dtype}",
            kernel=gated_activation_kernel,
            types=dict.fromkeys(("output", "x"), f"*{TRITON_TYPES[dtype]}"),
            constants={"SIZE": 12288, "TILE": ACTIVATION_TILE, "ACTIVATION": activation},
            num_warps=ACTIVATION_WARPS,
            is_decode=True,
        )


def _expert_builds(dtype: str) -> Iterator[KernelBuild]:
    """Qwen3-30B-A3B's experts, and gpt-oss's, which have biases."""
    pointer = f"*{TRITON_TYPES[dtype]}"
    tiles = {"TILE_M": TILE_M, "TILE_N": columns_of_tile(4 if dtype == "float32" else 2), "TILE_K": TILE_K}
    sorted_pairs = {"order": "*i64", **dict.fromkeys(("expert_of_block", "first_block", "first_row"), "*i32")}
    for hidden_size, size, top_k, activation, has_bias in (
        (2048, 768, 8, SILU, False),
        (2880, 2880, 4, CLAMPED_SWIGLU, True),
    ):
        name = f"{dtype} hidden_size={hidden_size} size={size}"
        yield KernelBuild(
            name=f"expert_gate_up {name}",
            kernel=expert_gate_up_kernel,
            types={**dict.fromkeys(("output", "x", "weight", "bias"), pointer), **sorted_pairs, "x_stride": "i32"},
            constants={
                "TOP_K": top_k,
                "INPUTS": hidden_size,
                "SIZE": size,
                "ACTIVATION": activation,
                "HAS_BIAS": has_bias,
                **tiles,
            },
            aligned_integers=frozenset({"x_stride"}),
            num_warps=EXPERT_WARPS,
            num_stages=EXPERT_STAGES,
            is_decode=True,
        )
        yield KernelBuild(
            name=f"expert_down {name}",
            kernel=expert_down_kernel,
            types={**dict.fromkeys(("x", "weight", "bias"), pointer), **sorted_pairs, "output": "*fp32"},
            constants={"INPUTS": size, "SIZE": hidden_size, "HAS_BIAS": has_bias, **tiles},
            num_warps=EXPERT_WARPS,
            num_stages=EXPERT_STAGES,
            is_decode=True,
        )
        if dtype == "float16":  # once: its sums are float32 in any
            yield KernelBuild(
                name=f"combine_experts hidden_size={hidden_size}",
                kernel=combine_experts_kernel,
                types={
                    **dict.fromkeys(("output", "x", "weights"), "*fp32"),
                    "ids": "*i64",
                    **dict.fromkeys(("first_expert", "num_experts"), "i32"),
                },
                constants={"TOP_K": top_k, "SIZE": hidden_size, "TILE": COMBINE_TILE},
                num_warps=COMBINE_WARPS,
                is_decode=True,
            )


def _lora_builds(dtype: str) -> Iterator[KernelBuild]:
    """Adapters of q, k and v, and of down, in Qwen3-8B, of rank 16."""
    pointer, rank_stride = f"*{TRITON_TYPES[dtype]}", 16 * MAX_PARTS
    tables = {"adapters": "*i64", **dict.fromkeys(("blocks", "order"), "*i32")}
    for inputs, outputs in ((4096, 6144), (12288, 4096)):
        yield KernelBuild(
            name=f"lora_shrink {dtype} inputs={inputs}",
            kernel=lora_shrink_kernel,
            types={"shrunk": "*fp32", "x": pointer, **tables},
            constants=shrink_constants(inputs, rank_stride),
            num_warps=SHRINK_WARPS,
            num_stages=STAGES,
            is_decode=True,
        )
        yield KernelBuild(
            name=f"lora_expand {dtype} inputs={inputs} outputs={outputs}",
            kernel=lora_expand_kernel,
            types={
                **dict.fromkeys(("output", "weights_like"), pointer),
                **dict.fromkeys(("shrunk", "scales"), "*fp32"),
                **tables,
            },
            constants=expand_constants(inputs, outputs, rank_stride),
            num_warps=EXPAND_WARPS,
            num_stages=STAGES,
            is_decode=True,
        )


def _delta_net_builds(dtype: str, *, interleaved: bool) -> Iterator[KernelBuild]:
    """Qwen3-Next's heads."""
    pointer = f"*{TRITON_TYPES[dtype]}"
    heads = {"KEY_HEADS": 16, "GROUP": 2, "KEY_DIM": 128, "VALUE_DIM": 128, "INTERLEAVED": interleaved}
    paging = {"BLOCK_SIZE": 1024}
    rows = {**dict.fromkeys(("query_start_loc", "seq_lens", "block_table"), "*i32"), "table_stride": "i32"}
    yield KernelBuild(
        name=f"convolve {dtype}",
        kernel=convolve_kernel,
        types={
            **dict.fromkeys(("output", "projected"), pointer),
            **dict.fromkeys(("weight", "conv_states"), "*fp32"),
            **rows,
            **dict.fromkeys(("conv_stride", "num_tiles"), "i32"),
        },
        constants={**heads, **paging, "TAPS": 3, "TOKENS": CONV_TOKENS, "TILE": CONV_TILE},
        aligned_integers=frozenset({"conv_stride"}),
        num_warps=CONV_WARPS,
        is_decode=True,
    )
    yield KernelBuild(
        name=f"keep_inputs {dtype}",
        kernel=keep_inputs_kernel,
        types={"conv_states": "*fp32", "projected": pointer, **rows, "conv_stride": "i32"},
        constants={**heads, **paging, "TAPS": 3, "TILE": KEEP_TILE},
        aligned_integers=frozenset({"conv_stride"}),
        num_warps=KEEP_WARPS,
        is_decode=True,
    )
    yield KernelBuild(
        name=f"delta_rule {dtype}",
        kernel=delta_rule_kernel,
        types={
            **dict.fromkeys(("output", "mixed"), pointer),
            **dict.fromkeys(("gates", "decay_log", "step_bias", "first_states", "other_states"), "*fp32"),
            **rows,
            **dict.fromkeys(("first_stride", "other_stride"), "i32"),
            "key_scale": "fp32",
        },
        constants={**heads, **paging, "PADDED_KEY_DIM": 128, "FIRST_HEADS": 16, "TILE": STATE_TILE},
        aligned_integers=frozenset({"first_stride", "other_stride"}),
        num_warps=STATE_WARPS,
        is_decode=True,
    )
    yield KernelBuild(
        name=f"gated_norm {dtype}",
        kernel=gated_norm_kernel,
        types={**dict.fromkeys(("output", "read", "projected"), pointer), "weight": "*fp32", "eps": "fp32"},
        constants={**heads, "PADDED_VALUE_DIM": 128},
        num_warps=NORM_WARPS,
        is_decode=True,
    )


def _rotate_builds(dtype: str, kv_dtype: str) -> Iterator[KernelBuild]:
    pointer, cache = f"*{TRITON_TYPES[dtype]}", f"*{TRITON_TYPES[kv_dtype]}"
    for num_heads, head_dim, has_norm, rotary_half, interleaved in (
        (32, 128, True, 64, False),
        (40, 128, False, 64, False),
        (14, 64, False, 32, False),
        (16, 256, True, 128, False),
        (32, 128, False, 32, True),
        (24, 128, False, 48, False),
    ):
        yield KernelBuild(
            name=f"rotate_and_store {dtype} heads={num_heads} head_dim={head_dim}"
            + " norm" * has_norm
            + f" rotary={2 * rotary_half}" * (2 * rotary_half != head_dim)
            + f" kv={kv_dtype}" * (kv_dtype != dtype),
            kernel=rotate_and_store_kernel,
            types={
                **dict.fromkeys(("rotated_query", "query", "key", "value", "query_norm", "key_norm"), pointer),
                **dict.fromkeys(("k_cache", "v_cache"), cache),
                **dict.fromkeys(("cos", "sin"), "*fp32"),
                "slot_mapping": "*i64",
                **dict.fromkeys(("eps", "inverse_k_scale", "inverse_v_scale"), "fp32"),
                **dict.fromkeys(("query_stride", "key_stride", "value_stride"), "i32"),
            },
            constants=rotate_constants(
                num_heads,
                8,
                head_dim,
                16,
                has_norm=has_norm,
                cache_dtype=getattr(torch, kv_dtype),
                rotary_half=rotary_half,
                interleaved=interleaved,
            ),
            aligned_integers=frozenset({"query_stride", "key_stride", "value_stride"}),
            num_warps=ROTATE_WARPS,
            is_decode=True,
        )


def _step_build() -> KernelBuild:
    longs = ("input_ids", "positions", "slot_mapping", "token_pool", "slots", "num_computed_tokens")
    return KernelBuild(
        name="gather_step",
        kernel=gather_step_kernel,
        types={
            **dict.fromkeys(longs, "*i64"),
            **dict.fromkeys(("seq_lens", "row_table", "block_table", "query_start_loc"), "*i32"),
            **dict.fromkeys(("pool_stride", "table_stride", "row_stride", "num_rows", "num_columns"), "i32"),
        },
        constants={"BLOCK_SIZE": 16, "TILE": GATHER_TILE},
        num_warps=GATHER_WARPS,
        is_decode=True,
    )


def _sampling_builds() -> Iterator[KernelBuild]:
    constants = {"VOCABULARY": 152_064, "TILE": SAMPLING_TILE}
    yield KernelBuild(
        name="greedy_sample",
        kernel=greedy_kernel,
        types={"token_ids": "*i64", "best_logits": "*fp32", "logits": "*fp32", "row_stride": "i32"},
        constants=constants,
        aligned_integers=frozenset({"row_stride"}),
        num_warps=SAMPLING_WARPS,
        is_decode=True,
    )
    yield KernelBuild(
        name="apply_token_bitmask",
        kernel=token_bitmask_kernel,
        types={
            "logits": "*fp32",
            "rows": "*i64",
            "bitmask": "*i32",
            **dict.fromkeys(("row_stride", "num_words"), "i32"),
        },
        constants={"TILE": BITMASK_TILE},
        aligned_integers=frozenset({"row_stride"}),
        num_warps=BITMASK_WARPS,
        is_decode=True,
    )
    yield KernelBuild(
        name="sample_top_p_by_rejection",
        kernel=sample_top_p_kernel,
        types={
            **dict.fromkeys(("token_ids", "rows", "seeds", "positions"), "*i64"),
            **dict.fromkeys(("logits", "best_logits", "inverse_temperatures", "min_ps"), "*fp32"),
            "top_ps": "*fp64",
            "row_stride": "i32",
        },
        constants={**constants, "TILES": num_tiles(constants["VOCABULARY"])},
        aligned_integers=frozenset({"row_stride"}),
        num_warps=SAMPLING_WARPS,
        is_decode=True,
    )
