"""Constrained outputs in a real engine: whatever happens to a request, `stop` means that its output is valid."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import jsonschema
import pytest
from typing_extensions import override

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
from pagoda.scheduling.step_cost import StepCost
from pagoda.speculation.loss_budget import LossBudget
from pagoda.speculation.plain_steps import PlainSteps
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

BUDGET_TOKENS, END_OF_REASONING = 5, [1, 77]
BUDGET = replace(GrammarSpec(kind="text"), reasoning_budget=BUDGET_TOKENS).after(END_OF_REASONING)


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
    thinking = [
        replace(
            requests[index],
            request_id=f"thinking {index}",
            params=replace(requests[index].params, structured_outputs=BUDGET, min_tokens=BUDGET_TOKENS + 4),
        )
        for index in range(len(samplings))
    ]
    return [*requests, *thinking, free]


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
    for index in range(3):
        tokens = answers[f"thinking {index}"].tokens
        assert tokens[BUDGET_TOKENS : BUDGET_TOKENS + 2] == END_OF_REASONING
        assert len(tokens) >= BUDGET_TOKENS + 4
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


@pytest.mark.parametrize("method", ["grammar", "ngram"])
def test_outputs_are_the_same_with_what_the_grammar_forces_as_drafts(core: EngineCore, method: str) -> None:
    call = {
        "format": {
            "type": "tag",
            "begin": '<tool_call>{"name": "get_weather", "arguments": ',
            "content": {"type": "json_schema", "json_schema": SCHEMA},
            "end": "}</tool_call>",
        }
    }
    compact = replace(GrammarSpec.of_json_schema(SCHEMA), whitespace=False)
    requests = requests_of()
    for name, spec in (("call", GrammarSpec.of_structural_tag(call)), ("compact", compact)):
        requests += [
            replace(request, request_id=f"{name} {index}", params=replace(request.params, structured_outputs=spec))
            for index, request in enumerate(requests[:3])
        ]
    plain = answers_of(core, requests)
    drafting = make_core(speculative_config={"method": method})
    try:
        # A machine on which drafts cost nothing.
        proposer, cost = drafting._scheduler._lookahead._proposer, FlatCost()  # type: ignore[attr-defined]
        proposer._cost, proposer._plain_steps, proposer._budget = cost, PlainSteps(cost), LossBudget(StepCost())
        assert answers_of(drafting, requests) == plain
        stats = drafting.stats()
        assert stats.num_spec_draft_tokens > 50
        assert method != "grammar" or stats.num_spec_accepted_tokens == stats.num_spec_draft_tokens
    finally:
        drafting.shutdown()


class FlatCost(StepCost):
    """A step takes as long whatever is in it."""

    @override
    def of(self, num_tokens: int) -> float:
        return 1.0

    @override
    def is_measured(self, num_tokens: int) -> bool:
        return True


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
        alone = answers_of(core, requests)
        for name in ("choice 0", "thinking 0"):
            assert answers[name].tokens == alone[name].tokens
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


def test_a_grammar_that_is_known_holds_no_request_up(core: EngineCore) -> None:
    requests = requests_of(max_tokens=2)
    answers_of(core, requests)
    for request in requests:
        core.add_request(replace(request, request_id=f"again {request.request_id}"))
    assert core._scheduler.num_waiting == len(requests)
    while core.has_work:
        core.step()


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


def test_whatever_else_is_asked_an_output_is_valid_or_cut_or_says_what_forbids_it(
    core: EngineCore, tokenizer: Tokenizer
) -> None:
    chosen = Random(0)
    texts = ('{"name": "', "}", '"', "red", "green", "abc-1")
    of_texts = tuple({token for text in texts for token in tokenizer.encode(text)})

    def some() -> int:
        return chosen.choice((EOS, *of_texts, chosen.randrange(core.ready.vocab_size)))

    makers = {
        "bad_words_token_ids": lambda: ((some(),), (some(), some())),
        "stop_token_ids": lambda: (some(), some()),
        "logit_bias": lambda: {some(): chosen.choice((-100.0, 100.0)) for _ in range(3)},
        "min_tokens": lambda: chosen.choice((1, 5, 30)),
        "ignore_eos": lambda: True,
        "allowed_token_ids": lambda: (*of_texts, some()) if chosen.random() < 0.5 else (some(), some()),
        "repetition_penalty": lambda: 1.5,
    }
    requests = []
    for index in range(40):
        name = chosen.choice(list(SPECS))
        others = {key: make() for key, make in makers.items() if chosen.random() < 0.3}
        params = SamplingParams(structured_outputs=SPECS[name], temperature=index % 2, seed=index, **others)  # type: ignore[arg-type]
        requests.append(
            EngineRequest(
                request_id=f"{name} {index}",
                prompt_token_ids=[5],
                params=params,
                max_tokens=40,
                eos_token_ids=(EOS,),
            )
        )
    answers = answers_of(core, requests)
    assert len(answers) == len(requests)
    for request in requests:
        answer = answers[request.request_id]
        if answer.finish_reason is FinishReason.ERROR:
            assert "forbid every one" in (answer.error or "")
        elif answer.finish_reason is FinishReason.LENGTH:
            assert len(answer.tokens) == request.max_tokens
        elif answer.tokens[-1] not in request.params.stop_token_ids:
            assert is_valid(request.request_id.split()[0], tokenizer.decode(answer.tokens))
    assert {answer.finish_reason for answer in answers.values()} == {
        FinishReason.STOP,
        FinishReason.LENGTH,
        FinishReason.ERROR,
    }


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
