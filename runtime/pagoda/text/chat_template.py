"""Chat messages to a prompt, with the checkpoint's jinja template, as transformers' `apply_chat_template` does it.

A template comes with a checkpoint and runs in a sandbox, in a server also in a process of its own (`template_process`).
Messages come from anyone: they are bounded before they are rendered, and only plain JSON values reach the template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2

from pagoda.errors import ConfigError, ContextLengthError, InvalidRequestError, shown
from pagoda.text.jinja_sandbox import check_syntax, compile_template
from pagoda.text.tokenizer_files import DEFAULT_TEMPLATE

Message = Mapping[str, Any]

_TOOL_TEMPLATE = "tool_use"
# Marks the end of the message to be continued; the trailing space shows whether the template trims messages.
_CONTINUE_MARK = "CONTINUE_FINAL_MESSAGE_TAG "
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_RESERVED_VARIABLES = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
_PROBE = "probe of the content format"
_MAX_DEPTH = 64


class ChatTemplate:
    """The chat templates of one tokenizer.

    `templates`: jinja sources by name; `special_tokens`: variables that every template sees (`bos_token`, ...).
    """

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str] | None = None) -> None:
        self.sources = dict(templates)
        self._templates = {name: _Template(name, source) for name, source in templates.items()}
        self.special_tokens = dict(special_tokens or {})

    @property
    def names(self) -> list[str]:
        """Names of the templates there are."""
        return sorted(self._templates)

    def compile(self) -> None:
        """Compile all templates now; raises `jinja2.TemplateSyntaxError`, and whatever a hostile one leads to."""
        for template in self._templates.values():
            template.compile()

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_name: str | None = None,
        template_variables: Mapping[str, Any] | None = None,
        max_characters: int | None = None,
    ) -> str:
        """The prompt for a conversation. Fields of a message whose value is None count as absent.

        `continue_final_message` leaves the last message open, so that the model goes on with it; it excludes
        `add_generation_prompt`. `template_name` picks one of several templates; without it `tool_use` is taken when there
        are tools, else `default`. `template_variables` are further variables for the template. `max_characters` bounds
        the conversation and the prompt.

        Raises `InvalidRequestError` when there is no template, when messages do not have the form they must have, and
        with the template's own words when it refuses them.
        """
        template = self._select(template_name, with_tools=bool(tools))
        if not messages:
            raise InvalidRequestError("messages is empty: at least one message is needed", "messages")
        if continue_final_message and add_generation_prompt:
            raise InvalidRequestError(
                "continue_final_message and add_generation_prompt exclude each other: a message is either continued or a "
                "new one begun",
                "continue_final_message",
            )
        budget = _Budget(max_characters)
        plain = [template.adapt(_plain_message(message, budget)) for message in messages]
        variables = {
            **self.special_tokens,
            **_plain_mapping(template_variables, "chat_template_kwargs", budget),
            "tools": None if tools is None else _plain(list(tools), "tools", budget),
            "documents": None if documents is None else _plain(list(documents), "documents", budget),
            "add_generation_prompt": add_generation_prompt,
        }
        final_text = _mark_final_message(plain[-1]) if continue_final_message else None
        prompt = template.render(plain, variables)
        if final_text is not None:
            prompt = _cut_after_final_message(prompt, final_text)
        if max_characters is not None and len(prompt) > max_characters:
            raise _too_long(len(prompt), max_characters)
        return prompt

    def _select(self, name: str | None, *, with_tools: bool) -> _Template:
        templates = self._templates
        if not templates:
            raise InvalidRequestError(
                "this model has no chat template: use the completions route with a prompt, or start the server with "
                "--chat-template"
            )
        if name is None:
            name = _TOOL_TEMPLATE if with_tools and _TOOL_TEMPLATE in templates else DEFAULT_TEMPLATE
        if name not in templates:
            raise InvalidRequestError(f"there is no chat template {name!r}; there are: {', '.join(self.names)}")
        return templates[name]


def chat_template_from_config(value: str | None, templates: Mapping[str, str]) -> dict[str, str]:
    """The templates to use: those of the checkpoint, or what `--chat-template` names instead.

    `value` is a path to a jinja file, the template itself, or the name of one of `templates`.
    Raises `ConfigError` when it is none of these or the template has a syntax error.
    """
    if value is None:
        chosen = dict(templates)
    elif value in templates:
        chosen = {DEFAULT_TEMPLATE: templates[value]}
    elif "{" in value:
        chosen = {DEFAULT_TEMPLATE: value}
    elif Path(value).is_file():
        chosen = {DEFAULT_TEMPLATE: Path(value).read_text(encoding="utf-8")}
    else:
        known = f"; the checkpoint's templates are {', '.join(sorted(templates))}" if templates else ""
        raise ConfigError(f"chat_template={value!r} is no file and no jinja template{known}")
    for name, source in chosen.items():
        try:
            check_syntax(source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"chat template {name!r} has a syntax error in line {error.lineno}: {error}") from error
    return chosen


class _Template:
    def __init__(self, name: str, source: str) -> None:
        self._name = name
        self._source = source

    @cached_property
    def _compiled(self) -> jinja2.Template:
        return compile_template(self._source)

    def compile(self) -> None:
        """Compile it, and find out what form of content it reads."""
        _ = self._compiled, self._reads_strings

    def render(self, messages: list[dict[str, Any]], variables: Mapping[str, Any]) -> str:
        try:
            return self._compiled.render(messages=messages, **variables)
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            # A template works on what the client sent, so what it trips over is the client's to change.
            raise InvalidRequestError(f"the chat template refused the messages: {error}", "messages") from error

    def adapt(self, message: dict[str, Any]) -> dict[str, Any]:
        """`message` with its content in the form that this template reads: a string, or a list of parts."""
        content = message.get("content")
        if isinstance(content, list):
            _check_parts(content)
            if not self._reads_parts:
                message["content"] = "\n".join(part["text"] for part in content)
        elif isinstance(content, str):
            if not self._reads_strings:
                message["content"] = [{"type": "text", "text": content}]
        elif content is not None:
            raise InvalidRequestError("the content of a message must be a string or a list of parts", "messages")
        return message

    @cached_property
    def _reads_parts(self) -> bool:
        parts = self._probe([{"type": "text", "text": _PROBE}])
        # A template made for strings prints the list as it is written in Python, or fails.
        return parts is not None and _PROBE in parts and "'text'" not in parts and '"text"' not in parts

    @cached_property
    def _reads_strings(self) -> bool:
        return not self._reads_parts or _PROBE in (self._probe(_PROBE) or "")

    def _probe(self, content: object) -> str | None:
        variables = {"tools": None, "documents": None, "add_generation_prompt": False}
        try:
            return self.render([{"role": "user", "content": content}], variables)
        except InvalidRequestError:
            return None


class _Budget:
    """Counts the characters of a conversation down; every message and value costs at least one."""

    def __init__(self, max_characters: int | None) -> None:
        self._max = max_characters
        self._used = 0

    def spend(self, characters: int) -> None:
        self._used += characters or 1
        if self._max is not None and self._used > self._max:
            raise _too_long(self._used, self._max)


def _too_long(characters: int, max_characters: int) -> ContextLengthError:
    return ContextLengthError(
        f"the conversation has at least {characters} characters; it holds {max_characters} at most",
        "messages",
    )


def _plain_message(message: object, budget: _Budget) -> dict[str, Any]:
    plain = _plain_mapping(message, "messages", budget)
    plain = {name: value for name, value in plain.items() if value is not None}
    if not isinstance(plain.get("role"), str):
        raise InvalidRequestError("every message needs a role, which is a string", "messages")
    reasoning = next((plain[name] for name in _REASONING_FIELDS if name in plain), None)
    if reasoning is not None:
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    return plain


def _plain_mapping(value: object, param: str, budget: _Budget) -> dict[str, Any]:
    if value is None:
        return {}
    plain = _plain(value, param, budget)
    if not isinstance(plain, dict):
        raise InvalidRequestError(f"{param} must hold objects, not {type(value).__name__}", param)
    if param != "messages" and (reserved := _RESERVED_VARIABLES & plain.keys()):
        raise InvalidRequestError(f"{param} must not set {', '.join(sorted(reserved))}", param)
    return plain


def _plain(value: object, param: str, budget: _Budget, depth: int = 0) -> Any:
    """A copy out of JSON types alone: objects of other classes have methods that the sandbox does not know."""
    if depth > _MAX_DEPTH:
        raise InvalidRequestError(f"{param} is nested deeper than {_MAX_DEPTH} levels", param)
    budget.spend(len(value) if isinstance(value, str) else 1)
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):  # a subclass, such as an enumeration
        return str.__str__(value)
    if isinstance(value, Mapping):
        if not all(type(key) is str for key in value):
            raise InvalidRequestError(f"{param} has an object with a key that is no string", param)
        return {key: _plain(item, param, budget, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, param, budget, depth + 1) for item in value]
    raise InvalidRequestError(f"{param} has a value of type {type(value).__name__}, which is no JSON value", param)


def _check_parts(content: list[Any]) -> None:
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise InvalidRequestError(
                f"a content part of type {shown(kind)} is not supported: this model takes parts of type 'text' with a text",
                "messages",
            )


def _mark_final_message(message: dict[str, Any]) -> str:
    """Put the mark behind the last message's text and return that text."""
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = content + _CONTINUE_MARK
        return content
    if isinstance(content, list) and content:
        text: str = content[-1]["text"]
        content[-1]["text"] = text + _CONTINUE_MARK
        return text
    raise InvalidRequestError("continue_final_message needs a last message with content to continue", "messages")


def _cut_after_final_message(prompt: str, final_text: str) -> str:
    position = prompt.rfind(_CONTINUE_MARK.strip())
    if position < 0 or final_text.strip() not in prompt:
        raise InvalidRequestError(
            "the last message cannot be continued: the chat template does not print it as it is", "messages"
        )
    if prompt.startswith(_CONTINUE_MARK, position):
        return prompt[:position]
    return prompt[:position].rstrip()
