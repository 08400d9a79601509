"""The parser of answers with markers around reasoning and calls, driven by a `ResponseFormat`.

    content ──reasoning.open (at the beginning of a part)──▶ reasoning ──reasoning.close──▶ content
       │                                                          │
       └───trigger and the name of a tool that was offered────────┴──▶ call ──close, end──▶ content

A trigger begins a call only when the name of a tool that the request offers follows as the format wants it. Until then the
text is held, and if something else follows it is what it was before: content, or reasoning. From the name on it is a call:
arguments are handed on as they come, and what does not fit the format ends up in the arguments while they are not complete,
and in the content afterwards. So no text is lost, whatever the model writes.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from pagoda.text.responses.arguments import (
    read_arguments_json,
    read_json,
    read_loose_json,
    read_parameters,
    read_python_keywords,
    read_string,
)
from pagoda.text.responses.cursor import MalformedError, Reading, finder_of
from pagoda.text.responses.marks import NO_MARKS, Marks
from pagoda.text.responses.parser import ResponseParser
from pagoda.text.responses.syntax import Calls, LooseJson, NamedJson, Parameters, PythonKeywords, ResponseFormat
from pagoda.text.responses.tools import ToolSet

MAX_NAME_CHARACTERS = 256
_KEYS_OF_CALLS = frozenset({"name", "type", "id"})


class MarkupParser(ResponseParser):
    """`in_reasoning`: the prompt has opened the reasoning, or the model always begins with it.

    `reasons`, `calls`: what of the format is looked for.
    """

    def __init__(
        self,
        format: ResponseFormat,
        tools: ToolSet,
        marks: Marks = NO_MARKS,
        *,
        in_reasoning: bool = False,
        skip_special: bool = True,
    ) -> None:
        super().__init__(tools, marks, skip_special=skip_special)
        self.is_reasoning = in_reasoning and format.reasoning is not None
        self._reasoning = format.reasoning
        self._calls = format.calls if tools.parameters else ()
        triggers = tuple(dict.fromkeys(calls.trigger for calls in self._calls if calls.trigger))
        endings = tuple(text for calls in self._calls for text in (calls.close, calls.end) if not text.isalnum())
        self._content_ends = finder_of(triggers)
        self._content_ends_after_malformed = finder_of((*triggers, *endings))
        self._reasoning_ends = finder_of((*triggers, *([format.reasoning.close] if format.reasoning else ())))
        self._endings = frozenset(endings)
        self._was_malformed = False

    def _read(self) -> Reading[None]:
        if self.is_reasoning:
            yield from self._read_reasoning(is_open=True)
        while not self.is_complete:
            if not (yield from self._read_opening()) and not (yield from self._read_content()):
                break
        self._release_space()

    def _read_opening(self) -> Reading[bool]:
        """What only the beginning of a part may be: reasoning, or calls that no marker announces. False if it is neither."""
        yield from self._cursor.skip_space(self._say)
        if self._reasoning is not None and (yield from self._cursor.match((self._reasoning.open,))):
            yield from self._read_reasoning(is_open=False)
            return True
        return (yield from self._read_calls(""))

    def _read_content(self) -> Reading[bool]:
        """Content up to calls, which are read too; False when the answer ends before."""
        while True:
            ends = self._content_ends_after_malformed if self._was_malformed else self._content_ends
            found = yield from self._cursor.until(ends, self._say)
            if not found:
                return False
            if found in self._endings:  # of a call that was read as far as it could be understood
                self._was_malformed = False
            elif (yield from self._read_calls(found)):
                return True
            else:
                self._say(found)

    def _read_reasoning(self, *, is_open: bool) -> Reading[None]:
        """Reasoning up to its end, or to calls, which are read too. `is_open`: the prompt has the marker."""
        assert self._reasoning is not None
        self._next_part()
        self.is_reasoning = True
        yield from self._cursor.skip_space()
        if is_open and (yield from self._cursor.match((self._reasoning.open,))):
            yield from self._cursor.skip_space()
        while True:
            found = yield from self._cursor.until(self._reasoning_ends, self._think)
            if not found:
                return
            if found == self._reasoning.close:
                break
            if (yield from self._read_calls(found)):
                return
            self._think(found)
        self._next_part()
        self.is_reasoning = False
        yield from self._cursor.skip_space()

    def _read_calls(self, trigger: str) -> Reading[bool]:
        """Calls behind `trigger`, if there are any; else nothing is read."""
        start = self._cursor.position
        for calls in self._calls:
            if calls.trigger != trigger:
                continue
            self._cursor.keep(start)
            try:
                yield from self._cursor.expect(calls.start)
                yield from self._read_section(calls)
            except MalformedError:
                self._cursor.position = start
                self._cursor.forget()
            else:
                return True
        return False

    def _read_section(self, calls: Calls) -> Reading[None]:
        """One call and those that follow it; raises `MalformedError` where the first is none."""
        is_last = not (yield from self._read_call(calls))
        while not is_last and not self.is_complete and (calls.separator or calls.open or calls.end):
            yield from self._cursor.skip_space()
            if calls.end and (yield from self._cursor.match((calls.end,))):
                break
            start = self._cursor.position
            self._cursor.keep(start)
            try:
                yield from self._cursor.expect(calls.separator)
                is_last = not (yield from self._read_call(calls))
            except MalformedError:
                self._cursor.position = start
                self._cursor.forget()
                self._was_malformed = True
                break
        if not self.is_complete:
            yield from self._cursor.skip_space()

    def _read_call(self, calls: Calls) -> Reading[bool]:
        """One call; False if it ends in what the format does not have. Raises `MalformedError` before its name is known."""
        number = self.num_calls
        self._is_argued = False
        try:
            yield from self._cursor.expect(calls.open)
            for literal in calls.before:
                yield from self._cursor.expect(literal)
            if isinstance(calls.arguments, NamedJson):
                yield from self._read_named_json(calls, calls.arguments)
            else:
                name = yield from self._read_name(calls)
                for literal in calls.preamble:
                    yield from self._cursor.expect(literal)
                yield from self._read_arguments(calls, name)
            self._is_argued = True
            for literal in (*calls.postamble, calls.close):
                yield from self._cursor.expect(literal)
            is_well_formed = True
        except MalformedError:
            if self.num_calls == number:
                raise
            is_well_formed = False
            self._was_malformed = True
            if not self._is_argued:
                ends = tuple(literal for literal in (calls.close or calls.end, calls.trigger) if literal)
                found = yield from self._cursor.until(finder_of(ends), self._argue, drops_beginning=True)
                if found == calls.trigger:
                    self._cursor.position -= len(found)
        self._end_call()
        return is_well_formed

    def _read_name(self, calls: Calls) -> Reading[str]:
        """The name, and the id where one is beside it: the call begins."""
        ends = finder_of((*calls.until, *calls.before_next, *([calls.id_mark] if calls.id_mark else ())))
        written, found = yield from self._collect(ends)
        if found in calls.before_next:
            self._cursor.position -= len(found)
        call_id = ""
        if calls.id_mark and found == calls.id_mark:
            call_id, found = yield from self._collect(finder_of(calls.until))
        name = self.marks.spelled(written).strip()
        if calls.name_pattern:
            match = re.fullmatch(calls.name_pattern, name)
            if match is None:
                raise MalformedError
            name, call_id = match["name"], match.groupdict().get("id") or call_id
        self._begin_call(name, call_id.strip(), calls.id_characters)
        return name

    def _collect(self, ends: object) -> Reading[tuple[str, str]]:
        pieces: list[str] = []

        def add(piece: str) -> None:
            pieces.append(piece)
            if sum(map(len, pieces)) > MAX_NAME_CHARACTERS:
                raise MalformedError

        found = yield from self._cursor.until(ends, add)  # type: ignore[arg-type]
        if not found:
            raise MalformedError
        return "".join(pieces), found

    def _read_arguments(self, calls: Calls, name: str) -> Reading[None]:
        cursor = self._cursor
        match calls.arguments:
            case Parameters() as syntax:
                closing = next((text for text in (*calls.postamble, calls.close, calls.end) if text), "")
                properties = self._tools.properties(name)
                yield from read_parameters(cursor, self._argue, syntax, properties, (closing,) if closing else ())
            case PythonKeywords():
                yield from read_python_keywords(cursor, self._argue)
            case LooseJson() as syntax:
                yield from read_loose_json(cursor, self._argue, syntax)
            case _:
                yield from read_arguments_json(cursor, self._argue)

    def _read_named_json(self, calls: Calls, syntax: NamedJson) -> Reading[None]:
        """An object with name and arguments, in whatever order; arguments that come first wait for the name."""
        cursor, number = self._cursor, self.num_calls
        waiting: list[str] = []
        call_id, is_first = "", True
        yield from cursor.expect("{")
        while True:
            yield from cursor.skip_space()
            if (yield from cursor.match(("}",))):
                break
            if not is_first:
                yield from cursor.expect(",")
                yield from cursor.skip_space()
            key = yield from read_string(cursor)
            if syntax.strict and is_first and key not in _KEYS_OF_CALLS and key not in syntax.keys:
                raise MalformedError
            is_first = False
            yield from cursor.expect(":")
            yield from cursor.skip_space()
            has_begun = self.num_calls > number
            if key == "name" and not has_begun:
                name = yield from read_string(cursor)
                self._begin_call(self.marks.spelled(name), call_id, calls.id_characters)
                self._argue("".join(waiting))
                self._is_argued = bool(waiting)
            elif key in syntax.keys and not self._is_argued and not waiting:
                sink: Callable[[str], None] = self._argue if has_begun else waiting.append
                yield from read_arguments_json(cursor, sink)
                self._is_argued = has_begun
            elif key == "id" and (yield from cursor.peek()) == '"':
                call_id = yield from read_string(cursor)
            else:
                yield from read_json(cursor, lambda _: None)
        if self.num_calls == number:
            raise MalformedError
