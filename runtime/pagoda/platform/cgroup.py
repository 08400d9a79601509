"""The CPU time and memory that this container may use, from Linux control groups of version 1 and 2.

A container sees the machine's cores and memory in /proc; its limits are in /sys/fs/cgroup. A group is bound by its own
limit and by that of every group above it. `root` is the file system's root, another one in tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

MOUNT = "sys/fs/cgroup"
# Version 1 writes "no limit" as the largest multiple of a page in 63 bits; anything near it is none.
_NO_LIMIT = 2**62


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Cores' worth of CPU time per second that the container may use; None: no limit."""
    quotas = []
    for group in _groups(root, "cpu"):
        both = _words(group / "cpu.max")
        if not both:
            both = _words(group / "cpu.cfs_quota_us") + _words(group / "cpu.cfs_period_us")
        if len(both) == 2 and both[0] not in ("max", "-1") and float(both[1]) > 0:
            quotas.append(float(both[0]) / float(both[1]))
    return min(quotas, default=None)


def memory_limit(root: Path = Path("/")) -> int | None:
    """Bytes of memory that the container may use in all; None: no limit."""
    return min((limit for limit, _ in _memory_bounds(root)), default=None)


def memory_left(root: Path = Path("/")) -> int | None:
    """Bytes of memory that the container may still take; None: no limit.

    Page cache that has not been used lately counts as free: the kernel gives it up before it kills anything.
    """
    return min((max(0, limit - used) for limit, used in _memory_bounds(root)), default=None)


def _memory_bounds(root: Path) -> list[tuple[int, int]]:
    """(limit, bytes in use) of every group that has a limit."""
    bounds = []
    for group in _groups(root, "memory"):
        limit = _number(group / "memory.max", group / "memory.limit_in_bytes")
        if limit is None or limit >= _NO_LIMIT:
            continue
        used = _number(group / "memory.current", group / "memory.usage_in_bytes") or 0
        statistics = dict(line.split()[:2] for line in _lines(group / "memory.stat"))
        cache = int(statistics.get("total_inactive_file", statistics.get("inactive_file", 0)))
        bounds.append((limit, max(0, used - cache)))
    return bounds


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The directories of this process's group for `controller` and of the groups above it, in both versions' trees."""
    for line in _lines(root / "proc/self/cgroup"):
        number, controllers, path = line.split(":", 2)
        if number == "0":
            top = root / MOUNT
        elif controller in controllers.split(","):
            top = root / MOUNT / controllers
            if not top.is_dir():
                top = root / MOUNT / controller
        else:
            continue
        group = top / path.lstrip("/")
        # In a container the path may be the host's, which is not mounted here: then the top is the container's own group.
        while group != top:
            if group.is_dir():
                yield group
            group = group.parent
        yield top


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []  # a file that is not there sets no limit


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()


def _number(*paths: Path) -> int | None:
    for path in paths:
        words = _words(path)
        if words and words[0].isdigit():
            return int(words[0])
    return None
