"""Which logical cores the compute threads of each rank on this machine run on."""

from __future__ import annotations

import os
from collections.abc import Sequence

from pagoda.config.auto import GIVEN, Choice
from pagoda.config.schema import PagodaConfig
from pagoda.errors import ConfigError
from pagoda.platform.cpu_sets import CpuSets, format_cpu_sets, format_cpus, parse_cpu_sets
from pagoda.platform.hardware import cpu_report, first_logical_cores


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
        return _choice(None, "a CPU quota is shared with whoever else runs on these cores")
    if share == 0:
        return _choice(None, f"{num_ranks} ranks take turns on {len(cores)} cores")
    if threads is not None and threads != share:
        return _choice(None, f"threads={threads} was given: the other cores may be another's")
    if share * num_ranks == len(allowed):
        # The engine core and the server would have to push bound threads aside, which could not move out of their way.
        return _choice(None, "no logical core would be left for other processes")
    sets = tuple(tuple(cores[rank * share : (rank + 1) * share]) for rank in range(num_ranks))
    return _choice(
        sets, "one logical core of each physical one" + (", other ones for each rank" if num_ranks > 1 else "")
    )


def affinities_of_replicas(config: PagodaConfig) -> list[str]:
    """What `cpu_thread_affinity` is for each of the replicas of a configuration: its ranks' part of the whole."""
    num_ranks = config.tensor_parallel_size * config.pipeline_parallel_size
    if config.device == "cuda" or not hasattr(os, "sched_getaffinity"):
        return [config.cpu_thread_affinity] * config.data_parallel_size
    choice = choose_cpu_sets(
        config.cpu_thread_affinity,
        num_ranks=num_ranks * config.data_parallel_size,
        threads=config.threads,
        allowed=frozenset(os.sched_getaffinity(0)),
        cores=first_logical_cores(),
        quota=cpu_report().quota,
    )
    if choice.value is None:
        return ["none"] * config.data_parallel_size
    sets: CpuSets = choice.value
    parts = [sets[replica * num_ranks : (replica + 1) * num_ranks] for replica in range(config.data_parallel_size)]
    return [format_cpu_sets(part) for part in parts]


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
