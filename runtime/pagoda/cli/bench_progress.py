"""The progress bar of a load."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pagoda.benchmarking.records import RequestRecord


class RequestProgress:
    """Shows on standard error how many of `total` requests have ended, and how many failed. A context that is a listener."""

    def __init__(self, total: int) -> None:
        failed = TextColumn("{task.fields[failed]} failed")
        columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), failed, TimeElapsedColumn())
        # Few refreshes: drawing takes time from the measurement.
        self._bar = Progress(*columns, console=Console(stderr=True), refresh_per_second=2)
        self._task = self._bar.add_task("", total=total, failed=0)
        self._failed = 0

    def __enter__(self) -> RequestProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def __call__(self, record: RequestRecord) -> None:
        self._failed += record.error is not None
        self._bar.update(self._task, advance=1, failed=self._failed)
