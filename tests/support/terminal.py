"""A command at a pseudo-terminal, as a person sees it."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time

SECONDS = 120.0


class Terminal:
    """`pagoda ARGUMENTS`; use as a context, which kills it in the end. `seen`: what is not read yet."""

    def __init__(self, arguments: list[str]) -> None:
        self.keyboard, theirs = pty.openpty()
        self.seen = ""
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
        environment.pop("NO_COLOR", None)
        command = [sys.executable, "-m", "pagoda.cli.main", *arguments]
        self.process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
        os.close(theirs)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.keyboard)

    def wait_for(self, text: str) -> str:
        """What was shown up to `text`, which is taken away too."""
        end = time.monotonic() + SECONDS
        while text not in self.seen:
            assert select.select([self.keyboard], [], [], max(0, end - time.monotonic()))[0], self.seen
            self.seen += os.read(self.keyboard, 65536).decode(errors="replace")
        shown, _, self.seen = self.seen.partition(text)
        return shown

    def type(self, line: str, until: str = "") -> str:
        """What was shown for a line, in whose echo there is no prompt, up to the next prompt."""
        os.write(self.keyboard, f"{line}\r".encode())
        before = self.wait_for(until) + until if until else ""
        return before + self.wait_for("> ")
