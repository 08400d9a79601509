"""What `pagoda serve` shows a person: how far the start is, then what is served and where. In a pipe or a pod there is none of
it, and log lines say the same.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TextIO

import pagoda
from pagoda.config.schema import PagodaConfig
from pagoda.engine.messages import EngineReady
from pagoda.platform.terminal import has_colors, is_terminal

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from pagoda.serving.health import Health

# In their order (docs/architecture.md); with one rank some are left out.
STAGES = (
    "config",
    "hardware",
    "launch",
    "rendezvous",
    "communication",
    "weights",
    "kv",
    "warm-up",
    "tokenizer",
)
_PERCENT = re.compile(r"(\d{1,3}) ?%")
_EVERYWHERE = {"0.0.0.0": "localhost", "::": "localhost"}


class CurrentStderr:
    """Standard error as it is at each write: a progress bar puts itself in its place to keep lines apart from it."""

    def write(self, text: str) -> int:
        """Write `text`."""
        return sys.stderr.write(text)

    def flush(self) -> None:
        """Write what is held back."""
        sys.stderr.flush()


class Greeting:
    """The start on a terminal. `follow` it, say where it listens, and that it is `ready`; `close` ends it at any time."""

    def __init__(self, config: PagodaConfig, console: Console) -> None:
        self._config = config
        self._console = console
        self._progress: Progress | None = None
        self._unsubscribe: Callable[[], None] = lambda: None
        self._is_starting = True
        self._rest = self._grpc = ""

    @classmethod
    def on_terminal(cls, config: PagodaConfig, stream: TextIO) -> Greeting | None:
        """A greeting where a person looks at `stream`, None elsewhere."""
        if config.log_format != "text" or not is_terminal(stream):
            return None
        from rich.console import Console

        return cls(config, Console(file=stream, no_color=not has_colors(stream), highlight=False))

    def lets_pass(self, record: logging.LogRecord) -> bool:
        """Whether a log line is shown: until the server is ready, only what somebody should know."""
        return not self._is_starting or record.levelno >= logging.WARNING

    def follow(self, health: Health) -> None:
        """Show the stage of the start until it is over."""
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=self._console, transient=True)
        name = self._config.model_description
        task = self._progress.add_task(f"starting {name}", total=1.0)

        def show() -> None:
            if self._progress is not None:
                words = f"starting {name}: {health.phase} {health.detail}".rstrip()
                self._progress.update(task, description=words, completed=share_done(health.phase, health.detail))

        self._progress.start()
        self._unsubscribe = health.subscribe(show)

    def listening(self, rest: str, grpc: str) -> None:
        """Note where: the URL of REST, and host and port of gRPC."""
        self._rest, self._grpc = rest, grpc

    def ready(self, ready: EngineReady | None) -> None:
        """Show what is served, on what, and where."""
        self.close()
        config = self._config
        lines = {"Model": config.model_description}
        if config.model_aliases:
            lines["Also as"] = ", ".join(config.model_aliases)
        if ready is not None:
            lines["Device"] = f"{ready.device}, {ready.dtype}"
            lines["KV cache"] = ready.kv_equation.removeprefix("KV cache: ")
        lines["REST"] = self._rest
        lines["OpenAI"] = f"{self._rest}/v1"
        lines["gRPC"] = self._grpc
        if not config.disable_fastapi_docs:
            lines["Routes"] = f"{self._rest}/docs"
        print_ = self._console.print
        print_(f"\n[bold green]Pagoda {pagoda.__version__}[/] is ready. Ctrl-C stops it.\n")
        for name, text in lines.items():
            print_(f"  [bold]{name:<9}[/]", end="")
            print_(text, markup=False, soft_wrap=True)
        print_()

    def ready_with(self, models: Sequence[tuple[str, str]]) -> None:
        """Show several models, each with its state, and where they are served."""
        self.close()
        print_ = self._console.print
        print_(f"\n[bold green]Pagoda {pagoda.__version__}[/] serves {len(models)} models. Ctrl-C stops it.\n")
        for name, state in models:
            print_(f"  [bold]{state:<9}[/]", end="")
            print_(name, markup=False, soft_wrap=True)
        for name, text in {"REST": self._rest, "OpenAI": f"{self._rest}/v1", "gRPC": self._grpc}.items():
            print_(f"  [bold]{name:<9}[/]", end="")
            print_(text, markup=False, soft_wrap=True)
        print_()

    def close(self) -> None:
        """End the progress bar; log lines are shown from now on."""
        self._unsubscribe()
        self._unsubscribe = lambda: None
        self._is_starting = False
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def share_done(stage: str, detail: str) -> float:
    """How much of the start is over, from 0 to 1, by its stage and what that says of itself (`40 %`)."""
    if stage not in STAGES:
        return 0.0
    percent = _PERCENT.search(detail)
    return (STAGES.index(stage) + (int(percent[1]) / 100 if percent else 0.0)) / len(STAGES)


def address_for_people(host: str, port: int) -> str:
    """HOST:PORT as a browser on this machine takes it."""
    host = _EVERYWHERE.get(host, host)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
