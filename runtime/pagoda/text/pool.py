"""The pool that tokenizes for the server, off its event loop, with a timeout for every call."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from pagoda.config.schema import PagodaConfig
from pagoda.errors import ConfigError, ContextLengthError, EngineNotReadyError, InvalidRequestError
from pagoda.fair_turns import FairTurns
from pagoda.request import TokenIds
from pagoda.text.chat_template import Message
from pagoda.text.operations import TextOperations
from pagoda.text.process_workers import ProcessWorkers
from pagoda.text.thread_workers import ThreadWorkers, load_in_thread
from pagoda.text.tokenizer import Tokenizer
from pagoda.text.workers import WorkerOptions, Workers, call_took_too_long

# Handing a text to a thread and back takes 45 us, tokenizing 100 characters 90 us (AMD Zen 5): up to here that is not worth
# it, and the event loop is blocked for about 0.1 ms.
INLINE_CHARACTERS = 128
INLINE_TOKENS = 128
MIN_DECODED_CHARACTERS = 2**20
DECODED_CHARACTERS_A_TOKEN = 16
DEFAULT_MAX_WAITING = 1024

Caller = Callable[[], tuple[str, float]]
"""For whom the current task calls: tenant and weight."""


class TokenizerPool:
    """Tokenizes, renders chats and decodes, in `size` threads or processes.

    `max_model_len`, once it is known, refuses texts that are longer than that many tokens can be, before they are
    tokenized. Every call ends: with a result, with the client's error, with `QueueFullError` where too many wait for a worker,
    or with `DeadlineExceededError`. Tenants take turns at the workers.
    """

    def __init__(
        self,
        options: WorkerOptions,
        kind: Literal["thread", "process"] = "thread",
        *,
        max_waiting: int = DEFAULT_MAX_WAITING,
        caller: Caller = lambda: ("", 1.0),
    ) -> None:
        self._options = options
        self._kind = kind
        self._turns = FairTurns(options.size, max_waiting, "a tokenizer worker")
        self.caller = caller
        self._loaded: TextOperations | None = None
        self._workers: Workers | None = None
        self.max_model_len: int | None = None
        self._num_calls = 0
        self._last_end = 0.0

    @classmethod
    def from_config(cls, config: PagodaConfig, **more: Any) -> TokenizerPool:
        """The pool that the configuration asks for; `more`: further arguments of `TokenizerPool`."""
        directory = config.tokenizer or config.model
        if directory is None:
            raise ConfigError("there is no tokenizer: neither model nor tokenizer is set")
        options = WorkerOptions(
            directory=directory,
            size=config.tokenizer_pool_size,
            start_timeout=config.tokenizer_start_timeout_seconds,
            call_timeout=config.tokenizer_timeout_seconds,
            chat_template=config.chat_template,
            trust_remote_code=config.trust_remote_code,
        )
        return cls(options, config.tokenizer_pool_type, max_waiting=config.tokenizer_max_num_waiting, **more)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer; raises `EngineNotReadyError` until it is loaded."""
        return self._operations.tokenizer

    @property
    def last_use(self) -> float:
        """When a call ended last, in monotonic seconds: now, while one runs."""
        return time.monotonic() if self._num_calls else self._last_end

    async def start(self) -> None:
        """Load the tokenizer and start all workers.

        Raises `CheckpointError` or `ConfigError` for what cannot be loaded, `EngineNotReadyError` when it takes too long.
        """
        # The server itself detokenizes, so it needs a tokenizer too; threads share that one.
        self._loaded = await load_in_thread(replace(self._options, isolates_templates=self._kind == "thread"))
        if self._kind == "thread":
            self._workers = ThreadWorkers(self._options, self._loaded)
        else:
            self._workers = ProcessWorkers(self._options)
        await self._workers.start()

    async def shutdown(self, grace: float = 0.0) -> None:
        """Refuse new calls, give running ones `grace` seconds, and end the workers."""
        if self._workers is not None:
            await self._workers.shutdown(grace)
        if self._loaded is not None:
            self._loaded.close()

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`.

        Raises `InvalidRequestError` for a text that cannot fit the model's context or is not valid Unicode.
        """
        limit = self.max_characters
        if limit is not None and len(text) > limit:
            raise ContextLengthError(
                f"the prompt has {len(text)} characters, and they hold {limit} at most", "prompt", self.max_model_len
            )
        arguments = {"text": text, "add_special_tokens": add_special_tokens, "max_tokens": self.max_model_len}
        token_ids: list[int] = await self._call("encode", arguments, inline=len(text) <= INLINE_CHARACTERS)
        return token_ids

    async def encode_whole(
        self,
        text: str,
        pair: str | None = None,
        *,
        add_special_tokens: bool = True,
        truncate_to: int | None = None,
    ) -> tuple[list[int], int | None]:
        """Token ids of a text, or of two that are read together, and where the second one's token type begins.

        `truncate_to`: the most tokens that are kept, -1 for as many as the model takes; None: a longer text is refused.
        Raises what `encode` does.
        """
        limit = self.max_characters
        if truncate_to is not None:
            longest = self.max_model_len
            truncate_to = longest if truncate_to < 0 or longest is None else min(truncate_to, longest)
            if limit is not None:  # what cannot be among the tokens that are kept need not be tokenized
                text, pair = text[: 4 * limit], None if pair is None else pair[: 4 * limit]
        elif limit is not None and len(text) + len(pair or "") > limit:
            raise ContextLengthError(
                f"the input has {len(text) + len(pair or '')} characters, and they hold {limit} at most",
                "input",
                self.max_model_len,
            )
        arguments = {
            "text": text,
            "pair": pair,
            "add_special_tokens": add_special_tokens,
            "max_tokens": self.max_model_len,
            "truncate_to": truncate_to,
        }
        is_short = len(text) + len(pair or "") <= INLINE_CHARACTERS
        token_ids, second = await self._call("encode_whole", arguments, inline=is_short)
        return token_ids, second

    async def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`; raises `InvalidRequestError` for a value that is no id at all."""
        if token_ids and (set(map(type, token_ids)) != {int} or min(token_ids) < 0 or max(token_ids) >= 1 << 32):
            raise InvalidRequestError("token ids must be integers of 0 and above", "tokens")
        arguments = {"token_ids": list(token_ids), "skip_special_tokens": skip_special_tokens}
        text: str = await self._call("decode", arguments, inline=len(token_ids) <= INLINE_TOKENS)
        return text

    async def decode_request(self, token_ids: Sequence[int], vocab_size: int) -> str:
        """Text of the ids that a client sent, special tokens too; no more of them than the model's context has.

        Raises `InvalidRequestError` for more, for one that is not below `vocab_size`, and for a text that is too long for a
        response.
        """
        self._check_count(token_ids)
        largest = int(token_ids.array.max(initial=0)) if isinstance(token_ids, TokenIds) else max(token_ids, default=0)
        if largest >= vocab_size:
            raise InvalidRequestError(f"tokens holds {largest}; ids of this model are below {vocab_size}", "tokens")
        ids = token_ids.tolist() if isinstance(token_ids, TokenIds) else token_ids
        arguments = {"token_ids": ids, "skip_special_tokens": False, "max_characters": self._max_decoded}
        text: str = await self._call("decode", arguments, inline=False)
        return text

    async def decode_each(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each id by itself, special tokens too. Raises what `decode_request` does."""
        arguments = {"token_ids": token_ids, "max_characters": self._max_decoded}
        texts: list[str] = await self._call("decode_each", arguments, inline=False)
        return texts

    async def render_chat_and_encode(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        add_special_tokens: bool = False,
        template_name: str | None = None,
        template_variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation; arguments as in `ChatTemplate.render`.

        A template writes the special tokens itself, so `add_special_tokens` is off unless it is asked for.
        Raises `InvalidRequestError` when the model has no chat template or the template refuses the messages.
        """
        arguments = {
            "messages": list(messages),
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "add_special_tokens": add_special_tokens,
            "template_name": template_name,
            "template_variables": template_variables,
            "max_characters": self.max_characters,
        }
        token_ids: list[int] = await self._call("render_chat_and_encode", arguments, inline=False)
        return token_ids

    def _check_count(self, token_ids: Sequence[int]) -> None:
        if self.max_model_len is not None and len(token_ids) > self.max_model_len:
            raise InvalidRequestError(
                f"there are {len(token_ids)} tokens; the model's context has {self.max_model_len}", "tokens"
            )

    def check_response(self, num_characters: int) -> None:
        """Refuse to repeat so many characters of prompts in one response."""
        if num_characters > self._max_decoded:
            raise InvalidRequestError(
                f"echo would repeat {num_characters} characters (the prompt's times n); at most {self._max_decoded} are "
                "allowed in one response",
                "echo",
            )

    @property
    def _max_decoded(self) -> int:
        """Characters of a response that is the text of tokens; vocabularies have tokens of thousands of characters."""
        return max(MIN_DECODED_CHARACTERS, DECODED_CHARACTERS_A_TOKEN * (self.max_model_len or 0))

    @property
    def chat_template_sources(self) -> list[str]:
        """The jinja sources of all chat templates."""
        return list(self._operations.chat_template.sources.values())

    @property
    def max_characters(self) -> int | None:
        """More characters than this cannot be tokenized to `max_model_len` tokens; None while that is not known."""
        if self.max_model_len is None:
            return None
        return self.max_model_len * self.tokenizer.longest_token_characters

    @property
    def _operations(self) -> TextOperations:
        if self._loaded is None:
            raise EngineNotReadyError("the tokenizer is still loading")
        return self._loaded

    async def _call(self, operation: str, arguments: Mapping[str, Any], *, inline: bool) -> Any:
        if inline:
            return self._operations.call(operation, arguments)
        if self._workers is None:
            raise EngineNotReadyError("the tokenizer is still loading")
        self._num_calls += 1
        try:
            try:
                await self._turns.take(*self.caller(), self._options.call_timeout)
            except TimeoutError:
                raise call_took_too_long(operation, self._options) from None
            try:
                return await self._workers.call(operation, arguments)
            finally:
                self._turns.give_back()
        finally:
            self._num_calls -= 1
            self._last_end = time.monotonic()
