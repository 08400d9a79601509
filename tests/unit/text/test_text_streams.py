"""Several streams read as one: none is lost, none outlives the reader, and none runs ahead of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from pagoda.text.streams import cancelling, merge_streams


class Source:
    """Streams of numbers, and what became of them."""

    def __init__(self) -> None:
        self.num_given: dict[str, int] = {}
        self.closed: list[str] = []

    async def stream(self, name: str, count: int, error: Exception | None = None) -> AsyncGenerator[int, None]:
        self.num_given[name] = 0
        try:
            for number in range(count):
                self.num_given[name] += 1
                yield number
                await asyncio.sleep(0)
            if error is not None:
                raise error
        finally:
            self.closed.append(name)


async def test_every_item_comes_once_in_its_streams_order_and_streams_take_turns() -> None:
    source = Source()
    items = [
        item async for item in merge_streams([source.stream("a", 3), source.stream("b", 5), source.stream("c", 0)])
    ]
    assert [number for index, number in items if index == 0] == [0, 1, 2]
    assert [number for index, number in items if index == 1] == [0, 1, 2, 3, 4]
    assert len(items) == 8
    assert [index for index, _ in items] != sorted(index for index, _ in items)
    assert sorted(source.closed) == ["a", "b", "c"]


async def test_the_first_error_is_raised_as_it_is_and_closes_the_others() -> None:
    source, error = Source(), KeyError("b")
    merged = merge_streams([source.stream("a", 1000), source.stream("b", 2, error)])
    with pytest.raises(KeyError) as caught:
        async for _ in merged:
            pass
    assert caught.value is error
    assert sorted(source.closed) == ["a", "b"]
    assert source.num_given["a"] < 1000


async def test_leaving_closes_all_and_each_was_read_one_item_ahead() -> None:
    source = Source()
    async with aclosing(merge_streams([source.stream(name, 1000) for name in "abc"])) as merged:
        await anext(merged)
        for _ in range(100):
            await asyncio.sleep(0)
        assert sum(source.num_given.values()) <= 1 + 3 + 3
    assert sorted(source.closed) == ["a", "b", "c"]


async def test_no_task_outlives_the_block() -> None:
    tasks = [asyncio.create_task(asyncio.sleep(seconds)) for seconds in (0, 1000)]

    async def fail() -> None:
        async with cancelling(tasks):
            await tasks[0]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    assert [task.cancelled() for task in tasks] == [False, True]
