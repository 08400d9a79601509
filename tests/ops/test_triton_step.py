"""The tests of the reference backend, run over the Triton kernel."""

from __future__ import annotations

from tests.ops.test_gather_step import (
    test_decode_rows_take_their_last_token_and_padding_has_only_the_null_block,
    test_every_row_gets_its_own_tokens_places_and_blocks,
    test_prompts_longer_than_a_tile,
)
from tests.support.triton_kernels import kernels, require_interpreter

require_interpreter()

__all__ = [
    "kernels",
    "test_decode_rows_take_their_last_token_and_padding_has_only_the_null_block",
    "test_every_row_gets_its_own_tokens_places_and_blocks",
    "test_prompts_longer_than_a_tile",
]
