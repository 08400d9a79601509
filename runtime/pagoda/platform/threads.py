"""Compute threads: how many a rank has, and which logical cores they run on."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import TypeVar

from pagoda.errors import ConfigError
from pagoda.platform.choice import GIVEN, Choice
from pagoda.platform.cpu_sets import CpuSets, format_cpu_sets, format_cpus, parse_cpu_sets
from pagoda.platform.hardware import CpuReport, cpu_report, first_logical_cores
from pagoda.process_control import with_lower_priority

logger = logging.getLogger(__name__)

T = TypeVar("T")


def choose_threads(
    asked: int | None, cpu: CpuReport, num_ranks: int = 1, *, affinity: str = "auto", index: int = 0
) -> Choice:
    """Compute threads of a rank: one a physical core; hyperthreads share the units that matrix products use.

    `num_ranks` share the machine; when there are more of them than cores, each has one thread. `affinity`: the setting
    `cpu_thread_affinity`; one that lists cores gives the rank at `index` a thread for each in its list.
    """
    if asked is not None:
        return Choice("threads", asked, GIVEN)
    if affinity not in ("auto", "none"):
        lists = parse_cpu_sets(affinity)
        return Choice("threads", len(lists[min(index, len(lists) - 1)]), "as many cores as cpu_thread_affinity lists")
    if cpu.usable_cores < cpu.physical_cores:
        reason = f"the container's CPU quota is {cpu.quota:g}"
    else:
        reason = f"{cpu.physical_cores} physical cores"
    if num_ranks > 1:
        reason += f", shared by {num_ranks} ranks"
    return Choice("threads", max(1, cpu.usable_cores // num_ranks), reason)


def choose_cpu_sets(
    asked: str,
    *,
    num_ranks: int,
    threads: int | None,
    allowed: frozenset[int],
    cores: Sequence[int],
    quota: float | None,
) -> Choice:
    """For each of the machine's `num_ranks` ranks its logical cores, disjoint; or None: wherever the system puts them.

    Args:
        asked: the setting `cpu_thread_affinity`.
        threads: compute threads of a rank as configured; None: chosen by the number of cores.
        allowed: the logical cores that this process may use.
        cores: of each physical core of `allowed`, its first logical one.
        quota: the container's CPU quota in cores, None without one.

    Raises:
        ConfigError: a list names cores that are not there or named before, or there is not one list for each rank.
    """
    if asked == "none":
        return _choice(None, GIVEN)
    if asked != "auto":
        return _choice(_given_sets(asked, num_ranks, allowed), GIVEN)
    share = len(cores) // num_ranks
    if quota is not None and quota < len(cores):
        return _choice(None, "a CPU quota is shared with other processes on these cores")
    if share == 0:
        return _choice(None, f"{num_ranks} ranks share {len(cores)} cores")
    if threads is not None and threads != share:
        return _choice(None, f"threads={threads} was given: the other cores may be another's")
    if share * num_ranks == len(allowed):
        # The engine core and the server would have to push bound threads aside, which could not move out of their way.
        return _choice(None, "no logical core would be left for other processes")
    sets = tuple(tuple(cores[rank * share : (rank + 1) * share]) for rank in range(num_ranks))
    return _choice(
        sets, "one logical core of each physical one" + (", other ones for each rank" if num_ranks > 1 else "")
    )


def affinities_of_replicas(affinity: str, threads: int | None, *, num_replicas: int, num_ranks: int) -> list[str]:
    """What `cpu_thread_affinity` is for each of `num_replicas` engines of `num_ranks` ranks: its part of `affinity`."""
    if not hasattr(os, "sched_getaffinity"):
        return [affinity] * num_replicas
    sets: CpuSets | None = _choose_cpu_sets_here(affinity, num_ranks * num_replicas, threads).value
    if sets is None:
        return ["none"] * num_replicas
    parts = [sets[replica * num_ranks : (replica + 1) * num_ranks] for replica in range(num_replicas)]
    return [format_cpu_sets(part) for part in parts]


def in_nice_thread(work: Callable[[], T], niceness: int) -> T:
    """What `work` returns or raises in a thread of lower priority, which ends with it, as do compute threads that it starts.

    The calling thread computes with as many threads and on the same cores then.
    """
    import torch

    has_affinity = hasattr(os, "sched_getaffinity")

    def run() -> tuple[T, int, set[int]]:
        return work(), torch.get_num_threads(), os.sched_getaffinity(0) if has_affinity else set()

    result, num_threads, cpus = with_lower_priority(run, niceness)
    torch.set_num_threads(num_threads)
    if has_affinity:
        os.sched_setaffinity(0, cpus)
    return result


def bind_compute_threads(affinity: str, threads: int | None, *, index: int = 0, num_ranks: int = 1) -> None:
    """Bind the calling thread, and with it every thread that it starts from now on, as `affinity` says.

    To be called in the thread that runs the model, before it computes for the first time: it starts OpenMP's threads, one for
    each of the cores. Existing threads are not bound.

    `affinity`, `threads`: the settings `cpu_thread_affinity` and `threads`. `index`: of this rank among the `num_ranks` of
    this machine.

    Raises:
        ConfigError: the cores asked for cannot be used.
    """
    if not hasattr(os, "sched_setaffinity"):
        if affinity not in ("auto", "none"):
            raise ConfigError(f"cpu_thread_affinity={affinity}: threads can be bound on Linux only")
        return
    choice = _choose_cpu_sets_here(affinity, num_ranks, threads)
    if choice.value is None:
        logger.debug("compute threads are not bound to cores: %s", choice.reason)
        return
    cpus = choice.value[index]
    logger.info("compute threads run on cores %s (%s)", format_cpus(cpus), choice.reason)
    os.sched_setaffinity(0, cpus)


def _choose_cpu_sets_here(affinity: str, num_ranks: int, threads: int | None) -> Choice:
    return choose_cpu_sets(
        affinity,
        num_ranks=num_ranks,
        threads=threads,
        allowed=frozenset(os.sched_getaffinity(0)),
        cores=first_logical_cores(),
        quota=cpu_report().quota,
    )


def _given_sets(asked: str, num_ranks: int, allowed: frozenset[int]) -> CpuSets:
    sets = parse_cpu_sets(asked)
    if len(sets) != num_ranks:
        raise ConfigError(
            f"cpu_thread_affinity={asked}: {len(sets)} lists for {num_ranks} ranks on this machine; "
            "there must be one for each, with | between"
        )
    cpus = [cpu for cpu_set in sets for cpu in cpu_set]
    if absent := sorted(set(cpus) - allowed):
        raise ConfigError(
            f"cpu_thread_affinity={asked}: this process may not use {format_cpus(absent)}, "
            f"only {format_cpus(sorted(allowed))}"
        )
    if twice := sorted({cpu for cpu in cpus if cpus.count(cpu) > 1}):
        raise ConfigError(f"cpu_thread_affinity={asked}: {format_cpus(twice)} is named more than once")
    return sets


def _choice(sets: CpuSets | None, reason: str) -> Choice:
    return Choice("cpu_thread_affinity", sets, reason)
