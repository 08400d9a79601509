"""The steps that an engine did while it was watched: what they were of, how long they took, and how near they came to what
the machine can do (Williams et al., Roofline, 2009).

    arithmetic intensity = FLOPs / bytes
    FLOPs = 2 * parameters * tokens        bytes = weights, once, and keys and values of each row
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pagoda.benchmarking.metrics import percentile

KINDS = ("prefill", "mixed", "decode")


@dataclass(frozen=True, slots=True)
class Step:
    """`tokens` ran in `rows`, of which `context` had been computed before in all; `new` came out. Seconds since the epoch."""

    kind: str
    time: float
    seconds: float
    rows: int
    tokens: int
    context: int
    drafts: int
    new: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What the machine does at most, a second: `flops`, and `bytes` from memory. `source`: how that is known."""

    flops: float
    bytes: float
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Of a model: parameters of a token, and bytes; see `EngineReady`."""

    parameters: int
    weight_bytes: int
    kv_bytes_per_token: int

    @classmethod
    def of_limits(cls, limits: Mapping[str, Any] | None) -> Size | None:
        """What the engine says of itself; None where it does not."""
        if not limits or not limits.get("num_parameters") or not limits.get("weight_bytes"):
            return None
        return cls(
            parameters=limits["num_parameters"],
            weight_bytes=limits["weight_bytes"],
            kv_bytes_per_token=limits.get("kv_bytes_per_token", 0),
        )

    def flops(self, step: Step) -> float:
        """Of the products with the weights."""
        return 2.0 * self.parameters * step.tokens

    def bytes(self, step: Step) -> float:
        """Read from memory at least."""
        return float(self.weight_bytes + self.kv_bytes_per_token * (step.context + step.tokens))

    def best_seconds(self, step: Step, machine: Machine) -> float:
        """How long the step takes at least."""
        return max(self.flops(step) / machine.flops, self.bytes(step) / machine.bytes)


@dataclass(slots=True)
class Recording:
    """The steps of a model's engines over `seconds`. `preempted`: requests that lost their blocks; `waiting`: seen at most.

    `blocks`: of the first replica's KV cache, by their state: free, cached, in use, shared. `requests`: those that ended, as
    `/ui/events` says it of them.
    """

    seconds: float = 0.0
    steps: list[Step] = field(default_factory=list)
    num_preempted_steps: int = 0
    preempted: int = 0
    waiting: int = 0
    blocks: dict[str, int] = field(default_factory=dict)
    requests: list[Mapping[str, Any]] = field(default_factory=list)

    def take(self, event: Mapping[str, Any]) -> None:
        """Add what a `trace` or `requests` event says."""
        if event["type"] == "requests":
            self.requests += event["requests"]
            return
        for one in event["steps"]:
            self.steps.append(_step(one))
            self.preempted += one["preempted"]
            self.num_preempted_steps += bool(one["preempted"])
            self.waiting = max(self.waiting, one["waiting"])
        blocks = event["blocks"]
        if blocks["first"] == 0 and event["replica"] == 0:
            states = blocks["states"]
            names = (("free", "."), ("cached", "c"), ("in use", "u"), ("shared", "s"))
            self.blocks = {name: states.count(mark) for name, mark in names}

    def as_json(self, size: Size | None, machine: Machine | None) -> dict[str, Any]:
        """Figures by kind of step, and the roofline where size and machine are known."""
        busy = sum(step.seconds for step in self.steps)
        found: dict[str, Any] = {
            "seconds": self.seconds,
            "steps": len(self.steps),
            "idle_share": max(0.0, 1 - busy / self.seconds) if self.seconds else None,
            "preempted": self.preempted,
            "preempted_share": self.num_preempted_steps / len(self.steps) if self.steps else 0.0,
            "most_waiting": self.waiting,
            "blocks": self.blocks,
            "kinds": {
                kind: _figures(of_kind, busy, size, machine)
                for kind in KINDS
                if (of_kind := [step for step in self.steps if step.kind == kind])
            },
            "roofline": None,
        }
        if size is not None and machine is not None:
            points = _thinned(self.steps)
            found["roofline"] = {
                "flops": machine.flops,
                "bytes": machine.bytes,
                "source": machine.source,
                "points": [
                    [size.flops(step) / size.bytes(step), size.flops(step) / step.seconds, step.kind]
                    for step in points
                    if step.seconds > 0
                ],
            }
        return found


def best_seen(steps: Iterable[Step], size: Size) -> Machine | None:
    """The most that any of the steps reached; None without steps."""
    timed = [step for step in steps if step.seconds > 0]
    if not timed:
        return None
    return Machine(
        flops=max(size.flops(step) / step.seconds for step in timed),
        bytes=max(size.bytes(step) / step.seconds for step in timed),
        source="the best of the steps that were seen",
    )


def _step(one: Mapping[str, Any]) -> Step:
    rows = one["rows"]
    is_prefill = [tokens - drafts > 1 for _, _, tokens, drafts, _ in rows]
    kind = "prefill" if rows and all(is_prefill) else "mixed" if any(is_prefill) else "decode"
    return Step(
        kind,
        one["time"],
        one["seconds"],
        len(rows),
        sum(row[2] for row in rows),
        sum(row[1] for row in rows),
        sum(row[3] for row in rows),
        sum(row[4] for row in rows),
    )


def _figures(steps: Sequence[Step], busy: float, size: Size | None, machine: Machine | None) -> dict[str, Any]:
    seconds = [step.seconds for step in steps]
    total = sum(seconds)
    found: dict[str, Any] = {
        "steps": len(steps),
        "share": total / busy if busy else 0.0,
        "ms": {f"p{percent}": 1000 * percentile(seconds, percent) for percent in (50, 99)},
        "rows": sum(step.rows for step in steps) / len(steps),
        "tokens": sum(step.tokens for step in steps) / len(steps),
        "new": sum(step.new for step in steps) / len(steps),
    }
    if size is not None and total > 0:
        found["flops"] = sum(map(size.flops, steps)) / total
        found["bytes"] = sum(map(size.bytes, steps)) / total
        if machine is not None:
            found["roof_share"] = sum(size.best_seconds(step, machine) for step in steps) / total
            by_bytes = sum(size.bytes(step) / machine.bytes > size.flops(step) / machine.flops for step in steps)
            found["bound"] = "memory" if by_bytes * 2 > len(steps) else "compute"
    return found


def _thinned(steps: Sequence[Step], most: int = 400) -> Sequence[Step]:
    return steps[:: max(1, -(-len(steps) // most))]
