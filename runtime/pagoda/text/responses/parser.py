"""What all parsers of answers share: text in pieces to the deltas of an assistant's message."""

from __future__ import annotations

from abc import ABC, abstractmethod

from pagoda.text.responses.cursor import MalformedError, Reading, TextCursor
from pagoda.text.responses.marks import NO_MARKS, Marks
from pagoda.text.responses.message import CallDelta, DeltaList
from pagoda.text.responses.tools import ToolSet, make_call_id

MAX_HELD_SPACE = 256


class ResponseParser(ABC):
    """The parser of one answer; what it makes of a text does not depend on how the text is cut into pieces.

    `tools`: only their names begin a call. `skip_special`: markers in prose that are special tokens are dropped, as other
    special tokens are. `is_reasoning`: whether what comes next is reasoning, as far as is known. `is_complete`: no more is
    wanted of the model. `reads_special_tokens`: all special tokens are part of the text, spelled; else only `marks` are.
    `drops_content`: a grammar allows none, so that what looks like content is the beginning of a call that was cut off.
    """

    reads_special_tokens = False
    drops_content = False

    def __init__(self, tools: ToolSet, marks: Marks = NO_MARKS, *, skip_special: bool = True) -> None:
        self.marks = marks
        self._tools = tools
        self._skip_special = skip_special
        self._cursor = TextCursor()
        self._deltas = DeltaList()
        self._space = ""
        self._has_text = {"content": False, "reasoning": False}
        self._separates = False
        self._has_arguments = False
        self.num_calls = 0
        self.is_reasoning = False
        self.is_complete = False
        self._reading = self._read()
        self._is_over = False

    def feed(self, text: str, deltas: DeltaList | None = None) -> DeltaList:
        """The deltas that `text` settles, behind those of `deltas` where there are some to be joined with."""
        self._deltas = DeltaList() if deltas is None else deltas
        if text and not self._is_over:
            self._cursor.append(text)
            self._resume()
        return self._deltas

    def finish(self, deltas: DeltaList | None = None) -> DeltaList:
        """The rest of the message, as `feed` gives it: nothing follows."""
        self._deltas = DeltaList() if deltas is None else deltas
        self._cursor.is_final = True
        if not self._is_over:
            self._resume()
        return self._deltas

    @abstractmethod
    def _read(self) -> Reading[None]:
        """Read the answer to its end."""

    def _resume(self) -> None:
        try:
            next(self._reading)
        except StopIteration:
            self._is_over = True

    def _say(self, text: str) -> None:
        """More content. White space at its end waits until it is known what follows."""
        if self.drops_content:
            return
        settled = self._settled(text)
        if settled:
            self._deltas.add_content(self._separated("content", settled))

    def _think(self, text: str) -> None:
        """More reasoning."""
        settled = self._settled(text)
        if settled:
            self._deltas.add_reasoning(self._separated("reasoning", settled))

    def _settled(self, text: str) -> str:
        text = self._space + self.marks.spelled(text, skip_special=self._skip_special)
        end = max(len(text.rstrip()), len(text) - MAX_HELD_SPACE)
        self._space = text[end:]
        return text[:end]

    def _separated(self, kind: str, text: str) -> str:
        """`text` with a blank line before it if it begins another part of the same kind."""
        if self._separates and self._has_text[kind]:
            text = "\n\n" + text
        self._separates = False
        self._has_text[kind] = True
        return text

    def _release_space(self) -> None:
        """The message ends here, so white space that waits is what the model wrote."""
        space, self._space = self._space, ""
        if space and self.is_reasoning:
            self._deltas.add_reasoning(space)
        elif space:
            self._deltas.add_content(space)

    def _next_part(self) -> None:
        """What follows is apart from what came: white space between the two belongs to the format."""
        self._space = ""
        self._separates = True

    def _begin_call(self, name: str, call_id: str = "", id_characters: int | None = None) -> None:
        """A call of `name`; raises `MalformedError` if no tool has that name."""
        if name not in self._tools.parameters:
            raise MalformedError
        self._cursor.forget()
        self._next_part()
        self.is_reasoning = False
        self._has_arguments = False
        self._deltas.append(CallDelta(self.num_calls, call_id or make_call_id(id_characters), name))
        self.num_calls += 1

    def _argue(self, text: str) -> None:
        """More arguments of the call that began last."""
        if text:
            self._has_arguments = True
            self._deltas.add_arguments(self.num_calls - 1, self.marks.escaped(text))

    def _end_call(self) -> None:
        """The call is over: one without arguments has an empty object."""
        if not self._has_arguments:
            self._argue("{}")
        self._next_part()
        self.is_complete = not self._tools.parallel
