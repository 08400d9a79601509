"""Finds stop strings in a stream of text, however the stream is cut into pieces.

All stop strings are looked for at once with an automaton (Aho and Corasick, "Efficient string matching", 1975). Its state
after some text is the longest end of the text that begins a stop string: exactly what must be held back, because more text
may complete it. A character costs a constant amount of work, whatever the length of the output.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from pagoda.errors import InvalidRequestError

MAX_STOP_CHARACTERS = 8192


@dataclass(slots=True)
class _Node:
    depth: int
    children: dict[str, _Node]
    fallback: _Node | None = None
    # Length of the longest stop string that ends here, 0 for none.
    match_length: int = 0


class StopStringMatcher:
    """Lets text through up to the first stop string.

    The first is the one that is complete first; of several that end at the same character, the longest. This does not depend
    on how the text arrives. Text that may become a stop string is held back until it cannot.
    Raises `InvalidRequestError` when the strings are longer than `MAX_STOP_CHARACTERS` together.
    """

    def __init__(self, stop: Sequence[str], *, include_in_output: bool = False) -> None:
        if sum(map(len, stop)) > MAX_STOP_CHARACTERS:
            raise InvalidRequestError(
                f"the stop strings have {sum(map(len, stop))} characters together; at most {MAX_STOP_CHARACTERS} are allowed",
                "stop",
            )
        self._include_in_output = include_in_output
        self._node = self._root = _build_automaton(stop)
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str, *, may_stop: bool = True) -> str:
        """The text that is settled by `text`; `matched` is set when a stop string is complete, and no text follows.

        Without `may_stop` a stop string that is completed by this text is let through (`min_tokens`).
        """
        if not self._root.children:
            return text
        held, self._held = self._held + text, ""
        node, root = self._node, self._root
        end = len(held) - len(text)
        for character in text:
            end += 1
            while (child := node.children.get(character)) is None and node.fallback is not None:
                node = node.fallback
            node = root if child is None else child
            if node.match_length and may_stop:
                start = end - node.match_length
                self.matched = held[start:end]
                return held[:end] if self._include_in_output else held[:start]
        self._node = node
        settled = len(held) - node.depth
        self._held = held[settled:]
        return held[:settled]

    def finish(self) -> str:
        """The text that was held back: no stop string came of it."""
        held, self._held = self._held, ""
        return held


def _build_automaton(stop: Sequence[str]) -> _Node:
    root = _Node(0, {})
    for string in stop:
        node = root
        for character in string:
            node = node.children.setdefault(character, _Node(node.depth + 1, {}))
        node.match_length = len(string)
    queue = deque([root])
    while queue:  # by depth, so that the fallback of a node is finished before the node
        node = queue.popleft()
        for character, child in node.children.items():
            fallback = node.fallback
            while fallback is not None and character not in fallback.children:
                fallback = fallback.fallback
            child.fallback = root if fallback is None else fallback.children[character]
            child.match_length = child.match_length or child.fallback.match_length
            queue.append(child)
    return root
