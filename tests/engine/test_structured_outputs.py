"""Constrained outputs in a real engine: whatever happens to a request, `stop` means that its output is valid."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import jsonschema
import pytest

import pagoda
from pagoda.config.schema import PagodaConfig
from pagoda.engine.core.loop import EngineCore
from pagoda.engine.core.startup import start_core
from pagoda.errors import ErrorKind
from pagoda.request import EngineRequest
from pagoda.sampling.output import FinishReason
from pagoda.sampling.params import SamplingParams
from pagoda.scheduling.lookahead import Lookahead, Speculation
from pagoda.scheduling.request import Request
from pagoda.structured.spec import GrammarSpec
from pagoda.text.tokenizer import Tokenizer
from tests.engine.test_speculation import Answer, answers_of
from tests.support.checkpoints import shared_checkpoint
from tests.support.drafts import ArbitraryDrafts
from tests.support.schema_sets import all_schemas, error_of

DEMO = Path(pagoda.__file__).parent / "demo_model"
EOS = 2

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
SPECS = {
    "schema": GrammarSpec.of_json_schema(SCHEMA),
    "object": GrammarSpec.of_json_object(),
    "choice": GrammarSpec.of_choice(["red", "green", "blue"]),
    "regex": GrammarSpec.of_regex("[a-c]{3}-[0-9]+"),
}


def is_valid(name: str, text: str) -> bool:
    if name == "schema":
        jsonschema.validate(json.loads(text), SCHEMA)
    elif name == "object":
        return isinstance(json.loads(text), dict)
    elif name == "choice":
        return text in ("red", "green", "blue")
    return True


def make_core(model: Path = DEMO, **settings: object) -> EngineCore:
    values: dict[str, object] = {
        "device": "cpu",
        "dtype": "float32",
        "threads": 1,
        "block_size": 8,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "max_model_len": 256,
    }
    return start_core(PagodaConfig(model=str(model), **(values | settings)))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def core() -> Iterator[EngineCore]:
    made = make_core()
    yield made
    made.shutdown()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_directory(DEMO)


def requests_of(max_tokens: int = 80) -> list[EngineRequest]:
    samplings = [{"temperature": 0.0}, {"temperature": 1.0, "seed": 3}, {"temperature": 1.8, "seed": 4, "top_p": 0.95}]
    requests = [
        EngineRequest(
            request_id=f"{name} {index}",
            prompt_token_ids=[(7 * index + n) % 400 + 100 for n in range(1 + 9 * index)],
            params=SamplingParams(structured_outputs=spec, logprobs=0, **sampling),  # type: ignore[arg-type]
            max_tokens=max_tokens,
            eos_token_ids=(EOS,),
        )
        for name, spec in SPECS.items()
        for index, sampling in enumerate(samplings)
    ]
    free = replace(
        requests[0], request_id="free", params=SamplingParams(temperature=0.0, ignore_eos=True), max_tokens=30
    )
    return [*requests, free]


def check(answers: dict[str, Answer], tokenizer: Tokenizer) -> int:
    """All that say `stop` are valid; returns how many these are."""
    num_stopped = 0
    for request_id, answer in answers.items():
        assert answer.finish_reason in (FinishReason.STOP, FinishReason.LENGTH), answer.error
        if answer.finish_reason is FinishReason.STOP:
            assert is_valid(request_id.split()[0], tokenizer.decode(answer.tokens)), tokenizer.decode(answer.tokens)
            num_stopped += 1
    return num_stopped


def test_outputs_are_valid_in_a_batch_and_the_same_alone(core: EngineCore, tokenizer: Tokenizer) -> None:
    requests = requests_of()
    answers = answers_of(core, requests)
    assert check(answers, tokenizer) >= 6
    assert answers["free"].finish_reason is FinishReason.LENGTH
    for request in requests[::4]:
        assert answers_of(core, [request])[request.request_id] == answers[request.request_id]


def test_outputs_are_the_same_with_drafts(core: EngineCore, tokenizer: Tokenizer) -> None:
    requests = requests_of()
    plain = answers_of(core, requests)

    def truth(request: Request, count: int) -> list[int]:
        return plain[request.spec.request_id].tokens[request.num_output_tokens :][:count]

    scheduler = core._scheduler
    for seed in range(3):
        scheduler._lookahead = Speculation(
            scheduler.kv, ArbitraryDrafts(Random(seed), truth, core.ready.vocab_size), max_draft_tokens=32
        )
        assert answers_of(core, requests) == plain
    scheduler._lookahead = Lookahead()


def test_outputs_are_the_same_after_preemption(core: EngineCore, tokenizer: Tokenizer) -> None:
    small = make_core(num_gpu_blocks_override=34, kv_cache_watermark=0.0)
    try:
        requests = requests_of()
        assert answers_of(small, requests) == answers_of(core, requests)
        assert small.stats().num_preemptions > 0
    finally:
        small.shutdown()


def test_several_steps_a_plan_stop_at_constrained_rows(core: EngineCore, tokenizer: Tokenizer) -> None:
    stepping = make_core(num_scheduler_steps=4)
    try:
        requests = requests_of(max_tokens=40)
        assert answers_of(stepping, requests) == answers_of(core, requests)
    finally:
        stepping.shutdown()


def test_ranks_as_processes_give_the_same_outputs(core: EngineCore, tokenizer: Tokenizer) -> None:
    ranks = make_core(tensor_parallel_size=2)
    try:
        requests = requests_of(max_tokens=24)
        answers = answers_of(ranks, requests)
        check(answers, tokenizer)
        assert answers["choice 0"].tokens == answers_of(core, requests)["choice 0"].tokens
    finally:
        ranks.shutdown()


def test_a_grammar_that_cannot_be_enforced_ends_its_request_alone(core: EngineCore) -> None:
    good, *_ = requests_of()
    bad = replace(
        good,
        request_id="bad",
        params=SamplingParams(structured_outputs=GrammarSpec.of_json_schema({"type": "array", "uniqueItems": True})),
    )
    answers = answers_of(core, [bad, good])
    assert answers["bad"].finish_reason is FinishReason.ERROR
    assert "uniqueItems" in (answers["bad"].error or "")
    assert answers[good.request_id].finish_reason is not FinishReason.ERROR


def test_a_request_whose_grammar_is_being_compiled_can_be_aborted(core: EngineCore) -> None:
    request, *_ = requests_of()
    core.add_request(request)
    core.abort([request.request_id])
    outputs = core.step().outputs
    assert [(output.request_id, output.finish_reason) for output in outputs] == [
        (request.request_id, FinishReason.ABORT)
    ]
    assert not core.has_work


def test_parameters_that_leave_no_token_are_an_error_of_that_request(core: EngineCore) -> None:
    request, *_ = requests_of()
    clash = replace(
        request, request_id="clash", params=SamplingParams(structured_outputs=SPECS["choice"], allowed_token_ids=(500,))
    )
    answer = answers_of(core, [clash])["clash"]
    assert answer.finish_reason is FinishReason.ERROR
    assert "forbid every one" in (answer.error or "")


def test_a_model_without_a_usable_tokenizer_says_so(tmp_path: Path) -> None:
    core = make_core(shared_checkpoint(), tokenizer=str(tmp_path))
    try:
        request = replace(requests_of()[0], prompt_token_ids=[5])
        core.add_request(request)
        outputs = []
        while core.has_work:
            outputs += core.step().outputs
        assert [(output.error_kind, output.finish_reason) for output in outputs] == [
            (ErrorKind.NOT_SUPPORTED, FinishReason.ERROR)
        ]
        assert "tokenizer.json" in (outputs[0].error or "")
    finally:
        core.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 32])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.5])
@pytest.mark.parametrize("with_drafts", [False, True])
def test_schemas_that_others_wrote(
    tokenizer: Tokenizer, batch_size: int, temperature: float, with_drafts: bool
) -> None:
    """Every third of them; whatever says `stop` is valid."""
    schemas = all_schemas()
    names = sorted(schemas)[::3] if batch_size > 1 else sorted(schemas)[::30]
    core = make_core(max_num_seqs=batch_size, max_model_len=160, max_num_batched_tokens=256)
    scheduler = core._scheduler
    if with_drafts:
        proposer = ArbitraryDrafts(Random(1), lambda request, count: request.token_ids[-count:], core.ready.vocab_size)
        scheduler._lookahead = Speculation(scheduler.kv, proposer, max_draft_tokens=64)
    requests = [
        EngineRequest(
            request_id=f"{index}",
            prompt_token_ids=[(7 * index + n) % 400 + 100 for n in range(8)],
            params=SamplingParams(
                structured_outputs=GrammarSpec.of_json_schema(schemas[name]) if schemas[name] is not False else None,
                temperature=temperature,
                seed=index,
            ),
            max_tokens=100,
            eos_token_ids=(EOS,),
        )
        for index, name in enumerate(names)
    ]
    num_stopped = 0
    try:
        for first in range(0, len(requests), 32):
            for request_id, answer in answers_of(core, requests[first : first + 32]).items():
                schema = schemas[names[int(request_id)]]
                if answer.finish_reason is FinishReason.STOP and schema is not False:
                    error = error_of(schema, tokenizer.decode(answer.tokens))
                    assert error is None, (names[int(request_id)], error)
                    num_stopped += 1
    finally:
        core.shutdown()
    assert num_stopped > len(names) // 10
