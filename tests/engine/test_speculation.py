"""Speculative decoding changes speed and nothing else (docs/architecture.md, invariant 11).

Every request runs plainly first. Then the same requests run with drafts that are the truth, nonsense, and the truth up to
some point: tokens, log-probabilities to the bit, finish reasons and stop reasons must be the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

import pytest

from pagoda.config.schema import PagodaConfig
from pagoda.engine.core.loop import EngineCore
from pagoda.engine.core.startup import start_core
from pagoda.errors import CheckpointError, ConfigError
from pagoda.models.dummy import DummySpec
from pagoda.request import EngineRequest
from pagoda.sampling.output import FinishReason, TokenLogprobs
from pagoda.sampling.params import SamplingParams
from pagoda.scheduling.lookahead import Speculation
from pagoda.scheduling.request import Request
from tests.support.checkpoints import shared_checkpoint
from tests.support.drafts import ArbitraryDrafts, Steady

SPECS = {
    "llama": DummySpec(family="llama", tie_word_embeddings=True, num_heads=6, num_kv_heads=2, hidden_size=96),
    "mistral": DummySpec(family="mistral", sliding_window=24),
    "qwen2": DummySpec(family="qwen2", tie_word_embeddings=True, num_heads=4, num_kv_heads=1),
    "qwen3": DummySpec(num_layers=2),
    "windows": DummySpec(num_layers=4, sliding_window=24, max_window_layers=1),
}

# Words of two and three ids, single ids, and what biases make likely, so that each processor has its say.
SAMPLINGS = [
    SamplingParams(temperature=0.0, ignore_eos=True),
    SamplingParams(temperature=0.0, logprobs=3, prompt_logprobs=2, ignore_eos=True),
    SamplingParams(seed=1, temperature=1.1, logprobs=0, ignore_eos=True),
    SamplingParams(seed=2, temperature=0.8, top_p=0.9, ignore_eos=True),
    SamplingParams(seed=3, top_k=9, min_p=0.02, ignore_eos=True),
    SamplingParams(seed=4, temperature=1.3, top_k=200, top_p=0.95, logprobs=2),
    SamplingParams(temperature=0.0, repetition_penalty=1.4, logprobs=1, ignore_eos=True),
    SamplingParams(seed=5, presence_penalty=0.7, frequency_penalty=0.5, ignore_eos=True),
    SamplingParams(seed=6, temperature=0.7, allowed_token_ids=tuple(range(40, 60)), ignore_eos=True),
    SamplingParams(
        temperature=0.0,
        logit_bias={7: 9.0, 8: 8.0, 9: 7.0},
        bad_words_token_ids=((7, 8), (8, 7, 9), (9, 9)),
        repetition_penalty=1.2,
        ignore_eos=True,
    ),
    SamplingParams(seed=7, min_tokens=12, stop_token_ids=tuple(range(3, 200))),
    SamplingParams(seed=8, stop_token_ids=tuple(range(3, 40)), logit_bias={2: 3.0}, logprobs=1),
]


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None


def requests_of(samplings: list[SamplingParams], max_tokens: int = 30) -> list[EngineRequest]:
    """Prompts of 1 to 80 tokens; every second one begins like the others."""
    shared = [(13 * n) % 400 + 5 for n in range(64)]
    prompts = [
        (shared if index % 2 else [])[: 8 * index] + [(31 * index + 7 * n) % 400 + 5 for n in range(1 + 5 * index)]
        for index in range(len(samplings))
    ]
    return [
        EngineRequest(
            request_id=f"r{index}", prompt_token_ids=prompt, params=sampling, max_tokens=max_tokens, eos_token_ids=(2,)
        )
        for index, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True))
    ]


def answers_of(core: EngineCore, requests: list[EngineRequest]) -> dict[str, Answer]:
    answers = {request.request_id: Answer() for request in requests}
    for request in requests:
        core.add_request(request)
    while core.has_work:
        for output in core.step().outputs:
            answer = answers[output.request_id]
            assert answer.finish_reason is None
            answer.tokens += output.new_token_ids
            answer.logprobs += output.logprobs or []
            answer.prompt_logprobs = answer.prompt_logprobs or output.prompt_logprobs
            answer.finish_reason, answer.stop_reason = output.finish_reason, output.stop_reason
            answer.error = output.error
    return answers


def speculate(core: EngineCore, plain: dict[str, Answer], seed: int, share: float = 0.8) -> ArbitraryDrafts:
    """Let `core` draft from the answers that it gave without drafts."""

    def truth(request: Request, count: int) -> list[int]:
        return plain[request.spec.request_id].tokens[request.num_output_tokens :][:count]

    scheduler = core._scheduler
    proposer = ArbitraryDrafts(Random(seed), truth, core.ready.vocab_size, share)
    scheduler._lookahead = Speculation(scheduler.kv, proposer, max_draft_tokens=32)
    return proposer


def make_core(directory: Path, **settings) -> EngineCore:
    values = {
        "device": "cpu",
        "dtype": "float32",
        "threads": 1,
        "block_size": 8,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "max_model_len": 160,
    }
    return start_core(PagodaConfig(model=str(directory), **(values | settings)))


@pytest.mark.parametrize("family", sorted(SPECS))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_drafts_change_nothing(family: str, dtype: str) -> None:
    core = make_core(shared_checkpoint(SPECS[family]), dtype=dtype)
    requests = requests_of(SAMPLINGS)
    plain = answers_of(core, requests)
    assert {answer.finish_reason for answer in plain.values()} == {FinishReason.LENGTH, FinishReason.STOP}
    assert answers_of(core, requests) == plain  # prefixes are cached now
    for seed in range(2):
        speculate(core, plain, seed)
        before = core.stats().num_spec_accepted_tokens
        assert answers_of(core, requests) == plain
        assert core.stats().num_spec_accepted_tokens - before > 20
    assert core.stats().num_blocks_in_use == 0


@pytest.mark.parametrize("chunk", [8, 64])
def test_drafts_change_nothing_where_requests_are_preempted_and_prompts_come_in_chunks(chunk: int) -> None:
    # Room for two of the longest.
    core = make_core(
        shared_checkpoint(SPECS["llama"]),
        max_num_batched_tokens=chunk,
        num_gpu_blocks_override=28,
        kv_cache_watermark=0.0,
    )
    requests = requests_of(SAMPLINGS)
    plain = answers_of(core, requests)
    speculate(core, plain, 1)
    before = core.stats().num_preemptions
    assert answers_of(core, requests) == plain
    assert core.stats().num_preemptions > before


@pytest.mark.parametrize("kernels", ["compiled", "reference"])
def test_request_that_cannot_be_sampled_fails_where_it_would_without_drafts(kernels: str) -> None:
    """All but one id is allowed nowhere, and that one never after itself: the second token cannot be sampled."""
    core = make_core(shared_checkpoint(SPECS["qwen3"]), cpu_kernels=kernels)
    requests = requests_of(
        [SamplingParams(temperature=0.0, allowed_token_ids=(9,), bad_words_token_ids=((9, 9, 9, 9),), ignore_eos=True)]
    )
    plain = answers_of(core, requests)
    assert plain["r0"].finish_reason is FinishReason.ERROR
    assert plain["r0"].tokens == [9, 9, 9]
    for seed in range(6):
        speculate(core, {"r0": Answer([9] * 30)}, seed, share=1.0)
        assert answers_of(core, requests) == plain


@pytest.mark.parametrize("method", ["ngram", "suffix"])
def test_methods_change_no_answer_and_save_steps_where_text_repeats(method: str) -> None:
    directory = shared_checkpoint(SPECS["qwen2"])
    requests = requests_of(SAMPLINGS, max_tokens=60)
    plain = answers_of(make_core(directory), requests)
    core = make_core(directory, speculative_config={"method": method, "num_speculative_tokens": 6})
    for _ in range(2):
        assert answers_of(core, requests) == plain
    # Every request once more, alone: a small model repeats itself, and past outputs are known.
    for request in requests:
        assert answers_of(core, [request])[request.request_id] == plain[request.request_id]
    assert core.stats().num_blocks_in_use == 0


def test_endless_generation_of_many_ends_within_every_cap_and_leaves_all_blocks_free() -> None:
    """Nothing stops these requests but their lengths; the KV cache is full all the time, and drafts fill what is left."""
    core = make_core(
        shared_checkpoint(SPECS["qwen3"]),
        speculative_config={"method": "ngram", "prompt_lookup_min": 1, "num_speculative_tokens": 8},
        max_num_seqs=16,
        num_gpu_blocks_override=41,
        kv_cache_watermark=0.0,
        max_num_batched_tokens=128,
    )
    prompt = [11, 12, 13, 14] * 4
    requests = [
        EngineRequest(
            request_id=str(index),
            prompt_token_ids=prompt[index % 8 :],
            params=SamplingParams(temperature=0.0, ignore_eos=True, logit_bias={11 + index % 4: 30.0}),
            max_tokens=10_000 if index % 2 else 40,
        )
        for index in range(32)
    ]
    answers = answers_of(core, requests)
    for request in requests:
        answer = answers[request.request_id]
        assert answer.finish_reason is FinishReason.LENGTH
        longest = 160 - len(request.prompt_token_ids)
        assert len(answer.tokens) == min(request.max_tokens, longest)
    stats = core.stats()
    assert stats.num_preemptions > 0
    assert stats.num_spec_draft_tokens > 0
    assert stats.num_blocks_in_use == 0
    core._scheduler.check_integrity()
    assert not core._scheduler.find_leak()


@pytest.mark.parametrize("is_right", [True, False])
@pytest.mark.parametrize("blocks", [None, 40])
def test_draft_model_changes_no_answer_and_is_believed_where_it_is_the_model(
    is_right: bool, blocks: int | None
) -> None:
    """A draft model that is the model itself is right wherever it has the same history, at any temperature."""
    directory = shared_checkpoint(SPECS["llama"])
    drafter = directory if is_right else shared_checkpoint(replace(SPECS["qwen3"], seed=7))
    requests = requests_of(SAMPLINGS)
    plain = answers_of(make_core(directory), requests)
    core = make_core(
        directory,
        speculative_config={"method": "draft_model", "model": str(drafter), "num_speculative_tokens": 3},
        num_gpu_blocks_override=blocks,
        kv_cache_watermark=0.0,
    )
    core._scheduler._lookahead._proposer = Steady(3)
    for _ in range(2):
        assert answers_of(core, requests) == plain
    stats = core.stats()
    assert (stats.num_preemptions > 0) == (blocks is not None)
    assert stats.num_spec_draft_tokens > 200
    share = stats.num_spec_accepted_tokens / stats.num_spec_draft_tokens
    if is_right:
        assert share > (0.95 if blocks is None else 0.5)
    else:
        assert share < 0.5
    assert stats.num_blocks_in_use == 0


def test_model_with_rounded_weights_drafts_for_itself() -> None:
    directory = shared_checkpoint(SPECS["llama"])
    requests = requests_of(SAMPLINGS)
    core = make_core(
        directory,
        speculative_config={"method": "draft_model", "quantization": "int8", "num_speculative_tokens": 3},
    )
    core._scheduler._lookahead._proposer = Steady(3)
    assert answers_of(core, requests) == answers_of(make_core(directory), requests)
    stats = core.stats()
    assert stats.num_spec_accepted_tokens > 0.5 * stats.num_spec_draft_tokens > 100


def test_draft_model_is_used_where_it_pays_and_rests_where_it_does_not() -> None:
    directory = shared_checkpoint(SPECS["llama"])
    core = make_core(directory, speculative_config={"method": "draft_model", "model": str(directory)})
    requests = requests_of(SAMPLINGS, max_tokens=60)
    assert answers_of(core, requests) == answers_of(make_core(directory), requests)


def test_draft_model_of_another_vocabulary_is_refused_before_anything_loads() -> None:
    other = shared_checkpoint(DummySpec(vocab_size=300))
    with pytest.raises(ConfigError, match="vocabulary of 300 tokens, the model one of 512"):
        make_core(shared_checkpoint(SPECS["llama"]), speculative_config={"model": str(other)})
    with pytest.raises(CheckpointError, match="there is no directory /nowhere"):
        make_core(shared_checkpoint(SPECS["llama"]), speculative_config={"model": "/nowhere"})


def test_draft_model_that_cannot_be_rounded_is_refused_before_anything_loads() -> None:
    odd = shared_checkpoint(replace(SPECS["llama"], hidden_size=80, num_heads=5, num_kv_heads=1, head_dim=16))
    message = "speculative_config: the draft model: quantization=int4: this model's layers have .* inputs"
    with pytest.raises(ConfigError, match=message):
        make_core(odd, speculative_config={"method": "draft_model", "quantization": "int4"})
