"""How the answers of one checkpoint are read: which format, bound to its tokenizer, and a parser for each answer."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from pagoda.errors import ConfigError
from pagoda.request import AnswerOptions
from pagoda.structured.spec import GrammarSpec
from pagoda.text.responses.channels import ChannelParser
from pagoda.text.responses.formats import CALL_NAMES, CALLS, HARMONY, HARMONY_END, REASONING, REASONING_NAMES
from pagoda.text.responses.machine import MarkupParser
from pagoda.text.responses.marks import NO_MARKS, Marks, bind
from pagoda.text.responses.message import AssistantMessage, ToolCall
from pagoda.text.responses.parser import ResponseParser
from pagoda.text.responses.structural_tags import (
    as_format,
    example,
    formats_with_tags,
    harmony_answer,
    has_structural_tags,
    required_calls,
)
from pagoda.text.responses.syntax import ResponseFormat
from pagoda.text.responses.tools import ToolSet

if TYPE_CHECKING:
    from pagoda.text.responses.checkpoint_template import ResponseTemplate
    from pagoda.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

AUTO, OFF = "auto", "off"
_TAIL_TOKENS = 32
_HARMONY_ANALYSIS = "<|channel|>analysis<|message|>"
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
        self._reasoning = REASONING.get(reasoning or "") if template is None else template.reasoning

    @property
    def can_end_reasoning(self) -> bool:
        """Whether there is a marker that ends the reasoning, so that it can be given a budget."""
        if self.reasoning_name == "openai_gptoss":
            return HARMONY_END in self._tokenizer.added_tokens
        return self._reasoning is not None

    @property
    def has_calls(self) -> bool:
        """Whether tool calls can be told from content."""
        return self._template is not None or self.call_name is not None

    @cached_property
    def grammar_name(self) -> str | None:
        """The format whose grammars hold calls, None where there is none; of a template, one whose calls it reads."""
        if self._template is None:
            return self.call_name if has_structural_tags(self.call_name) else None
        from pagoda.text.responses.checkpoint_template import TemplateParser

        tools = ToolSet({"f": {"type": "object", "properties": {}}}, parallel=False)
        for name in formats_with_tags():
            parser = TemplateParser(self._template, tools, "")
            message = AssistantMessage.of(
                [*parser.feed(example(required_calls(name, tools)["format"])), *parser.finish()]
            )
            if message.tool_calls == [ToolCall("f", arguments="{}")] and not message.content:
                return name
        return None

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
            read = TemplateParser(self._template, tools, prompt, skip_special=skip_special)
            read.drops_content = options.only_calls
            return read
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
        parser.drops_content = options.only_calls
        return parser

    def skipping_reasoning(self, prompt_token_ids: Sequence[int]) -> list[int]:
        """What the model would have to say behind the prompt, so that the next token is the content's first."""
        if self.reasoning_name == "openai_gptoss":
            return self._tokenizer.encode(_HARMONY_FINAL, add_special_tokens=False)
        if self._reasoning is None or not self._is_in_reasoning("", prompt_token_ids):
            return []
        return self._tokenizer.encode(f"\n{self._reasoning.close}\n\n", add_special_tokens=False)

    def constrained(
        self, spec: GrammarSpec | None, options: AnswerOptions, prompt_token_ids: Sequence[int]
    ) -> GrammarSpec | None:
        """`spec`, so that it begins behind the reasoning of the answer to the prompt, and that within its budget.

        None: nothing is asked of the answer, neither a form nor a budget that could be reached.
        """
        encode = self._tokenizer.encode
        if self.reasoning_name == "openai_gptoss":
            return self._constrained_in_channels(spec, options)
        reasoning, budget = self._reasoning, options.thinking_token_budget
        if reasoning is None or (spec is None and budget is None):
            return spec
        bounded = spec or replace(GrammarSpec(kind="text"), reasoning_left_by=self._trigger_ids(options))
        bounded = replace(bounded, reasoning_budget=budget)
        close = encode(reasoning.close, add_special_tokens=False)
        if self._is_in_reasoning(options.continued, prompt_token_ids):
            return bounded.after(close)
        opening = encode(reasoning.open, add_special_tokens=False)
        tail = self._tail(prompt_token_ids)
        may_open = not options.continued and not tail.endswith(reasoning.close)
        if may_open and bounded.has_grammar:
            may_open = (
                len(opening) == 1
            )  # spelled with several tokens, it could not be told from what the grammar allows
        return bounded.after(close, opened_by=opening) if may_open else spec

    def _constrained_in_channels(self, spec: GrammarSpec | None, options: AnswerOptions) -> GrammarSpec | None:
        """A grammar of calls has all channels in it, any other begins in the final one. With a budget it is of the whole
        answer in any case: nothing else keeps the model from reasoning again behind the end of its reasoning."""
        encode, budget = self._tokenizer.encode, options.thinking_token_budget
        if budget is None:
            if spec is None or options.is_constrained:
                return spec
            return spec.after(encode(_HARMONY_FINAL, add_special_tokens=False))
        if not options.is_constrained:
            tools = ToolSet(options.tools)
            tag = harmony_answer(
                tools, frozenset(tools.parameters), None if spec is None else as_format(spec), one_reasoning=True
            )
            whitespace = spec is None or spec.whitespace
            spec = replace(GrammarSpec.of_structural_tag(tag), whitespace=whitespace)
        assert spec is not None
        bounded = replace(spec, reasoning_budget=budget, reasoning_in_grammar=True)
        end, opening = (encode(text, add_special_tokens=False) for text in (HARMONY_END, _HARMONY_ANALYSIS))
        return bounded.after(end, opened_by=opening)

    def _trigger_ids(self, options: AnswerOptions) -> tuple[int, ...]:
        """Tokens that begin calls, which end the reasoning, too."""
        if not options.tools or self.call_name is None:
            return ()
        added = self._tokenizer.added_tokens
        triggers = (calls.trigger for calls in CALLS.get(self.call_name, ()))
        return tuple(dict.fromkeys(added[text] for text in triggers if text in added))

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
        reasoning = self._reasoning
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
