"""The compiled kernels as a backend. Importing this loads the library, which may have to be built first: see `build`."""

from __future__ import annotations

import torch
from typing_extensions import override

from pagoda_kernels.cpu.build import library
from pagoda_kernels.interface import (
    Encoder,
    FusedDecoder,
    FusedExperts,
    KernelBackend,
    LoraBatch,
    LoraLinear,
    PackedLinear,
)
from pagoda_kernels.types import AttentionMetadata, DeltaNetWeights, LoraLimits, PackedWeight, StepTensors

torch.ops.load_library(str(library()))  # type: ignore[no-untyped-call]

# Looked up once: `torch.ops.pagoda_cpu.x` itself would choose an overload at every call.
_gather_step = torch.ops.pagoda_cpu.gather_step.default
_paged_attention = torch.ops.pagoda_cpu.paged_attention.default
_latent_attention = torch.ops.pagoda_cpu.latent_attention.default
_write_kv = torch.ops.pagoda_cpu.write_kv.default
_rotate_and_store = torch.ops.pagoda_cpu.rotate_and_store.default
_rms_norm = torch.ops.pagoda_cpu.rms_norm.default
_add_rms_norm = torch.ops.pagoda_cpu.add_rms_norm.default
_apply_rotary = torch.ops.pagoda_cpu.apply_rotary.default
_silu_and_mul = torch.ops.pagoda_cpu.silu_and_mul.default
_gelu_and_mul = torch.ops.pagoda_cpu.gelu_and_mul.default
_clamped_swiglu_and_mul = torch.ops.pagoda_cpu.clamped_swiglu_and_mul.default
_linear = torch.ops.pagoda_cpu.linear.default
_linear_quantized = torch.ops.pagoda_cpu.linear_quantized.default
_linear_heads = torch.ops.pagoda_cpu.linear_heads.default
_packed_rows = torch.ops.pagoda_cpu.packed_rows.default
_gated_delta_net = torch.ops.pagoda_cpu.gated_delta_net.default
_pack = torch.ops.pagoda_cpu.pack.default
_soft_cap = torch.ops.pagoda_cpu.soft_cap.default
_greedy_sample = torch.ops.pagoda_cpu.greedy_sample.default
_apply_token_bitmask = torch.ops.pagoda_cpu.apply_token_bitmask.default


def available_levels() -> list[str]:
    """Names of the instruction sets that this processor can run the kernels with, slowest first."""
    levels: list[str] = torch.ops.pagoda_cpu.available_levels()
    return levels


def active_level() -> str:
    """The instruction set in use: the fastest on this processor, unless `use_level` has chosen another."""
    level: str = torch.ops.pagoda_cpu.active_level()
    return level


def use_level(level: str) -> None:
    """Let all kernels of this process use one of `available_levels`; `RuntimeError` for another."""
    torch.ops.pagoda_cpu.use_level(level)


class CpuBackend(KernelBackend):
    """Everything but `sample_top_p_by_rejection`: the sampler draws by torch, which on a CPU waits for no device."""

    name = "cpu"
    packed_dtypes = frozenset({torch.float32, torch.bfloat16})  # float16 has no product of packed weights

    @override
    def gather_step(
        self,
        token_pool: torch.Tensor,
        block_table: torch.Tensor,
        block_size: int,
        req_indices: torch.Tensor,
        query_start_loc: torch.Tensor,
        num_computed_tokens: torch.Tensor,
        max_query_len: int,
        into: StepTensors,
    ) -> None:
        _gather_step(
            token_pool,
            block_table,
            block_size,
            req_indices,
            query_start_loc,
            num_computed_tokens,
            into.input_ids,
            into.positions,
            into.slot_mapping,
            into.seq_lens,
            into.block_table,
        )

    @override
    def paged_attention(
        self,
        query: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        metadata: AttentionMetadata,
        scale: float,
        sliding_window: int | None = None,
        soft_cap: float | None = None,
        kv_scales: tuple[float, float] | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if kv_scales is not None:
            raise self._not_implemented("paged_attention over a float8 KV cache")
        attended: torch.Tensor = _paged_attention(
            query,
            k_cache,
            v_cache,
            metadata.query_start_loc,
            metadata.seq_lens,
            metadata.block_table,
            scale,
            sliding_window or 0,
            soft_cap or 0.0,
            sinks,
        )
        return attended

    @override
    def latent_attention(
        self, query: torch.Tensor, cache: torch.Tensor, metadata: AttentionMetadata, scale: float, rank: int
    ) -> torch.Tensor:
        attended: torch.Tensor = _latent_attention(
            query, cache, rank, metadata.query_start_loc, metadata.seq_lens, metadata.block_table, scale
        )
        return attended

    @override
    def gated_delta_net(
        self,
        projected: torch.Tensor,
        gates: torch.Tensor,
        weights: DeltaNetWeights,
        states: tuple[torch.Tensor, ...],
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        output: torch.Tensor = _gated_delta_net(
            projected,
            gates,
            weights.interleaved,
            weights.conv,
            weights.decay_log,
            weights.step_bias,
            weights.norm,
            weights.eps,
            weights.num_key_heads,
            *states,
            metadata.query_start_loc,
            metadata.seq_lens,
            metadata.block_table,
            metadata.block_size,
        )
        return output

    @override
    def write_kv(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        _write_kv(key, value, k_cache, v_cache, slot_mapping)

    @override
    def rotate_and_store(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        query_norm: torch.Tensor | None,
        key_norm: torch.Tensor | None,
        eps: float,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        kv_scales: tuple[float, float] | None = None,
        interleaved: bool = False,
    ) -> torch.Tensor:
        if kv_scales is not None:
            raise self._not_implemented("rotate_and_store into a float8 KV cache")
        rotated: torch.Tensor = _rotate_and_store(
            query, key, value, cos, sin, query_norm, key_norm, eps, k_cache, v_cache, slot_mapping, interleaved
        )
        return rotated

    @override
    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if residual is None:
            return _rms_norm(x, weight, eps), x
        normed, stream = _add_rms_norm(x, residual, weight, eps)
        return normed, stream

    @override
    def apply_rotary(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        interleaved: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rotated_query, rotated_key = _apply_rotary(query, key, cos, sin, interleaved)
        return rotated_query, rotated_key

    @override
    def silu_and_mul(self, x: torch.Tensor) -> torch.Tensor:
        activated: torch.Tensor = _silu_and_mul(x)
        return activated

    @override
    def gelu_and_mul(self, x: torch.Tensor) -> torch.Tensor:
        activated: torch.Tensor = _gelu_and_mul(x)
        return activated

    @override
    def clamped_swiglu_and_mul(self, x: torch.Tensor) -> torch.Tensor:
        activated: torch.Tensor = _clamped_swiglu_and_mul(x)
        return activated

    @override
    def packed_linear(
        self,
        x: torch.Tensor,
        weight: PackedWeight,
        bias: torch.Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        output: torch.Tensor
        if weight.scales is None:
            output = _linear(x, weight.values, bias, weight.out_features, out_dtype)
        else:
            output = _linear_quantized(
                x,
                weight.values,
                weight.scales,
                weight.zeros,
                weight.block_scales,
                bias,
                weight.out_features,
                weight.group_size,
                weight.bits == 4,
                out_dtype,
            )
        return output

    @override
    def packed_linear_heads(self, x: torch.Tensor, weight: PackedWeight, out_features: int) -> torch.Tensor:
        output: torch.Tensor = _linear_heads(x, weight.values, out_features)
        return output

    @override
    def packed_rows(self, weight: PackedWeight, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        rows: torch.Tensor = _packed_rows(weight.values, ids, weight.out_features, dtype == torch.float32)
        return rows if rows.dtype == dtype else rows.to(dtype)

    @override
    def pack(self, weight: torch.Tensor, panels: torch.Tensor) -> None:
        _pack(weight, panels)

    @override
    def fused_decoder(self, eps: float, final_norm: torch.Tensor) -> FusedDecoder:
        decoder: FusedDecoder = torch.classes.pagoda_cpu.Decoder(eps, final_norm)
        return decoder

    @override
    def fused_experts(
        self,
        router: PackedLinear,
        correction_bias: torch.Tensor | None,
        top_k: int,
        scoring: int,
        normalize: bool,
        scaling: float,
        num_groups: int,
        top_groups: int,
        group_members: int,
        activation: int,
    ) -> FusedExperts:
        experts: FusedExperts = torch.classes.pagoda_cpu.Experts(
            router,
            correction_bias,
            top_k,
            scoring,
            normalize,
            scaling,
            num_groups,
            top_groups,
            group_members,
            activation,
        )
        return experts

    @override
    def lora_batch(self, limits: LoraLimits) -> LoraBatch:
        del limits  # weights are where they are, and nothing is captured
        batch: LoraBatch = torch.classes.pagoda_cpu.LoraBatch()
        return batch

    @override
    def lora_linear(self, batch: LoraBatch, in_features: int, out_features: int) -> LoraLinear:
        layer: LoraLinear = torch.classes.pagoda_cpu.LoraLinear(batch, in_features, out_features)
        return layer

    @override
    def soft_cap(self, logits: torch.Tensor, cap: float) -> None:
        _soft_cap(logits, cap)

    @override
    def encoder(
        self,
        num_heads: int,
        head_dim: int,
        intermediate_size: int,
        eps: float,
        *,
        norm_first: bool,
        gated: bool,
        activation: str,
    ) -> Encoder:
        encoder: Encoder = torch.classes.pagoda_cpu.Encoder(
            num_heads, head_dim, intermediate_size, eps, norm_first, gated, activation
        )
        return encoder

    @override
    def greedy_sample(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        token_ids, best_logits = _greedy_sample(logits)
        return token_ids, best_logits

    @override
    def apply_token_bitmask(self, logits: torch.Tensor, rows: torch.Tensor, bitmask: torch.Tensor) -> None:
        _apply_token_bitmask(logits, rows, bitmask)


BACKEND = CpuBackend()
