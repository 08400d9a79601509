from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing

import pytest

from pagoda.config.schema import PagodaConfig
from pagoda.engine.client.request_queue import QueuePlaces, RequestQueue
from pagoda.engine.messages import EngineOutput, EngineReady
from pagoda.errors import (
    EngineDeadError,
    EngineNotReadyError,
    InvalidRequestError,
    QueueFullError,
    RequestFailedError,
)
from pagoda.request import EngineRequest, GenerationRequest
from pagoda.sampling.output import FinishReason
from pagoda.sampling.params import SamplingParams
from pagoda.text.generation import TextGenerator
from pagoda.text.pool import TokenizerPool
from pagoda.text.workers import WorkerOptions
from tests.support.tokenizers import save_tokenizer

Script = Callable[[EngineRequest], AsyncIterator[EngineOutput]]


def asked(prompt: str | list[int], params: SamplingParams, **fields) -> GenerationRequest:
    return GenerationRequest(prompt=prompt, params=params, **fields)


class ScriptedClient:
    """An engine client whose requests go as a script says; knows which of them were left before their end."""

    def __init__(self, script: Script) -> None:
        self.ready: EngineReady | None = EngineReady(
            max_model_len=200, max_num_seqs=4, max_num_batched_tokens=64, num_blocks=8, block_size=16, vocab_size=456
        )
        self.script = script
        self.requests: list[EngineRequest] = []
        self.aborted: list[str] = []

    def reserve(self, tenant: str, count: int) -> QueuePlaces:
        return QueuePlaces(RequestQueue(), tenant, count)

    async def submit(self, request: EngineRequest, places: QueuePlaces | None = None) -> AsyncIterator[EngineOutput]:
        self.requests.append(request)
        ended = False
        try:
            async for output in self.script(request):
                ended = output.finish_reason is not None
                yield output
        finally:
            if not ended:
                self.aborted.append(request.request_id)


@pytest.fixture
async def pool(tmp_path):
    directory = save_tokenizer(tmp_path, "byte_level_bpe")
    pool = TokenizerPool(WorkerOptions(directory=str(directory), size=1, start_timeout=30, call_timeout=30))
    await pool.start()
    yield pool
    await pool.shutdown()


def says(text_of: Callable[[EngineRequest], str], pool: TokenizerPool, step_seconds: float = 0.0) -> Script:
    async def script(request: EngineRequest) -> AsyncIterator[EngineOutput]:
        ids = pool.tokenizer.encode(text_of(request))
        for position, token_id in enumerate(ids, start=1):
            await asyncio.sleep(step_seconds)
            reason = FinishReason.LENGTH if position == len(ids) else None
            yield EngineOutput(request_id=request.request_id, new_token_ids=[token_id], finish_reason=reason)

    return script


async def collect(stream) -> dict[int, str]:
    texts: dict[int, str] = {}
    async for chunk in stream:
        texts[chunk.index] = texts.get(chunk.index, "") + chunk.text
    return texts


async def test_text_goes_in_and_text_comes_out(pool):
    client = ScriptedClient(says(lambda request: " there was 塔", pool))
    generator = TextGenerator(client, pool, eos_token_ids=(452,), default_max_tokens=9)
    assert await collect(generator.generate(asked("Once upon", SamplingParams(), request_id="r"))) == {
        0: " there was 塔"
    }
    (request,) = client.requests
    assert request.prompt_token_ids == pool.tokenizer.encode("Once upon")
    assert (request.max_tokens, request.eos_token_ids) == (9, (452,))
    assert client.aborted == []


async def test_prompt_ids_are_taken_as_they_are_and_echoed_as_text(pool):
    client = ScriptedClient(says(lambda request: " there", pool))
    generator = TextGenerator(client, pool)
    ids = pool.tokenizer.encode("Once upon")
    texts = await collect(generator.generate(asked(ids, SamplingParams(n=2), request_id="r", echo=True)))
    assert texts == {0: "Once upon there", 1: "Once upon there"}
    assert client.requests[0].prompt_token_ids == ids


async def test_choices_run_at_once_and_come_interleaved(pool):
    client = ScriptedClient(says(lambda request: f" number {request.request_id} is here", pool, 0.001))
    generator = TextGenerator(client, pool)
    stream = generator.generate(asked("x", SamplingParams(n=3), request_id="r"))
    chunks = [chunk async for chunk in stream]
    order = [chunk.index for chunk in chunks]
    assert order != sorted(order)
    for index in range(3):
        own = [chunk for chunk in chunks if chunk.index == index]
        assert "".join(chunk.text for chunk in own) == f" number r-{index} is here"
        assert own[0].num_prompt_tokens == 1
        assert [chunk.finish_reason for chunk in own][-1] is FinishReason.LENGTH
    assert client.aborted == []


async def test_stop_string_ends_the_stream_and_aborts_the_request(pool):
    client = ScriptedClient(says(lambda request: "one two three", pool))
    generator = TextGenerator(client, pool)
    chunks = [chunk async for chunk in generator.generate(asked("x", SamplingParams(stop=("two",)), request_id="r"))]
    assert "".join(chunk.text for chunk in chunks) == "one "
    assert chunks[-1].finish_reason is FinishReason.STOP
    assert chunks[-1].stop_reason == "two"
    assert client.aborted == ["r"]


async def test_a_choice_that_stops_leaves_the_others_running(pool):
    client = ScriptedClient(says(lambda r: "stop it" if r.request_id.endswith("0") else "go on and on", pool, 0.001))
    generator = TextGenerator(client, pool)
    texts = await collect(generator.generate(asked("x", SamplingParams(n=2, stop=("stop",)), request_id="r")))
    assert texts == {0: "", 1: "go on and on"}
    assert client.aborted == ["r-0"]


@pytest.mark.parametrize("n", [1, 3])
async def test_closing_the_stream_aborts_what_still_runs(pool, n):
    client = ScriptedClient(says(lambda request: "on and on", pool, 0.005))
    generator = TextGenerator(client, pool)
    async with aclosing(generator.generate(asked("x", SamplingParams(n=n), request_id="r"))) as stream:
        await anext(stream)
    assert sorted(client.aborted) == sorted(request.request_id for request in client.requests)
    assert len(client.requests) == n


@pytest.mark.parametrize("n", [1, 3])
async def test_cancelling_the_reader_aborts_what_still_runs(pool, n):
    client = ScriptedClient(says(lambda request: "on and on", pool, 0.05))
    generator = TextGenerator(client, pool)
    task = asyncio.create_task(collect(generator.generate(asked("x", SamplingParams(n=n), request_id="r"))))
    await asyncio.sleep(0.07)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(client.aborted) == n


@pytest.mark.parametrize("error", [EngineDeadError("gone"), QueueFullError("full", 7)])
async def test_error_of_one_choice_ends_the_request_and_aborts_the_others(pool, error):
    async def script(request: EngineRequest) -> AsyncIterator[EngineOutput]:
        if request.request_id == "r-1":
            raise error
        for _ in range(50):
            await asyncio.sleep(0.01)
            yield EngineOutput(request_id=request.request_id, new_token_ids=[65])

    client = ScriptedClient(script)
    generator = TextGenerator(client, pool)
    with pytest.raises(type(error)) as caught:
        await collect(generator.generate(asked("x", SamplingParams(n=3), request_id="r")))
    assert caught.value is error
    assert sorted(client.aborted) == ["r-0", "r-1", "r-2"]


async def test_engine_that_leaves_a_request_unfinished_is_an_error(pool):
    async def script(request: EngineRequest) -> AsyncIterator[EngineOutput]:
        yield EngineOutput(request_id=request.request_id, new_token_ids=[65])

    generator = TextGenerator(ScriptedClient(script), pool)
    with pytest.raises(RequestFailedError, match="without finishing"):
        await collect(generator.generate(asked("x", SamplingParams(), request_id="r")))


async def test_failure_to_make_text_of_one_request_leaves_others_alone(pool):
    async def script(request: EngineRequest) -> AsyncIterator[EngineOutput]:
        bad = request.request_id == "bad"
        for position in range(5):
            await asyncio.sleep(0.005)
            reason = FinishReason.LENGTH if position == 4 else None
            yield EngineOutput(request_id=request.request_id, new_token_ids=["?" if bad else 65], finish_reason=reason)

    client = ScriptedClient(script)
    generator = TextGenerator(client, pool)
    good = asyncio.create_task(collect(generator.generate(asked("x", SamplingParams(), request_id="good"))))
    with pytest.raises(RequestFailedError):
        await collect(generator.generate(asked("x", SamplingParams(), request_id="bad")))
    assert await good == {0: pool.tokenizer.decode([65] * 5)}
    assert client.aborted == ["bad"]


async def test_engine_that_is_not_ready_takes_no_request(pool):
    client = ScriptedClient(says(lambda request: "x", pool))
    client.ready = None
    with pytest.raises(EngineNotReadyError):
        await collect(TextGenerator(client, pool).generate(asked("x", SamplingParams(), request_id="r")))


async def test_text_that_cannot_fit_is_refused_before_it_is_tokenized(pool, monkeypatch):
    client = ScriptedClient(says(lambda request: "x", pool))
    generator = TextGenerator(client, pool)
    monkeypatch.setattr(type(pool.tokenizer), "encode", lambda *_args, **_kwargs: pytest.fail("was tokenized"))
    with pytest.raises(InvalidRequestError, match="200 tokens"):
        await collect(generator.generate(asked("x" * 1_000_000, SamplingParams(), request_id="r")))


def test_sampling_takes_the_clients_values_then_the_checkpoints_then_ours():
    generator = TextGenerator(None, None, default_sampling={"temperature": 0.6, "top_p": 0.9})  # type: ignore[arg-type]
    sampling = generator.sampling_params({"temperature": 0.1, "max_tokens": 5})
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_tokens) == (0.1, 0.9, 0, 5)
    with pytest.raises(InvalidRequestError, match="'temprature'"):
        generator.sampling_params({"temprature": 1})
    with pytest.raises(InvalidRequestError, match="top_p"):
        generator.sampling_params({"top_p": 2})


async def test_checkpoint_says_what_ends_generation_and_how_to_sample(tmp_path):
    directory = save_tokenizer(tmp_path, "byte_level_bpe")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 456,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "eos_token_id": 450,
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [451, 450], "temperature": 0.7, "top_k": 20, "do_sample": True})
    )
    for mode, eos, sampling in (
        ("auto", (451, 450, 452), {"temperature": 0.7, "top_k": 20}),
        ("none", (450, 452), {}),
    ):
        settings = PagodaConfig(model=str(directory), generation_config=mode, default_max_tokens=11)
        pool = TokenizerPool.from_config(settings)
        await pool.start()
        generator = TextGenerator.from_config(ScriptedClient(says(lambda _: "x", pool)), pool, settings)
        assert generator.eos_token_ids == eos
        assert generator.default_sampling == sampling
        assert generator.default_max_tokens == 11
        assert pool.max_model_len == 200  # the first chat is bounded too
        await pool.shutdown()
