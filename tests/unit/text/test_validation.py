from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from pagoda.errors import ContextLengthError, InvalidRequestError
from pagoda.request import GenerationRequest
from pagoda.sampling.params import MAX_SEED, SamplingParams
from pagoda.text.tokenizer import Tokenizer
from pagoda.text.validation import MAX_BAD_WORDS, RequestLimits, validate_request
from tests.support.tokenizers import save_tokenizer

with TemporaryDirectory() as directory:
    TOKENIZER = Tokenizer.from_directory(save_tokenizer(Path(directory), "byte_level_bpe"))


def validated(prompt, params: SamplingParams, default_max_tokens: int | None = None, **fields):
    limits = RequestLimits(
        max_model_len=100, vocab_size=400, eos_token_ids=(7, 8), default_max_tokens=default_max_tokens
    )
    request = GenerationRequest(request_id="r", params=params, prompt=prompt, **fields)
    return validate_request(request, prompt, TOKENIZER, limits)


@pytest.mark.parametrize(
    ("given", "default", "resolved"),
    [(None, None, 90), (None, 16, 16), (None, 1000, 90), (5, 16, 5), (90, None, 90), (90, 16, 90)],
)
def test_max_tokens_is_what_was_given_else_the_default_else_what_fits(given, default, resolved):
    (request,) = validated([1] * 10, SamplingParams(max_tokens=given), default)
    assert request.max_tokens == resolved


def test_one_request_becomes_one_for_the_engine_with_everything_that_was_asked():
    sampling = SamplingParams(temperature=0.5, stop=("x",), seed=3, prompt_logprobs=2)
    (request,) = validated([1, 2], sampling, priority=4, cache_keys=("salt=x",))
    assert request.request_id == "r"
    assert request.prompt_token_ids == [1, 2]
    assert request.params == sampling
    assert (request.priority, request.cache_keys, request.eos_token_ids) == (4, ("salt=x",), (7, 8))
    assert request.arrival_time > 0


def test_choices_become_requests_of_their_own_with_seeds_of_their_own():
    requests = validated([1], SamplingParams(n=3, seed=MAX_SEED - 1, prompt_logprobs=0))
    assert [request.request_id for request in requests] == ["r-0", "r-1", "r-2"]
    assert requests[0].params.seed == MAX_SEED - 1
    SamplingParams(seed=requests[1].params.seed)  # in the range of seeds
    assert [request.params.n for request in requests] == [1, 1, 1]
    assert [request.params.prompt_logprobs for request in requests] == [0, None, None]
    assert [request.params.seed for request in validated([1], SamplingParams(n=2))] == [None, None]


def test_choices_of_neighbouring_seeds_are_all_different():
    """With `seed + index`, the second choice of seed 1 would be the first of seed 2."""
    seeds = [
        request.params.seed for seed in range(-50, 50) for request in validated([1], SamplingParams(n=8, seed=seed))
    ]
    assert len(set(seeds)) == len(seeds) == 800
    again = [request.params.seed for request in validated([1], SamplingParams(n=8, seed=-50))]
    assert seeds[:8] == again


@pytest.mark.parametrize(("prompt", "params"), [([1] * 100, {}), ([1] * 10, {"max_tokens": 91}), ([1] * 150, {})])
def test_what_is_too_long_is_said_in_the_words_that_clients_look_for(prompt, params):
    with pytest.raises(ContextLengthError) as caught:
        validated(prompt, SamplingParams(**params))
    assert caught.value.kind == "context_length_exceeded"
    assert str(caught.value).startswith("This model's maximum context length is 100 tokens: ")


BAD = {
    "empty prompt": ([], {}, "prompt is empty", "prompt"),
    "prompt that leaves no room": ([1] * 100, {}, "100 tokens", "prompt"),
    "prompt id beyond the vocabulary": ([1, 400], {}, "400.*from 0 to 399", "prompt"),
    "negative prompt id": ([-1], {}, "-1", "prompt"),
    "prompt id that is no integer": ([1, "2"], {}, "'2'", "prompt"),
    "prompt id that is a boolean": ([True], {}, "True", "prompt"),
    "too many tokens": ([1] * 10, {"max_tokens": 91}, "100 tokens: max_tokens=91.*has 10.*90 at most", "max_tokens"),
    "min_tokens beyond what fits": ([1] * 10, {"min_tokens": 91}, "min_tokens=91.*90", "min_tokens"),
    "allowed id": ([1], {"allowed_token_ids": (1, 400)}, "allowed_token_ids holds 400", "allowed_token_ids"),
    "biased id": ([1], {"logit_bias": {1: 0.5, 999: 1.0}}, "logit_bias holds 999", "logit_bias"),
    "stop id": ([1], {"stop_token_ids": (400,)}, "stop_token_ids holds 400", "stop_token_ids"),
    "bad word's id": ([1], {"bad_words_token_ids": ((1, 400),)}, "400", "bad_words_token_ids"),
    "too many bad words": ([1], {"bad_words": ("x",) * (MAX_BAD_WORDS + 1)}, "bad_words", "bad_words"),
    "too long bad words": ([1], {"bad_words": ("x" * 5000,)}, "bad_words", "bad_words"),
}


@pytest.mark.parametrize(("prompt", "sampling", "named", "param"), BAD.values(), ids=BAD.keys())
def test_what_cannot_be_served_is_refused_with_the_numbers(prompt, sampling, named, param):
    with pytest.raises(InvalidRequestError, match=named) as caught:
        validated(prompt, SamplingParams(**sampling))
    assert caught.value.param == param


def test_bad_words_become_ids_as_they_stand_alone_and_after_a_space():
    (request,) = validated([1], SamplingParams(bad_words=("the", " lazy"), bad_words_token_ids=((3, 4),)))
    spelled = {TOKENIZER.decode(ids) for ids in request.params.bad_words_token_ids[1:]}
    assert request.params.bad_words_token_ids[0] == (3, 4)
    assert spelled == {"the", " the", "lazy", " lazy"}
