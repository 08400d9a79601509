"""The outputs of the text layer: pieces of text with their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pagoda.errors import RequestFailedError
from pagoda.pooling.output import PooledOutput
from pagoda.sampling.output import FinishReason
from pagoda.text.responses.message import AssistantMessage, ContentDelta, MessageDelta


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One candidate token at one position.

    `token` is readable (bytes that are no character alone show as U+FFFD); `bytes` are the exact bytes the token adds to the
    output, so that the bytes of neighbours can be joined to whole characters. `rank` is 1 for the most probable token, None of
    tokens that were asked for by id.
    """

    token_id: int
    token: str
    bytes: list[int]
    logprob: float
    rank: int | None


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """The token at a position, and the most probable ones there by falling log-probability, or those asked for by id."""

    chosen: TokenLogprob
    top: list[TokenLogprob]


@dataclass(slots=True, kw_only=True)  # frozen costs two microseconds, and there is one for every token
class GenerationChunk:
    """What is new of choice `index` (0 .. n-1) of one request; not to be changed.

    `text` and `token_ids` are what is new; joined over all chunks of an index they are the whole completion. Text that may
    still turn out to be half a character or the start of a stop string is held back, so a chunk may bring ids and no text,
    and the last one text and no ids. `logprobs` has one entry for each of `token_ids` if they were asked for.
    `pooled`: the output of a request that pools, which has no text.
    Where the answer is parsed as a message, `text` is what is new of its content, and `deltas`, if there is anything else,
    all that is new in its order; `num_reasoning_tokens` counts those of `token_ids` that are reasoning.
    `finish_reason` is set on the last chunk of an index and only there; `stop_reason` is then the stop string or the id of
    `stop_token_ids` that ended it, None when an end-of-sequence token or the length did.

    Only on the first chunk of an index: `num_prompt_tokens`, `prompt_token_ids`, `num_cached_tokens` (prompt tokens found in
    the prefix cache) and `scheduled_time` (monotonic seconds); and on that of index 0, if they were asked for,
    `prompt_logprobs`, whose first entry is None.

    Only on the last chunk of an index: `num_draft_tokens` of speculative decoding were verified, `num_accepted_tokens` of them
    accepted.
    """

    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    deltas: Sequence[MessageDelta] | None = None
    num_reasoning_tokens: int = 0
    logprobs: list[PositionLogprobs] | None = None
    pooled: PooledOutput | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    num_prompt_tokens: int | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    num_cached_tokens: int | None = None
    scheduled_time: float | None = None
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0

    def all_deltas(self) -> Sequence[MessageDelta]:
        """What is new of the message, content too."""
        if self.deltas is not None:
            return self.deltas
        return [ContentDelta(self.text)] if self.text else []


@dataclass(slots=True, kw_only=True)
class CompletionOutput:
    """One whole completion: the chunks of one index joined.

    `pieces` joined are its text; `finish_reason` is None only while it is being made. `error` says why when the reason is
    ERROR; what came before stays. The rest is what the first chunk says of the prompt. Two are equal whose tokens are, however
    they came.
    """

    index: int = 0
    pieces: list[str] = field(default_factory=list, compare=False)
    token_ids: list[int] = field(default_factory=list)
    deltas: list[MessageDelta] = field(default_factory=list, compare=False)
    num_reasoning_tokens: int = 0
    logprobs: list[PositionLogprobs] | None = None
    pooled: PooledOutput | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    num_prompt_tokens: int = 0
    prompt_token_ids: list[int] = field(default_factory=list)
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    num_cached_tokens: int = field(default=0, compare=False)
    num_draft_tokens: int = field(default=0, compare=False)
    num_accepted_tokens: int = field(default=0, compare=False)

    @property
    def text(self) -> str:
        """The whole text so far."""
        return "".join(self.pieces)

    @property
    def message(self) -> AssistantMessage:
        """The whole message so far: its content is `text`."""
        message = AssistantMessage.of(self.deltas)
        message.content = self.text
        return message

    def add(self, chunk: GenerationChunk) -> None:
        """Append what `chunk` brings."""
        self.pieces.append(chunk.text)
        self.token_ids += chunk.token_ids
        if chunk.deltas is not None:
            self.deltas += chunk.deltas
        self.num_reasoning_tokens += chunk.num_reasoning_tokens
        if chunk.logprobs is not None:
            self.logprobs = self.logprobs or []
            self.logprobs += chunk.logprobs
        if chunk.pooled is not None:
            self.pooled = chunk.pooled
        if chunk.num_prompt_tokens is not None:
            self.num_prompt_tokens = chunk.num_prompt_tokens
            self.prompt_token_ids = chunk.prompt_token_ids or []
            self.prompt_logprobs = chunk.prompt_logprobs
            self.num_cached_tokens = chunk.num_cached_tokens or 0
        if chunk.finish_reason is not None:
            self.finish_reason, self.stop_reason = chunk.finish_reason, chunk.stop_reason
            self.num_draft_tokens, self.num_accepted_tokens = chunk.num_draft_tokens, chunk.num_accepted_tokens


@dataclass(slots=True, kw_only=True)
class RequestOutput:
    """All that came of one prompt; `outputs` has one entry a choice. `prompt` is None where ids were given."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]

    @property
    def prompt_logprobs(self) -> list[PositionLogprobs | None] | None:
        """Of the prompt's tokens, the first None; they come with the first choice."""
        return self.outputs[0].prompt_logprobs

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that were found in the prefix cache, by the choice that found most."""
        return max(output.num_cached_tokens for output in self.outputs)


@dataclass(slots=True, kw_only=True)
class PoolingOutput:
    """What came of one prompt that was pooled; names are vLLM's. `prompt` is None where ids were given.

    `error` says why there is nothing. `num_cached_tokens`: of the prompt, found in the prefix cache.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    pooled: PooledOutput | None = None
    num_cached_tokens: int = 0
    error: str | None = None

    @property
    def data(self) -> list[float] | list[list[float]]:
        """The numbers; those of each token where a task is one of tokens. Raises `RequestFailedError` where there are none."""
        if self.pooled is None:
            raise RequestFailedError(self.error or "the request was not finished")
        return self.pooled.tolist() if len(self.pooled.shape) == 1 else self.pooled.rows()

    @property
    def embedding(self) -> list[float]:
        """The vector of the text."""
        return self._numbers()

    @property
    def probs(self) -> list[float]:
        """A classifier's numbers, one a label."""
        return self._numbers()

    @property
    def score(self) -> float:
        """How well two texts belong together."""
        return self._numbers()[0]

    def _numbers(self) -> list[float]:
        if self.pooled is None:
            raise RequestFailedError(self.error or "the request was not finished")
        return self.pooled.tolist()
