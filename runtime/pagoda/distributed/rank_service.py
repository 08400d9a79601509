"""A rank's process: it executes the driver's commands, and exits when the driver does.

    reader thread ──inbox──▶ main thread: commands, steps ──▶ answers
                                     │ on a GPU ──▶ results thread: waits for the device
    heartbeat thread ──▶ driver                                          (and checks the driver's heartbeat)

Ends in four ways, none of which blocks: by command (`EndRank`); after an error of its own, which it reports; on disconnect;
without a heartbeat of the driver for `rank_heartbeat_timeout_seconds`.
"""

from __future__ import annotations

import gc
import logging
import os
import queue
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pagoda import faults
from pagoda.config.schema import PagodaConfig
from pagoda.distributed.node_state import READY, StateFile, rank_file
from pagoda.distributed.rank_channel import ChannelEnded, HeartbeatThread, RankChannel
from pagoda.distributed.rank_messages import (
    PROTOCOL_VERSION,
    AdapterLoaded,
    CheckCommunication,
    Command,
    CommunicationChecked,
    EndRank,
    InitializeKV,
    JoinGroup,
    KernelsRecorded,
    KVMeasured,
    LoadAdapter,
    LoadProgress,
    LoadWeights,
    MeasureKV,
    Message,
    PhaseDone,
    RankFailed,
    RankHeartbeat,
    RankHello,
    RankPrepared,
    RecordKernels,
    ReleaseMemory,
    RunStep,
    StartRank,
    StepDone,
    StepFailed,
    UnloadAdapter,
)
from pagoda.errors import CommunicationError, ErrorKind, PagodaError
from pagoda.execution.adapter_loading import AdapterLoader, AdapterRead
from pagoda.execution.executor import StepHandle, is_out_of_memory
from pagoda.execution.kernel_recorder import KernelRecorder
from pagoda.execution.worker import Worker
from pagoda.logs import configure_logging
from pagoda.models.config import ModelConfig
from pagoda.models.loading.loader import LoadListener
from pagoda.parallel.groups import SINGLE_RANK, ParallelGroups, connect_groups
from pagoda.parallel.interfaces import NetworkInterface, choose_interface, export_interface, listen_on
from pagoda.parallel.layout import ParallelLayout
from pagoda.parallel.preflight import check_communication
from pagoda.parallel.rank_info import RankInfo, describe_rank
from pagoda.platform.hardware import cpu_report, memory_report
from pagoda.platform.threads import bind_compute_threads, choose_threads
from pagoda.scheduling.plan import StepPlan
from pagoda.scheduling.step_timeout import stall_bound
from pagoda.timers import HeartbeatTimer
from pagoda.version import __version__

logger = logging.getLogger(__name__)

_FAILED_EXIT_CODE = 1
_PHASE_OF = {
    CheckCommunication: "communication",
    LoadWeights: "weights",
    MeasureKV: "kv",
    InitializeKV: "warm-up",
    ReleaseMemory: "sleep",
}
_FLUSH_SECONDS = 5.0
_IDLE_SECONDS = 0.3
"""Without a command for so long the rank is idle: what was recorded is sent."""


def results_executor(device_index: int) -> ThreadPoolExecutor:
    """A thread that waits for the results of a GPU.

    A new thread's device is GPU 0: without the initializer its first wait would make a CUDA context there, some 500 MiB.
    """
    return ThreadPoolExecutor(1, "rank-results", initializer=torch.cuda.set_device, initargs=(device_index,))


class RankService:
    """The loop of one rank. `connected`: the stream to the driver, authenticated before it came here.

    `state_directory`: where the rank publishes its state for the probes of its node; None: nowhere.
    """

    def __init__(self, connected: socket.socket, rank: int, state_directory: Path | None = None) -> None:
        self._rank = rank
        self._state_directory = state_directory
        self._state: StateFile | None = None
        self._channel = RankChannel(connected)
        self._inbox: queue.SimpleQueue[Command | AdapterRead] = queue.SimpleQueue()
        self._loader: AdapterLoader | None = None
        self._listener: socket.socket | None = None  # rank 0's, where all ranks meet
        self._groups: ParallelGroups = SINGLE_RANK
        self._start: StartRank
        self._config: PagodaConfig
        self._model_config: ModelConfig
        self._worker: Worker | None = None  # until the rendezvous
        self._kernels: KernelRecorder | None = None  # while somebody looks
        self._num_steps = 0
        self._is_ending = False
        # Sends a step's result: from a thread that waits for the GPU; on a CPU, where the result is there at once, directly.
        self._finish: Callable[[StepPlan, StepHandle, int], Any] = self._finish_step

    def run(self) -> int:
        """Serve until the end; the exit status of the process."""
        self._channel.start(self._deliver)
        self._channel.send(RankHello(self._rank, PROTOCOL_VERSION, __version__, socket.gethostname(), os.getpid()))
        while True:
            command = self._next_command()
            try:
                if isinstance(command, EndRank):
                    self._end(command)
                    return 0
                self._do(command)
            except Exception as error:  # any fault is reported to the driver, and the rank ends
                self._fail(error)
                return _FAILED_EXIT_CODE

    def _next_command(self) -> Command | AdapterRead:
        """Wait for it; what was recorded meanwhile is sent between two steps."""
        while self._kernels is not None:
            try:
                command = self._inbox.get(timeout=_IDLE_SECONDS)
            except queue.Empty:
                self._send_kernels(self._kernels, is_idle=True)
            else:
                self._send_kernels(self._kernels, is_idle=False)
                return command
        return self._inbox.get()

    def _send_kernels(self, recorder: KernelRecorder, *, is_idle: bool) -> None:
        kernels, num_lost = recorder.take(time.monotonic(), is_idle=is_idle)
        if kernels:
            self._channel.send(KernelsRecorded(kernels, num_lost, time.time() - time.monotonic()))

    def _record_kernels(self, most: int) -> None:
        if self._kernels is not None:
            self._kernels.close()
        self._kernels = KernelRecorder(most, self._rank) if most else None

    def _deliver(self, message: Message | ChannelEnded) -> None:
        """Take a message, in the reader's thread; the end of the connection is the end of the process, whatever it does."""
        if isinstance(message, ChannelEnded):
            if self._is_ending:
                return  # this rank closed it; the process may have more to do
            logger.info("the engine core disconnected (%s): this rank ends", message.reason)
            os._exit(0)
        self._inbox.put(message)  # type: ignore[arg-type]  # another message raises in `_do`, which is reported

    def _do(self, command: Command | AdapterRead) -> None:
        if isinstance(command, RunStep):
            self._run_step(command)
        elif isinstance(command, LoadAdapter | AdapterRead | UnloadAdapter):
            self._change_adapters(command)
        elif isinstance(command, RecordKernels):
            self._record_kernels(command.most)
        elif isinstance(command, StartRank):
            self._prepare(command)
        elif isinstance(command, JoinGroup):
            self._join(command)
        else:
            self._bring_up(command)

    def _bring_up(self, command: Command) -> None:
        """Do one of the commands between rendezvous and the first step."""
        worker = self._worker
        assert worker is not None, f"{type(command).__name__} before the rendezvous"
        self._publish(_PHASE_OF.get(type(command), "unknown"))
        if isinstance(command, CheckCommunication):
            self._channel.send(CommunicationChecked(check_communication(self._groups, worker.device)))
        elif isinstance(command, LoadWeights):
            worker.load(self._weights_progress())
            self._channel.send(PhaseDone("weights"))
        elif isinstance(command, MeasureKV):
            available = worker.available_kv_bytes(self._start.ranks_on_host)
            self._channel.send(KVMeasured(worker.kv_block_bytes(command.block_size), available))
        elif isinstance(command, InitializeKV):
            worker.initialize_kv_cache(command.num_blocks, command.max_model_len)
            gc.collect()
            gc.freeze()  # what start-up made is never freed: later collections need not walk it
            self._publish(READY)
            self._channel.send(PhaseDone("warm-up"))
        elif isinstance(command, ReleaseMemory):
            if self._loader is not None:  # it holds the model
                self._loader.close()
                self._loader = None
            worker.release(command.level)
            self._channel.send(PhaseDone("sleep"))
        else:
            raise TypeError(f"a rank does not take {type(command).__name__}")

    # ---- start-up -------------------------------------------------------------------------------------------------

    def _prepare(self, start: StartRank) -> None:
        """Take the configuration, look at the machine, and say what was found."""
        config = PagodaConfig.of_fields(start.config)
        handler = configure_logging(config.log_level, config.log_format, model_name=config.served_model_name)
        handler.addFilter(self._add_rank)
        faults.install(config.fault_injection)
        self._start = start
        if self._state_directory is not None:
            self._state = rank_file(self._state_directory, self._rank, config.rank_heartbeat_timeout_seconds)
            self._publish("launch")
        self._watch_driver(config.rank_heartbeat_timeout_seconds)
        interface = choose_interface(config.network_interface, start.route_to)
        export_interface(interface)
        if config.device == "cuda":
            torch.cuda.set_device(start.device_index)
            results = results_executor(start.device_index)
            self._finish = lambda plan, handle, before: results.submit(self._finish_step, plan, handle, before)
        index = self._rank % start.ranks_on_host
        threads = choose_threads(
            config.threads,
            cpu_report(),
            start.ranks_on_host * config.data_parallel_size,
            affinity=config.cpu_thread_affinity,
            index=index,
        )
        if config.device == "cpu":
            bind_compute_threads(config.cpu_thread_affinity, config.threads, index=index, num_ranks=start.ranks_on_host)
        logger.info("%s; interface %s", threads, interface)
        self._config = replace(config, threads=threads.value)
        self._model_config = ModelConfig.from_directory(
            str(config.model), generation=config.generation_config == "auto", model_impl=config.model_impl
        )
        if self._rank == 0 and config.tensor_parallel_size * config.pipeline_parallel_size > 1:
            self._listener = listen_on(interface.address)
        port = 0 if self._listener is None else int(self._listener.getsockname()[1])
        self._channel.send(RankPrepared(info=self._info(config, interface), port=port, threads=threads.value))

    def _join(self, command: JoinGroup) -> None:
        """Meet the others, and make the worker that works with them."""
        self._publish("rendezvous")
        config = self._config
        assert config.max_num_batched_tokens is not None
        # torch.distributed wants to know which GPU, not only that it is one.
        device = torch.device("cuda", self._start.device_index) if config.device == "cuda" else torch.device("cpu")
        self._groups = connect_groups(
            ParallelLayout(config.tensor_parallel_size, config.pipeline_parallel_size, config.enable_expert_parallel),
            self._rank,
            host=command.host,
            port=command.port,
            backend="nccl" if config.device == "cuda" else "gloo",
            timeout_seconds=stall_bound(config.max_num_batched_tokens, config.collective_timeout_seconds),
            device=device,
            rendezvous_timeout_seconds=config.rendezvous_timeout_seconds,
            listener=self._listener,
            shares_memory=config.device == "cpu" and config.cpu_kernels != "reference",
        )
        self._worker = Worker(config, self._model_config, self._groups, device)
        self._channel.send(PhaseDone("rendezvous"))

    # ---- steps ----------------------------------------------------------------------------------------------------

    def _run_step(self, command: RunStep) -> None:
        plan, before = command.plan, self._groups.num_operations
        assert self._worker is not None, "a step before the rendezvous"
        try:
            handle = self._worker.execute(plan, command.update)
        except Exception as error:  # of model, kernels or device: reported to the driver, which decides
            self._fail_step(plan, error, before)
        else:
            self._finish(plan, handle, before)

    def _finish_step(self, plan: StepPlan, handle: StepHandle, num_operations: int) -> None:
        """Wait for the device; the sampling rank sends what was sampled, the others only errors."""
        try:
            result = handle.result()
        except Exception as error:  # the same, of what the device found out later
            self._fail_step(plan, error, num_operations)
            return
        self._num_steps += 1
        if self._groups.coordinates.is_sampling_rank:
            self._channel.send(StepDone(result))

    def _fail_step(self, plan: StepPlan, error: Exception, num_operations: int) -> None:
        logger.error("step %d with %d tokens failed", plan.step_id, plan.total_tokens, exc_info=error)
        self._channel.send(
            StepFailed(
                step_id=plan.step_id,
                error=f"{type(error).__name__}: {error}",
                is_out_of_memory=is_out_of_memory(error),
                is_communication=isinstance(error, CommunicationError),
                is_out_of_step=self._groups.num_operations != num_operations
                or isinstance(error, torch.AcceleratorError),
            )
        )

    # ---- adapters -------------------------------------------------------------------------------------------------

    def _change_adapters(self, command: LoadAdapter | AdapterRead | UnloadAdapter) -> None:
        """Between two steps. What the thread has read comes through the inbox, as commands do."""
        assert self._worker is not None, "an adapter before the rendezvous"
        model = self._worker.adapters
        assert model is not None, "the model is served without adapters"
        if self._loader is None:
            self._loader = AdapterLoader(model, self._inbox.put)
        if isinstance(command, LoadAdapter):
            self._loader.start(command.slot, command.adapter)
        elif isinstance(command, AdapterRead):
            self._channel.send(AdapterLoaded(command.adapter, self._loader.install(command)))
        else:
            model.remove(command.slot)

    # ---- the end --------------------------------------------------------------------------------------------------

    def _end(self, command: EndRank) -> None:
        logger.info("this rank ends: %s", command.reason)
        self._is_ending = True
        if self._loader is not None:
            self._loader.close()
        if self._worker is not None:
            # NCCL waits for ever to destroy a communicator that live CUDA graphs use (pytorch/pytorch#115388).
            self._worker.shutdown()
        self._groups.close()
        self._channel.close()

    def _fail(self, error: Exception) -> None:
        # An error of ours is a whole sentence; anything else needs its stack.
        logger.error("this rank failed: %s", error, exc_info=not isinstance(error, PagodaError))
        kind = error.kind if isinstance(error, PagodaError) else ErrorKind.ENGINE_DEAD
        message = str(error) if isinstance(error, PagodaError) else f"{type(error).__name__}: {error}"
        self._is_ending = True
        self._channel.send(RankFailed(kind, message, isinstance(error, CommunicationError)))
        self._channel.close(_FLUSH_SECONDS)

    # ---- helpers --------------------------------------------------------------------------------------------------

    def _watch_driver(self, timeout: float) -> None:
        """Send heartbeats, and end the process when there are none from the driver."""
        timer = HeartbeatTimer()

        def check() -> None:
            silent = timer.check(self._channel.last_received, time.monotonic())
            if silent > timeout:
                logger.error(
                    "no heartbeat of the engine core for %.1f s (timeout %g s): this rank ends", silent, timeout
                )
                os._exit(_FAILED_EXIT_CODE)
            if self._state is not None:
                self._state.beat()

        HeartbeatThread(
            [self._channel], lambda: RankHeartbeat(self._num_steps, self._groups.num_operations), timeout, check
        ).start()

    def _publish(self, phase: str) -> None:
        """Tell the probes of this node which phase the rank is in."""
        if self._state is not None:
            self._state.enter(phase)

    def _add_rank(self, record: logging.LogRecord) -> bool:
        record.rank = self._rank
        return True

    def _weights_progress(self) -> LoadListener:
        """Sends the driver each whole percent."""
        last = -1

        def progress(name: str, bytes_done: int, bytes_total: int) -> None:
            nonlocal last
            percent = 100 * bytes_done // max(1, bytes_total)
            if percent != last:
                last = percent
                self._channel.send(LoadProgress(bytes_done, bytes_total))

        return progress

    def _info(self, config: PagodaConfig, interface: NetworkInterface) -> RankInfo:
        is_cuda = config.device == "cuda"
        properties = torch.cuda.get_device_properties(self._start.device_index) if is_cuda else None
        return describe_rank(
            config,
            rank=self._rank,
            model_directory=Path(str(config.model)),
            device=config.device,
            device_name=properties.name if properties is not None else cpu_report().name,
            memory_bytes=properties.total_memory if properties is not None else memory_report().total,
            dtype=config.dtype,
            nccl=".".join(map(str, torch.cuda.nccl.version())) if is_cuda else None,  # type: ignore[no-untyped-call]
            uses_ray=self._start.uses_ray,
            interface=interface.name,
            address=interface.address,
        )
