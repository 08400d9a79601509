"""How the answers of one checkpoint are read: which format, bound to its tokenizer, and a parser for each answer."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from pagoda.errors import ConfigError
from pagoda.request import AnswerOptions
from pagoda.structured.spec import GrammarSpec
from pagoda.text.responses.channels import ChannelParser
from pagoda.text.responses.formats import CALL_NAMES, CALLS, HARMONY, REASONING, REASONING_NAMES
from pagoda.text.responses.machine import MarkupParser
from pagoda.text.responses.marks import NO_MARKS, Marks, bind
from pagoda.text.responses.parser import ResponseParser
from pagoda.text.responses.syntax import ResponseFormat
from pagoda.text.responses.tools import ToolSet

if TYPE_CHECKING:
    from pagoda.text.responses.checkpoint_template import ResponseTemplate
    from pagoda.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

AUTO, OFF = "auto", "off"
_TAIL_TOKENS = 32
_HARMONY_FINAL = "<|channel|>final<|message|>"
_TEMPLATE_TAIL_TOKENS = 2048

# The name of a format, and what of a chat template shows it; the first that fits is taken.
_CALL_SIGNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("openai", ("<|channel|>", "<|message|>")),
    ("deepseek_v32", ("｜DSML｜",)),
    ("deepseek_v3", ("<｜tool▁calls▁begin｜>", "```json")),
    ("deepseek_v31", ("<｜tool▁calls▁begin｜>",)),
    ("kimi_k2", ("<|tool_calls_section_begin|>",)),
    ("minimax_m2", ("<minimax:tool_call>",)),
    ("glm45", ("<tool_call>", "<arg_key>")),
    ("qwen3_coder", ("<function=", "<parameter=")),
    ("gemma4", ("<|tool_call>", "call:")),
    ("functiongemma", ("<start_function_call>",)),
    ("mistral", ("[TOOL_CALLS]",)),
    ("hermes", ("<tool_call>",)),
    ("olmo3", ("<function_calls>",)),
    ("pythonic", ("<|python_start|>",)),
    ("pythonic", ("[func_name1(",)),
    ("llama3_json", ("<|python_tag|>",)),
    ("llama3_json", ("<|start_header_id|>", '"parameters":')),
)
_REASONING_SIGNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("openai_gptoss", ("<|channel|>", "<|message|>")),
    ("gemma4", ("<|channel>thought",)),
    ("mistral", ("[THINK]",)),
    ("seed_oss", ("<seed:think>",)),
    ("think", ("</think>",)),
)


class AnswerFormat:
    """The format of one checkpoint's answers. `call_name`, `reasoning_name`: what it was taken for, None where it has none."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        calls: str | None = None,
        reasoning: str | None = None,
        template: ResponseTemplate | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self.call_name, self.reasoning_name = calls, reasoning
        self._template = template

    @property
    def has_calls(self) -> bool:
        """Whether tool calls can be told from content."""
        return self._template is not None or self.call_name is not None

    @property
    def description(self) -> str:
        """The format for the log."""
        if self._template is not None:
            return "by the checkpoint's response_template"
        return f"tool calls {self.call_name or 'unknown'}, reasoning {self.reasoning_name or 'none'}"

    def parser(
        self, options: AnswerOptions, prompt_token_ids: Sequence[int], *, skip_special: bool
    ) -> ResponseParser | None:
        """A parser for one answer to the prompt; None where there is nothing to tell apart."""
        tools = ToolSet(options.tools, options.parallel_tool_calls)
        if self._template is not None:
            from pagoda.text.responses.checkpoint_template import TemplateParser

            prompt = self._tokenizer.decode(prompt_token_ids[-_TEMPLATE_TAIL_TOKENS:], skip_special_tokens=False)
            return TemplateParser(self._template, tools, prompt, skip_special=skip_special)
        wants_calls = bool(options.tools) and self.call_name is not None
        wants_reasoning = self.reasoning_name is not None
        if not wants_calls and not wants_reasoning:
            return None
        format, marks = self._bound[wants_calls, wants_reasoning]
        if options.is_constrained:
            format, marks = format_of(self.call_name, self.reasoning_name if wants_reasoning else None), NO_MARKS
        parser = make_parser(
            format,
            tools,
            marks,
            in_reasoning=wants_reasoning and self._is_in_reasoning(options.continued, prompt_token_ids),
            skip_special=skip_special,
        )
        parser.reads_special_tokens = options.is_constrained
        return parser

    def constrained(self, spec: GrammarSpec, options: AnswerOptions, prompt_token_ids: Sequence[int]) -> GrammarSpec:
        """`spec`, so that it begins behind the reasoning of the answer to the prompt, if there is any."""
        if self._template is not None:
            return spec
        encode = self._tokenizer.encode
        if self.reasoning_name == "openai_gptoss":
            return spec.after(encode(_HARMONY_FINAL, add_special_tokens=False))
        reasoning = REASONING.get(self.reasoning_name or "")
        if reasoning is None:
            return spec
        close = encode(reasoning.close, add_special_tokens=False)
        if self._is_in_reasoning(options.continued, prompt_token_ids):
            return spec.after(close)
        opening = encode(reasoning.open, add_special_tokens=False)
        tail = self._tail(prompt_token_ids)
        may_open = len(opening) == 1 and not options.continued and not tail.endswith(reasoning.close)
        return spec.after(close, opened_by=opening[0]) if may_open else spec

    @cached_property
    def _bound(self) -> dict[tuple[bool, bool], tuple[ResponseFormat, Marks]]:
        return {
            (calls, reasoning): bind(
                format_of(self.call_name if calls else None, self.reasoning_name if reasoning else None),
                self._tokenizer,
            )
            for calls in (False, True)
            for reasoning in (False, True)
        }

    def _tail(self, prompt_token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(prompt_token_ids[-_TAIL_TOKENS:], skip_special_tokens=False).rstrip()

    def _is_in_reasoning(self, continued: str, prompt_token_ids: Sequence[int]) -> bool:
        """Whether the prompt ends within the model's reasoning."""
        reasoning = REASONING.get(self.reasoning_name or "")
        if reasoning is None:
            return False
        if continued:
            return continued.rfind(reasoning.open) > continued.rfind(reasoning.close)
        tail = self._tail(prompt_token_ids)
        if tail.endswith(reasoning.open):
            return True
        return reasoning.implicit and not tail.endswith(reasoning.close)


def make_parser(
    format: ResponseFormat,
    tools: ToolSet,
    marks: Marks = NO_MARKS,
    *,
    in_reasoning: bool = False,
    skip_special: bool = True,
) -> ResponseParser:
    """The parser for a built-in format."""
    kind = MarkupParser if format.channels is None else ChannelParser
    return kind(format, tools, marks, in_reasoning=in_reasoning, skip_special=skip_special)


def format_of(calls: str | None, reasoning: str | None) -> ResponseFormat:
    """The built-in format with calls and reasoning of these names."""
    if "openai" in (calls, reasoning) or reasoning == "openai_gptoss":
        return ResponseFormat(channels=HARMONY)
    return ResponseFormat(reasoning=REASONING.get(reasoning or ""), calls=CALLS[calls] if calls else ())


def answer_format(
    tokenizer: Tokenizer,
    templates: Iterable[str],
    *,
    tool_call_parser: str = AUTO,
    reasoning_parser: str = AUTO,
) -> AnswerFormat:
    """The format of a checkpoint's answers: as configured, else by its response_template, else by its chat templates.

    Raises `ConfigError` for a name that is not known.
    """
    source = "\n".join(templates)
    is_automatic = tool_call_parser == reasoning_parser == AUTO
    if is_automatic and tokenizer.response_template is not None:
        from pagoda.text.responses.checkpoint_template import read_response_template

        template = read_response_template(tokenizer.response_template, "tokenizer_config.json")
        return AnswerFormat(tokenizer, template=template)
    return AnswerFormat(
        tokenizer,
        calls=_chosen("tool_call_parser", tool_call_parser, CALL_NAMES, _CALL_SIGNS, source),
        reasoning=_chosen("reasoning_parser", reasoning_parser, REASONING_NAMES, _REASONING_SIGNS, source),
    )


def _chosen(
    option: str, value: str, names: dict[str, str], signs: tuple[tuple[str, tuple[str, ...]], ...], source: str
) -> str | None:
    if value == OFF:
        return None
    if value == AUTO:
        return next((name for name, texts in signs if all(text in source for text in texts)), None)
    if value not in names:
        raise ConfigError(f"{option}={value!r} is not known; known are {AUTO}, {OFF}, {', '.join(sorted(names))}")
    return names[value]
