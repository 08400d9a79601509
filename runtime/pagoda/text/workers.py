"""What the two kinds of tokenizer workers have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from pagoda.errors import DeadlineExceededError, EngineNotReadyError
from pagoda.text.operations import TextOperations


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    """How many workers, what they load, and how long starting one and one call may take (seconds)."""

    directory: str
    size: int
    start_timeout: float
    call_timeout: float
    chat_template: str | None = None
    trust_remote_code: bool = False
    isolates_templates: bool = True

    def load(self) -> TextOperations:
        """Load what a worker works with."""
        return TextOperations(
            self.directory,
            chat_template=self.chat_template,
            trust_remote_code=self.trust_remote_code,
            isolates_templates=self.isolates_templates,
        )


class Workers(Protocol):
    """A group of workers that perform `TextOperations`."""

    async def start(self) -> None:
        """Start all workers; raises `EngineNotReadyError` naming one that does not start in time."""

    async def call(self, operation: str, arguments: Mapping[str, Any]) -> Any:
        """Have one worker perform an operation; raises `DeadlineExceededError` when it takes too long."""

    async def shutdown(self, grace: float) -> None:
        """Refuse new calls, give running ones `grace` seconds, then let the workers go."""


def not_started_in_time(worker: str, options: WorkerOptions) -> EngineNotReadyError:
    """The error for a worker that did not come up."""
    return EngineNotReadyError(
        f"{worker} did not load the tokenizer of {options.directory} in {options.start_timeout:g} s "
        f"(tokenizer_start_timeout_seconds)"
    )


def call_took_too_long(operation: str, options: WorkerOptions) -> DeadlineExceededError:
    """The error for a call that ran out of time, waiting for a worker included."""
    return DeadlineExceededError(
        f"{operation} was not done in {options.call_timeout:g} s (tokenizer_timeout_seconds); the text is very long, or "
        f"all {options.size} tokenizer workers are busy"
    )
