from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from dataclasses import asdict

import psutil
import pytest

from pagoda.config.schema import PagodaConfig
from pagoda.errors import (
    CheckpointError,
    ConfigError,
    DeadlineExceededError,
    EngineNotReadyError,
    InvalidRequestError,
    RequestFailedError,
)
from pagoda.text import frames
from pagoda.text.operations import TextOperations
from pagoda.text.pool import INLINE_CHARACTERS, TokenizerPool
from pagoda.text.workers import WorkerOptions
from tests.support.child_processes import children_running
from tests.support.tokenizers import CORPUS, save_tokenizer
from tests.support.virtual_time import turn_clock_of_loop
from tests.support.waiting import wait_until_async

LONG = " ".join(CORPUS)
assert len(LONG) > INLINE_CHARACTERS
CHAT = [{"role": "user", "content": "Hi"}]
KINDS = ["thread", "process"]
CALL_TIMEOUT = 1000.0
"""Longer than a test takes: where it passes, the test has turned the clock."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> str:
    return str(save_tokenizer(tmp_path_factory.mktemp("pool"), "byte_level_bpe"))


@pytest.fixture
async def make_pool(directory):
    pools = []

    async def make(kind: str, **options: object) -> TokenizerPool:
        values = {"directory": directory, "size": 1, "start_timeout": 60.0, "call_timeout": CALL_TIMEOUT, **options}
        pool = TokenizerPool(WorkerOptions(**values), kind)
        pools.append(pool)
        await pool.start()
        return pool

    yield make
    for pool in pools:
        await pool.shutdown()


def workers() -> list[psutil.Process]:
    return children_running("pagoda.text.worker_process")


@pytest.mark.parametrize("kind", KINDS)
async def test_every_operation_gives_what_the_tokenizer_gives(make_pool, kind):
    pool = await make_pool(kind, size=2)
    for text in ("", "short 塔", LONG, LONG * 30):
        for add_special_tokens in (True, False):
            ids = await pool.encode(text, add_special_tokens=add_special_tokens)
            assert ids == pool.tokenizer.encode(text, add_special_tokens=add_special_tokens)
            assert await pool.decode(ids) == text
    chat = await pool.render_chat_and_encode(CHAT)
    assert (
        pool.tokenizer.decode(chat, skip_special_tokens=False)
        == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    many = await asyncio.gather(*(pool.encode(f"{LONG} {number}") for number in range(40)))
    assert [pool.tokenizer.decode(ids) for ids in many] == [f"{LONG} {number}" for number in range(40)]


@pytest.mark.parametrize("kind", KINDS)
async def test_mistakes_of_the_client_come_back_as_such(make_pool, kind):
    pool = await make_pool(kind)
    with pytest.raises(InvalidRequestError, match="not valid Unicode"):
        await pool.encode(LONG + "\ud83d")
    with pytest.raises(InvalidRequestError, match="role") as caught:
        await pool.render_chat_and_encode([{"content": "x"}])
    assert caught.value.param == "messages"
    with pytest.raises(InvalidRequestError, match="JSON"):
        await pool.render_chat_and_encode([{"role": "user", "content": object()}])
    with pytest.raises(InvalidRequestError, match="integers"):
        await pool.decode([1, -1])
    pool.max_model_len = 10
    with pytest.raises(InvalidRequestError, match="10 tokens"):
        await pool.encode(LONG)
    with pytest.raises(InvalidRequestError, match="at most"):
        await pool.render_chat_and_encode([{"role": "user", "content": LONG}])
    pool.max_model_len = None
    assert await pool.encode(LONG)  # the worker is as good as before


@pytest.mark.parametrize("kind", KINDS)
async def test_a_fault_of_ours_fails_the_call_and_not_the_worker(make_pool, kind, monkeypatch):
    pool = await make_pool(kind)
    with pytest.raises(RequestFailedError, match="rendering the chat template failed: TypeError"):
        await pool.render_chat_and_encode(CHAT, template_name=["no name"])  # type: ignore[arg-type]
    assert await pool.encode(LONG)


class Stuck:
    """Threads hang on texts that begin with `stuck` until `end` is set. `texts`: those of all calls that have begun."""

    def __init__(self) -> None:
        self.end = threading.Event()
        self.texts: list[str] = []

    def num_begun(self) -> int:
        return sum(text.startswith("stuck") for text in self.texts)

    def note(self, text: str) -> None:
        self.texts.append(text)
        if text.startswith("stuck"):
            self.end.wait(170)


@pytest.fixture
def stuck(monkeypatch):
    stuck = Stuck()
    original = TextOperations.call

    def call(self, operation, arguments):
        stuck.note(str(arguments.get("text", "")))
        return original(self, operation, arguments)

    monkeypatch.setattr(TextOperations, "call", call)
    yield stuck
    stuck.end.set()


async def encode_when_a_thread_is_back(pool: TokenizerPool, text: str) -> list[int]:
    while True:
        try:
            return await pool.encode(text)
        except EngineNotReadyError:
            await asyncio.sleep(0.01)


async def test_the_event_loop_runs_while_a_thread_tokenizes(make_pool, stuck):
    pool = await make_pool("thread")
    task = asyncio.create_task(pool.encode("stuck " + LONG))
    await wait_until_async(stuck.num_begun)
    for _ in range(20):
        await asyncio.sleep(0)
    assert not task.done()
    stuck.end.set()
    assert await task == pool.tokenizer.encode("stuck " + LONG)


async def test_the_event_loop_runs_while_a_process_tokenizes(make_pool):
    pool = await make_pool("process")
    (worker,) = workers()
    worker.suspend()
    task = asyncio.create_task(pool.encode(LONG))
    for _ in range(20):
        await asyncio.sleep(0)
    assert not task.done()
    worker.resume()
    assert await task == pool.tokenizer.encode(LONG)


async def test_a_stuck_thread_is_given_up_and_replaced(make_pool, stuck):
    pool = await make_pool("thread")
    for number in (1, 2):
        assert await pool.encode(LONG)  # another thread has taken the place of the stuck one
        task = asyncio.create_task(pool.encode("stuck " + LONG))
        await wait_until_async(lambda number=number: stuck.num_begun() == number)
        turn_clock_of_loop(CALL_TIMEOUT)
        with pytest.raises(DeadlineExceededError, match="tokenizer_timeout_seconds"):
            await task
    # One thread was replaced, as many as the pool has; now it says, before any time has passed, that none is left.
    with pytest.raises(EngineNotReadyError, match="stuck"):
        await pool.encode(LONG)
    stuck.end.set()
    assert await encode_when_a_thread_is_back(pool, LONG) == pool.tokenizer.encode(LONG)


async def test_a_call_behind_a_stuck_one_is_served_by_the_thread_that_takes_its_place(make_pool, stuck):
    pool = await make_pool("thread")
    first = asyncio.create_task(pool.encode("stuck " + LONG))
    await wait_until_async(stuck.num_begun)
    turn_clock_of_loop(CALL_TIMEOUT / 2)
    behind = asyncio.create_task(pool.encode(LONG))
    await asyncio.sleep(0)
    turn_clock_of_loop(CALL_TIMEOUT / 2)
    with pytest.raises(DeadlineExceededError):
        await first
    assert await behind


async def test_a_call_that_no_thread_took_in_time_ends_with_an_error_and_is_not_done_later(make_pool, stuck):
    pool = await make_pool("thread")
    texts = ["stuck 1 " + LONG, "stuck 2 " + LONG, "3 " + LONG, "4 " + LONG]
    tasks = [asyncio.create_task(pool.encode(text)) for text in texts[:1]]
    await wait_until_async(lambda: stuck.num_begun() == 1)
    turn_clock_of_loop(CALL_TIMEOUT)
    await asyncio.wait(tasks)
    tasks += [asyncio.create_task(pool.encode(text)) for text in texts[1:]]
    await wait_until_async(lambda: stuck.num_begun() == 2)
    turn_clock_of_loop(CALL_TIMEOUT)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [DeadlineExceededError] * 4
    stuck.end.set()
    await encode_when_a_thread_is_back(pool, LONG)
    assert stuck.texts == [*texts[:2], LONG]


async def test_a_stuck_process_is_killed_and_replaced(make_pool):
    pool = await make_pool("process")
    (worker,) = workers()
    worker.suspend()
    task = asyncio.create_task(pool.encode(LONG))
    await asyncio.sleep(0.01)
    turn_clock_of_loop(CALL_TIMEOUT)
    with pytest.raises(DeadlineExceededError):
        await task
    assert await pool.encode(LONG) == pool.tokenizer.encode(LONG)
    assert [process.pid for process in workers()] != [worker.pid]
    assert len(workers()) == 1


async def test_a_process_that_was_killed_is_replaced_before_it_is_missed(make_pool):
    pool = await make_pool("process", size=2)
    for worker in workers():
        worker.kill()
        psutil.wait_procs([worker], timeout=5)
    await asyncio.sleep(0.05)
    assert await pool.encode(LONG) == pool.tokenizer.encode(LONG)


async def test_a_caller_who_leaves_does_not_leave_his_answer_to_the_next_one(make_pool):
    pool = await make_pool("process")
    leaving = asyncio.create_task(pool.encode(LONG * 200))
    await asyncio.sleep(0.02)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    assert await pool.encode(LONG) == pool.tokenizer.encode(LONG)


async def test_processes_that_do_not_come_up_in_time_are_named_and_leave_nothing_behind(
    make_pool, monkeypatch, tmp_path
):
    sleeper = tmp_path / "sleeper"
    sleeper.write_text("#!/bin/sh\nexec sleep 60\n")
    sleeper.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(sleeper))
    with pytest.raises(EngineNotReadyError, match=r"tokenizer process \d did not load .* in 0.5 s"):
        await make_pool("process", size=2, start_timeout=0.5)
    await wait_until_async(lambda: not [child for child in psutil.Process().children() if child.name() == "sleep"])


async def test_process_that_ends_while_it_starts_is_named(make_pool, monkeypatch):
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(EngineNotReadyError, match=r"tokenizer process \d ended while it was starting"):
        await make_pool("process", size=1)


async def test_tokenizer_that_does_not_load_in_time_is_an_error(make_pool, monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(WorkerOptions, "load", lambda self: release.wait(30))
    with pytest.raises(EngineNotReadyError, match="tokenizer_start_timeout_seconds"):
        await make_pool("thread", start_timeout=0.1)
    release.set()


@pytest.mark.parametrize("kind", KINDS)
async def test_what_cannot_be_loaded_is_refused_at_start(make_pool, kind, tmp_path):
    with pytest.raises(CheckpointError, match="not a directory"):
        await make_pool(kind, directory=str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="chat_template"):
        await make_pool(kind, chat_template="/no/such/template")


@pytest.mark.parametrize("kind", KINDS)
async def test_shutdown_lets_running_calls_end_and_refuses_new_ones(make_pool, kind):
    pool = await make_pool(kind)
    running = asyncio.create_task(pool.encode(LONG * 50))
    await asyncio.sleep(0.01)
    await pool.shutdown(grace=20)
    assert await running == pool.tokenizer.encode(LONG * 50)
    with pytest.raises(EngineNotReadyError, match="shutting down"):
        await pool.encode(LONG)
    assert workers() == []


def test_a_worker_process_ends_when_the_server_is_gone(directory):
    options = WorkerOptions(directory=directory, size=1, start_timeout=1, call_timeout=1)
    worker = subprocess.Popen(
        [sys.executable, "-m", "pagoda.text.worker_process"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    worker.stdin.write(frames.encode_frame(asdict(options)))
    worker.stdin.close()
    assert worker.wait(timeout=20) == 0
    assert frames.result_of(worker.stdout.read()[frames.LENGTH_BYTES :]) is True
    worker.stdout.close()


async def test_pool_before_it_is_started_says_that_it_is_loading(directory):
    pool = TokenizerPool.from_config(PagodaConfig(model=directory, tokenizer_pool_type="process"))
    with pytest.raises(EngineNotReadyError, match="loading"):
        await pool.encode("short")
    with pytest.raises(EngineNotReadyError, match="loading"):
        await pool.encode(LONG)


async def test_pool_takes_everything_from_the_configuration(directory, tmp_path):
    config = PagodaConfig(
        model="/nowhere",
        tokenizer=directory,
        tokenizer_pool_size=3,
        tokenizer_pool_type="process",
        chat_template="{{ messages[0].content }}!",
    )
    pool = TokenizerPool.from_config(config)
    await pool.start()
    try:
        assert len(workers()) == 3
        assert pool.tokenizer.decode(await pool.render_chat_and_encode(CHAT)) == "Hi!"
    finally:
        await pool.shutdown()


def test_errors_keep_their_kind_over_the_wire():
    for error in (InvalidRequestError("bad", "prompt"), RequestFailedError("fault")):
        frame = frames.encode_error(error)
        assert int.from_bytes(frame[: frames.LENGTH_BYTES], "big") == len(frame) - frames.LENGTH_BYTES
        with pytest.raises(type(error), match=str(error)) as caught:
            frames.result_of(frame[frames.LENGTH_BYTES :])
        assert getattr(caught.value, "param", None) == getattr(error, "param", None)
    assert json.loads(frames.encode_frame({"text": "\ud83d塔"})[frames.LENGTH_BYTES :]) == {"text": "\ud83d塔"}
