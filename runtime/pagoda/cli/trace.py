"""`pagoda trace`: what the engines of a running server do, as a file that ui.perfetto.dev and chrome://tracing open.

Each engine is a process in it: its steps in one thread, each request in a thread of its own with its part in them; counters
of requests and tokens. Follows the Trace Event Format (JSON object form; times in microseconds).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from pagoda.cli.parser import CommandParser
from pagoda.monitoring.server import Server, add_options

_STEPS = 0  # the thread of an engine's steps; those of requests count from 1


def run(arguments: Sequence[str]) -> int:
    """Record for some seconds and write the file; exit status 0."""
    parser = CommandParser(prog="pagoda trace", description="Record the steps of a running server's engines.")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long to record; default: 10")
    parser.add_argument("--out", type=Path, default=Path("trace.json"), metavar="FILE", help="default: trace.json")
    add_options(parser)
    parser.add_argument(
        "--kernels",
        action="store_true",
        help="with what torch runs in each step: operations and GPU kernels; slows the engine down, and needs the scope admin",
    )
    options = parser.parse_args(list(arguments))
    if not 0 < options.seconds <= 3600:
        parser.error("--seconds must be more than 0 and at most 3600")
    trace = Trace()
    with closing(Server.of_options(options).events(options.seconds, kernels=options.kernels)) as events:
        for event in events:
            trace.take(event)
    options.out.write_text(json.dumps(trace.as_json()), encoding="utf-8")
    if trace.num_lost:
        print(
            f"{trace.num_lost} events were lost: this machine, or the way to the server, is too slow", file=sys.stderr
        )
    print(
        f"{options.out}: {trace.num_steps} steps, {trace.num_requests} requests"
        + (f", {trace.num_kernels} operations and kernels" if options.kernels else "")
        + "; open it at https://ui.perfetto.dev"
    )
    return 0


class Trace:
    """Trace events from those of `/ui/events`."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._processes: dict[tuple[str, int], int] = {}
        self._threads: dict[tuple[int, str], int] = {}
        self._requests: set[tuple[int, str]] = set()
        self.num_steps = 0
        self.num_kernels = 0
        self.num_lost = 0

    @property
    def num_requests(self) -> int:
        """Requests that had a part in a step."""
        return len(self._requests)

    def take(self, event: Mapping[str, Any]) -> None:
        """Add what an event says of steps and state."""
        if event["type"] == "trace":
            process = self._process(event["model"], event["replica"])
            for step in event["steps"]:
                self._take_step(process, step)
            for name, begin, length, thread, on_device, rank in event.get("kernels", ()):
                of_rank = "" if rank is None else f"rank {rank}, "
                number = self._thread(process, f"{of_rank}{'GPU stream' if on_device else 'CPU thread'} {thread}")
                self._complete(process, number, name, begin * 1e6, length * 1e6, {})
                self.num_kernels += 1
            self.num_lost += event.get("lost_kernels", 0)
        elif event["type"] == "lost":
            self.num_lost += event["events"]
        elif event["type"] == "health":
            stats, at = event["stats"], event["time"] * 1e6
            process = self._process(event["model"], 0)
            self._counter(process, "requests", at, running=stats["num_running"], waiting=stats["num_waiting"])
            self._counter(process, "KV blocks", at, used=stats["num_blocks_in_use"])

    def as_json(self) -> dict[str, Any]:
        """The file's content."""
        return {"traceEvents": self._events, "displayTimeUnit": "ms"}

    def _take_step(self, process: int, step: Mapping[str, Any]) -> None:
        self.num_steps += 1
        begin, length = step["time"] * 1e6, step["seconds"] * 1e6
        tokens = sum(row[2] for row in step["rows"])
        drafts = sum(row[3] for row in step["rows"])
        arguments = {"step": step["step"], "rows": len(step["rows"]), "tokens": tokens, "drafts": drafts}
        arguments |= {"waiting": step["waiting"], "preempted": step["preempted"]}
        kind = "prefill" if any(row[2] - row[3] > 1 for row in step["rows"]) else "decode"
        self._complete(process, _STEPS, f"step: {kind}", begin, length, arguments)
        self._counter(process, "tokens a step", begin, tokens=tokens)
        for request, computed, scheduled, drafted, new in step["rows"]:
            part = "prefill" if scheduled - drafted > 1 else "decode"
            what = {"computed": computed, "tokens": scheduled, "drafts": drafted, "new": new}
            self._requests.add((process, request))
            self._complete(process, self._thread(process, request), part, begin, length, what)
        for request, reason in step["ended"]:
            self._events.append(
                {
                    "name": f"ended: {reason}",
                    "ph": "i",
                    "s": "t",
                    "ts": begin + length,
                    "pid": process,
                    "tid": self._thread(process, request),
                }
            )

    def _complete(
        self, process: int, thread: int, name: str, begin: float, length: float, what: dict[str, Any]
    ) -> None:
        event = {"name": name, "ph": "X", "ts": begin, "dur": length, "pid": process, "tid": thread, "args": what}
        self._events.append(event)

    def _counter(self, process: int, name: str, at: float, **values: float) -> None:
        self._events.append({"name": name, "ph": "C", "ts": at, "pid": process, "args": values})

    def _process(self, model: str, replica: int) -> int:
        if (model, replica) not in self._processes:
            number = self._processes[model, replica] = len(self._processes) + 1
            self._name("process_name", number, _STEPS, f"{model}, replica {replica}")
            self._name("thread_name", number, _STEPS, "steps")
        return self._processes[model, replica]

    def _thread(self, process: int, request: str) -> int:
        if (process, request) not in self._threads:
            self._threads[process, request] = len(self._threads) + 1
            self._name("thread_name", process, len(self._threads), request)
        return self._threads[process, request]

    def _name(self, kind: str, process: int, thread: int, name: str) -> None:
        self._events.append({"name": kind, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}})
