"""From a prompt to a stream of text over the engine client."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

from pagoda.sampling.params import SamplingParams
from pagoda.text.output import GenerationChunk, PositionLogprobs, TokenLogprob

if TYPE_CHECKING:
    from pagoda.engine.client import EngineClient
    from pagoda.text.pool import TokenizerPool

__all__ = ["GenerationChunk", "PositionLogprobs", "TextGenerator", "TokenLogprob"]


class TextGenerator:
    """Tokenizes, admits, fans out, detokenizes and cuts at stop strings; one for each served model.

    `pool` and `client` are public: `await generator.pool.encode(text)`, `.decode(ids)`,
    `.render_chat_and_encode(messages, ...)` serve the routes that need tokens and no generation.
    `default_max_tokens` stands in for a `max_tokens` that was not given; `default_sampling` holds the sampling defaults of
    the checkpoint's generation_config.json, `eos_token_ids` the ids that end generation.
    """

    def __init__(
        self,
        client: EngineClient,
        pool: TokenizerPool,
        *,
        eos_token_ids: tuple[int, ...] = (),
        default_max_tokens: int | None = None,
        default_sampling: Mapping[str, Any] | None = None,
    ) -> None:
        self.client = client
        self.pool = pool
        self.eos_token_ids = eos_token_ids
        self.default_max_tokens = default_max_tokens
        self.default_sampling = dict(default_sampling or {})

    def sampling_params(self, given: Mapping[str, Any]) -> SamplingParams:
        """`SamplingParams` from what the client gave; a field not given takes the checkpoint's default, then ours.

        Raises `InvalidRequestError` naming the field for an unknown name or an impossible value.
        """
        raise NotImplementedError

    async def generate(
        self,
        prompt: str | list[int],
        sampling: SamplingParams,
        *,
        request_id: str,
        priority: int = 0,
        cache_salt: str | None = None,
        deadline: float | None = None,
        echo: bool = False,
        add_special_tokens: bool = True,
    ) -> AsyncIterator[GenerationChunk]:
        """Stream the completion(s) of `prompt`: text, or token ids taken as they are.

        Chunks of the `sampling.n` choices come interleaved in the order they are made. With `echo` the first chunk of each
        choice begins with the prompt's text. `deadline` is monotonic seconds. `add_special_tokens` concerns a text prompt
        only. Closing the iterator, cancelling the task that reads it, or any error aborts what is still running.

        Raises, before the first chunk: `InvalidRequestError`, `QueueFullError`, `EngineNotReadyError`; at any time:
        `DeadlineExceededError`, `EngineDeadError`, `RequestFailedError`.
        """
        raise NotImplementedError
        yield GenerationChunk()  # an asynchronous generator
