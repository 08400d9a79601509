"""The tests of the reference backend, run over the compiled kernels."""

from __future__ import annotations

from tests.ops.test_elementwise import (
    test_rms_norm_adds_the_residual_first,
    test_rms_norm_of_large_bfloat16_values_does_not_overflow,
    test_rms_norm_of_zeros_is_zero,
    test_rms_norm_without_residual_keeps_the_input_as_stream,
    test_rotary_turns_each_pair_by_its_angle,
    test_silu_and_mul_gates_the_second_half,
)
from tests.ops.test_gather_step import (
    test_decode_rows_take_their_last_token_and_padding_has_only_the_null_block,
    test_every_row_gets_its_own_tokens_places_and_blocks,
    test_prompts_longer_than_a_tile,
)
from tests.ops.test_paged_attention import (
    test_any_batch_matches_the_float64_reference,
    test_chunk_over_every_prefix_length,
    test_context_ends_anywhere_in_a_block,
    test_grouped_heads_read_their_own_kv_head,
    test_half_precision_is_close,
    test_layers_with_different_windows_share_the_metadata,
    test_ragged_batch_matches_the_float64_reference,
    test_single_token_attends_to_itself,
    test_sliding_window_of_any_size,
    test_slots_of_no_token_never_change_a_bit,
    test_soft_cap_bounds_the_scores,
)
from tests.ops.test_write_kv import (
    test_keys_and_values_land_in_their_slots_and_nowhere_else,
    test_padding_tokens_touch_the_null_block_only,
    test_strided_views_are_written_as_they_look,
)
from tests.support.cpu_kernels import kernels, require_cpu_kernels

require_cpu_kernels()

__all__ = [
    "kernels",
    "test_any_batch_matches_the_float64_reference",
    "test_chunk_over_every_prefix_length",
    "test_context_ends_anywhere_in_a_block",
    "test_decode_rows_take_their_last_token_and_padding_has_only_the_null_block",
    "test_every_row_gets_its_own_tokens_places_and_blocks",
    "test_grouped_heads_read_their_own_kv_head",
    "test_half_precision_is_close",
    "test_keys_and_values_land_in_their_slots_and_nowhere_else",
    "test_layers_with_different_windows_share_the_metadata",
    "test_padding_tokens_touch_the_null_block_only",
    "test_prompts_longer_than_a_tile",
    "test_ragged_batch_matches_the_float64_reference",
    "test_rms_norm_adds_the_residual_first",
    "test_rms_norm_of_large_bfloat16_values_does_not_overflow",
    "test_rms_norm_of_zeros_is_zero",
    "test_rms_norm_without_residual_keeps_the_input_as_stream",
    "test_rotary_turns_each_pair_by_its_angle",
    "test_silu_and_mul_gates_the_second_half",
    "test_single_token_attends_to_itself",
    "test_sliding_window_of_any_size",
    "test_slots_of_no_token_never_change_a_bit",
    "test_soft_cap_bounds_the_scores",
    "test_strided_views_are_written_as_they_look",
]
