"""Detokenization and stop strings of one running sequence, synchronous: used by `TextGenerator` and by `LLM`."""

from __future__ import annotations

from typing_extensions import override

from pagoda import faults
from pagoda.engine.messages import EngineOutput
from pagoda.errors import ErrorKind, RequestFailedError, error_of
from pagoda.sampling.output import FinishReason
from pagoda.sampling.params import SamplingParams
from pagoda.text.detokenizer import IncrementalDetokenizer, MarkingDetokenizer
from pagoda.text.logprobs import decode_logprobs, decode_prompt_logprobs
from pagoda.text.output import GenerationChunk
from pagoda.text.responses.message import ContentDelta, DeltaList
from pagoda.text.responses.parser import ResponseParser
from pagoda.text.stop import StopStringMatcher
from pagoda.text.tokenizer import Tokenizer


class RequestTextState:
    """Turns the engine's outputs for one sequence into chunks of text.

    `index` is the choice it is; `echo` is put in front of its text. After `process` has returned a chunk with a finish
    reason, `finished` is True. `must_abort` is True when a stop string ended it and the engine does not know yet.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: list[int],
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
        self._num_tokens = 0
        self._started = False
        self._may_be_plain = not sampling.stop
        self._is_plain = False  # from the second output on, where no more is to be done than to decode tokens
        self.finished = False
        self.must_abort = False

    def process(self, output: EngineOutput) -> GenerationChunk:
        """The chunk that `output` makes.

        Raises the error that the engine ended the request with, or `RequestFailedError` when its tokens cannot be
        turned into text; either way the request has ended, and `must_abort` says whether to abort it in the engine.
        """
        if output.finish_reason is FinishReason.ERROR:
            self.finished = True
            raise error_of(output.error_kind or ErrorKind.INTERNAL, output.error or "the engine gave no reason")
        try:
            return self._process(output)
        except Exception as error:  # any error ends this request and no other
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
            text += self._take_rest()
        if self._stop.matched is not None:
            self.must_abort = finish_reason is None
            finish_reason, stop_reason = FinishReason.STOP, self._stop.matched
        self.finished = finish_reason is not None
        first, self._started = not self._started, True
        self._is_plain = self._may_be_plain
        logprobs, prompt_logprobs = output.logprobs, output.prompt_logprobs
        return GenerationChunk(
            index=self.index,
            text=self._echo + text if first else text,
            token_ids=output.new_token_ids[:num_used],
            logprobs=None if logprobs is None else decode_logprobs(self._tokenizer, logprobs[:num_used]),
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            num_prompt_tokens=len(self._prompt_token_ids) if first else None,
            prompt_token_ids=self._prompt_token_ids if first else None,
            prompt_logprobs=(
                None if prompt_logprobs is None else decode_prompt_logprobs(self._tokenizer, prompt_logprobs)
            ),
            num_cached_tokens=output.num_cached_tokens if first else None,
            scheduled_time=output.scheduled_time if first else None,
            num_draft_tokens=output.num_draft_tokens if self.finished else 0,
            num_accepted_tokens=output.num_accepted_tokens if self.finished else 0,
        )

    def _take_rest(self) -> str:
        """The text that was held back, up to a stop string."""
        text = self._stop.feed(self._detokenizer.finish())
        return text if self._stop.matched is not None else text + self._stop.finish()

    def _take_tokens(self, output: EngineOutput) -> tuple[str, int]:
        """The text of the new tokens up to a stop string, and how many of them that took."""
        text = ""
        token_ids = output.new_token_ids
        for position, token_id in enumerate(self._tokens_with_text(output), start=1):
            self._num_tokens += 1
            delta = self._detokenizer.feed(token_id)
            if delta:
                text += self._stop.feed(delta, may_stop=self._num_tokens > self._min_tokens)
                if self._stop.matched is not None:
                    return text, position
        return text, len(token_ids)

    def _tokens_with_text(self, output: EngineOutput) -> list[int]:
        """The new tokens but for one that ended the request: it is part of the ids and, unless it was asked for, not of the
        text. What completed a constrained output is part of both."""
        terminated = output.finish_reason is FinishReason.STOP and self._drops_terminator and not output.is_complete
        return output.new_token_ids[:-1] if terminated else output.new_token_ids


class RequestMessageState(RequestTextState):
    """The same for a sequence that is an assistant's message: `parser` tells its content, reasoning and calls apart.

    The parser reads every token's text by itself, so that what it says does not depend on how many come at once.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        parser: ResponseParser,
        *,
        index: int = 0,
    ) -> None:
        super().__init__(tokenizer, prompt_token_ids, sampling, index=index)
        self._parser = parser
        self._marks = parser.marks
        self._detokenizer = MarkingDetokenizer(
            tokenizer,
            parser.marks,
            prompt_token_ids=prompt_token_ids,
            skip_special_tokens=sampling.skip_special_tokens and not parser.reads_special_tokens,
        )
        # A stop string may be spelled by a marker's token as well as by others.
        stop = dict.fromkeys((*sampling.stop, *map(parser.marks.marked, sampling.stop)))
        self._stop = StopStringMatcher(tuple(stop), include_in_output=sampling.include_stop_str_in_output)
        self._may_be_plain = False
        self._has_stop_strings = bool(sampling.stop)
        self._deltas = DeltaList()
        self._num_reasoning_tokens = 0

    @override
    def _process(self, output: EngineOutput) -> GenerationChunk:
        self._deltas = DeltaList()
        self._num_reasoning_tokens = 0
        if self._started and output.finish_reason is None and output.logprobs is None and not self._has_stop_strings:
            faults.fire("detokenize", output.request_id)
            _, num_used = self._take_tokens(output)
            if not self._parser.is_complete:
                return self._with_deltas(GenerationChunk(index=self.index, token_ids=output.new_token_ids))
            chunk = GenerationChunk(index=self.index, token_ids=output.new_token_ids[:num_used])
        else:
            chunk = super()._process(output)
        if chunk.finish_reason is None and self._parser.is_complete:
            self.finished = self.must_abort = True
            chunk.finish_reason = FinishReason.STOP
        if chunk.finish_reason is not None:
            self._parser.finish(self._deltas)
            if isinstance(chunk.stop_reason, str):
                chunk.stop_reason = self._marks.spelled(chunk.stop_reason)
        return self._with_deltas(chunk)

    def _with_deltas(self, chunk: GenerationChunk) -> GenerationChunk:
        deltas = self._deltas
        if len(deltas) == 1 and isinstance(deltas[0], ContentDelta):
            chunk.text = deltas[0].text
        elif deltas:
            chunk.text = "".join([delta.text for delta in deltas if isinstance(delta, ContentDelta)])
            chunk.deltas = deltas
        chunk.num_reasoning_tokens = self._num_reasoning_tokens
        return chunk

    @override
    def _take_rest(self) -> str:
        self._parser.feed(super()._take_rest(), self._deltas)
        return ""

    @override
    def _take_tokens(self, output: EngineOutput) -> tuple[str, int]:
        token_ids = output.new_token_ids
        for position, token_id in enumerate(self._tokens_with_text(output), start=1):
            self._num_tokens += 1
            delta = self._detokenizer.feed(token_id)
            if delta:
                if self._has_stop_strings:
                    delta = self._stop.feed(delta, may_stop=self._num_tokens > self._min_tokens)
                self._parser.feed(delta, self._deltas)
            if self._parser.is_reasoning:
                self._num_reasoning_tokens += 1
            if self._stop.matched is not None or self._parser.is_complete:
                return "", position
        return "", len(token_ids)
