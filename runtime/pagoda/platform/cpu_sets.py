"""Lists of logical cores as Linux writes them, `0-3,8`, one a rank: `0-3|4-7`."""

from __future__ import annotations

from collections.abc import Iterable

CpuSets = tuple[tuple[int, ...], ...]

_CPUS = r"\d+(-\d+)?(,\d+(-\d+)?)*"
CPU_SETS_PATTERN = rf"{_CPUS}(\|{_CPUS})*"


def parse_cpu_sets(text: str) -> CpuSets:
    """The cores of each rank, of a text that matches `CPU_SETS_PATTERN`."""
    return tuple(tuple(cpu for part in cpus.split(",") for cpu in _range(part)) for cpus in text.split("|"))


def format_cpus(cpus: Iterable[int]) -> str:
    """One list, runs put together: `0-3,8`."""
    runs: list[list[int]] = []
    for cpu in cpus:
        if runs and runs[-1][-1] + 1 == cpu:
            runs[-1].append(cpu)
        else:
            runs.append([cpu])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def format_cpu_sets(sets: CpuSets) -> str:
    """As the setting `cpu_thread_affinity` is written."""
    return "|".join(map(format_cpus, sets))


def _range(part: str) -> range:
    first, _, last = part.partition("-")
    return range(int(first), int(last or first) + 1)
