"""Readers of the arguments of a tool call, one for each syntax; all write JSON.

They hand on what they read as it comes. What is not the syntax raises `MalformedError` with the cursor at the character that
cannot be.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from pagoda.text.responses.cursor import MalformedError, Reading, TextCursor, finder_of
from pagoda.text.responses.schema_types import coerce, is_verbatim, schema_types
from pagoda.text.responses.syntax import LooseJson, Parameters

Emit = Callable[[str], None]

# Outside of strings: all but brackets, quotes and what no JSON has.
_PLAIN = re.compile(r"[\s:,0-9A-Za-z+\-.]*")
_SCALAR = re.compile(r"[0-9A-Za-z+\-.]*")
_IN_STRING = re.compile(r'["\\\x00-\x1f]')
_KEY = re.compile(r"[^\s:{}\[\],]*")
_PYTHON_CONSTANTS = {"true": True, "false": False, "null": None}
MAX_DEPTH = 128
MAX_SPACE = 256  # between one argument's markup and the next


def read_json(cursor: TextCursor, emit: Emit) -> Reading[None]:
    """One JSON value as it is written, but control characters in strings, which no JSON has, as escapes."""
    yield from cursor.skip_space()
    first = yield from cursor.peek()
    if first and first not in '{["':
        yield from _read_scalar(cursor, emit)
        return
    depth, in_string, escaped = 0, False, False
    while True:
        text, start = cursor.text, cursor.position
        end, position = len(text), start
        while position < end:
            if escaped:
                escaped, position = False, position + 1
                continue
            if not in_string:
                position = _PLAIN.match(text, position).end()  # type: ignore[union-attr]
                if position == end:
                    break
                character = text[position]
                if character == '"':
                    in_string = True
                elif character in "{[":
                    depth += 1
                elif character in "}]":
                    depth -= 1
                else:
                    _hand_on(cursor, emit, position)
                    raise MalformedError
                position += 1
            else:
                match = _IN_STRING.search(text, position)
                if match is None:
                    position = end
                    break
                position = match.end()
                character = match.group()
                if character == "\\":
                    escaped = True
                    continue
                if character != '"':
                    _hand_on(cursor, emit, position - 1)
                    cursor.position = position
                    emit(_escaped(character))
                    continue
                in_string = False
            if not in_string and depth <= 0:
                _hand_on(cursor, emit, position)
                return
        _hand_on(cursor, emit, position)
        if not (yield from cursor.more()):
            raise MalformedError


def read_arguments_json(cursor: TextCursor, emit: Emit) -> Reading[None]:
    """Arguments as JSON: an object as it is; text that holds one is unpacked, and null means none."""
    yield from cursor.skip_space()
    first = yield from cursor.peek()
    if first == "{" or not first:
        yield from read_json(cursor, emit)
        return
    pieces: list[str] = []
    try:
        yield from read_json(cursor, pieces.append)
    except MalformedError:
        emit("".join(pieces))
        raise
    written = "".join(pieces)
    if written == "null":
        return
    unpacked = _loads(written) if first == '"' else None
    emit(unpacked if isinstance(unpacked, str) and isinstance(_loads(unpacked), dict) else written)


def read_string(cursor: TextCursor) -> Reading[str]:
    """A JSON string; what it says."""
    if (yield from cursor.peek()) != '"':
        raise MalformedError
    pieces: list[str] = []
    yield from read_json(cursor, pieces.append)
    value = _loads("".join(pieces))
    if not isinstance(value, str):
        raise MalformedError
    return value


def read_parameters(
    cursor: TextCursor, emit: Emit, syntax: Parameters, properties: Mapping[str, Any], closing: tuple[str, ...]
) -> Reading[None]:
    """Arguments in markup, as an object. `properties`: their schemas. `closing`: what may follow the last one."""
    key_end, ends = finder_of((syntax.key_end,)), finder_of((syntax.close,))
    count = 0
    while True:
        yield from cursor.skip_space()
        if not (yield from cursor.match((syntax.open,))):
            cursor.drop_beginning_of((syntax.open, *closing))
            break
        key_pieces: list[str] = []
        if not (yield from cursor.until(key_end, key_pieces.append)):
            raise MalformedError
        key = "".join(key_pieces).strip()
        types = schema_types(properties.get(key))
        verbatim = is_verbatim(types)
        if syntax.typed:
            typed = yield from cursor.match(syntax.typed)
            if not typed:
                cursor.drop_beginning_of(syntax.typed)
            verbatim = typed == syntax.typed[0] if typed else verbatim
            types = () if typed == syntax.typed[1] else types
        yield from cursor.expect(syntax.value_open)
        emit(f"{', ' if count else '{'}{json.dumps(key, ensure_ascii=False)}: ")
        count += 1
        value = _Value(emit, verbatim, types, trims_newline=syntax.trims_newline)
        while True:
            if not (yield from cursor.until(ends, value.add, drops_beginning=True)):
                value.cut_off()
                raise MalformedError
            # The closing markup in a value, as of code about such markup, is not followed by what must follow.
            space = yield from _space_before(cursor, (syntax.open, *closing))
            if space is None:
                break
            value.add(syntax.close + space)
        value.finish()
    emit("}" if count else "{}")


def _space_before(cursor: TextCursor, following: tuple[str, ...]) -> Reading[str | None]:
    """None if, after white space, one of `following` or the end is next, and nothing is read; else the white space, read."""
    while True:
        rest = cursor.text[cursor.position :]
        bare = rest.lstrip()
        if any(bare.startswith(literal) for literal in following):
            return None
        if len(rest) - len(bare) > MAX_SPACE or (bare and not any(literal.startswith(bare) for literal in following)):
            space = rest[: len(rest) - len(bare)]
            cursor.position += len(space)
            return space
        if not (yield from cursor.more()):
            return None


class _Value:
    """Writes one value in markup as JSON: a string piece by piece, anything else when all of it is there."""

    def __init__(self, emit: Emit, verbatim: bool, types: tuple[str, ...], *, trims_newline: bool) -> None:
        self._emit = emit
        self._verbatim = verbatim
        self._types = types
        self._trims_newline = trims_newline
        self._pieces: list[str] = []
        self._is_new = True
        self._held = ""
        if verbatim:
            emit('"')

    def add(self, text: str) -> None:
        if self._is_new and text:
            self._is_new = False
            if self._trims_newline:
                text = text.removeprefix("\n")
        if self._trims_newline:
            text = self._held + text
            self._held = "\n" if text.endswith("\n") else ""
            text = text.removesuffix("\n")
        if not text:
            return
        if self._verbatim:
            self._emit(_escaped(text))
        else:
            self._pieces.append(text)

    def cut_off(self) -> None:
        """The answer ended within the value: what there is of it, and no more."""
        if not self._verbatim:
            self._emit("".join(self._pieces).strip())

    def finish(self) -> None:
        if self._verbatim:
            self._emit('"')
        else:
            self._emit(json.dumps(coerce("".join(self._pieces), self._types), ensure_ascii=False))


def read_python_keywords(cursor: TextCursor, emit: Emit) -> Reading[None]:
    """Keyword arguments and the closing parenthesis, as an object."""
    count = 0
    while True:
        yield from cursor.skip_space()
        if (yield from cursor.match((")",))):
            break
        if count:
            yield from cursor.expect(",")
            yield from cursor.skip_space()
            if (yield from cursor.match((")",))):
                break
        key = yield from _python_source(cursor, "=")
        cursor.position += 1
        if not key.strip().isidentifier():
            cursor.position -= 1
            raise MalformedError
        yield from cursor.skip_space()
        source = yield from _python_source(cursor, ",)")
        emit(f"{', ' if count else '{'}{json.dumps(key.strip(), ensure_ascii=False)}: {python_to_json(source.strip())}")
        count += 1
    emit("}" if count else "{}")


_PYTHON_STOP = re.compile(r"""['"()\[\]{},=\\\n]""")


def _python_source(cursor: TextCursor, ends: str) -> Reading[str]:
    """Source up to one of `ends` outside of strings and brackets, which stays unread."""
    pieces: list[str] = []
    quote, depth, escaped = "", 0, False
    while True:
        text, start = cursor.text, cursor.position
        position, end = start, len(text)
        while position < end:
            if escaped:
                escaped, position = False, position + 1
                continue
            match = _PYTHON_STOP.search(text, position)
            if match is None:
                position = end
                break
            position, character = match.start(), match.group()
            if quote:
                escaped = character == "\\"
                quote = "" if character == quote else quote
            elif character in "'\"":
                quote = character
            elif depth == 0 and character in ends:
                pieces.append(text[start:position])
                cursor.position = position
                return "".join(pieces)
            elif character in "([{":
                depth += 1
            elif character in ")]}":
                depth -= 1
                if depth < 0:
                    cursor.position = position
                    raise MalformedError
            position += 1
        pieces.append(text[start:position])
        cursor.position = position
        if not (yield from cursor.more()):
            raise MalformedError


def python_to_json(source: str) -> str:
    """A Python literal as JSON; what is none (a name, a call) as the string that it is.

    What is JSON is read as JSON: a grammar holds values to that, whose escapes are not all Python's.
    """
    if source in _PYTHON_CONSTANTS:
        return source
    try:
        json.loads(source, parse_constant=_no_json)
    except (ValueError, RecursionError):
        pass
    else:
        return source
    try:
        if len(source) > 1 << 20 or max(map(source.count, "([{")) > 10_000:
            raise ValueError
        value = _plain_literal(ast.parse(source, mode="eval").body)
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return json.dumps(source, ensure_ascii=False)


def _plain_literal(node: ast.expr) -> Any:
    """`ast.literal_eval` for what JSON has, with JSON's own constants too."""
    match node:
        case ast.Constant(value=str() | int() | float() | bool() | None):
            return node.value
        case ast.Name(id=name) if name in _PYTHON_CONSTANTS:
            return _PYTHON_CONSTANTS[name]
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -number
        case ast.List(elts=items) | ast.Tuple(elts=items) | ast.Set(elts=items):
            return [_plain_literal(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            return {
                str(_plain_literal(key)): _plain_literal(value)
                for key, value in zip(keys, values, strict=True)
                if key is not None
            }
    raise ValueError


def read_loose_json(cursor: TextCursor, emit: Emit, syntax: LooseJson) -> Reading[None]:
    """An object with bare keys and strings between marks, as JSON."""
    yield from cursor.skip_space()
    if (yield from cursor.peek()) != "{":
        raise MalformedError
    quote = finder_of((syntax.quote,))
    brackets: list[str] = []
    while True:
        yield from cursor.skip_space()
        character = yield from cursor.peek()
        if not character:
            raise MalformedError
        if character in "{[":
            brackets.append(character)
            if len(brackets) > MAX_DEPTH:
                raise MalformedError
            cursor.position += 1
            emit(character)
        elif character in "}]":
            if brackets.pop() + character not in ("{}", "[]"):
                raise MalformedError
            cursor.position += 1
            emit(character)
            if not brackets:
                return
        elif character in ",:":
            cursor.position += 1
            emit(character + " ")
        elif (yield from cursor.match((syntax.quote,))):
            emit('"')
            if not (yield from cursor.until(quote, lambda text: emit(_escaped(text)), drops_beginning=True)):
                raise MalformedError
            emit('"')
        elif character == '"':
            yield from read_json(cursor, emit)
        else:
            cursor.drop_beginning_of((syntax.quote,))
            yield from _read_bare(cursor, emit)


def _read_bare(cursor: TextCursor, emit: Emit) -> Reading[None]:
    """A key or a scalar without quotes."""
    pieces: list[str] = []
    while True:
        match = _KEY.match(cursor.text, cursor.position)
        assert match is not None
        pieces.append(match.group())
        cursor.position = match.end()
        if not cursor.at_end or not (yield from cursor.more()):
            break
    written = "".join(pieces)
    if not written:
        raise MalformedError
    is_key = (yield from cursor.peek()) == ":"
    value = _loads(written)
    is_scalar = not is_key and (value is not None or written == "null")
    emit(written if is_scalar else json.dumps(written, ensure_ascii=False))


def _read_scalar(cursor: TextCursor, emit: Emit) -> Reading[None]:
    pieces: list[str] = []
    while True:
        match = _SCALAR.match(cursor.text, cursor.position)
        assert match is not None
        pieces.append(match.group())
        cursor.position = match.end()
        if not cursor.at_end or not (yield from cursor.more()):
            break
    if not any(pieces):
        raise MalformedError
    emit("".join(pieces))


def _hand_on(cursor: TextCursor, emit: Emit, position: int) -> None:
    """Hand on what is before `position`, and read it."""
    if position > cursor.position:
        emit(cursor.text[cursor.position : position])
    cursor.position = position


def _escaped(text: str) -> str:
    """`text` as it stands within a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _no_json(name: str) -> None:
    raise ValueError(name)


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
