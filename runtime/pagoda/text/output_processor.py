"""The text side of one running sequence, without any waiting: used by the asynchronous generator and by `LLM` alike."""

from __future__ import annotations

from collections.abc import Sequence

from pagoda import faults
from pagoda.engine.messages import EngineOutput
from pagoda.errors import ErrorKind, RequestFailedError, error_of
from pagoda.sampling.output import FinishReason
from pagoda.sampling.params import SamplingParams
from pagoda.text.detokenizer import IncrementalDetokenizer
from pagoda.text.logprobs import decode_logprobs, decode_prompt_logprobs
from pagoda.text.output import GenerationChunk
from pagoda.text.stop import StopStringMatcher
from pagoda.text.tokenizer import Tokenizer


class RequestTextState:
    """Turns the engine's outputs of one sequence into chunks of text.

    `index` is the choice it is; `echo` is put in front of its text. After `process` has returned a chunk with a finish
    reason, `finished` is True. `must_abort` is True when a stop string ended it and the engine does not know yet.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        index: int = 0,
        echo: str = "",
    ) -> None:
        self._tokenizer = tokenizer
        self._prompt_token_ids = prompt_token_ids
        self.index = index
        self._echo = echo
        self._min_tokens = sampling.min_tokens
        self._drops_terminator = not sampling.include_stop_str_in_output
        self._detokenizer = IncrementalDetokenizer(
            tokenizer, prompt_token_ids=prompt_token_ids, skip_special_tokens=sampling.skip_special_tokens
        )
        self._stop = StopStringMatcher(sampling.stop, include_in_output=sampling.include_stop_str_in_output)
        self._has_stop_strings = bool(sampling.stop)
        self._num_tokens = 0
        self._started = False
        self._is_plain = (
            False  # from the second output on, where no stop strings are looked for: all it brings is tokens
        )
        self.finished = False
        self.must_abort = False

    def process(self, output: EngineOutput) -> GenerationChunk:
        """The chunk that `output` makes.

        Raises the error that the engine ended the request with, or `RequestFailedError` when its tokens cannot be
        turned into text; either way the request is over, and `must_abort` says whether it must be aborted in the engine.
        """
        if output.finish_reason is FinishReason.ERROR:
            self.finished = True
            raise error_of(output.error_kind or ErrorKind.INTERNAL, output.error or "the engine gave no reason")
        try:
            return self._process(output)
        except Exception as error:  # of whatever type, it ends this request and no other
            self.finished = True
            self.must_abort = output.finish_reason is None
            raise RequestFailedError(f"the tokens of this request could not be turned into text: {error!r}") from error

    def _process(self, output: EngineOutput) -> GenerationChunk:
        faults.fire("detokenize", output.request_id)
        if self._is_plain and output.finish_reason is None and output.logprobs is None:
            token_ids = output.new_token_ids
            self._num_tokens += len(token_ids)
            return GenerationChunk(
                index=self.index, text="".join(map(self._detokenizer.feed, token_ids)), token_ids=token_ids
            )
        text, num_used = self._take_tokens(output)
        finish_reason: FinishReason | None = output.finish_reason
        stop_reason: int | str | None = output.stop_reason
        if finish_reason is not None and self._stop.matched is None:
            text += self._stop.feed(self._detokenizer.finish())
            if self._stop.matched is None:
                text += self._stop.finish()
        if self._stop.matched is not None:
            self.must_abort = finish_reason is None
            finish_reason, stop_reason = FinishReason.STOP, self._stop.matched
        self.finished = finish_reason is not None
        first, self._started = not self._started, True
        self._is_plain = not self._has_stop_strings
        logprobs, prompt_logprobs = output.logprobs, output.prompt_logprobs
        return GenerationChunk(
            index=self.index,
            text=self._echo + text if first else text,
            token_ids=output.new_token_ids[:num_used],
            logprobs=None if logprobs is None else decode_logprobs(self._tokenizer, logprobs[:num_used]),
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            num_prompt_tokens=len(self._prompt_token_ids) if first else None,
            prompt_token_ids=list(self._prompt_token_ids) if first else None,
            prompt_logprobs=(
                None if prompt_logprobs is None else decode_prompt_logprobs(self._tokenizer, prompt_logprobs)
            ),
            num_cached_tokens=output.num_cached_tokens if first else None,
            scheduled_time=output.scheduled_time if first else None,
        )

    def _take_tokens(self, output: EngineOutput) -> tuple[str, int]:
        """The text of the new tokens up to a stop string, and how many of them that took."""
        text = ""
        token_ids = output.new_token_ids
        # A token that ended the request is part of its ids and, unless it was asked for, not of its text.
        terminated = output.finish_reason is FinishReason.STOP and self._drops_terminator
        num_with_text = len(token_ids) - 1 if terminated else len(token_ids)
        for position, token_id in enumerate(token_ids[:num_with_text], start=1):
            self._num_tokens += 1
            delta = self._detokenizer.feed(token_id)
            if delta:
                text += self._stop.feed(delta, may_stop=self._num_tokens > self._min_tokens)
                if self._stop.matched is not None:
                    return text, position
        return text, len(token_ids)
