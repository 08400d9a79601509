"""Binding a rank's compute threads to logical cores of their own."""

from __future__ import annotations

import logging
import os

from pagoda.config.schema import PagodaConfig
from pagoda.errors import ConfigError
from pagoda.platform.cpu_sets import format_cpus
from pagoda.platform.hardware import cpu_report, first_logical_cores
from pagoda.platform.thread_affinity import choose_cpu_sets

logger = logging.getLogger(__name__)


def bind_compute_threads(config: PagodaConfig, *, index: int = 0, num_ranks: int = 1) -> None:
    """Bind the calling thread, and with it every thread that it starts from now on, as `cpu_thread_affinity` says.

    To be called in the thread that runs the model, before it computes for the first time: it starts OpenMP's threads, one for
    each of the cores. Threads that are there already go on running anywhere.

    `index`: of this rank among the `num_ranks` of this machine.

    Raises:
        ConfigError: the cores asked for are not to be had.
    """
    if not hasattr(os, "sched_setaffinity"):
        if config.cpu_thread_affinity not in ("auto", "none"):
            raise ConfigError(f"cpu_thread_affinity={config.cpu_thread_affinity}: threads can be bound on Linux only")
        return
    choice = choose_cpu_sets(
        config.cpu_thread_affinity,
        num_ranks=num_ranks,
        threads=config.threads,
        allowed=frozenset(os.sched_getaffinity(0)),
        cores=first_logical_cores(),
        quota=cpu_report().quota,
    )
    if choice.value is None:
        logger.debug("compute threads are not bound to cores: %s", choice.reason)
        return
    cpus = choice.value[index]
    logger.info("compute threads run on cores %s (%s)", format_cpus(cpus), choice.reason)
    os.sched_setaffinity(0, cpus)
