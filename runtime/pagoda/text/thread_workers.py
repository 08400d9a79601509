"""Tokenizer workers that are threads of this process.

They share one tokenizer, which is safe between threads and gives the interpreter lock back while it works. A thread cannot be
stopped: one that is stuck is abandoned, and another takes its place as long as not too many are stuck.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pagoda.errors import EngineNotReadyError
from pagoda.process_control import NICENESS, lower_thread_priority, short_switches
from pagoda.text.operations import TextOperations
from pagoda.text.workers import WorkerOptions, call_took_too_long, not_started_in_time


@dataclass(eq=False, slots=True)
class _Job:
    operation: str
    arguments: Mapping[str, Any]
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]
    worker: int | None = None


class ThreadWorkers:
    """`options.size` threads behind one queue.

    At most `options.size` stuck threads are replaced. When more are stuck, the remaining workers continue, and while there is
    none every call fails at once with `EngineNotReadyError`. A thread that returns is used again if it is needed.
    """

    def __init__(self, options: WorkerOptions, operations: TextOperations) -> None:
        self._options = options
        self._operations = operations
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._next_worker = 0
        self._live: set[int] = set()
        self._abandoned: set[int] = set()

    async def start(self) -> None:
        for _ in range(self._options.size):
            self._add_worker()

    async def call(self, operation: str, arguments: Mapping[str, Any]) -> Any:
        """Queue the operation and wait for its result, `options.call_timeout` seconds at most."""
        loop = asyncio.get_running_loop()
        job = _Job(operation, arguments, loop, loop.create_future())
        with self._changed:
            if self._is_closed or not self._live:
                reason = "the server is shutting down" if self._is_closed else "all tokenizer threads are stuck"
                raise EngineNotReadyError(f"no text can be tokenized: {reason}")
            self._jobs.append(job)
            self._changed.notify()
        try:
            async with asyncio.timeout(self._options.call_timeout):
                return await job.future
        except TimeoutError:
            self._give_up(job)
            raise call_took_too_long(operation, self._options) from None
        finally:
            job.future.cancel()  # a worker drops a cancelled job and the result of one that it is at

    async def shutdown(self, grace: float) -> None:
        """Let the threads end once the queue is empty; what is not done after `grace` seconds fails."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + grace
        while self._live and loop.time() < deadline:
            await asyncio.sleep(0.01)
        with self._changed:
            waiting, self._jobs = self._jobs, deque()
        for job in waiting:
            _report(job.loop, job.future, None, EngineNotReadyError("the server is shutting down"))

    def _add_worker(self) -> None:
        worker = self._next_worker
        self._next_worker += 1
        self._live.add(worker)
        threading.Thread(target=self._work, args=(worker,), name=f"tokenizer-{worker}", daemon=True).start()

    def _give_up(self, job: _Job) -> None:
        with self._changed:
            if job in self._jobs:
                self._jobs.remove(job)
            elif job.worker in self._live:
                self._live.remove(job.worker)
                self._abandoned.add(job.worker)
                if len(self._abandoned) <= self._options.size and not self._is_closed:
                    self._add_worker()

    def _work(self, worker: int) -> None:
        lower_thread_priority(NICENESS)
        while (job := self._next_job(worker)) is not None:
            if job.future.cancelled():
                continue
            try:
                _report(job.loop, job.future, self._operations.call(job.operation, job.arguments), None)
            except BaseException as error:  # passed to the caller; the thread continues
                _report(job.loop, job.future, None, error)
            job.worker = None

    def _next_job(self, worker: int) -> _Job | None:
        with self._changed:
            if worker in self._abandoned:  # it came back; another may have taken its place
                self._abandoned.remove(worker)
                if len(self._live) == self._options.size:
                    return None
                self._live.add(worker)
            while not self._jobs and not self._is_closed:
                self._changed.wait()
            if not self._jobs:
                self._live.remove(worker)
                return None
            job = self._jobs.popleft()
            job.worker = worker
            return job


async def load_in_thread(options: WorkerOptions) -> TextOperations:
    """Load the tokenizer off the event loop; raises `EngineNotReadyError` when it takes longer than `start_timeout`.

    What nobody waits for any more when it is loaded is closed: it may have a process.
    """
    loop = asyncio.get_running_loop()
    loaded: asyncio.Future[TextOperations] = loop.create_future()

    def load() -> None:
        try:
            with short_switches():
                operations = options.load()
        except BaseException as error:  # carried to the one who waits, or the start would hang
            _report(loop, loaded, None, error)
            return
        try:
            loop.call_soon_threadsafe(hand_over, operations)
        except RuntimeError:  # the loop is closed
            operations.close()

    def hand_over(operations: TextOperations) -> None:
        if loaded.done():
            operations.close()
        else:
            loaded.set_result(operations)

    # Not of the loop's own pool: the interpreter would wait for a stuck thread of that when it ends.
    threading.Thread(target=load, name="tokenizer-load", daemon=True).start()
    try:
        async with asyncio.timeout(options.start_timeout):
            return await loaded
    except TimeoutError:
        raise not_started_in_time("the first tokenizer worker", options) from None
    except asyncio.CancelledError:
        if not loaded.cancel() and not loaded.cancelled() and loaded.exception() is None:
            loaded.result().close()
        raise


def _report(
    loop: asyncio.AbstractEventLoop, future: asyncio.Future[Any], result: object, error: BaseException | None
) -> None:
    """Set the result of a future of another thread's loop, unless it was cancelled."""

    def settle() -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    with suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(settle)
