"""The formats of the model families, by the names under which vLLM knows their parsers.

Sources: the families' chat templates and model cards, and for gpt-oss OpenAI's description of the harmony format.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from pagoda.text.responses.syntax import (
    Calls,
    Channels,
    LooseJson,
    NamedJson,
    Parameters,
    PythonKeywords,
    Reasoning,
)

_HERMES = Calls(trigger="<tool_call>", arguments=NamedJson(), close="</tool_call>")
_QWEN3_CODER = Calls(
    trigger="<tool_call>",
    before=("<function=",),
    until=(">",),
    arguments=Parameters(open="<parameter=", key_end=">", close="</parameter>", trims_newline=True),
    postamble=("</function>",),
    close="</tool_call>",
)
# The models leave out the outer markup at times.
_QWEN3_CODER_BARE = Calls(
    trigger="<function=",
    until=(">",),
    arguments=Parameters(open="<parameter=", key_end=">", close="</parameter>", trims_newline=True),
    postamble=("</function>",),
)
_LLAMA3_JSON = Calls(arguments=NamedJson(("parameters", "arguments"), strict=True), separator=";")
_PYTHONIC = Calls(start="[", until=("(",), arguments=PythonKeywords(), separator=",", end="]")
_MISTRAL = Calls(trigger="[TOOL_CALLS]", until=("[ARGS]",), before_next=("{",), id_mark="[CALL_ID]", id_characters=9)
_MISTRAL_LIST = Calls(trigger="[TOOL_CALLS]", start="[", arguments=NamedJson(), separator=",", end="]", id_characters=9)
_DEEPSEEK_V31 = Calls(
    trigger="<｜tool▁calls▁begin｜>",
    open="<｜tool▁call▁begin｜>",
    until=("<｜tool▁sep｜>",),
    close="<｜tool▁call▁end｜>",
    end="<｜tool▁calls▁end｜>",
)
_DEEPSEEK_V3 = replace(
    _DEEPSEEK_V31, before=("function", "<｜tool▁sep｜>"), until=("\n",), preamble=("```json",), postamble=("```",)
)


def _dsml(section: str) -> Calls:
    return Calls(
        trigger=f"<｜DSML｜{section}>",
        open='<｜DSML｜invoke name="',
        until=('">',),
        arguments=Parameters(
            open='<｜DSML｜parameter name="',
            key_end='"',
            typed=(' string="true">', ' string="false">'),
            value_open="",
            close="</｜DSML｜parameter>",
        ),
        close="</｜DSML｜invoke>",
        end=f"</｜DSML｜{section}>",
    )


def _gemma(trigger: str, quote: str, close: str) -> Calls:
    return Calls(trigger=trigger, before=("call:",), before_next=("{",), arguments=LooseJson(quote), close=close)


CALLS: Mapping[str, tuple[Calls, ...]] = {
    "hermes": (_HERMES,),
    "qwen3_coder": (_QWEN3_CODER, _QWEN3_CODER_BARE),
    "llama3_json": (
        Calls(trigger="<|python_tag|>", arguments=NamedJson(("parameters", "arguments")), separator=";"),
        _LLAMA3_JSON,
    ),
    "pythonic": (
        _PYTHONIC,
        Calls(
            trigger="<|python_start|>",
            start="[",
            until=("(",),
            arguments=PythonKeywords(),
            separator=",",
            end="]<|python_end|>",
        ),
    ),
    "olmo3": (Calls(trigger="<function_calls>", until=("(",), arguments=PythonKeywords(), end="</function_calls>"),),
    "mistral": (_MISTRAL_LIST, _MISTRAL),
    "deepseek_v3": (_DEEPSEEK_V3,),
    "deepseek_v31": (_DEEPSEEK_V31,),
    "deepseek_v32": (_dsml("function_calls"), _dsml("tool_calls")),
    "glm45": (
        Calls(
            trigger="<tool_call>",
            before_next=("\n", "<arg_key>", "</tool_call>"),
            arguments=Parameters(
                open="<arg_key>", key_end="</arg_key>", value_open="<arg_value>", close="</arg_value>"
            ),
            close="</tool_call>",
        ),
    ),
    "kimi_k2": (
        Calls(
            trigger="<|tool_calls_section_begin|>",
            open="<|tool_call_begin|>",
            until=("<|tool_call_argument_begin|>",),
            name_pattern=r"(?P<id>(?:functions\.)?(?P<name>[^:]+):\d+)",
            close="<|tool_call_end|>",
            end="<|tool_calls_section_end|>",
        ),
    ),
    "minimax_m2": (
        Calls(
            trigger="<minimax:tool_call>",
            open='<invoke name="',
            until=('">',),
            arguments=Parameters(open='<parameter name="', key_end='">', close="</parameter>"),
            close="</invoke>",
            end="</minimax:tool_call>",
        ),
    ),
    "gemma4": (_gemma("<|tool_call>", '<|"|>', "<tool_call|>"),),
    "functiongemma": (_gemma("<start_function_call>", "<escape>", "<end_function_call>"),),
}

_THINK = Reasoning("<think>", "</think>")
REASONING: Mapping[str, Reasoning] = {
    "think": _THINK,
    "deepseek_r1": Reasoning("<think>", "</think>", implicit=True),
    "mistral": Reasoning("[THINK]", "[/THINK]"),
    "gemma4": Reasoning("<|channel>thought", "<channel|>"),
    "seed_oss": Reasoning("<seed:think>", "</seed:think>"),
}

HARMONY_END = "<|end|>"
HARMONY = Channels(
    start="<|start|>",
    channel="<|channel|>",
    message="<|message|>",
    constrain="<|constrain|>",
    ends=(HARMONY_END, "<|call|>", "<|return|>"),
    reasoning_channels=("analysis",),
)

# Other names of the formats: vLLM's for further families, and SGLang's.
CALL_NAMES: dict[str, str] = {
    **{name: name for name in CALLS},
    "openai": "openai",
    "gpt-oss": "openai",
    "qwen25": "hermes",
    "qwen": "hermes",
    "qwen3_xml": "qwen3_coder",
    "llama3": "llama3_json",
    "llama4_json": "llama3_json",
    "llama4_pythonic": "pythonic",
    "deepseekv3": "deepseek_v3",
    "deepseekv31": "deepseek_v31",
    "deepseekv32": "deepseek_v32",
    "deepseek_v4": "deepseek_v32",
    "glm": "glm45",
    "glm47": "glm45",
    "minimax": "minimax_m2",
    "minimax-m2": "minimax_m2",
}
REASONING_NAMES: dict[str, str] = {
    **{name: name for name in REASONING},
    "qwen3": "think",
    "deepseek-r1": "deepseek_r1",
    "deepseek_v3": "think",
    "deepseek-v3": "think",
    "glm45": "think",
    "kimi_k2": "think",
    "minimax_m2": "think",
    "olmo3": "think",
    "openai_gptoss": "openai_gptoss",
    "gpt-oss": "openai_gptoss",
}
