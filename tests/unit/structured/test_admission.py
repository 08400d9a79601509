"""Grammars are compiled on trial in processes that can be ended: a verdict is kept, one that takes too long is a 400."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest

import pagoda
from pagoda.errors import InvalidRequestError, NotSupportedError
from pagoda.structured.admission import GrammarAdmission
from pagoda.structured.spec import GrammarSpec
from tests.support.child_processes import children_running

DEMO = str(Path(pagoda.__file__).parent / "demo_model")
GOOD = GrammarSpec.of_regex("a+")
ENDLESS = GrammarSpec.of_json_schema({"allOf": [{"type": "integer", "multipleOf": n} for n in (101, 103, 107, 109)]})


@pytest.fixture
async def admission() -> AsyncIterator[GrammarAdmission]:
    made = GrammarAdmission(DEMO, timeout=1.0, num_processes=1)
    yield made
    await made.close()
    assert children() == []


def children() -> list[int]:
    return [child.pid for child in children_running("pagoda.structured.compile_process")]


async def test_verdicts_are_kept_and_one_process_gives_them_all(admission: GrammarAdmission) -> None:
    bad = GrammarSpec.of_json_schema({"not": {}})
    for _ in range(2):
        await admission.check(GOOD)
        await admission.check(GOOD.after([5]))  # where it begins makes no other grammar
        with pytest.raises(InvalidRequestError, match="not") as refused:
            await admission.check(bad)
        assert refused.value.param == "json_schema"
    assert len(children()) == 1


async def test_one_that_takes_too_long_is_refused_and_its_process_replaced(admission: GrammarAdmission) -> None:
    await admission.check(GOOD)
    before = children()
    results = await asyncio.gather(*(admission.check(ENDLESS) for _ in range(3)), return_exceptions=True)
    assert [type(result) for result in results] == [InvalidRequestError] * 3
    assert "took longer than 1 s" in str(results[0])
    await admission.check(GrammarSpec.of_regex("b+"))
    assert len(children()) == 1
    assert children() != before


async def test_one_who_leaves_ends_nobody_elses_trial(admission: GrammarAdmission) -> None:
    leaving, staying = (asyncio.create_task(admission.check(GOOD)) for _ in range(2))
    await asyncio.sleep(0.01)
    leaving.cancel()
    await staying
    with pytest.raises(asyncio.CancelledError):
        await leaving


async def test_a_process_that_ends_is_replaced(admission: GrammarAdmission) -> None:
    await admission.check(GOOD)
    for pid in children():
        os.kill(pid, signal.SIGKILL)
    # Whether the next one meets the process or finds it gone is a matter of moments.
    with suppress(InvalidRequestError):
        await admission.check(GrammarSpec.of_regex("c+"))
    await admission.check(GrammarSpec.of_regex("d+"))


async def test_a_checkpoint_without_a_usable_tokenizer_is_said_to_be_that(tmp_path: Path) -> None:
    made = GrammarAdmission(str(tmp_path), timeout=5.0)
    with pytest.raises(NotSupportedError, match=r"tokenizer\.json"):
        await made.check(GOOD)
    await made.close()
