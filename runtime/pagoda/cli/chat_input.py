"""Messages typed or pasted at a terminal, or piped in."""

from __future__ import annotations

import select
import sys

PASTE_SECONDS = 0.05
"""Between two lines of a paste, which a terminal writes at once."""
_pastes_are_marked = False


def start_line_editor() -> None:
    """Give `input` a line editor with a history. GNU readline also has the terminal mark what is pasted."""
    global _pastes_are_marked
    try:
        import readline
    except ImportError:
        return
    if "libedit" not in (readline.__doc__ or ""):
        readline.parse_and_bind("set enable-bracketed-paste on")
        _pastes_are_marked = True


def read_message(prompt: str, is_terminal: bool) -> str | None:
    """The next message without the space around it; None when there are no more. Ctrl-C drops a line that was begun.

    At a terminal, what was pasted is one message: as the line editor gives it, newlines in it, or, with an editor that
    does not know of pastes, all lines that are there already.
    """
    while True:
        lines: list[str] = []
        try:
            lines.append(input(prompt))
            while is_terminal and not _pastes_are_marked and select.select([sys.stdin], [], [], PASTE_SECONDS)[0]:
                lines.append(input())
            return "\n".join(lines).strip()
        except EOFError:
            return "\n".join(lines).strip() if lines else None
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            print()
