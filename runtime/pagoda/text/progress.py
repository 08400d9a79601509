"""A progress bar for generating many sequences."""

from __future__ import annotations

import time
from types import TracebackType


class TokenProgress:
    """Shows on standard error how many of `total` sequences are done and how fast tokens come; nothing if not `enabled`."""

    def __init__(self, total: int, enabled: bool) -> None:
        self._total = total
        self._enabled = enabled
        self._num_tokens = 0
        self._started = time.monotonic()

    def __enter__(self) -> TokenProgress:
        if self._enabled:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("generating"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[speed]:.0f} tokens/s"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("", total=self._total, speed=0.0)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._enabled:
            self._bar.stop()

    def count_tokens(self, count: int) -> None:
        """`count` more tokens were generated."""
        self._num_tokens += count
        if self._enabled:
            elapsed = max(1e-6, time.monotonic() - self._started)
            self._bar.update(self._task, speed=self._num_tokens / elapsed)

    def count_sequence(self) -> None:
        """One more sequence is done."""
        if self._enabled:
            self._bar.advance(self._task)
