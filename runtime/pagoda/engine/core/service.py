"""An engine core in its process, driven by the messages of the API process.

    reader thread ──inbox──▶ main thread: the loop ──outbox──▶ writer thread

The main thread never waits for the network unless the outbox, which is bounded, is full. When the parent has died the reader
reads EOF and ends the process, independent of the main thread; where the reader cannot run, because the
process is stopped or stuck in a call that holds the GIL, the kernel kills it.
"""

from __future__ import annotations

import gc
import logging
import os
import queue
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

from pagoda.config.schema import PagodaConfig
from pagoda.engine import wire
from pagoda.engine.heartbeat import SharedHeartbeat
from pagoda.engine.messages import (
    AbortRequests,
    AdapterLoaded,
    EngineFailed,
    EngineOutput,
    EngineOutputs,
    EngineRanks,
    EngineStartupPhase,
    LoadAdapter,
    Reconfigure,
    Reconfigured,
    ResetPrefixCache,
    Shutdown,
    Sleep,
    SleepState,
    StartCore,
    TraceSteps,
    UnloadAdapter,
    WakeUp,
)
from pagoda.errors import ErrorKind, PagodaError, RequestFailedError
from pagoda.logs import set_level
from pagoda.request import EngineRequest
from pagoda.sampling.output import FinishReason

if TYPE_CHECKING:
    from pagoda.engine.core.loop import EngineCore

logger = logging.getLogger(__name__)

LOG_LEVEL = "log_level"  # the one setting of the process that is no limit of the scheduler
_HEARTBEAT_SECONDS = 0.5  # between heartbeats of an idle core
_OUTBOX_LENGTH = 256  # messages the parent has not read; past that the loop waits for it
_INBOX_LENGTH = 4096  # messages the loop has not taken; past that they wait in the parent, which then refuses requests
_RANKS_SECONDS = 1.0  # between reports of the ranks' health
_FAILED_EXIT_CODE = 1


class Connection:
    """Frames over the inherited socket, with a thread for each direction."""

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=fd)
        self._stream = self._socket.makefile("rb")
        self.inbox: queue.Queue[wire.Message | wire.UnreadableRequestError] = queue.Queue(_INBOX_LENGTH)
        self._outbox: queue.Queue[wire.Message | None] = queue.Queue(_OUTBOX_LENGTH)
        self._writing = threading.Thread(target=self._write, name="engine-writer", daemon=True)

    def start(self) -> None:
        threading.Thread(target=self._read, name="engine-reader", daemon=True).start()
        self._writing.start()

    def receive(self) -> wire.Message:
        """The next frame, read by the calling thread (before `start` only). `EOFError` when the parent has died."""
        header = self._stream.read(wire.HEADER.size)
        if len(header) < wire.HEADER.size:
            raise EOFError
        return wire.decode(header, self._stream.read(wire.payload_size(header)))

    def send(self, message: wire.Message) -> None:
        """Hand a message to the writer; waits while the outbox is full."""
        self._outbox.put(message)

    def close(self) -> None:
        """Send what is in the outbox, then close."""
        self._outbox.put(None)
        self._writing.join(timeout=5)
        self._socket.close()

    def _read(self) -> None:
        try:
            while True:
                try:
                    self.inbox.put(self.receive())
                except wire.UnreadableRequestError as error:
                    self.inbox.put(error)
        except (EOFError, OSError):
            logger.info("the API process closed the connection: the engine core ends")
            os._exit(0)
        except Exception:  # any error: without this thread no request would arrive, nor EOF be read
            logger.exception("invalid frame from the API process: the engine core ends")
            os._exit(_FAILED_EXIT_CODE)

    def _write(self) -> None:
        try:
            while (message := self._outbox.get()) is not None:
                self._socket.sendall(wire.encode(message))
        except OSError:
            return  # the parent has died; the reader ends the process
        except Exception:  # any error: without this thread no output would be sent
            logger.exception("a message to the API process could not be written: the engine core ends")
            os._exit(_FAILED_EXIT_CODE)


class EngineCoreLoop:
    """Drives the core with the messages of the connection."""

    def __init__(self, core: EngineCore, connection: Connection, heartbeat: SharedHeartbeat) -> None:
        self._core = core
        self._connection = connection
        self._heartbeat = heartbeat
        self._is_ending = False
        self._last_step = 0
        self._ranks_reported = 0.0
        core.on_submit = lambda step, num_tokens: heartbeat.write(step, num_tokens, is_busy=True)

    def run(self) -> None:
        """The loop, until `Shutdown` is received."""
        while True:
            self._drain_inbox()
            if self._is_ending:
                return
            step_before = self._last_step
            message = self._core.step()
            self._last_step = message.stats.step
            if message.outputs or message.stats.step != step_before:
                # Only an iteration with progress writes a heartbeat: the watchdog must catch a core that spins.
                self._heartbeat.write(message.stats.step, self._core.num_tokens_in_flight, is_busy=self._core.has_work)
                self._connection.send(message)
            self._send_trace()
            self._report_adapters()
            self._report_ranks()

    def _send_trace(self) -> None:
        if (trace := self._core.take_trace()) is not None:
            self._connection.send(trace)

    def _report_adapters(self) -> None:
        for outcome in self._core.take_adapter_outcomes():
            self._connection.send(AdapterLoaded(outcome.adapter, outcome.error))

    def _report_ranks(self) -> None:
        """Report the health of the ranks every `_RANKS_SECONDS`."""
        now = time.monotonic()
        if now - self._ranks_reported >= _RANKS_SECONDS:
            self._ranks_reported = now
            if ranks := self._core.ranks():
                self._connection.send(EngineRanks(ranks))

    def _drain_inbox(self) -> None:
        """Take all messages; when idle, wait for one and check the health of the ranks meanwhile."""
        inbox = self._connection.inbox
        while not self._core.has_work and not self._is_ending:
            self._heartbeat.write(self._last_step, 0, is_busy=False)
            self._report_ranks()
            try:
                self._take(inbox.get(timeout=_HEARTBEAT_SECONDS))
            except queue.Empty:
                self._core.check_health()
        while not inbox.empty() and not self._is_ending:
            self._take(inbox.get())

    def _take(self, message: wire.Message | wire.UnreadableRequestError) -> None:
        if isinstance(message, EngineRequest):
            try:
                self._core.add_request(message)
            except PagodaError as error:
                self._refuse(message.request_id, error)
            except Exception as error:  # an error in one request ends that request, not the engine
                logger.exception("request %s could not be taken", message.request_id)
                self._refuse(message.request_id, RequestFailedError(f"the request could not be taken: {error!r}"))
        elif isinstance(message, wire.UnreadableRequestError):
            logger.error("request %s could not be read: %s", message.request_id, message)
            self._refuse(message.request_id, message.reason)
        elif isinstance(message, AbortRequests):
            self._core.abort(message.request_ids)
        elif isinstance(message, ResetPrefixCache):
            self._core.reset_prefix_cache()
        elif isinstance(message, Reconfigure):
            self._reconfigure(message.settings)
        elif isinstance(message, Sleep):
            self._sleep(message.level)
        elif isinstance(message, WakeUp):
            self._wake_up()
        elif isinstance(message, TraceSteps):
            self._core.trace_steps(message.is_on, kernels=message.kernels)
            self._send_trace()
        elif isinstance(message, LoadAdapter):
            self._core.load_adapter(message.adapter)
            self._report_adapters()
        elif isinstance(message, UnloadAdapter):
            self._core.unload_adapter(message.adapter)
        elif isinstance(message, Shutdown):
            self._is_ending = True
        else:
            raise TypeError(f"the engine core does not take {type(message).__name__}")

    def _reconfigure(self, settings: dict[str, Any]) -> None:
        level = settings.pop(LOG_LEVEL, None)
        try:
            self._core.reconfigure(settings)
        except PagodaError as error:
            self._connection.send(Reconfigured(str(error)))
            return
        if level is not None:
            set_level(level)
        self._connection.send(Reconfigured())

    def _sleep(self, level: int) -> None:
        try:
            self._core.sleep(level)
        except PagodaError as error:
            self._connection.send(SleepState(0, str(error)))
            return
        self._connection.send(SleepState(level))

    def _wake_up(self) -> None:
        """Loading is progress: the watchdog must not take it for a core that is stuck."""
        self._core.wake_up(lambda *_: self._heartbeat.write(self._last_step, 0, is_busy=False))
        self._connection.send(SleepState(0))

    def _refuse(self, request_id: str, error: PagodaError) -> None:
        output = EngineOutput(
            request_id=request_id, finish_reason=FinishReason.ERROR, error_kind=error.kind, error=str(error)
        )
        self._connection.send(EngineOutputs([output], self._core.stats(), 0.0))


def serve(socket_fd: int, heartbeat_fd: int, failure: Exception | None) -> int:
    """Run the core until its parent ends it; exit code 0 after a shutdown, 1 after a failure.

    `failure`: why the engine could not be imported, for the parent.
    """
    connection = Connection(socket_fd)
    heartbeat = SharedHeartbeat(heartbeat_fd)
    try:
        first = connection.receive()
    except (EOFError, OSError):
        return 0  # the parent ended without a configuration
    assert isinstance(first, StartCore)
    connection.start()
    try:
        if failure is not None:
            raise failure
        _run(first, connection, heartbeat)
    except Exception as error:  # any error is reported to the parent
        # The parent says what a `PagodaError` is; anything else needs its stack.
        if not isinstance(error, PagodaError):
            logger.exception("the engine core failed: %s", error)
        kind = error.kind if isinstance(error, PagodaError) else ErrorKind.ENGINE_DEAD
        message = str(error) if isinstance(error, PagodaError) else f"{type(error).__name__}: {error}"
        connection.send(EngineFailed(kind, message))
        connection.close()
        return _FAILED_EXIT_CODE
    connection.close()
    return 0


def _run(first: StartCore, connection: Connection, heartbeat: SharedHeartbeat) -> None:
    from pagoda.engine.core.startup import start_core
    from pagoda.logs import configure_logging
    from pagoda.platform.hardware import may_have_gpu
    from pagoda.platform.threads import in_nice_thread

    os.environ.update(first.environment)
    config = PagodaConfig.of_fields(first.config)
    configure_logging(config.log_level, config.log_format, model_name=config.served_model_name)

    def start() -> EngineCore:
        return start_core(config, lambda name, detail: connection.send(EngineStartupPhase(name, detail)))

    # Ranks would inherit the priority, and a GPU is the current one of a thread.
    is_alone = config.tensor_parallel_size * config.pipeline_parallel_size == 1 and not may_have_gpu()
    core = in_nice_thread(start, first.niceness) if first.niceness and is_alone else start()
    gc.collect()
    gc.freeze()  # objects of the start-up stay: later collections need not walk them
    heartbeat.write(0, 0, is_busy=False)
    connection.send(core.ready)
    EngineCoreLoop(core, connection, heartbeat).run()
    core.shutdown()  # not after a failure: ranks end when their connections close
