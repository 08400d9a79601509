"""An assistant's message and the pieces in which it comes. Imports nothing but the standard library."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeAlias


@dataclass(slots=True)
class ContentDelta:
    """More of what is said to the user."""

    text: str


@dataclass(slots=True)
class ReasoningDelta:
    """More of what the model wrote for itself."""

    text: str


@dataclass(slots=True)
class CallDelta:
    """A tool call begins: calls are numbered from 0, and one ends where the next begins or the message does."""

    index: int
    id: str
    name: str


@dataclass(slots=True)
class ArgumentsDelta:
    """More of the JSON text of the arguments of call `index`, the one that began last."""

    index: int
    text: str


MessageDelta: TypeAlias = ContentDelta | ReasoningDelta | CallDelta | ArgumentsDelta


@dataclass(slots=True)
class ToolCall:
    """A call of a tool. `arguments` is the JSON text that the model wrote: valid if the model's was."""

    name: str
    id: str = field(default="", compare=False)
    arguments: str = ""


@dataclass(slots=True)
class AssistantMessage:
    """Deltas joined."""

    content: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)

    @classmethod
    def of(cls, deltas: Iterable[MessageDelta]) -> AssistantMessage:
        """The message that `deltas` make."""
        content: list[str] = []
        reasoning: list[str] = []
        calls: list[tuple[CallDelta, list[str]]] = []
        for delta in deltas:
            match delta:
                case ContentDelta(text):
                    content.append(text)
                case ReasoningDelta(text):
                    reasoning.append(text)
                case CallDelta():
                    calls.append((delta, []))
                case ArgumentsDelta(index, text):
                    calls[index][1].append(text)
        return cls(
            "".join(content),
            "".join(reasoning),
            [ToolCall(call.name, call.id, "".join(arguments)) for call, arguments in calls],
        )


class DeltaList(list[MessageDelta]):
    """Deltas in their order, neighbours of one kind joined."""

    def add_content(self, text: str) -> None:
        """More content."""
        last = self[-1] if self else None
        if isinstance(last, ContentDelta):
            last.text += text
        else:
            self.append(ContentDelta(text))

    def add_reasoning(self, text: str) -> None:
        """More reasoning."""
        last = self[-1] if self else None
        if isinstance(last, ReasoningDelta):
            last.text += text
        else:
            self.append(ReasoningDelta(text))

    def add_arguments(self, index: int, text: str) -> None:
        """More arguments of call `index`."""
        last = self[-1] if self else None
        if isinstance(last, ArgumentsDelta) and last.index == index:
            last.text += text
        else:
            self.append(ArgumentsDelta(index, text))
