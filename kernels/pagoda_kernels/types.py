"""What operations take and give besides tensors: a batch for attention, a packed weight, the inputs of a step."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

PANEL = 32
"""Outputs that lie next to each other in a packed weight; the last panel is filled up with zeros."""

LORA_ALIGNMENT = 16
"""Ranks of adapters are filled up with zeros to a multiple of this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraLimits:
    """The most that there may be of adapters: slots, rank, and rows of a step; and the type of the model's products."""

    num_slots: int
    max_rank: int
    max_num_tokens: int
    dtype: torch.dtype
    device: torch.device


SWIGLU_ALPHA, SWIGLU_LIMIT = 1.702, 7.0
"""Of `KernelBackend.clamped_swiglu_and_mul`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionMetadata:
    """A ragged batch of R requests with T query tokens, over paged keys and values.

    Row r's queries are tokens `query_start_loc[r] .. query_start_loc[r + 1] - 1` of the flattened batch, and they are the
    last ones of its `seq_lens[r]` tokens:

        row r, block size 4:   block_table[r] = [7, 3, 9, 0, 0]          (0: the null block, padding)
        positions               0 1 2 3 │ 4 5 6 7 │ 8 9 . .
        in block                   7    │    3    │    9
        seq_lens[r] = 10, and with 3 query tokens the queries are at positions 7, 8 and 9

    Attributes:
        query_start_loc: int32 [R + 1]; starts with 0, ends with T.
        seq_lens: int32 [R], at least 1; context length including this step's tokens.
        block_table: int32 [R, max_blocks]; entries past a row's last block are 0 and never influence a result.
        slot_mapping: int64 [T]; `block_id * block_size + offset` of the slot that a token's key and value go to. Padding
            tokens use slot 0, which is in the null block.
        max_query_len: largest query length of a row.
        max_seq_len: largest entry of `seq_lens`.
        num_decode_rows: the first that many rows have query length 1 (their tokens are the first `num_decode_rows` tokens).
        num_short_rows: that many rows after them have at most `KernelBackend.short_query_len` tokens, and go to a kernel for
            few tokens in long contexts; 0 where the backend has none.
        block_size: tokens of a block.
        derived: values that an implementation works out from the others once a step and not once a layer. Metadata
            therefore belongs to one step: its tensors must not be changed after the first use.
    """

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    max_query_len: int
    max_seq_len: int
    num_decode_rows: int
    num_short_rows: int = 0
    block_size: int = 0
    derived: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertWeights:
    """Gated MLPs that tokens choose among: E of them, from number `first_expert` on, each of I units that are held here.

    `gate_up` [E, 2I, hidden_size], gate above up, and `down` [E, hidden_size, I], contiguous, of one type; biases [E, 2I] and
    [E, hidden_size] of the same, or None. `activation` as in `KernelBackend.fused_experts`.
    """

    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None
    activation: int
    first_expert: int = 0

    @property
    def num_experts(self) -> int:
        """Experts that are here."""
        return len(self.gate_up)

    @property
    def size(self) -> int:
        """Units of each."""
        return self.down.shape[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaNetWeights:
    """What a gated delta net (Yang et al., 2024) has besides its projections; tensors are contiguous float32.

    `conv` [taps + 1, channels]: the causal convolution of each channel, of queries, keys and values after each other; its last
    row meets the newest token. A value head keeps `exp(-exp(decay_log) * softplus(step + step_bias))` of its state; both
    [num_value_heads]. `norm` [value_dim]: weight of the RMSNorm, with `eps`, of what a head reads. Value head h belongs to key
    head `h // (num_value_heads // num_key_heads)`.

    `interleaved`: projections and gates are key head by key head (of each its query, its key, then the values and the output
    gates of its value heads; write gates, then steps); else all queries, all keys, all values, all output gates; all write
    gates, all steps.
    """

    conv: torch.Tensor
    decay_log: torch.Tensor
    step_bias: torch.Tensor
    norm: torch.Tensor
    eps: float
    num_key_heads: int
    key_dim: int
    interleaved: bool

    @property
    def num_value_heads(self) -> int:
        """Heads of values, each with a state of its own."""
        return len(self.decay_log)

    @property
    def value_dim(self) -> int:
        """Of each value head."""
        return len(self.norm)


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight `[out_features, in_features]` in panels of 32 outputs, P of them.

        float32    values float32  [P, in_features, 32]          values[p, k, c] = weight[32p + c, k]
        bfloat16   values bfloat16 [P, in_features / 2, 32, 2]   values[p, j, c, i] = weight[32p + c, 2j + i]
        int8       values uint8    [P, in_features / 4, 32, 4]   values[p, j, c, i] = q[32p + c, 4j + i] + 128
        int4       values uint8    [P, in_features / 8, 32, 4]   low  four bits: q[32p + c, 8j + i]
                                                                 high four bits: q[32p + c, 8j + 4 + i]

    Quantized weights have a scale for every output and every group of `group_size` consecutive inputs, G groups:
    `weight[n, k] = scale[n, g] * (stored - zeros[n, g])` with g = k // group_size, where `stored` is 0 .. 255 (int8, with the
    128 in it) or 0 .. 15 (int4). `scales` float32 or float16 and `zeros` uint8 are `[P, G, 32]`, so that a panel's lie next to
    each other; zeros of None are 128, and 8. Zeros of the type of `scales` are what a stored 0 stands for:
    `weight[n, k] = scale[n, g] * stored + zeros[n, g]`.

    With `block_scales`, float16 `[P, B, 1, 32]`, scales have two levels, as in GGUF's K-quants: `scales` are int8, to be
    multiplied by that of their block of G / B groups. Zeros, if any, are int8, too, what a stored 0 stands for, and theirs is
    the second one of `block_scales` `[P, B, 2, 32]`.

    `in_features` must be even for bfloat16, a multiple of 4 for int8 and of 8 for int4, and so must `group_size`.
    """

    values: torch.Tensor
    out_features: int
    in_features: int
    scales: torch.Tensor | None = None
    zeros: torch.Tensor | None = None
    group_size: int = 0
    bits: int = 32
    block_scales: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        tensors = (self.values, self.scales, self.zeros, self.block_scales)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def group_scales(self) -> torch.Tensor:
        """The scale of each output and group, float32 [P, G, 32]."""
        assert self.scales is not None
        return self._in_one_level(self.scales, 0)

    def group_zeros(self) -> torch.Tensor:
        """The zeros, float32 [P, G, 32]; or what a stored 0 stands for, where `has_mins`."""
        if self.zeros is None:
            return torch.full_like(self.group_scales(), 2 ** (self.bits - 1))
        return self._in_one_level(self.zeros, 1)

    @property
    def has_mins(self) -> bool:
        """Whether zeros are what a stored 0 stands for."""
        return self.zeros is not None and self.zeros.dtype != torch.uint8

    def _in_one_level(self, numbers: torch.Tensor, level: int) -> torch.Tensor:
        wide = numbers.float()
        if self.block_scales is None:
            return wide
        blocks = self.block_scales[:, :, level].float()
        return (wide.view(len(wide), blocks.shape[1], -1, PANEL) * blocks.unsqueeze(2)).flatten(1, 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTensors:
    """What a model reads of a step, for M rows of N tokens in all, on the model's device.

    Attributes:
        input_ids, positions, slot_mapping: contiguous int64 [N]; the mapping as in `AttentionMetadata`.
        seq_lens: contiguous int32 [M].
        block_table: int32 [M, columns]; rows may be parts of longer ones.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor

    @classmethod
    def allocate(cls, num_tokens: int, num_rows: int, num_columns: int, device: torch.device) -> StepTensors:
        """Tensors that hold nothing yet."""
        input_ids, positions, slot_mapping = torch.empty((3, num_tokens), dtype=torch.int64, device=device).unbind()
        return cls(
            input_ids=input_ids,
            positions=positions,
            slot_mapping=slot_mapping,
            seq_lens=torch.empty(num_rows, dtype=torch.int32, device=device),
            block_table=torch.empty((num_rows, num_columns), dtype=torch.int32, device=device),
        )

    @classmethod
    def allocate_groups(
        cls, num_groups: int, num_tokens: int, num_rows: int, num_columns: int, device: torch.device
    ) -> list[StepTensors]:
        """The same for several groups of layers, each with a block table and a slot mapping of its own."""
        first = cls.allocate(num_tokens, num_rows, num_columns, device)
        groups = [first]
        for _ in range(num_groups - 1):
            mapping, table = torch.empty_like(first.slot_mapping), torch.empty_like(first.block_table)
            groups.append(replace(first, slot_mapping=mapping, block_table=table))
        return groups

    def part(self, num_rows: int, num_tokens: int, num_columns: int) -> StepTensors:
        """The first rows and tokens, and the first columns of the block tables."""
        return StepTensors(
            input_ids=self.input_ids[:num_tokens],
            positions=self.positions[:num_tokens],
            slot_mapping=self.slot_mapping[:num_tokens],
            seq_lens=self.seq_lens[:num_rows],
            block_table=self.block_table[:num_rows, :num_columns],
        )
