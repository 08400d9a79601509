"""The sampling parameters of a request."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from pagoda.errors import InvalidRequestError, shown
from pagoda.structured.spec import GrammarSpec

MAX_LOGPROBS = 20
MAX_LOGPROB_TOKEN_IDS = 512
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 4096
"""Of all stop strings together: the end of every output is compared with them."""
MAX_N = 64
MAX_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen and when generation ends; names and meaning are vLLM's.

    Construction validates: `InvalidRequestError` names the field, its value and the allowed range. `max_tokens=None` means
    "not given" and is resolved at admission (docs/architecture.md, invariant 4); the engine reads `EngineRequest.max_tokens`
    only. `temperature == 0` is greedy, and so is `top_p == 0`. `top_k` of 0 or -1 switches top-k off. Text fields (`stop`,
    `bad_words`, `skip_special_tokens`, `include_stop_str_in_output`) are the text layer's; it turns `bad_words` into
    `bad_words_token_ids` before the engine sees them. Ids are checked against the vocabulary at admission.
    `logprob_token_ids`: log-probabilities of these tokens at every position, in this order, instead of those of the best ones.
    `structured_outputs`: what the output must keep to; then `min_tokens` and `ignore_eos` hold its end back only while
    something else may follow.
    """

    n: int = 1
    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    bad_words: tuple[str, ...] = ()
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    seed: int | None = None
    logprobs: int | None = None
    logprob_token_ids: tuple[int, ...] | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    structured_outputs: GrammarSpec | None = None

    def __post_init__(self) -> None:
        _integer("n", self.n, 1, MAX_N)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, None)
        _integer("min_tokens", self.min_tokens, 0, None)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(
                f"min_tokens={self.min_tokens} is greater than max_tokens={self.max_tokens}", "min_tokens"
            )
        _number("temperature", self.temperature, 0.0, 100.0)
        _integer("top_k", self.top_k, -1, None)
        _number("top_p", self.top_p, 0.0, 1.0)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, 100.0, low_excluded=True)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        for token_id, bias in (self.logit_bias or {}).items():
            _integer("logit_bias key", token_id, 0, None)
            _number(f"logit_bias[{token_id}]", bias, -100.0, 100.0)
        if self.allowed_token_ids is not None:
            if not self.allowed_token_ids:
                raise InvalidRequestError("allowed_token_ids is empty: at least one id is needed", "allowed_token_ids")
            _token_ids("allowed_token_ids", self.allowed_token_ids)
        _token_ids("stop_token_ids", self.stop_token_ids)
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequestError(
                f"stop has {len(self.stop)} strings; at most {MAX_STOP_STRINGS} are allowed", "stop"
            )
        for name, strings in (("stop", self.stop), ("bad_words", self.bad_words)):
            for string in strings:
                if not isinstance(string, str) or not string:
                    raise InvalidRequestError(f"{name} must hold non-empty strings, got {shown(string)}", name)
        if (num_characters := sum(map(len, self.stop))) > MAX_STOP_CHARACTERS:
            raise InvalidRequestError(
                f"stop has {num_characters} characters; at most {MAX_STOP_CHARACTERS} are allowed", "stop"
            )
        if self.seed is not None:
            _integer("seed", self.seed, -MAX_SEED - 1, MAX_SEED)
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.logprob_token_ids is not None:
            if self.logprobs is not None:
                raise InvalidRequestError("give logprobs or logprob_token_ids, not both", "logprob_token_ids")
            if not 1 <= len(self.logprob_token_ids) <= MAX_LOGPROB_TOKEN_IDS:
                raise InvalidRequestError(
                    f"logprob_token_ids has {len(self.logprob_token_ids)} ids; 1 to {MAX_LOGPROB_TOKEN_IDS} are allowed",
                    "logprob_token_ids",
                )
            _token_ids("logprob_token_ids", self.logprob_token_ids)
        if self.prompt_logprobs is not None:
            _integer("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)

    @property
    def num_ids(self) -> int:
        """Ids in all its lists: what the engine is sent, and looks at, for every sequence."""
        lists = (
            *(self.logit_bias, self.allowed_token_ids, self.stop_token_ids, self.logprob_token_ids),
            *self.bad_words_token_ids,
        )
        return sum(len(ids) for ids in lists if ids is not None)

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is taken, with no noise."""
        return self.temperature < 1e-5 or self.top_p == 0


def _token_ids(name: str, ids: tuple[int, ...]) -> None:
    # There may be as many as the vocabulary has, so the usual case must not run a line of Python for each.
    if not ids or (set(map(type, ids)) == {int} and min(ids) >= 0):
        return
    for token_id in ids:
        _integer(name, token_id, 0, None)


def _integer(name: str, value: object, low: int, high: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        allowed = f"at least {low}" if high is None else f"between {low} and {high}"
        raise InvalidRequestError(f"{name} must be an integer {allowed}, got {shown(value)}", name.split(" ")[0])


def _number(name: str, value: object, low: float, high: float, *, low_excluded: bool = False) -> None:
    ok = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not ok or not (low <= value <= high) or (low_excluded and value == low):  # type: ignore[operator]
        bracket = "(" if low_excluded else "["
        raise InvalidRequestError(
            f"{name} must be a number in {bracket}{low:g}, {high:g}], got {shown(value)}", name.split("[")[0]
        )
