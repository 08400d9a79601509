"""Which grammars the server takes: each is compiled on trial, off the event loop, with a deadline."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from pagoda.errors import DeadlineExceededError, InvalidRequestError, NotSupportedError, RequestFailedError
from pagoda.fair_turns import FairTurns
from pagoda.structured.compile_process import LENGTH_BYTES, encode
from pagoda.structured.spec import GrammarSpec

logger = logging.getLogger(__name__)

_Verdict = tuple[str, str | None]  # what is wrong, and the parameter

_MAX_VERDICTS = 4096
_START_SECONDS = 60.0
_MAX_WAITING = 256
_MAX_WAITING_SECONDS = 30.0


class GrammarAdmission:
    """Compiles each grammar on trial in one of `num_processes` processes, which are started when they are needed.

    `directory`: with the tokenizer, see `GrammarVocabulary`. `timeout`: seconds that compiling one may take; a process that
    takes longer is killed. `caller`: tenant and weight of the current task; tenants take turns.
    """

    def __init__(
        self,
        directory: str,
        *,
        timeout: float,
        num_processes: int = 2,
        caller: Callable[[], tuple[str, float]] = lambda: ("", 1.0),
    ) -> None:
        self._setup = {"tokenizer": directory, "vocab_size": None}
        self._timeout = timeout
        self._idle: list[asyncio.subprocess.Process | None] = [None] * num_processes
        self._turns = FairTurns(num_processes, _MAX_WAITING, "a grammar to be compiled")
        self._caller = caller
        self._running: dict[bytes, asyncio.Task[_Verdict | None]] = {}
        # By digest of a grammar: None for one that is taken, else the error.
        self._verdicts: OrderedDict[bytes, _Verdict | None] = OrderedDict()

    async def check(self, spec: GrammarSpec) -> None:
        """Return when `spec` is known to compile.

        Raises `InvalidRequestError` that says why it does not, `QueueFullError` and `DeadlineExceededError` where too many
        others wait for the processes.
        """
        if not spec.has_grammar:
            return
        key = hashlib.sha256(f"{spec.kind} {spec.whitespace} {spec.source}".encode("utf-8", "surrogatepass")).digest()
        if key in self._verdicts:
            self._verdicts.move_to_end(key)
            refused = self._verdicts[key]
        else:
            if key not in self._running:
                self._running[key] = asyncio.create_task(self._find_out(key, spec))
                self._running[key].add_done_callback(lambda task: task.cancelled() or task.exception())
            # Others may wait for the same grammar: one who leaves does not end its trial.
            refused = await asyncio.shield(self._running[key])
        if refused is not None:
            raise InvalidRequestError(*refused)

    async def close(self) -> None:
        """End all processes."""
        for task in self._running.values():
            task.cancel()
        await asyncio.gather(*self._running.values(), return_exceptions=True)
        processes, self._idle = self._idle, []
        await asyncio.gather(*(_end(process) for process in processes if process is not None))

    async def _find_out(self, key: bytes, spec: GrammarSpec) -> _Verdict | None:
        try:
            try:
                await self._turns.take(*self._caller(), _MAX_WAITING_SECONDS)
            except TimeoutError:
                raise DeadlineExceededError(
                    f"other grammars were compiled for {_MAX_WAITING_SECONDS:g} s before this one"
                ) from None
            try:
                verdict = await self._try(spec)
            finally:
                self._turns.give_back()
            self._verdicts[key] = verdict
            while len(self._verdicts) > _MAX_VERDICTS:
                self._verdicts.popitem(last=False)
        finally:
            del self._running[key]
        return verdict

    async def _try(self, spec: GrammarSpec) -> _Verdict | None:
        """The verdict of a process on `spec`."""
        process = self._idle.pop()
        answered = False
        try:
            if process is None or process.returncode is not None:
                process = await self._start()
            answer = await _exchange(process, asdict(spec.alone), self._timeout)
            answered = True
        except TimeoutError:
            logger.warning("a %s took longer than %g s to be compiled: its process is ended", spec.kind, self._timeout)
            return (
                f"this {spec.kind} took longer than {self._timeout:g} s to be compiled "
                "(structured_outputs_timeout_seconds)",
                spec.kind,
            )
        except (asyncio.IncompleteReadError, ConnectionError):
            return f"this {spec.kind} takes more memory than it may to be compiled", spec.kind
        finally:
            if process is not None and not answered:
                await asyncio.shield(_end(process))
            self._idle.append(process if answered else None)
        return (answer["error"], answer["param"]) if "error" in answer else None

    async def _start(self) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "pagoda.structured.compile_process",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            answer = await _exchange(process, self._setup, _START_SECONDS)
        except (TimeoutError, asyncio.IncompleteReadError, ConnectionError) as error:
            await _end(process)
            raise RequestFailedError(f"the process that compiles grammars could not be started ({error!r})") from error
        except BaseException:  # cancelled: nobody else knows of the process
            await _end(process)
            raise
        if "error" in answer:
            await _end(process)
            raise NotSupportedError(str(answer["error"]))
        return process


async def _exchange(process: asyncio.subprocess.Process, message: dict[str, Any], seconds: float) -> dict[str, Any]:
    sink, source = process.stdin, process.stdout
    assert sink is not None
    assert source is not None
    async with asyncio.timeout(seconds):
        sink.write(encode(message))
        await sink.drain()
        length = int.from_bytes(await source.readexactly(LENGTH_BYTES), "big")
        answer: dict[str, Any] = json.loads(await source.readexactly(length))
    return answer


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
    if process.stdin is not None:
        process.stdin.close()
    await process.wait()
