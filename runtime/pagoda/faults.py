"""Fault injection: named points in the code where a test or an operator can inject a failure.

A point costs one dictionary look-up when no fault is installed. The setting `fault_injection` is a comma-separated list of

    POINT[@REQUEST_PREFIX][#N]=ACTION        the N-th time (default: every time) that POINT is passed by such a request

    points    prepare · sample · step · detokenize
    actions   raise · oom · sleep:SECONDS · spin · exit

`step` is passed by every model step of every rank, the rank's number in place of a request's name (`step@1#5=oom`: the fifth
step of rank 1). The others are passed by a request.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from pagoda.errors import ConfigError

POINTS = ("prepare", "sample", "step", "detokenize")
_ACTIONS = ("raise", "oom", "sleep", "spin", "exit")


class InjectedFaultError(RuntimeError):
    """What the action `raise` raises."""


@dataclass(slots=True)
class _Fault:
    request_prefix: str
    nth: int | None
    action: str
    seconds: float
    passed: int = 0


_installed: dict[str, list[_Fault]] = {}


def install(specification: str | None) -> None:
    """Install the faults of a `fault_injection` setting, in place of any before. Raises `ConfigError`."""
    _installed.clear()
    for entry in filter(None, (part.strip() for part in (specification or "").split(","))):
        point, fault = _parse(entry)
        _installed.setdefault(point, []).append(fault)


def fire(point: str, request_id: str = "") -> None:
    """Pass a point: does nothing, or what was installed for it."""
    for fault in _installed.get(point, ()):
        if request_id.startswith(fault.request_prefix):
            fault.passed += 1
            if fault.nth is None or fault.passed == fault.nth:
                _act(fault, point)


def is_installed(point: str) -> bool:
    """Whether passing `point` may do anything; lets a loop over requests be left out."""
    return point in _installed


def _parse(entry: str) -> tuple[str, _Fault]:
    where, _, what = entry.partition("=")
    where, _, nth = where.partition("#")
    point, _, prefix = where.partition("@")
    action, _, seconds = what.partition(":")
    try:
        if point not in POINTS or action not in _ACTIONS:
            raise ValueError
        fault = _Fault(prefix, int(nth) if nth else None, action, float(seconds) if seconds else 0.0)
    except ValueError:
        raise ConfigError(
            f"fault_injection={entry!r}: must be POINT[@REQUEST_PREFIX][#N]=ACTION with POINT one of {', '.join(POINTS)} "
            f"and ACTION one of {', '.join(_ACTIONS)} (sleep:SECONDS)"
        ) from None
    return point, fault


def _act(fault: _Fault, point: str) -> None:
    if fault.action == "raise":
        raise InjectedFaultError(f"injected fault at {point}")
    if fault.action == "oom":
        raise MemoryError(f"injected out-of-memory error at {point}")
    if fault.action == "sleep":
        time.sleep(fault.seconds)
    elif fault.action == "exit":
        os._exit(70)
    else:
        while True:
            time.sleep(0)
