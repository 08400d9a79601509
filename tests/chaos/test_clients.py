"""Clients as they are: they leave in the middle, they come by the thousand, they do not read what they asked for."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from statistics import median

import httpx
import pytest

from tests.support.chaos import PROMPTS, SETTINGS, asks_of, check_same_answers, references_of, watched
from tests.support.load import Books, Clients, load
from tests.support.notes import Note
from tests.support.observer import resident_bytes
from tests.support.server import ServerProcess

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]
ASKS = asks_of()
# The heap settles within some 15,000 requests, and no object is left of them after that; before, pools fill and pages scatter.
WARM_UP_SECONDS, DROPPING_SECONDS = 60.0, 60.0
LOOK_SECONDS = 0.5
NUM_IDLE, NUM_STREAMING = 1000, 300
NUM_SLOW_READERS = 8
MIB = 2**20
# A leak of 1 KiB a request would be about as much in a minute; at rest neither process grows by more than one.
MAX_GROWTH_BYTES = 3 * MIB


async def growth_of(pids: dict[str, int], seconds: float) -> dict[str, float]:
    """By how many bytes each process grew from the first third of the time to the last."""
    sizes: dict[str, list[int]] = {name: [] for name in pids}
    for _ in range(int(seconds / LOOK_SECONDS)):
        for name, pid in pids.items():
            sizes[name].append(resident_bytes(pid))
        await asyncio.sleep(LOOK_SECONDS)
    third = int(seconds / LOOK_SECONDS) // 3
    return {name: median(samples[-third:]) - median(samples[:third]) for name, samples in sizes.items()}


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess(**{**SETTINGS, "max_num_waiting": 1000}) as running:
        running.wait_until_ready()
        yield running


async def test_a_third_of_the_clients_leave_for_a_minute_nobody_else_notices_and_no_memory_is_lost(
    server: ServerProcess, note: Note
) -> None:
    async with watched(server) as (clients, observer):
        references = await references_of(clients, ASKS)
        before = await observer.metrics()
        async with load(clients, ASKS, num_clients=24, drop=0.5) as books:
            await asyncio.sleep(WARM_UP_SECONDS)
            grown = await growth_of({"server": server.process.pid, "engine": server.engine_pid()}, DROPPING_SECONDS)
        books.check(references)
        growth = ", ".join(f"{name} {size / MIB:+.2f} MiB" for name, size in grown.items())
        note(f"{books.summary}; growth in {DROPPING_SECONDS:g} s: {growth}")
        assert max(grown.values()) < MAX_GROWTH_BYTES, f"{grown} bytes over {len(books.answers)} requests"
        count = books.count()
        assert count.keys() == {"finished", "left"}
        assert count["left"] > 0.3 * count.total()
        await observer.until_idle()
        after = await observer.metrics()
        ended = {
            reason: after[f"request_success_total[{reason}]"] - before[f"request_success_total[{reason}]"]
            for reason in ("length", "abort", "error")
        }
        # Each ended once; who left may have left before the server knew of them, or when they were done.
        note(f"ended in the engine: {', '.join(f'{number:g} {reason}' for reason, number in ended.items())}")
        assert ended["error"] == 0
        assert count["finished"] <= ended["length"]
        assert ended["length"] + ended["abort"] <= count.total()
        assert after["engine_restarts_total"] == 0
        await check_same_answers(clients, ASKS, references)


async def test_a_thousand_idle_connections_and_hundreds_of_streams_are_served(
    server: ServerProcess, note: Note
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 8192)), hard))
    body = json.dumps({"prompt": PROMPTS[0], "max_tokens": 12, "temperature": 0, "stream": True}).encode()

    async def connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", server.port)

    async def stream() -> bytes:
        reader, writer = await connect()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        with closing(writer):
            return await reader.read()

    async with watched(server) as (_, observer):
        before = resident_bytes(server.process.pid)
        idle = [await connect() for _ in range(NUM_IDLE)]
        begun = time.monotonic()
        answers = await asyncio.gather(*(stream() for _ in range(NUM_STREAMING)))
        assert {answer.split(b"\r\n", 1)[0] for answer in answers} == {b"HTTP/1.1 200 OK"}
        assert all(answer.count(b"data: [DONE]") == 1 for answer in answers)
        assert all(answer.count(b'"finish_reason":"length"') == 1 for answer in answers)
        grown = resident_bytes(server.process.pid) - before
        note(
            f"{NUM_IDLE} idle connections, {NUM_STREAMING} streams at once in {time.monotonic() - begun:.1f} s; "
            f"the server is {grown / MIB:.1f} MiB larger meanwhile"
        )
        for _, writer in idle:
            writer.write(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        heads = await asyncio.gather(*(reader.readline() for reader, _ in idle))
        assert set(heads) == {b"HTTP/1.1 200 OK\r\n"}
        for _, writer in idle:
            writer.close()
        await observer.until_idle()


async def test_readers_that_do_not_read_hold_neither_the_engine_nor_much_memory(
    server: ServerProcess, note: Note
) -> None:
    body = {"prompt": PROMPTS[0], "max_tokens": 450, "ignore_eos": True, "logprobs": 20, "n": 4, "stream": True}
    content = json.dumps(body).encode()
    async with watched(server) as (clients, observer):
        references = await references_of(clients, ASKS)
        before = resident_bytes(server.process.pid)
        readers = []
        for _ in range(NUM_SLOW_READERS):
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", server.port))
            connection.sendall(
                f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content
            )
            readers.append(connection)
        async with asyncio.timeout(60):
            while (await observer.health())["running"] == 0:
                await asyncio.sleep(0.02)
        # The engine finishes and forgets them, though nobody has read a word.
        await observer.until_idle(seconds=200)
        grown = resident_bytes(server.process.pid) - before
        note(f"{NUM_SLOW_READERS} streams of 4 * 450 tokens that nobody reads: {grown / MIB:.1f} MiB")
        # What is kept is a request's own output at most, 4 * 450 tokens with 20 log-probabilities each, in one piece.
        assert grown < NUM_SLOW_READERS * 4 * MIB, f"{grown / MIB:.0f} MiB"
        await check_same_answers(clients, ASKS, references)
        for connection in readers:
            connection.close()
        await observer.until_idle()


async def test_a_flood_under_one_key_leaves_room_and_turns_for_the_other(note: Note) -> None:
    settings = {**SETTINGS, "api_keys": "flood-key,quiet-key", "anonymous_scopes": "read"}
    with ServerProcess(**settings) as server:
        server.wait_until_ready()
        async with Clients(server, key="flood-key") as flood, Clients(server, key="quiet-key") as quiet:
            asks = asks_of(lengths=(60,))
            async with load(flood, asks, num_clients=60) as flooded:
                async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=60) as http:
                    async with asyncio.timeout(60):
                        while (await http.get("/health")).json()["waiting"] < SETTINGS["max_num_waiting"] // 2:
                            await asyncio.sleep(0.01)
                answers = Books([await quiet.run(ask) for ask in asks[:8]])
            assert answers.count() == {"finished": 8}, [a.error for a in answers.of("refused")]
        note(f"the busy key: {flooded.summary}; the other: {answers.summary}")
        assert flooded.count().keys() == {"finished", "refused"}
        assert all("requests are waiting" in answer.error for answer in flooded.of("refused"))
