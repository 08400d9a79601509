"""Tokenizer workers that are processes of their own: nothing they do holds the interpreter lock of the server.

A worker that does not answer in time is killed and another one started in its place.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from pagoda.errors import EngineNotReadyError, InvalidRequestError, PagodaError, RequestFailedError
from pagoda.process_control import environment_of_parser
from pagoda.text.frames import LENGTH_BYTES, encode_frame, result_of
from pagoda.text.workers import WorkerOptions, call_took_too_long, not_started_in_time

logger = logging.getLogger(__name__)

# What a worker that left or broke the protocol looks like from here.
_LOST = (asyncio.IncompleteReadError, ConnectionError, ValueError)


class _Worker:
    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self._process = process

    @classmethod
    async def start(cls, name: str, options: WorkerOptions) -> _Worker:
        """Start a process and wait until it has loaded the tokenizer."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "pagoda.text.worker_process",
            env=environment_of_parser(),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        worker = cls(name, process)
        is_up = False
        try:
            async with asyncio.timeout(options.start_timeout):
                await worker.exchange(encode_frame(asdict(options)))
            is_up = True
        except TimeoutError:
            raise not_started_in_time(name, options) from None
        except _LOST as error:
            raise EngineNotReadyError(f"{name} ended while it was starting: {error!r}") from error
        finally:
            if not is_up:
                await worker.close()
        return worker

    async def exchange(self, frame: bytes) -> Any:
        """Send a frame and wait for the result; one exchange at a time."""
        sink, source = self._process.stdin, self._process.stdout
        assert sink is not None
        assert source is not None
        sink.write(frame)
        await sink.drain()
        length = int.from_bytes(await source.readexactly(LENGTH_BYTES), "big")
        return result_of(await source.readexactly(length))

    @property
    def is_alive(self) -> bool:
        """Whether the process has not exited yet."""
        return self._process.returncode is None

    async def close(self) -> None:
        """Kill the process, which has no state to save, and wait until it has exited."""
        if self.is_alive:
            self._process.kill()
        if self._process.stdin is not None:
            self._process.stdin.close()
        await self._process.wait()


class ProcessWorkers:
    """`options.size` processes; a call takes one that is idle, or waits for one."""

    def __init__(self, options: WorkerOptions) -> None:
        self._options = options
        self._idle: asyncio.LifoQueue[_Worker] = asyncio.LifoQueue()
        self._workers: set[_Worker] = set()
        self._running: set[asyncio.Task[Any]] = set()
        self._starting: set[asyncio.Task[None]] = set()
        self._num_started = 0
        self._is_closed = False

    async def start(self) -> None:
        results = await asyncio.gather(*(self._add_worker() for _ in range(self._options.size)), return_exceptions=True)
        errors = [result for result in results if isinstance(result, BaseException)]
        if errors:
            await self.shutdown(0)
            raise errors[0]

    async def call(self, operation: str, arguments: Mapping[str, Any]) -> Any:
        """Have a process perform the operation; `options.call_timeout` seconds at most, waiting included."""
        if self._is_closed or not (self._workers or self._starting):
            reason = "the server is shutting down" if self._is_closed else "no tokenizer process is left"
            raise EngineNotReadyError(f"no text can be tokenized: {reason}")
        try:
            frame = encode_frame({"operation": operation, "arguments": arguments})
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidRequestError(
                f"the request cannot be tokenized: it holds what is not JSON ({error})"
            ) from error
        # A task of its own, so that a cancelled caller does not leave half an exchange on the pipe.
        task = asyncio.create_task(self._call(operation, frame))
        self._running.add(task)
        task.add_done_callback(self._forget)
        return await asyncio.shield(task)

    async def shutdown(self, grace: float) -> None:
        """Refuse new calls, wait `grace` seconds for running ones, then end the processes."""
        self._is_closed = True
        if self._running and grace > 0:
            await asyncio.wait(self._running, timeout=grace)
        unfinished = [*self._running, *self._starting]
        for task in unfinished:
            task.cancel()
        await asyncio.gather(*unfinished, return_exceptions=True)
        await asyncio.gather(*(worker.close() for worker in self._workers))
        self._workers.clear()

    async def _call(self, operation: str, frame: bytes) -> Any:
        worker: _Worker | None = None
        try:
            async with asyncio.timeout(self._options.call_timeout):
                worker = await self._take_worker()
                result = await worker.exchange(frame)
        except TimeoutError:
            self._replace(worker)
            raise call_took_too_long(operation, self._options) from None
        except _LOST as error:
            self._replace(worker)
            raise RequestFailedError(f"{operation} failed: the tokenizer process ended ({error!r})") from error
        except PagodaError:
            self._release(worker)
            raise
        self._release(worker)
        return result

    async def _take_worker(self) -> _Worker:
        while not (worker := await self._idle.get()).is_alive:
            self._replace(worker)
        return worker

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # retrieved: asyncio would log it if its caller was cancelled

    def _release(self, worker: _Worker | None) -> None:
        if worker is not None:
            self._idle.put_nowait(worker)

    def _replace(self, worker: _Worker | None) -> None:
        if worker is None or self._is_closed:
            return
        self._workers.discard(worker)
        logger.warning("%s does not answer; it is killed and another one is started", worker.name)
        task = asyncio.create_task(self._exchange_for_new(worker))
        self._starting.add(task)
        task.add_done_callback(self._starting.discard)

    async def _add_worker(self) -> None:
        name = f"tokenizer process {self._num_started}"
        self._num_started += 1
        worker = await _Worker.start(name, self._options)
        self._workers.add(worker)
        self._release(worker)

    async def _exchange_for_new(self, worker: _Worker) -> None:
        await worker.close()
        try:
            await self._add_worker()
        except PagodaError as error:
            logger.error("a tokenizer process could not be replaced, %d are left: %s", len(self._workers), error)
