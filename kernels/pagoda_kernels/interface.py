"""The operations of the engine, as each backend implements them."""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch

from pagoda_kernels.types import AttentionMetadata, PackedWeight, StepTensors

PackedLinear = tuple[
    torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, int, int, bool
]  # of a `PackedWeight` and its layer: values, bias, scales, zeros, out_features, group_size, whether it has 4 bits


class FusedDecoder(Protocol):
    """All decoder layers of a rank, with the final norm, as one operator; holds their weights."""

    def add_layer(
        self,
        input_norm: torch.Tensor,
        post_attention_norm: torch.Tensor,
        query_norm: torch.Tensor | None,
        key_norm: torch.Tensor | None,
        qkv: PackedLinear,
        output: PackedLinear,
        gate_up: PackedLinear,
        down: PackedLinear,
        sliding_window: int,
    ) -> None:
        """Append a layer: norm, attention, norm, gated MLP with SiLU. A `sliding_window` of 0 means none.

        Raises `RuntimeError` where the layer's sizes are not the decoder's.
        """

    def forward(
        self,
        embedded: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        k_caches: list[torch.Tensor],
        v_caches: list[torch.Tensor],
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> torch.Tensor:
        """Embeddings [T, hidden_size] to hidden states after the final norm, bit for bit those of the single operations.

        Caches, one of each kind a layer, as in `KernelBackend.paged_attention`, written in place; the rest as in
        `KernelBackend.rotate_and_store` and `AttentionMetadata`.
        """


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

        Returns:
            [T, num_heads, head_dim], contiguous, dtype of `query`.
        """
        raise self._not_implemented("paged_attention")

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
    ) -> torch.Tensor:
        """The operations between the projection and attention: norm of each head, rotation, and the write to the KV cache.

        Args:
            query: [T, num_heads, head_dim]; not changed. Like `key` and `value` [T, num_kv_heads, head_dim] it may be a view
                of one projection, in which heads follow each other without gaps.
            cos, sin: as in `apply_rotary`.
            query_norm, key_norm: weights [head_dim] of `rms_norm` over each head, with `eps`; None for models without: both
                or neither.
            k_cache, v_cache, slot_mapping: as in `write_kv`; the keys are stored rotated.
            kv_scales: as in `paged_attention`. Keys and values are divided by them, kept in the range of their float8 type,
                and rounded to nearest.

        Returns:
            The normalized and rotated query, contiguous.
        """
        raise self._not_implemented("rotate_and_store")

    # ---- elementwise ---------------------------------------------------------------------------------------------------

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the residual stream, if there is one, and normalize the sum over its last dimension (Zhang, Sennrich, 2019).

        Args:
            x: [..., size]; not changed.
            weight: [size].
            eps: added to the mean square.
            residual: shape and dtype of `x`; None at the bottom of the stack, where `x` itself is the stream.

        Returns:
            `(normed, new_residual)`: `new_residual = x + residual` in the dtype of `x` (`x` itself without a residual), and
            `normed` is it, normalized in float32, rounded to that dtype and then multiplied by `weight`.
        """
        raise self._not_implemented("rms_norm")

    def apply_rotary(
        self, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate queries and keys by the angles of their tokens' positions (Su et al., 2021).

        The layout is that of GPT-NeoX: a head's first half pairs with its second.

        Args:
            query: [T, num_heads, head_dim]; not changed, and may be a strided view.
            key: [T, num_kv_heads, head_dim]; likewise.
            cos, sin: float32 [T, head_dim // 2], contiguous, one row a token.

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

    def packed_rows(self, weight: PackedWeight, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Rows of a float weight by int64 `ids` [T], as an embedding that shares it has them: [T, in_features] of `dtype`."""
        raise self._not_implemented("packed_rows")

    def pack(self, weight: torch.Tensor, panels: torch.Tensor) -> None:
        """Write the rows of `weight` [N, in_features], contiguous, to `panels`, in place; what is left of the last is zeros.

        `panels` of the same dtype, float32 or bfloat16, as `PackedWeight.values` for N outputs.
        """
        raise self._not_implemented("pack")

    def fused_decoder(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        intermediate_size: int,
        eps: float,
        final_norm: torch.Tensor,
    ) -> FusedDecoder:
        """A decoder without layers yet, whose norms have `eps` and whose last one has the weight `final_norm`."""
        raise self._not_implemented("fused_decoder")

    # ---- sampling ------------------------------------------------------------------------------------------------------

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
