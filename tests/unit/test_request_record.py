"""A request's record is passed on whole: what a parser sets, scheduler and model runner get, whatever fields it has."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from pagoda.adapters import LoraAdapter
from pagoda.engine import wire
from pagoda.engine.core.loop import EngineCore
from pagoda.engine.messages import EngineReady
from pagoda.request import BaseRequest, EngineRequest, GenerationRequest
from pagoda.sampling.params import SamplingParams
from pagoda.scheduling.config import SchedulerLimits
from pagoda.scheduling.kv_cache_manager import KVCacheManager
from pagoda.scheduling.plan import NewRequest
from pagoda.scheduling.request import Request
from pagoda.scheduling.scheduler import Scheduler
from pagoda.text.tokenizer import Tokenizer
from pagoda.text.validation import RequestLimits, validate_request
from tests.support.tokenizers import save_tokenizer

# A value that is not the default for every field that all forms of a request have.
VALUES = {
    "request_id": "chosen",
    "params": SamplingParams(temperature=0.25, seed=7),
    "priority": -3,
    "tenant": "a tenant",
    "tenant_weight": 2.0,
    "fairness_id": "team",
    "ttft_slo": 0.5,
    "cache_keys": ("salt=x", "another"),
    "adapter": LoraAdapter("sql", "/adapters/sql", "0f"),
    "num_speculative_tokens": 2,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_directory(save_tokenizer(Path(tmp_path_factory.mktemp("tokenizer")), "byte_level_bpe"))


def validated(tokenizer: Tokenizer) -> EngineRequest:
    limits = RequestLimits(max_model_len=64, vocab_size=400, eos_token_ids=(7,))
    (request,) = validate_request(GenerationRequest(prompt=[1, 2, 3], **VALUES), [1, 2, 3], tokenizer, limits)
    return request


def planned(request: EngineRequest) -> NewRequest:
    """The request as the model runner gets it, by way of the core and its scheduler."""
    limits = SchedulerLimits(
        max_num_seqs=2,
        max_num_batched_tokens=64,
        max_model_len=64,
        max_num_waiting=4,
        max_loras=1,
        max_cpu_loras=1,
    )
    scheduler = Scheduler(limits, KVCacheManager(9, 16))
    ready = EngineReady(
        max_model_len=64, max_num_seqs=2, max_num_batched_tokens=64, num_blocks=8, block_size=16, vocab_size=400
    )
    EngineCore(scheduler, executor=None, ready=ready).add_request(request)  # type: ignore[arg-type]
    assert scheduler.schedule() is None
    for _, adapter in scheduler.adapters.take_loads():
        scheduler.adapters.loaded(adapter)
    plan = scheduler.schedule()
    assert plan is not None
    return plan.new_requests[0]


def test_every_field_of_a_request_reaches_the_model_runner(tokenizer: Tokenizer) -> None:
    assert set(VALUES) == {field.name for field in fields(BaseRequest)}, "a new field needs a value here, and no more"
    frame = wire.encode(validated(tokenizer))
    received = wire.decode(frame[: wire.HEADER.size], frame[wire.HEADER.size :])
    assert isinstance(received, EngineRequest)
    spec = planned(received).spec
    assert spec is received
    assert {name: getattr(spec, name) for name in VALUES} == VALUES
    assert (spec.prompt_token_ids, spec.max_tokens, spec.eos_token_ids) == ([1, 2, 3], 61, (7,))


def test_requests_share_cached_prefixes_only_where_all_cache_keys_are_equal() -> None:
    kv = KVCacheManager(64, 4)
    limits = SchedulerLimits(max_num_seqs=8, max_num_batched_tokens=64, max_model_len=64, max_num_waiting=8)
    scheduler = Scheduler(limits, kv)
    keys = [("a", "b"), ("ab",), ("b", "a"), ("a",), (), ("", "ab"), ("a", "b")]
    for index, cache_keys in enumerate(keys):
        spec = EngineRequest(
            request_id=str(index),
            params=SamplingParams(),
            prompt_token_ids=[1] * 8,
            max_tokens=1,
            cache_keys=cache_keys,
        )
        scheduler.add(Request(spec))
    plan = scheduler.schedule()
    assert plan is not None
    assert [new.num_computed_tokens for new in plan.new_requests] == [0, 0, 0, 0, 0, 0, 4]
