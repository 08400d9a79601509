"""The operations of tokenizer workers, threads and processes alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pagoda.errors import PagodaError, RequestFailedError
from pagoda.models.checkpoint_files import shown_reason
from pagoda.text.chat_template import ChatTemplate, Message, chat_template_from_config
from pagoda.text.template_process import TemplateProcess
from pagoda.text.tokenizer import Tokenizer
from pagoda.text.tokenizer_loading import is_panic


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
            "decode": self.decode,
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

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def render_chat_and_encode(
        self, messages: Sequence[Message], *, add_special_tokens: bool, **template_arguments: Any
    ) -> list[int]:
        """Token ids of a conversation; `template_arguments` as in `ChatTemplate.render`."""
        prompt = self._render(messages, **template_arguments)
        return self.tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
