"""Several ranks on one machine: processes of this one, each at the other end of a socket pair that only the two hold."""

from __future__ import annotations

import logging
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import torch
from typing_extensions import override

from pagoda.config.schema import PagodaConfig
from pagoda.distributed.rank_group import RankGroup
from pagoda.distributed.rank_launcher import RankConnection, RankLauncher
from pagoda.errors import ConfigError
from pagoda.models.config import ModelConfig
from pagoda.platform.hardware import cpu_report

logger = logging.getLogger(__name__)

_DEATH_SECONDS = 0.5  # from the end of a dying rank's connection to that of its process


def multi_process_executor(config: PagodaConfig, model_config: ModelConfig) -> RankGroup:
    """The executor of this machine's ranks. Raises `ConfigError` when there are fewer GPUs than ranks."""
    num_ranks = config.tensor_parallel_size * config.pipeline_parallel_size
    if config.device == "cuda" and (num_gpus := torch.cuda.device_count()) < num_ranks:
        raise ConfigError(
            f"tensor_parallel_size={config.tensor_parallel_size} * pipeline_parallel_size={config.pipeline_parallel_size} "
            f"needs {num_ranks} GPUs and this machine has {num_gpus}: lower one of them, or use several machines "
            "(distributed_executor_backend=ray)"
        )
    if config.device == "cpu" and num_ranks > (cores := cpu_report().usable_cores):
        logger.warning("%d ranks share %d cores: slower than as many ranks as cores", num_ranks, cores)
    return RankGroup(config, model_config, ProcessLauncher())


class ProcessLauncher(RankLauncher):
    """Ranks as child processes of this one."""

    uses_ray = False

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        # The kernel ends a rank with the thread that started it, so that is one which lasts as long as this process.
        self._starter = ThreadPoolExecutor(1, "rank-starter")

    @override
    def launch(
        self, num_ranks: int, timeout_seconds: float, on_progress: Callable[[str], None]
    ) -> list[RankConnection]:
        # A process that does not come up is noticed later, by the hello that does not come.
        host = socket.gethostname()
        return [
            RankConnection(self._starter.submit(self._start, rank).result(), host, None, device_index=rank)
            for rank in range(num_ranks)
        ]

    def _start(self, rank: int) -> socket.socket:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "pagoda.distributed.rank_process", str(theirs.fileno()), str(rank)]
            self._processes.append(subprocess.Popen(command, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL))
        return ours

    @override
    def death_of(self, rank: int) -> str | None:
        try:
            code = self._processes[rank].wait(_DEATH_SECONDS)
        except subprocess.TimeoutExpired:
            return None
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"

    @override
    def terminate(self, patience_seconds: float) -> None:
        deadline = time.monotonic() + patience_seconds
        for process in self._processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        for process in self._processes:
            process.kill()  # ends a stopped process too, and does nothing to one that has exited
        for process in self._processes:
            process.wait()
        self._starter.shutdown()
