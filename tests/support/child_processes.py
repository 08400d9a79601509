"""The processes that one of Pagoda's has started, by the module that they run."""

from __future__ import annotations

from contextlib import suppress

import psutil


def children_running(module: str, parent: int | None = None, *, recursive: bool = False) -> list[psutil.Process]:
    """Children of `parent` (this process, unless given) that were started with `-m MODULE` and have not ended.

    One that has ended and that nobody has waited for, which may be of another module of tests, has no command line.
    """
    found = []
    for child in psutil.Process(parent).children(recursive=recursive):
        with suppress(psutil.Error):
            if module in child.cmdline():
                found.append(child)
    return found
