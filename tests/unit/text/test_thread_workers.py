"""Tokenizer threads outlive the event loop that asked them."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator

import pytest

from pagoda.process_control import NICENESS
from pagoda.text.thread_workers import ThreadWorkers
from pagoda.text.workers import WorkerOptions


class Operations:
    """Answers when it `may_answer`, and says when it was asked."""

    def __init__(self) -> None:
        self.was_asked, self.may_answer = threading.Event(), threading.Event()

    def call(self, operation: str, arguments: object) -> str:
        self.was_asked.set()
        self.may_answer.wait(30)
        return operation


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[threading.ExceptHookArgs]]:
    """What ended threads."""
    found: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", found.append)
    yield found
    found.clear()


async def test_the_engine_goes_before_what_tokenizes() -> None:
    class Priority:
        def call(self, operation: str, arguments: object) -> int:
            return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    workers = ThreadWorkers(
        WorkerOptions(directory="", size=1, start_timeout=30.0, call_timeout=30.0),
        Priority(),  # type: ignore[arg-type]
    )
    await workers.start()
    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    assert await workers.call("encode", {}) == min(19, own + NICENESS)
    await workers.shutdown(30.0)


def test_a_loop_that_closes_while_a_thread_is_at_work_takes_no_worker_with_it(
    faults: list[threading.ExceptHookArgs], monkeypatch: pytest.MonkeyPatch
) -> None:
    operations = Operations()
    workers = ThreadWorkers(
        WorkerOptions(directory="", size=1, start_timeout=30.0, call_timeout=30.0),
        operations,  # type: ignore[arg-type]
    )
    closing = asyncio.new_event_loop()
    closing.run_until_complete(workers.start())
    call = closing.create_task(workers.call("late", {}))
    closing.run_until_complete(asyncio.sleep(0))
    assert operations.was_asked.wait(30)
    call.cancel()
    closing.run_until_complete(asyncio.gather(call, return_exceptions=True))
    closing.close()
    with monkeypatch.context() as patch:
        patch.setattr(closing, "is_closed", lambda: False)  # the thread looked just before
        operations.may_answer.set()
        assert asyncio.run(workers.call("next", {})) == "next"
    assert not faults
    asyncio.run(workers.shutdown(5.0))
