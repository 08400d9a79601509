"""The last checks before the engine: every number is known and every id exists."""

from __future__ import annotations

import hashlib
import struct
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import takewhile

from pagoda.errors import ContextLengthError, InvalidRequestError
from pagoda.pooling.params import PoolingParams
from pagoda.request import EngineRequest, GenerationRequest, PoolingRequest, sequence_ids
from pagoda.sampling.params import SamplingParams
from pagoda.text.tokenizer import Tokenizer

MAX_BAD_WORDS = 256
MAX_BAD_WORD_CHARACTERS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLimits:
    """What a request must fit into. `max_model_len`: tokens of prompt and completion. `vocab_size`: the model's.
    `num_speculative_tokens` of 0: no speculative decoding."""

    max_model_len: int
    vocab_size: int
    num_speculative_tokens: int = 0
    eos_token_ids: tuple[int, ...] = ()
    default_max_tokens: int | None = None


def validate_request(
    request: GenerationRequest,
    prompt_token_ids: list[int],
    tokenizer: Tokenizer,
    limits: RequestLimits,
    prediction_token_ids: Sequence[int] = (),
) -> list[EngineRequest]:
    """The `params.n` engine requests of one request, with `max_tokens` resolved and `bad_words` as ids.

    `prompt_token_ids`: the prompt as tokens; `prediction_token_ids`: what the output may be. With `n > 1` the requests are
    named `request_id-0`, ... and, when seeded, have seeds that follow from `seed`, the first one `seed` itself; prompt
    log-probabilities are asked of the first alone, as all share the prompt.
    Raises `InvalidRequestError` naming the field and the numbers that do not fit: this is where a client's mistake is found.
    """
    params = request.params
    check_num_tokens(len(prompt_token_ids), limits)
    _check_range("prompt", prompt_token_ids, limits.vocab_size)
    max_tokens = _resolve_max_tokens(params, len(prompt_token_ids), limits)
    _check_ids(params, limits.vocab_size)
    bad_words_token_ids = (
        *params.bad_words_token_ids,
        *_bad_words_token_ids(tuple(params.bad_words), tokenizer.encode),
    )
    whole = EngineRequest.of(
        request,
        prompt_token_ids=prompt_token_ids,
        max_tokens=max_tokens,
        eos_token_ids=limits.eos_token_ids,
        # No more than can be generated, and no id that only the tokenizer has.
        prediction_token_ids=list(takewhile(lambda id: id < limits.vocab_size, prediction_token_ids[:max_tokens])),
        arrival_time=time.monotonic(),
    )
    return [
        replace(
            whole,
            request_id=name,
            params=replace(
                params,
                n=1,
                seed=None if params.seed is None else _nth_seed(params.seed, index),
                bad_words_token_ids=bad_words_token_ids,
                prompt_logprobs=params.prompt_logprobs if index == 0 else None,
            ),
        )
        for index, name in enumerate(sequence_ids(request.request_id, params.n))
    ]


def check_pooled_prompt(prompt_token_ids: list[int], limits: RequestLimits) -> None:
    """Refuse a prompt that cannot be pooled: no token follows it, so it may have as many as the model takes."""
    if not prompt_token_ids:
        raise InvalidRequestError("the input is empty: at least one token is needed", "input")
    if len(prompt_token_ids) > limits.max_model_len:
        raise ContextLengthError(
            f"the input has {len(prompt_token_ids)} tokens; truncate_prompt_tokens cuts it, -1 to as many as fit",
            "input",
            limits.max_model_len,
        )
    _check_range("input", prompt_token_ids, limits.vocab_size)


def pooling_request(request: PoolingRequest, prompt_token_ids: list[int], params: PoolingParams) -> EngineRequest:
    """The engine's request for a prompt whose tokens are known."""
    return EngineRequest.of(
        replace(request, params=params),
        prompt_token_ids=prompt_token_ids,
        max_tokens=1,
        eos_token_ids=(),
        prediction_token_ids=[],
        arrival_time=time.monotonic(),
    )


def check_num_tokens(num_prompt_tokens: int, limits: RequestLimits) -> None:
    """Refuse a prompt of so many tokens unless it leaves one for the completion."""
    if num_prompt_tokens == 0:
        raise InvalidRequestError("the prompt is empty: at least one token is needed", "prompt")
    if num_prompt_tokens >= limits.max_model_len:
        raise ContextLengthError(
            f"the prompt has {num_prompt_tokens} tokens, which leaves no token for a completion",
            "prompt",
            limits.max_model_len,
        )


def _resolve_max_tokens(params: SamplingParams, num_prompt_tokens: int, limits: RequestLimits) -> int:
    remaining = limits.max_model_len - num_prompt_tokens
    if params.max_tokens is not None:
        if params.max_tokens > remaining:
            raise ContextLengthError(
                f"max_tokens={params.max_tokens} is too large; the prompt has {num_prompt_tokens} tokens, so max_tokens may "
                f"be {remaining} at most",
                "max_tokens",
                limits.max_model_len,
            )
        return params.max_tokens
    max_tokens = remaining if limits.default_max_tokens is None else min(limits.default_max_tokens, remaining)
    if params.min_tokens > max_tokens:
        raise InvalidRequestError(
            f"min_tokens={params.min_tokens} is greater than the {max_tokens} tokens that may be generated",
            "min_tokens",
        )
    return max_tokens


def _check_ids(params: SamplingParams, vocab_size: int) -> None:
    _check_range("allowed_token_ids", params.allowed_token_ids or (), vocab_size)
    _check_range("logit_bias", params.logit_bias or (), vocab_size)
    _check_range("logprob_token_ids", params.logprob_token_ids or (), vocab_size)
    _check_range("stop_token_ids", params.stop_token_ids, vocab_size)
    for token_ids in params.bad_words_token_ids:
        _check_range("bad_words_token_ids", token_ids, vocab_size)


def _check_range(param: str, token_ids: Collection[int], vocab_size: int) -> None:
    # A prompt may have a hundred thousand ids, so the usual case must not run a line of Python for each.
    if not token_ids or (set(map(type, token_ids)) == {int} and min(token_ids) >= 0 and max(token_ids) < vocab_size):
        return
    for token_id in token_ids:
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            raise InvalidRequestError(
                f"{param} holds {token_id!r}, which is no token id: ids of this model are integers from 0 to {vocab_size - 1}",
                param,
            )


@lru_cache(maxsize=16)  # the prompts of a request have the same ones
def _bad_words_token_ids(bad_words: tuple[str, ...], encode: Callable[..., list[int]]) -> list[tuple[int, ...]]:
    """Each word alone and after a space; the tokens differ in most vocabularies."""
    if len(bad_words) > MAX_BAD_WORDS or sum(map(len, bad_words)) > MAX_BAD_WORD_CHARACTERS:
        raise InvalidRequestError(
            f"bad_words has {len(bad_words)} words of {sum(map(len, bad_words))} characters together; at most "
            f"{MAX_BAD_WORDS} words and {MAX_BAD_WORD_CHARACTERS} characters are allowed",
            "bad_words",
        )
    spelled = (prefix + word.lstrip() for word in bad_words for prefix in ("", " "))
    unique = dict.fromkeys(tuple(encode(text, add_special_tokens=False)) for text in spelled)
    return [token_ids for token_ids in unique if token_ids]


def _nth_seed(seed: int, index: int) -> int:
    """The seed of a choice: the request's for the first, and for others one that no request is likely to have chosen.

    With `seed + index`, choices of requests whose seeds follow one another would be the same texts.
    """
    if index == 0:
        return seed
    digest = hashlib.blake2b(struct.pack("<qI", seed, index), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
