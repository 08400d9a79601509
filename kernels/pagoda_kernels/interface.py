"""The operations of the engine, as each backend implements them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol

import torch

from pagoda_kernels.types import (
    AttentionMetadata,
    DeltaNetWeights,
    ExpertWeights,
    LoraLimits,
    PackedWeight,
    StepTensors,
)

PackedLinear = tuple[
    torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, int, int, bool
]  # of a `PackedWeight` and its layer: values, bias, scales, zeros, block_scales, out_features, group_size, if it has 4 bits


class LoraBatch(Protocol):
    """Which rows of a step have which adapter; shared by all layers of a model. Made by `KernelBackend.lora_batch`."""

    def set(self, slots: torch.Tensor | None) -> None:
        """`slots` int32 [T]: of each row of the steps that follow the slot of its adapter, -1: none; None: no row has one.

        On a GPU this is queued: steps before it are not touched, and graphs that were captured after `expect` read it.
        """

    def expect(self, num_tokens: int) -> None:
        """Before a graph is captured: its step has up to so many rows, whose adapters later calls of `set` say; 0: it runs for
        steps without any."""


class LoraLinear(Protocol):
    """The adapters (LoRA, Hu et al., 2021) of a linear layer, or of several that are fused; holds their weights, by slot.

    Made by `KernelBackend.lora_linear`.
    """

    def set(
        self,
        slot: int,
        a: torch.Tensor,
        b: list[torch.Tensor],
        columns: list[int],
        widths: list[int],
        scales: list[float],
    ) -> None:
        """Put an adapter into `slot`, for some of the fused layers.

        `a` float32 or bfloat16 [in_features, R]: their A, transposed, side by side, padded with zeros to a multiple of
        `LORA_ALIGNMENT`. `b`, of the same dtype, one each: its B in panels of outputs, [panels, rank, PANEL], padded with
        zeros; they are added to `widths[i]` columns of the output from `columns[i]` on, times `scales[i]`. Raises
        `RuntimeError` for what does not fit the layer.
        """

    def clear(self, slot: int) -> None:
        """Empty `slot`; it may be empty already."""

    def add(self, x: torch.Tensor, output: torch.Tensor, rows: torch.Tensor | None = None) -> None:
        """Add to rows of `output` [T, out_features], in place, `scale * (x @ a) @ b` of their adapters; x [T, in_features].

        Both contiguous, of the model's dtype, or `output` float32. `rows` int64 [T]: of each row of x which one of the step it
        is, as where an expert has some of them; None: all of the step's, in order. Sums are float32, and rounded with the
        output that they are added to; a row's bits are the same alone and in any batch. Rows whose adapter has nothing for
        this layer are left as they are.
        """


class FusedExperts(Protocol):
    """A mixture of experts as one operator: router, experts grouped by the rows that chose them, and the shared expert; holds
    their weights."""

    def add_expert(self, gate_up: PackedLinear, down: PackedLinear) -> None:
        """Append an expert. Raises `RuntimeError` where its sizes are not those of the first."""

    def set_shared(self, gate_up: PackedLinear, down: PackedLinear, gate: PackedLinear | None) -> None:
        """The expert of every token; `gate`: the layer of one output whose sigmoid weights it."""

    def set_first_expert(self, first: int) -> None:
        """Those that were added are experts `first` and the following ones; others add nothing here."""

    def set_load(self, load: torch.Tensor) -> None:
        """int64 [experts], to which every `forward` adds how many rows chose each."""

    def set_lora(self, index: int, gate_up: LoraLinear, down: LoraLinear) -> None:
        """What adapters add to the products of the expert that was added as number `index`; all of one `LoraBatch`, whose
        rows are those of `forward`. To be called for each expert or none."""

    def set_shared_lora(self, gate_up: LoraLinear, down: LoraLinear) -> None:
        """The same for the shared expert."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x float32 or bfloat16 [T, hidden_size], contiguous, to the same shape: the weighted sum of a token's experts in the
        order of its choice, then the shared one, in float32 and rounded once. A row's bits are the same in any batch."""


class FusedDecoder(Protocol):
    """All decoder layers of a rank, with the final norm, as one operator; holds their weights.

    A layer is appended by `add_layer`, and described by the calls that follow: `set_norms`, `set_sinks` where it has them, and
    either `set_mlp` or `set_experts`. All of them raise `RuntimeError` for sizes that do not fit.
    """

    def add_layer(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        qkv: PackedLinear,
        output: PackedLinear,
        scale: float,
        soft_cap: float,
        sliding_window: int,
        group: int,
        rotary: int,
        interleaved: bool,
    ) -> None:
        """Append a layer, of which this is the attention; as in `KernelBackend.paged_attention` and `rotate_and_store`.

        A `sliding_window`, and a `soft_cap`, of 0 mean none. `group`: whose block table and slot mapping it uses; `rotary`:
        whose cosines and sines.
        """

    def set_norms(
        self,
        before_attention: torch.Tensor | None,
        after_attention: torch.Tensor | None,
        before_mlp: torch.Tensor | None,
        after_mlp: torch.Tensor | None,
        query: torch.Tensor | None,
        key: torch.Tensor | None,
        residual_multiplier: float,
    ) -> None:
        """The weights of the layer's norms, of the final norm's dtype. `residual_multiplier`: factor of what attention and MLP
        add to the residual stream where there is no norm behind them."""

    def set_sinks(self, sinks: torch.Tensor) -> None:
        """float32 [num_heads], see `KernelBackend.paged_attention`."""

    def set_mlp(self, gate_up: PackedLinear, down: PackedLinear, activation: int) -> None:
        """A gated MLP; `activation` as in `KernelBackend.fused_experts`."""

    def set_experts(self, experts: FusedExperts) -> None:
        """A mixture of experts, complete."""

    def set_lora(
        self, qkv: LoraLinear, output: LoraLinear, gate_up: LoraLinear | None, down: LoraLinear | None
    ) -> None:
        """What adapters add to the layer's products, all of one `LoraBatch`; those of the MLP unless there are experts."""

    def capture(self, layers: list[int], output: torch.Tensor) -> None:
        """Let each `forward` also write the residual stream before these layers (their number: after the last one), side by
        side, to the first T rows of `output` [max T, len(layers) * hidden_size].

        Raises `RuntimeError` where a layer or the shape of `output` does not fit; so does `forward` for more tokens than its
        rows.
        """

    def forward(
        self,
        embedded: torch.Tensor,
        cos: list[torch.Tensor],
        sin: list[torch.Tensor],
        k_caches: list[torch.Tensor],
        v_caches: list[torch.Tensor],
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        block_tables: list[torch.Tensor],
        slot_mappings: list[torch.Tensor],
    ) -> torch.Tensor:
        """Embeddings [T, hidden_size] to hidden states after the final norm, bit for bit those of the single operations.

        Caches, one of each kind a layer, as in `KernelBackend.paged_attention`, written in place; the rest as in
        `KernelBackend.rotate_and_store` and `AttentionMetadata`, cosines and sines one a rotary embedding, block tables and
        slot mappings one a group of layers.
        """


class Encoder(Protocol):
    """An encoder, its embeddings included; holds their weights. Made by `KernelBackend.encoder`.

    Every token sees all tokens of its row, those after it, too: a row is computed whole, and nothing is cached. A linear layer
    is packed, or has its weight `[out_features, in_features]` as `values`, where the backend takes such.
    """

    def set_embedding(
        self,
        words: torch.Tensor,
        positions: torch.Tensor | None,
        types: torch.Tensor | None,
        norm: torch.Tensor | None,
        norm_bias: torch.Tensor | None,
    ) -> None:
        """The tables whose vectors are summed, each [ids, hidden_size], and the LayerNorm of the sum, where there is one."""

    def set_relative_bias(self, bias: torch.Tensor) -> None:
        """What is added to all layers' scores by the key's position minus the query's: float32 [num_heads, 2 * distance + 1],
        from `-distance` on; of what is farther apart, the bias of the farthest."""

    def set_final_norm(self, norm: torch.Tensor, norm_bias: torch.Tensor | None) -> None:
        """The LayerNorm behind the last layer."""

    def add_layer(
        self,
        attention_norm: torch.Tensor | None,
        attention_norm_bias: torch.Tensor | None,
        mlp_norm: torch.Tensor | None,
        mlp_norm_bias: torch.Tensor | None,
        qkv: PackedLinear,
        output: PackedLinear,
        up: PackedLinear,
        down: PackedLinear,
        window: int,
        rotary: int,
    ) -> None:
        """Append a layer. `window`: a token sees those at most so far from it, 0: all. `rotary`: which of the angles that
        `forward` gets turn queries and keys, -1: none. `up` of a gated encoder has what is activated first, then the rest.

        Raises `RuntimeError` where the layer's sizes are not the encoder's.
        """

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        type_ids: torch.Tensor | None,
        query_start_loc: torch.Tensor,
        cosines: Sequence[torch.Tensor],
        sines: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """Hidden states [T, hidden_size] behind the last norm. `input_ids`, `positions`, `type_ids` (None: all 0): int64 [T];
        `query_start_loc` int32 [R + 1]; cosines and sines, as many as layers ask for, as in `KernelBackend.apply_rotary`."""


class KernelBackend:
    """The operations on one kind of device. A backend overrides those that it implements; the others raise.

    Here an operation is documented once, with shapes and dtypes; T is the number of tokens of a step. All tensors of a call
    are on the backend's device. Arguments that do not fit are a programming error: the compiled CPU kernels answer them with
    `RuntimeError` that names the argument, the others do not check.

    Raises:
        NotImplementedError: by every operation that the backend does not override; names backend and operation.
    """

    name: ClassVar[str] = "base"

    packed_dtypes: ClassVar[frozenset[torch.dtype]] = frozenset()
    """Model dtypes with which float linear layers are packed as they are loaded, for `packed_linear`."""

    def implements(self, operation: str) -> bool:
        """Whether the backend overrides the operation of that name; `AttributeError` for one that does not exist.

        To be called in constructors, not in each step.
        """
        return getattr(type(self), operation) is not getattr(KernelBackend, operation)

    def _not_implemented(self, operation: str) -> NotImplementedError:
        return NotImplementedError(f"the kernel backend {self.name!r} does not implement {operation}")

    # ---- the inputs of a step ------------------------------------------------------------------------------------------

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
        """Fill `into` with the tokens that R rows compute next.

        Row r computes the tokens from position `num_computed_tokens[r]` on, `query_start_loc[r + 1] - query_start_loc[r]` of
        them. Rows of `into` behind the R are padding: one token at position 0 of a context that has only the null block.

        Args:
            token_pool: contiguous int64 [request slots, positions], the token ids of each request slot.
            block_table: contiguous int32 [request slots, blocks], the blocks of each request slot.
            block_size: tokens a block.
            req_indices: int64 [R], the request slot of each row.
            query_start_loc: int32 [R + 1] or longer, as in `AttentionMetadata`.
            num_computed_tokens: int64 [R].
            max_query_len: the largest number of tokens of a row.
            into: of M >= R rows and the R rows' tokens and M - R more.
        """
        raise self._not_implemented("gather_step")

    # ---- attention -----------------------------------------------------------------------------------------------------

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
        """Causal softmax attention of every query token over its own request's context.

        The keys and values of this step's tokens must be in the cache already. Scores and softmax are float32. Slots beyond a
        row's context, the null block included, never influence the result, whatever they hold (NaN too).

        Args:
            query: contiguous [T, num_heads, head_dim]; head h reads KV head `h // (num_heads // num_kv_heads)`.
            k_cache, v_cache: contiguous [num_blocks, num_kv_heads, block_size, head_dim], dtype of `query`, or float8.
            metadata: the batch.
            scale: factor of the scores, usually `head_dim ** -0.5`.
            sliding_window: a query at position p sees positions `p - sliding_window + 1 .. p`; None: all up to p.
            soft_cap: scores become `soft_cap * tanh(score / soft_cap)` before the softmax.
            kv_scales: of caches of float8, the factors of their keys and of their values; None for other caches.
                `NotImplementedError` where the backend has no float8 caches.
            sinks: float32 [num_heads], contiguous; a score of each head that takes part in every softmax and has no value
                (Xiao et al., 2024). Neither scaled nor capped.

        Returns:
            [T, num_heads, head_dim], contiguous, dtype of `query`.
        """
        raise self._not_implemented("paged_attention")

    def latent_attention(
        self, query: torch.Tensor, cache: torch.Tensor, metadata: AttentionMetadata, scale: float, rank: int
    ) -> torch.Tensor:
        """`paged_attention` of all heads over one latent vector a token, whose first `rank` numbers are the values, too
        (multi-head latent attention in its absorbed form; DeepSeek-V2, 2024, section 2.1).

        Args:
            query: contiguous [T, num_heads, latent_dim]: of each head, what the latent is multiplied by, and the rotated part.
            cache: contiguous [num_blocks, 1, block_size, latent_dim], dtype of `query`.

        Returns:
            [T, num_heads, rank], contiguous, dtype of `query`.
        """
        raise self._not_implemented("latent_attention")

    def short_query_len(self, heads_per_kv: int) -> int:
        """The most tokens of a row that the backend attends to as it does to a decode row, its context cut into parts; 1 where
        it makes no difference. `heads_per_kv`: query heads of a KV head."""
        del heads_per_kv
        return 1

    def max_short_rows(self, heads_per_kv: int) -> int:
        """The most rows of two tokens or more in a step that may be `AttentionMetadata.num_short_rows`."""
        del heads_per_kv
        return 0

    def write_kv(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Store keys and values [T, num_kv_heads, head_dim] in their slots of the caches, in place.

        Caches as in `paged_attention`; `slot_mapping` as in `AttentionMetadata`. Two tokens share a slot only if it is slot 0.
        """
        raise self._not_implemented("write_kv")

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
        """The operations between the projection and attention: norm of each head, rotation, and the write to the KV cache.

        Args:
            query: [T, num_heads, head_dim]; not changed. Like `key` and `value` [T, num_kv_heads, head_dim] it may be a view
                of one projection, in which heads follow each other without gaps.
            cos, sin, interleaved: as in `apply_rotary`.
            query_norm, key_norm: weights [head_dim] of `rms_norm` over each head, with `eps`; None for models without: both
                or neither.
            k_cache, v_cache, slot_mapping: as in `write_kv`; the keys are stored rotated.
            kv_scales: as in `paged_attention`. Keys and values are divided by them, kept in the range of their float8 type,
                and rounded to nearest.

        Returns:
            The normalized and rotated query, contiguous.
        """
        raise self._not_implemented("rotate_and_store")

    # ---- recurrent layers ----------------------------------------------------------------------------------------------

    def gated_delta_net(
        self,
        projected: torch.Tensor,
        gates: torch.Tensor,
        weights: DeltaNetWeights,
        states: tuple[torch.Tensor, ...],
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """A gated delta net between its projections: convolution and SiLU, the delta rule, norm and output gate.

        A row's state is in the block of its last computed token, and starts from zero at position 0. Its tokens leave it at
        the end of each block that they fill, and in that of the last one; blocks before that are not written. Token by token,
        in order: a row's bits are the same in any batch and chunks. Rows must not share a block that one of them writes.

        Args:
            projected: contiguous [T, channels + num_value_heads * value_dim], float32, bfloat16 or float16.
            gates: contiguous float32 [T, 2 * num_value_heads].
            states: float32, of each block the states of the first value heads and of the others, `[blocks, heads, key_dim,
                value_dim]`, and the convolution's last inputs `[blocks, taps, channels]`; written in place. Blocks may lie
                apart.
            metadata: of which `slot_mapping` is not used.

        Returns:
            [T, num_value_heads * value_dim], of the dtype of `projected`.
        """
        raise self._not_implemented("gated_delta_net")

    # ---- elementwise ---------------------------------------------------------------------------------------------------

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the residual stream, if there is one, and normalize the sum over its last dimension (Zhang, Sennrich, 2019).

        Args:
            x: [..., size]; not changed.
            weight: [size], of the dtype of `x`, or float32.
            eps: added to the mean square.
            residual: shape and dtype of `x`; None at the bottom of the stack, where `x` itself is the stream.

        Returns:
            `(normed, new_residual)`: `new_residual = x + residual` in the dtype of `x` (`x` itself without a residual), and
            `normed` is it, normalized in float32, rounded to that dtype and then multiplied by `weight`. A float32 weight of
            a narrower `x` is multiplied before that is rounded, and nothing after it.
        """
        raise self._not_implemented("rms_norm")

    def apply_rotary(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        interleaved: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate queries and keys by the angles of their tokens' positions (Su et al., 2021).

        Args:
            query: [T, num_heads, head_dim]; not changed, and may be a strided view.
            key: [T, num_kv_heads, head_dim]; likewise.
            cos, sin: float32 [T, rotary_dim // 2], contiguous, one row a token. Of each head the first `rotary_dim`
                dimensions are rotated; none where that is 0.
            interleaved: dimension 2i pairs with 2i + 1; else i with `rotary_dim // 2 + i`, as in GPT-NeoX.

        Returns:
            The rotated query and key, contiguous, computed in float32 and rounded once.
        """
        raise self._not_implemented("apply_rotary")

    def silu_and_mul(self, x: torch.Tensor) -> torch.Tensor:
        """`silu(gate) * up` for x = [gate | up] of shape [T, 2 * size]; returns [T, size], contiguous."""
        raise self._not_implemented("silu_and_mul")

    def gelu_and_mul(self, x: torch.Tensor) -> torch.Tensor:
        """`gelu(gate) * up`, GELU in its tanh form, for x as in `silu_and_mul`; returns [T, size], contiguous."""
        raise self._not_implemented("gelu_and_mul")

    def clamped_swiglu_and_mul(self, x: torch.Tensor) -> torch.Tensor:
        """gpt-oss's activation: `gate * sigmoid(1.702 * gate) * (up + 1)` for x as in `silu_and_mul`, the gate being at most 7
        and up from -7 to 7; returns [T, size], contiguous."""
        raise self._not_implemented("clamped_swiglu_and_mul")

    # ---- packed linear layers ------------------------------------------------------------------------------------------

    def packed_linear(
        self,
        x: torch.Tensor,
        weight: PackedWeight,
        bias: torch.Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """`x @ weight.T + bias` for x float32 or bfloat16 [T, in_features], contiguous; returns [T, out_features].

        Sums are float32, and every row's bits are the same alone and in any batch. `out_dtype`: float32, which leaves the sums
        as they are, or None or that of x, to which they are rounded. For quantized weights, each row of x is quantized too: to
        int8, symmetrically, a scale for every group of inputs.
        """
        raise self._not_implemented("packed_linear")

    def packed_linear_heads(self, x: torch.Tensor, weight: PackedWeight, out_features: int) -> torch.Tensor:
        """A product a head: x float32 or bfloat16 [T, heads, in_features] to [T, heads, out_features], which may be a view.

        `weight`: floats, that of each head behind that of the one before, each filled up with zeros to whole panels. Sums and
        bits as in `packed_linear`.
        """
        raise self._not_implemented("packed_linear_heads")

    def packed_rows(self, weight: PackedWeight, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Rows of a float weight by int64 `ids` [T], as an embedding that shares it has them: [T, in_features] of `dtype`."""
        raise self._not_implemented("packed_rows")

    def pack(self, weight: torch.Tensor, panels: torch.Tensor) -> None:
        """Write the rows of `weight` [N, in_features], contiguous, to `panels`, in place; what is left of the last is zeros.

        `panels` of the same dtype, float32 or bfloat16, as `PackedWeight.values` for N outputs.
        """
        raise self._not_implemented("pack")

    def fused_decoder(self, eps: float, final_norm: torch.Tensor) -> FusedDecoder:
        """A decoder without layers yet, whose norms have `eps` and whose last one has the weight `final_norm`."""
        raise self._not_implemented("fused_decoder")

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
        """A mixture without experts yet. Arguments as in `RouterConfig` and `MoE`; `scoring`: 0 softmax, 1 sigmoid, 2 softmax
        of the chosen; `activation`: 0 SiLU, 1 GELU, 2 gpt-oss's."""
        raise self._not_implemented("fused_experts")

    def grouped_experts(
        self, x: torch.Tensor, routing_weights: torch.Tensor, ids: torch.Tensor, experts: ExpertWeights
    ) -> torch.Tensor:
        """The experts of a mixture, behind its router.

        A row's bits are the same in any batch. Nothing waits for the host.

        Args:
            x: contiguous [T, hidden_size], of the type of the weights.
            routing_weights, ids: contiguous float32 and int64 [T, k]: the experts of each token and how much they count, each
                of them once. Experts that are not here add nothing.

        Returns:
            float32 [T, hidden_size]: the weighted sum of a token's experts, in the order of its choice.
        """
        raise self._not_implemented("grouped_experts")

    # ---- adapters ------------------------------------------------------------------------------------------------------

    def lora_batch(self, limits: LoraLimits) -> LoraBatch:
        """The rows of a step, none of which has an adapter yet."""
        raise self._not_implemented("lora_batch")

    def lora_linear(self, batch: LoraBatch, in_features: int, out_features: int) -> LoraLinear:
        """A layer of these sizes, without adapters yet, whose rows are those of `batch`."""
        raise self._not_implemented("lora_linear")

    # ---- encoders ------------------------------------------------------------------------------------------------------

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
        """An encoder without weights yet, whose LayerNorms have `eps`.

        `norm_first`: attention and MLP read normalized inputs and are added to the stream, as in ModernBERT; else the sum is
        normalized, as in BERT (Devlin et al., 2019). `gated`: the MLP is `down(activation(first) * second)`. `activation`:
        gelu (by the error function), gelu_tanh, relu or silu.
        """
        raise self._not_implemented("encoder")

    # ---- sampling ------------------------------------------------------------------------------------------------------

    def soft_cap(self, logits: torch.Tensor, cap: float) -> None:
        """`cap * tanh(logit / cap)` for contiguous float32 logits [N, V], in place."""
        raise self._not_implemented("soft_cap")

    def greedy_sample(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The best token of each row of `logits`, contiguous float32 [N, V].

        Returns:
            Token ids int64 [N], the lowest among equals, and their logits float32 [N]. For a row with a NaN the logit is NaN,
            and the id some id of the vocabulary.
        """
        raise self._not_implemented("greedy_sample")

    def sample_top_p_by_rejection(
        self,
        logits: torch.Tensor,
        best_logits: torch.Tensor,
        rows: torch.Tensor,
        seeds: torch.Tensor,
        positions: torch.Tensor,
        inverse_temperature: torch.Tensor,
        min_p: torch.Tensor,
        top_p: torch.Tensor,
    ) -> torch.Tensor:
        """Draw a token for each of R rows from what min-p and top-p leave, on the device, without waiting for the host.

        The random numbers are those of `pagoda.sampling.noise`: a row's token follows from its logits, seed and position. A
        backend without this operation leaves it to the sampler, which draws the same tokens.

        Args:
            logits: contiguous float32 [N, V].
            best_logits: float32 [N], from `greedy_sample`.
            rows: int64 [R], rows of the logits.
            seeds: int64 [R], the bits of unsigned seeds.
            positions: int64 [R], of the tokens to be drawn.
            inverse_temperature, min_p: float32 [R].
            top_p: float64 [R]; 1 or more for no top-p.

        Returns:
            Token ids int64 [R]. Of rows without a finite weight, some id of the vocabulary.
        """
        raise self._not_implemented("sample_top_p_by_rejection")

    def apply_token_bitmask(self, logits: torch.Tensor, rows: torch.Tensor, bitmask: torch.Tensor) -> None:
        """Set the logits of tokens that are not allowed to minus infinity, in place.

        Args:
            logits: contiguous float32 [N, V].
            rows: int64 [M], rows of the logits, each at most once.
            bitmask: contiguous int32 [M, W] with 32 * W <= V: bit i % 32 of word i // 32 is set where token i is allowed in
                `rows[m]`. Logits from 32 * W on are left as they are.
        """
        raise self._not_implemented("apply_token_bitmask")

    # ---- memory --------------------------------------------------------------------------------------------------------

    def reserve_workspace(self, max_num_seqs: int, num_heads: int, head_dim: int, device: torch.device) -> int:
        """Allocate what `paged_attention` needs for batches of `max_num_seqs` decode rows, so that it never does later.

        Returns the bytes now held on the device: 0 for a backend that keeps none.
        """
        return 0
