"""The judge of the engine: greedy tokens equal those of Hugging Face transformers, whatever the engine does meanwhile.

32 prompts of 1 to 300 tokens arrive at once, and then once more (when their prefixes are cached), with a KV cache so small
that requests are preempted, in small and large chunks and with two block sizes. Every token must be equal.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pagoda.config.schema import PagodaConfig
from pagoda.engine.core.loop import EngineCore
from pagoda.engine.core.startup import start_core
from pagoda.models.dummy import DummySpec
from tests.support.parity import ParityCase, make_parity_case, run_greedily

NUM_PROMPTS = 32
NEW_TOKENS = 48
LONGEST = 300

SPECS = {
    "llama": DummySpec(family="llama", tie_word_embeddings=True, num_heads=6, num_kv_heads=2, hidden_size=96),
    "mistral": DummySpec(family="mistral", sliding_window=128, num_shards=3),
    "qwen2": DummySpec(family="qwen2", tie_word_embeddings=True, num_heads=4, num_kv_heads=1),
    "qwen3": DummySpec(family="qwen3", num_heads=4, num_kv_heads=2, num_shards=2),
    # Two layers of full attention and four with a window, in three groups.
    "windows": DummySpec(family="qwen3", num_layers=6, sliding_window=48, max_window_layers=2),
}


@pytest.fixture(scope="module", params=sorted(SPECS))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ParityCase:
    directory = tmp_path_factory.mktemp("parity") / request.param
    return make_parity_case(
        directory, SPECS[request.param], num_prompts=NUM_PROMPTS, longest=LONGEST, new_tokens=NEW_TOKENS
    )


@pytest.fixture(params=[(8, 16), (8, 512), (16, 16), (16, 512)], ids=lambda p: f"block{p[0]}-chunk{p[1]}")
def core(request: pytest.FixtureRequest, family: ParityCase) -> Iterator[EngineCore]:
    block_size, chunk = request.param
    config = PagodaConfig(
        model=str(family.directory),
        device="cpu",
        dtype="float32",
        threads=1,
        block_size=block_size,
        max_num_batched_tokens=chunk,
        max_num_seqs=min(16, chunk),
        max_model_len=LONGEST + NEW_TOKENS,
        # Three of the longest at a time: the fourth, and every decoding one, has to fight for blocks.
        # (Of three groups, in chunks of 512 tokens, one: a chunk is kept whole.)
        num_gpu_blocks_override=3 * -(-(LONGEST + NEW_TOKENS) // block_size) + 1,
        kv_cache_watermark=0.0,
    )
    core = start_core(config)
    yield core
    core.shutdown()


def test_every_token_equals_transformers(core: EngineCore, family: ParityCase) -> None:
    assert run_greedily(core, family, "first-") == family.expected
    after_first = core.stats()
    assert run_greedily(core, family, "second-") == family.expected
    stats = core.stats()
    if not (family.has_window and core.ready.max_num_batched_tokens == 16):
        # In small chunks a window gives blocks back as fast as others are admitted.
        assert stats.num_preemptions > 0, "the cache was meant to be too small"
    if family.directory.name != "windows":  # three groups in so few blocks: what one request leaves, the next one takes
        assert stats.prefix_cache_hits > after_first.prefix_cache_hits, "nothing was found in the prefix cache"
    assert stats.num_blocks_in_use == 0
