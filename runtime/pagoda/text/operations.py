"""The operations of tokenizer workers, threads and processes alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pagoda.errors import ContextLengthError, InvalidRequestError, PagodaError, RequestFailedError
from pagoda.models.checkpoint_files import shown_reason
from pagoda.text.chat_template import ChatTemplate, Message, chat_template_from_config
from pagoda.text.template_process import TemplateProcess
from pagoda.text.tokenizer import Tokenizer
from pagoda.text.tokenizer_loading import is_panic

CHARACTERS_A_TOKEN = 6
"""A text with more of them for each token of the context is most likely too long; in most languages a token has 2 to 5."""
PIECE_CHARACTERS = 2**14
DECODED_AT_ONCE = 512


class TextOperations:
    """One tokenizer with its chat templates. Arguments and results are JSON values, so they can cross to a process.

    `chat_template` replaces the checkpoint's templates, as `chat_template_from_config` describes. `isolates_templates`: chats
    of others are rendered, so a `TemplateProcess` does it until `close`.
    Raises `CheckpointError` or `ConfigError` when either cannot be loaded.
    """

    def __init__(
        self,
        directory: str,
        *,
        chat_template: str | None = None,
        trust_remote_code: bool = False,
        isolates_templates: bool = False,
    ) -> None:
        self.tokenizer = Tokenizer.from_directory(directory, trust_remote_code=trust_remote_code)
        self.chat_template = ChatTemplate(
            chat_template_from_config(chat_template, self.tokenizer.chat_templates), self.tokenizer.special_tokens
        )
        self._process: TemplateProcess | None = None
        if isolates_templates and self.chat_template.sources:
            self._process = TemplateProcess(self.chat_template)
        self._render = self.chat_template.render if self._process is None else self._process.render
        self._operations: dict[str, Callable[..., Any]] = {
            "encode": self.encode,
            "encode_whole": self.encode_whole,
            "decode": self.decode,
            "decode_each": self.decode_each,
            "render_chat_and_encode": self.render_chat_and_encode,
        }

    def close(self) -> None:
        """End the process that renders templates, if there is one."""
        if self._process is not None:
            self._process.close()

    def call(self, operation: str, arguments: Mapping[str, Any]) -> Any:
        """Perform the operation of this name. Raises what it raises; any fault of ours as `RequestFailedError`."""
        try:
            return self._operations[operation](**arguments)
        except PagodaError:
            raise
        except BaseException as error:  # a fault of a tokenizer, of any type, is this one request's
            if not isinstance(error, Exception) and not is_panic(error):
                raise
            raise RequestFailedError(
                f"{operation} failed in the tokenizer: {type(error).__name__}: {shown_reason(error)}"
            ) from error

    def encode(self, text: str, *, add_special_tokens: bool, max_tokens: int | None = None) -> list[int]:
        """Token ids of `text`; refuses one of very many more than `max_tokens` tokens, for each takes a hundred bytes here."""
        if max_tokens is not None and len(text) > max(PIECE_CHARACTERS, CHARACTERS_A_TOKEN * max_tokens):
            self._check_length(text, max_tokens)
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def encode_whole(
        self, text: str, *, pair: str | None, add_special_tokens: bool, max_tokens: int | None, truncate_to: int | None
    ) -> list[Any]:
        """Token ids of a text or of a pair, and where the second one begins; see `Tokenizer.encode_whole`."""
        if truncate_to is None and max_tokens is not None:
            for part in (text, pair or ""):
                if len(part) > max(PIECE_CHARACTERS, CHARACTERS_A_TOKEN * max_tokens):
                    self._check_length(part, max_tokens)
        return list(
            self.tokenizer.encode_whole(text, pair, add_special_tokens=add_special_tokens, max_length=truncate_to)
        )

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool, max_characters: int | None = None) -> str:
        """Text of `token_ids`, which may have `max_characters`."""
        self._check_characters(token_ids, max_characters)
        return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def decode_each(self, token_ids: Sequence[int], *, max_characters: int | None = None) -> list[str]:
        """The text of each of `token_ids` by itself; together they may have `max_characters`."""
        self._check_characters(token_ids, max_characters)
        unique = list(dict.fromkeys(token_ids))
        texts: dict[int, str] = {}
        for start in range(0, len(unique), DECODED_AT_ONCE):
            ids = unique[start : start + DECODED_AT_ONCE]
            texts.update(zip(ids, self.tokenizer.decode_each(ids), strict=True))
        return [texts[token_id] for token_id in token_ids]

    def _check_length(self, text: str, max_tokens: int) -> None:
        """Refuse `text` if its pieces have twice as many tokens as are allowed; cutting it adds a few at each cut."""
        num_tokens = 0
        for start in range(0, len(text), PIECE_CHARACTERS):
            num_tokens += len(self.tokenizer.encode(text[start : start + PIECE_CHARACTERS], add_special_tokens=False))
            if num_tokens > 2 * max_tokens:
                raise ContextLengthError(
                    f"the prompt of {len(text)} characters has more than {2 * max_tokens}", "prompt", max_tokens
                )

    def _check_characters(self, token_ids: Sequence[int], max_characters: int | None) -> None:
        if max_characters is None:
            return
        lengths = {token_id: len(self.tokenizer.token(token_id) or "") for token_id in set(token_ids)}
        if sum(lengths[token_id] for token_id in token_ids) > max_characters:
            raise InvalidRequestError(
                f"the text of these {len(token_ids)} tokens has more than {max_characters} characters, which are allowed in "
                "one response",
                "tokens",
            )

    def render_chat_and_encode(
        self, messages: Sequence[Message], *, add_special_tokens: bool, **template_arguments: Any
    ) -> list[int]:
        """Token ids of a conversation; `template_arguments` as in `ChatTemplate.render`."""
        prompt = self._render(messages, **template_arguments)
        return self.tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
