"""What a stream of this process is: a terminal that a person looks at, or something that reads plain lines."""

from __future__ import annotations

import os
from typing import TextIO


def is_terminal(stream: TextIO) -> bool:
    """Whether lines may be written over and colours be shown where they are wanted."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def has_colors(stream: TextIO) -> bool:
    """Whether to write in colours: on a terminal, unless NO_COLOR (https://no-color.org) is set."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR")
