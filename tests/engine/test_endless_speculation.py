"""Endless answers, a KV cache that is full, and drafts: what once took a server that speculated down, silently."""

from __future__ import annotations

import pytest

from pagoda.config.schema import PagodaConfig
from pagoda.engine.core.startup import start_core
from pagoda.request import EngineRequest
from pagoda.sampling.output import FinishReason
from pagoda.sampling.params import SamplingParams
from tests.support.drafts import Steady

CLIENTS, MAX_TOKENS, NUM_BLOCKS = 64, 96, 120


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ngram", "suffix", "eagle3"])
def test_endless_answers_in_a_full_cache_end_in_their_cap(method: str) -> None:
    """64 clients, whose answers would take four times the blocks that there are, end all the same, and give every block
    back."""
    core = start_core(
        PagodaConfig(
            device="cpu",
            dtype="float32",
            threads=1,
            max_num_seqs=CLIENTS,
            max_num_batched_tokens=256,
            max_model_len=256,
            num_gpu_blocks_override=NUM_BLOCKS,
            speculative_config={"method": method},
            runaway_detection="off",
        )
    )
    if method == "eagle3":  # which would rest: it does not pay for so small a model
        core._scheduler._lookahead._proposer = Steady(3)
    for number in range(CLIENTS):
        core.add_request(
            EngineRequest(
                request_id=str(number),
                prompt_token_ids=[5 + (7 * number + place) % 300 for place in range(1 + number % 40)],
                params=SamplingParams(temperature=0.0 if number % 2 else 0.8, seed=number, ignore_eos=True),
                max_tokens=MAX_TOKENS,
            )
        )
    num_tokens, ends = dict.fromkeys(map(str, range(CLIENTS)), 0), {}
    while core.has_work:
        for output in core.step().outputs:
            num_tokens[output.request_id] += len(output.new_token_ids)
            if output.finish_reason is not None:
                ends[output.request_id] = output.finish_reason
        core._scheduler.check_integrity()
    assert ends == dict.fromkeys(num_tokens, FinishReason.LENGTH)
    assert set(num_tokens.values()) == {MAX_TOKENS}
    stats = core.stats()
    assert stats.num_preemptions > 0
    assert stats.num_spec_draft_tokens > 0
    pool = core._scheduler.kv.pool
    assert stats.num_blocks_in_use == 0
    assert pool.num_available == pool.num_usable == NUM_BLOCKS - 1  # free or cached
    assert not core._scheduler.find_leak()
    core.shutdown()
