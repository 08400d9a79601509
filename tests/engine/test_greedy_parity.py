"""The judge of the engine: greedy tokens equal those of Hugging Face transformers, whatever the engine does meanwhile.

32 prompts of 1 to 300 tokens arrive at once, and then once more (when their prefixes are cached), with a KV cache so small
that requests are preempted, in small and large chunks and with two block sizes. Every token must be equal.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pagoda.config.schema import PagodaConfig
from pagoda.engine.core import EngineCore
from pagoda.engine.messages import EngineRequest
from pagoda.engine.startup import start_core
from pagoda.models.dummy import DummySpec, write_dummy_checkpoint
from pagoda.sampling.output import FinishReason
from pagoda.sampling.params import SamplingParams

NUM_PROMPTS = 32
NEW_TOKENS = 48
LONGEST = 300

SPECS = {
    "llama": DummySpec(family="llama", tie_word_embeddings=True, num_heads=6, num_kv_heads=2, hidden_size=96),
    "mistral": DummySpec(family="mistral", sliding_window=128, num_shards=3),
    "qwen2": DummySpec(family="qwen2", tie_word_embeddings=True, num_heads=4, num_kv_heads=1),
    "qwen3": DummySpec(family="qwen3", num_heads=4, num_kv_heads=2, num_shards=2),
}


@dataclass(frozen=True)
class Family:
    directory: Path
    prompts: list[list[int]]
    expected: list[list[int]]
    has_window: bool


@pytest.fixture(scope="module", params=sorted(SPECS))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    directory = write_dummy_checkpoint(tmp_path_factory.mktemp("parity") / request.param, SPECS[request.param])
    generator = random.Random(7)
    lengths = [1, 2, 15, 16, 17, LONGEST, *(generator.randint(1, LONGEST) for _ in range(NUM_PROMPTS - 6))]
    shared = [generator.randrange(3, 500) for _ in range(LONGEST)]
    prompts = []
    for index, length in enumerate(lengths):
        own = [generator.randrange(3, 500) for _ in range(length)]
        prompts.append((shared[: length // 2] + own)[:length] if index % 3 == 0 else own)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    has_window = SPECS[request.param].sliding_window is not None
    return Family(directory, prompts, [greedy(model, prompt) for prompt in prompts], has_window)


@torch.inference_mode()
def greedy(model: torch.nn.Module, prompt: list[int]) -> list[int]:
    inputs = torch.tensor([prompt])
    output = model.generate(  # type: ignore[operator]
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return output[0, len(prompt) :].tolist()


@pytest.fixture(params=[(8, 16), (8, 512), (16, 16), (16, 512)], ids=lambda p: f"block{p[0]}-chunk{p[1]}")
def core(request: pytest.FixtureRequest, family: Family) -> Iterator[EngineCore]:
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
        num_gpu_blocks_override=3 * (LONGEST + NEW_TOKENS) // block_size + 1,
        kv_cache_watermark=0.0,
    )
    core = start_core(config)
    yield core
    core.shutdown()


def run(core: EngineCore, family: Family, name: str) -> list[list[int]]:
    outputs: dict[str, list[int]] = {}
    for index, prompt in enumerate(family.prompts):
        outputs[f"{name}{index}"] = []
        core.add_request(
            EngineRequest(
                request_id=f"{name}{index}",
                prompt_token_ids=prompt,
                sampling=SamplingParams(temperature=0.0, ignore_eos=True),
                max_tokens=NEW_TOKENS,
            )
        )
    ended = []
    while core.has_work:
        for news in core.step().outputs:
            outputs[news.request_id] += news.new_token_ids
            if news.finish_reason is not None:
                assert news.finish_reason is FinishReason.LENGTH, news.error
                ended.append(news.request_id)
    assert sorted(ended) == sorted(outputs)
    return list(outputs.values())


def test_every_token_equals_transformers(core: EngineCore, family: Family) -> None:
    assert run(core, family, "first-") == family.expected
    after_first = core.stats()
    assert run(core, family, "second-") == family.expected
    stats = core.stats()
    if not (family.has_window and core.ready.max_num_batched_tokens == 16):
        # In small chunks a window gives blocks back as fast as others are admitted.
        assert stats.num_preemptions > 0, "the cache was meant to be too small"
    assert stats.prefix_cache_hits > after_first.prefix_cache_hits, "nothing was found in the prefix cache"
    assert stats.num_blocks_in_use == 0
