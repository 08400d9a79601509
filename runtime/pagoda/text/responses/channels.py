"""The parser of answers in channels: harmony, which gpt-oss writes.

    <|channel|>analysis<|message|>…<|end|>
    <|start|>assistant<|channel|>commentary to=functions.F <|constrain|>json<|message|>{…}<|call|>

The prompt ends within the first header, behind the role.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from pagoda.text.responses.arguments import read_arguments_json
from pagoda.text.responses.cursor import MalformedError, Reading, finder_of
from pagoda.text.responses.marks import NO_MARKS, Marks
from pagoda.text.responses.parser import ResponseParser
from pagoda.text.responses.syntax import Channels, ResponseFormat
from pagoda.text.responses.tools import ToolSet

# A marker may follow at once: spelled, or as the character of its token.
_RECIPIENT = re.compile("to=(?:functions\\.)?([^\\s<\ud800-\udfff]+)")


class ChannelParser(ResponseParser):
    """Reasoning, content and calls by the channel and the recipient in the header of each message."""

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
        assert format.channels is not None
        self._channels: Channels = format.channels

    def _read(self) -> Reading[None]:
        channels = self._channels
        yield from self._cursor.skip_space(self._say)
        if not (yield from self._stands((channels.channel, channels.message, channels.start, "to="))):
            # Plain text, which a model that keeps to the format does not write.
            yield from self._until((channels.start, channels.channel), self._say)
        while not self.is_complete and (yield from self._cursor.peek()):
            header: list[str] = []
            if (yield from self._cursor.until(finder_of((channels.message,)), header.append)):
                yield from self._read_message("".join(header))
            elif not any(marker in "".join(header) for marker in (channels.channel, channels.start)):
                self._say("".join(header))
        self._release_space()

    def _read_message(self, header: str) -> Reading[None]:
        """A message up to its end, or to the start of the next."""
        channels = self._channels
        before, _, channel = header.rpartition(channels.channel)
        recipient = _RECIPIENT.search(channel) or _RECIPIENT.search(before)
        self._next_part()
        if recipient is not None:
            try:
                self._begin_call(recipient[1])
            except MalformedError:  # no tool that was offered: content, as the model wrote it
                self._say(header + channels.message)
            else:
                yield from self._read_call()
                return
        self.is_reasoning = recipient is None and channel.split()[:1] in [
            [name] for name in channels.reasoning_channels
        ]
        if recipient is None:
            yield from self._cursor.skip_space()
        yield from self._until((*channels.ends, channels.start), self._think if self.is_reasoning else self._say)

    def _read_call(self) -> Reading[None]:
        ends = (*self._channels.ends, self._channels.start)
        emit = self._say
        try:
            yield from read_arguments_json(self._cursor, self._argue)
            yield from self._cursor.skip_space()
        except MalformedError:
            emit = self._argue
        yield from self._until(ends, emit)
        self._end_call()

    def _stands(self, literals: tuple[str, ...]) -> Reading[bool]:
        """Whether one of `literals` is next; it stays unread."""
        found = yield from self._cursor.match(literals)
        self._cursor.position -= len(found)
        return bool(found)

    def _until(self, literals: tuple[str, ...], emit: Callable[[str], None]) -> Reading[None]:
        """Hand on what is before one of `literals`, and read that unless a header begins with it."""
        found = yield from self._cursor.until(finder_of(literals), emit)
        if found in (self._channels.start, self._channels.channel):
            self._cursor.position -= len(found)
        if found:
            self.is_reasoning = False
