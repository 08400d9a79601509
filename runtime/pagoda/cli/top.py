"""`pagoda top`: what a running server is at, live in a terminal; `--once` and a pipe get plain text.

It asks `/health` and `/metrics` once a second, which costs the server as much as a scrape by Prometheus.
"""

from __future__ import annotations

import json
import select
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import IO

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pagoda.cli.parser import CommandParser
from pagoda.errors import PagodaError
from pagoda.monitoring.figures import Figures, ModelFigures, Part, figures
from pagoda.monitoring.server import KEY_HINT, Server, Snapshot, add_options, look

WINDOW_SECONDS = 10.0
MAX_INTERVAL = 60.0
_KEYS = "q quits · p pauses · + and - change the interval"
_STYLES = {"ready": "green", "degraded": "yellow", "starting": "yellow", "draining": "yellow", "dead": "red"}
_BARS = " ▁▂▃▄▅▆▇█"
_LINES_A_MODEL = 6


def run(arguments: Sequence[str]) -> int:
    """Show the figures until `q`; with --once once, exit status 1 where the server is not ready."""
    parser = CommandParser(prog="pagoda top", description="What a running server is at.")
    add_options(parser)
    parser.add_argument("--interval", type=float, default=1.0, metavar="SECONDS", help="default: 1")
    parser.add_argument("--once", action="store_true", help="look twice, an interval apart, print it and end")
    parser.add_argument("--json", action="store_true", help="with --once: as JSON")
    options = parser.parse_args(list(arguments))
    if not 0.1 <= options.interval <= MAX_INTERVAL:
        parser.error(f"--interval must be from 0.1 to {MAX_INTERVAL:g} seconds")
    if options.json and not options.once:
        parser.error("--json needs --once")
    server = Server.of_options(options)
    if options.once:
        then = _look(server)
        time.sleep(options.interval)
        found = figures(_look(server), then)
        print(json.dumps(asdict(found), indent=2) if options.json else as_text(found, server.url))
        return 0 if found.state in ("ready", "degraded", "sleeping") else 1
    if not (sys.stdout.isatty() and sys.stdin.isatty()):
        return _print_on(server, options.interval)
    return _show(server, options.interval)


class Screen:
    """What was seen so far, and what is drawn of it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.found: Figures | None = None
        self.trouble = ""
        self.is_paused = False
        self.interval = 1.0
        self._looks: deque[Snapshot] = deque()
        self._waiting: deque[float] = deque(maxlen=40)
        self._tokens: deque[float] = deque(maxlen=40)

    def add(self, snapshot: Snapshot) -> None:
        """Take in a look; rates are over the last `WINDOW_SECONDS`."""
        self.trouble = ""
        self._looks.append(snapshot)
        while len(self._looks) > 2 and self._looks[1].time < snapshot.time - WINDOW_SECONDS:
            self._looks.popleft()
        self.found = figures(snapshot, self._looks[0] if len(self._looks) > 1 else None)
        self._waiting.append(sum(one.waiting for one in self.found.models))
        self._tokens.append(sum(one.output_tokens or 0.0 for one in self.found.models))

    def failed(self, error: Exception) -> None:
        """The server did not answer; what was seen before stays to be seen."""
        self.trouble = str(error)
        self._looks.clear()

    def draw(self, height: int = 24) -> Group:
        """At most `height` lines."""
        head = Text()
        found = self.found
        state = "no answer" if self.trouble else found.state if found is not None else "asking"
        head.append("pagoda top  ", style="bold")
        head.append(self.url + "  ")
        head.append(state, style=f"bold {_STYLES.get(state, 'red' if self.trouble else 'cyan')}")
        head.append(f"  every {self.interval:g} s" + ("  PAUSED" if self.is_paused else ""), style="dim")
        lines: list[Text | Table] = [head]
        if self.trouble:
            lines.append(Text(self.trouble, style="red"))
        if found is not None:
            lines += self._body(found, height - len(lines) - 1)
        lines.append(Text(_KEYS, style="dim"))
        return Group(*lines)

    def _body(self, found: Figures, height: int) -> list[Text | Table]:
        lines: list[Text | Table] = []
        if found.state not in ("ready", "sleeping"):
            why = ": ".join(part for part in (found.stage, found.detail, found.cause) if part)
            lines.append(Text(why, style="yellow", no_wrap=True, overflow="ellipsis"))
        if found.not_shown:
            return [
                *lines,
                *(_line(f"{one.name}  {one.state}") for one in found.models),
                Text(_hidden(found), style="red"),
            ]
        lines.append(_history("waiting", self._waiting))
        lines.append(_history("output tokens/s", self._tokens))
        if found.error_rates:
            text = ", ".join(f"{kind} {rate:.1f}/s" for kind, rate in sorted(found.error_rates.items()))
            lines.append(Text(f"errors  {text}", style="red", no_wrap=True, overflow="ellipsis"))
        num_shown = max(1, (height - len(lines) - 1) // _LINES_A_MODEL)
        for one in found.models[:num_shown]:
            lines += [_line(line) for line in model_lines(one)]
        if hidden := found.models[num_shown:]:
            names = ", ".join(f"{one.name} {one.state}" for one in hidden)
            lines.append(_line(f"  and {len(hidden)} more: {names}"))
        room = height - len(lines)
        worst_first = sorted(found.parts, key=lambda part: part.is_up)
        lines += [_part_line(part) for part in worst_first[: max(0, room)]]
        return lines


def model_lines(one: ModelFigures) -> list[str]:
    """A model's figures, a subject a line."""
    lines = [
        f"{one.name}  {one.state}",
        f"  requests  {one.running:.0f} running, {one.waiting:.0f} waiting, {_rate(one.requests)} ended",
        f"  KV cache  {_bar(one.kv_usage)} {one.kv_usage:4.0%}  prefix hits {_share(one.hit_share)}, "
        f"{_rate(one.preemptions)} preempted",
        f"  tokens    {_rate(one.output_tokens)} out, {_rate(one.prompt_tokens)} in",
        f"  steps     {_time(one.step_seconds)}, {_rate(one.steps)}, {_number(one.tokens_a_step)} tokens each",
        f"  latency   TTFT {_times(one.ttft)}, ITL {_times(one.itl)} (p50, p99)",
    ]
    if one.acceptance_length is not None:
        lines[4] += f"; drafts {_share(one.acceptance_share)} accepted, {one.acceptance_length:.2f} tokens a step"
    return lines


def as_text(found: Figures, url: str) -> str:
    """All figures, without colours or a limit of lines."""
    head = f"{url}  {found.state}"
    why = ": ".join(part for part in (found.stage, found.detail, found.cause) if part)
    lines = [head if found.state == "ready" or not why else f"{head}: {why}"]
    if found.not_shown:
        lines += [*(f"{one.name}  {one.state}" for one in found.models), _hidden(found)]
    else:
        lines += [line for one in found.models for line in model_lines(one)]
    lines += [f"  {part.name} of {part.model}: {part.note}" for part in found.parts]
    lines += [f"  errors    {kind} {rate:.2f}/s" for kind, rate in sorted(found.error_rates.items())]
    return "\n".join(lines)


def _hidden(found: Figures) -> str:
    return f"  no figures: {found.not_shown}; {KEY_HINT}"


def _look(server: Server) -> Snapshot:
    try:
        return look(server)
    except ValueError as error:
        raise PagodaError(str(error)) from None


def _print_on(server: Server, interval: float) -> int:
    """Plain text, again and again, until Ctrl-C or the reader's end."""
    then: Snapshot | None = None
    while True:
        now = _look(server)
        if then is not None:
            print(as_text(figures(now, then), server.url), flush=True)
        then = now
        time.sleep(interval)


def _show(server: Server, interval: float) -> int:
    screen = Screen(server.url)
    screen.interval = interval
    console = Console()
    with Live(console=console, screen=True, auto_refresh=False) as live, _single_keys(sys.stdin) as key:
        while True:
            if not screen.is_paused:
                try:
                    screen.add(look(server))
                except (PagodaError, ValueError) as error:
                    screen.failed(error)
            due = time.monotonic() + screen.interval
            while True:
                live.update(screen.draw(console.size.height), refresh=True)
                pressed = key(max(0.0, due - time.monotonic()))
                if pressed == "q":
                    return 0
                _press(screen, pressed)
                if time.monotonic() >= due:
                    break


def _press(screen: Screen, key: str) -> None:
    if key in ("p", " "):
        screen.is_paused = not screen.is_paused
    elif key == "+":
        screen.interval = min(MAX_INTERVAL, screen.interval * 2)
    elif key == "-":
        screen.interval = max(0.25, screen.interval / 2)


@contextmanager
def _single_keys(stdin: IO[str]) -> Iterator:  # type: ignore[type-arg]
    """Gives a function that waits so many seconds for a key; empty where none came. Keys are not echoed meanwhile."""
    import termios
    import tty

    descriptor = stdin.fileno()
    before = termios.tcgetattr(descriptor)

    def key(seconds: float) -> str:
        ready, _, _ = select.select([descriptor], [], [], seconds)
        return stdin.read(1) if ready else ""

    tty.setcbreak(descriptor)
    try:
        yield key
    finally:
        with suppress(termios.error):
            termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _line(text: str) -> Text:
    return Text(text, no_wrap=True, overflow="ellipsis", style="bold" if not text.startswith(" ") else "")


def _part_line(part: Part) -> Text:
    style = "" if part.is_up else "red"
    return Text(f"  {part.name} of {part.model}: {part.note}", style=style, no_wrap=True, overflow="ellipsis")


def _history(name: str, values: Sequence[float]) -> Text:
    highest = max(values, default=0.0)
    bars = "".join(_BARS[round(value / highest * 8)] if highest else _BARS[0] for value in values)
    return Text(f"{name:<16} {bars} {_number(values[-1]) if values else ''}", no_wrap=True, overflow="ellipsis")


def _bar(share: float, width: int = 20) -> str:
    full = round(min(max(share, 0.0), 1.0) * width)
    return "█" * full + "░" * (width - full)


def _rate(value: float | None) -> str:
    return "–/s" if value is None else f"{_number(value)}/s"


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 or value == round(value) else f"{value:.1f}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"


def _times(pair: tuple[float, float] | None) -> str:
    return "–" if pair is None else f"{_time(pair[0])}, {_time(pair[1])}"
