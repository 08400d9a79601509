"""Invariant 13: however an answer is cut into pieces, its message is that of the whole answer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagoda.text.responses.checkpoint import format_of, make_parser
from pagoda.text.responses.formats import CALLS
from pagoda.text.responses.marks import NO_MARKS, Marks
from pagoda.text.responses.message import AssistantMessage
from pagoda.text.responses.syntax import ResponseFormat
from pagoda.text.responses.tools import ToolSet

FORMATS = {**{name: format_of(name, "think") for name in CALLS}, "openai": format_of("openai", "openai_gptoss")}
FORMATS["gemma4"] = format_of("gemma4", "gemma4")
FORMATS["mistral"] = format_of("mistral", "mistral")
TOOLS = ToolSet(
    {
        "f": {"properties": {"a": {"type": "integer"}, "b": {"type": "string"}, "o": {"type": ["object", "null"]}}},
        "g": {},
    }
)
PIECES = (
    *('{"name": "f", "arguments": {"a": 1, "b": "x"}}', '{"arguments": {}, "name": "g"}', '{"name": "h"}', '{"a": "'),
    *(
        'f(a=1, b="x")',
        "g()",
        "f",
        "g",
        "functions.f:0",
        "functions.f",
        "function",
        "to=",
        " json",
        "analysis",
        "final",
    ),
    *(
        "commentary",
        "{a:1}",
        '{"b": "\\"}"}',
        "\n",
        " ",
        "```json",
        "```",
        ", ",
        ";",
        "[",
        "]",
        "(",
        ")",
        "{",
        "}",
        '"',
    ),
    *("\\", "a", "b", "o", "call:", "塔🙂", "None", "<", "</", "<tool", ">", "x\ny", "12", "null"),
)


def all_literals(format: ResponseFormat) -> set[str]:
    found: set[str] = set()
    format.map_literals(lambda literal: found.add(literal) or literal)  # type: ignore[func-returns-value]
    return found - {""}


def message_of(
    format: ResponseFormat, pieces: Sequence[str], marks: Marks = NO_MARKS, **options: bool
) -> AssistantMessage:
    parser = make_parser(format, TOOLS, marks, **options)
    deltas = []
    for piece in pieces:
        deltas += parser.feed(piece)
    return AssistantMessage.of([*deltas, *parser.finish()])


def cut(text: str, places: Sequence[int]) -> list[str]:
    borders = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[start:end] for start, end in pairwise(borders)]


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=40)
@given(data=st.data())
def test_pieces_make_the_message_of_the_whole(name: str, data: st.DataObject) -> None:
    format = FORMATS[name]
    literals = sorted(all_literals(format))
    piece = st.sampled_from((*literals, *literals, *PIECES)) | st.text(max_size=4)
    text = "".join(data.draw(st.lists(piece, max_size=14)))
    places = data.draw(st.lists(st.integers(0, 1000), max_size=8))
    options = {"in_reasoning": data.draw(st.booleans())}
    whole = message_of(format, [text], **options)
    assert message_of(format, cut(text, places), **options) == whole
    assert message_of(format, list(text), **options) == whole
