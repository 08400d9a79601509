"""A gRPC server of ours on a free port in a thread of its own, over a generator whose answers are known."""

from __future__ import annotations

import asyncio
import math
import struct
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from types import SimpleNamespace
from typing import Any, TypeVar

import grpc

from pagoda.config.schema import PagodaConfig
from pagoda.engine.health import EngineState
from pagoda.errors import ErrorKind, InvalidRequestError, error_of
from pagoda.request import GenerationRequest
from pagoda.sampling.output import FinishReason
from pagoda.sampling.params import SamplingParams
from pagoda.serving.build import make_context
from pagoda.serving.grpc.messages import SERVICE_NAME, message_class, service_methods
from pagoda.serving.grpc.server import GrpcServer
from pagoda.serving.v2.service import V2Service
from pagoda.text.output import GenerationChunk
from tests.support.fake_engine import FakeEngineClient
from tests.support.jobs import AnyNumber

T = TypeVar("T")
MAX_MODEL_LEN = 64
HANG = "hang"
"""A prompt that gives one token and then nothing more."""
WAIT = "wait"
"""A prompt that gives nothing at all."""


class FakeGenerator:
    """Answers a prompt with its own characters in capitals, one token each; ends with `stop`, or at max_tokens.

    `fail:KIND` fails with that kind of error after one token. `started` and `left` count sequences that began, and those
    whose reader left before their end; `num_running` have not ended; `tenants` has whose they all were.
    """

    client = AnyNumber()
    pool = SimpleNamespace(max_characters=None)

    def __init__(self) -> None:
        self.started: list[str] = []
        self.left: list[str] = []
        self.tenants: list[str] = []
        self.num_running = 0
        self.seconds_per_token = 0.0

    def sampling_params(self, given: Mapping[str, Any]) -> SamplingParams:
        return SamplingParams(**given)

    async def generate(
        self, request: GenerationRequest, places: object = None
    ) -> AsyncGenerator[GenerationChunk, None]:
        prompt, params = request.prompt, request.params
        self.tenants.append(request.tenant)
        text = prompt if isinstance(prompt, str) else "".join(chr(97 + token_id % 26) for token_id in prompt)
        if not text or len(text) >= MAX_MODEL_LEN:
            raise InvalidRequestError(f"the prompt has {len(text)} tokens; 1 to {MAX_MODEL_LEN - 1} are allowed")
        self.started.append(request.request_id)
        self.num_running += 1
        is_over = False
        try:
            if text == WAIT:
                await asyncio.Event().wait()
            limit = params.max_tokens or MAX_MODEL_LEN - len(text)
            for position, character in enumerate(text[:limit]):
                is_last = position == min(len(text), limit) - 1
                for index in range(params.n):
                    yield GenerationChunk(
                        index=index,
                        text=character.upper(),
                        token_ids=[ord(character.upper())],
                        finish_reason=self._reason(len(text), limit) if is_last else None,
                        num_prompt_tokens=len(text) if position == 0 else None,
                    )
                if text == HANG:
                    await asyncio.Event().wait()
                if text.startswith("fail:"):
                    raise error_of(ErrorKind(text.removeprefix("fail:")), "failed as asked")
                if text == "bug":
                    raise ZeroDivisionError("a secret of the implementation")
                await asyncio.sleep(self.seconds_per_token)
            is_over = True
        except (asyncio.CancelledError, GeneratorExit):
            if not is_over:
                self.left.append(request.request_id)
            raise
        finally:
            self.num_running -= 1

    @staticmethod
    def _reason(num_characters: int, limit: int) -> FinishReason:
        return FinishReason.STOP if num_characters <= limit else FinishReason.LENGTH


class GrpcHarness:
    """The server, and a synchronous client of it that uses our own message classes."""

    def __init__(self, *, is_ready: bool = True, **settings: Any) -> None:
        self.config = PagodaConfig(**{"model_name": "demo", "host": "127.0.0.1", "grpc_port": 0, **settings})
        self.engine = FakeEngineClient()
        self.generator = FakeGenerator()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._is_ready = is_ready
        self._channel: grpc.Channel | None = None

    def __enter__(self) -> GrpcHarness:
        self._thread.start()
        try:
            self.run(self._start)
        except BaseException:
            self._end_loop()
            raise
        return self

    async def _start(self) -> None:
        context = make_context(self.config, self.engine)
        self._tracing = context.tracing
        context.models.default.runner.attach(self.generator)  # type: ignore[arg-type]
        self.health, self.metrics, self.keys = context.health, context.metrics, context.keys
        self.memory = context.decoding.memory
        self.engine.health.enter_phase("weights")
        self.health.text_is_ready()
        if self._is_ready:
            await self.engine.start()
        self.server = GrpcServer(context, V2Service(context.models, context.health, context.repository))
        await self.server.start()

    def run(self, make: Callable[..., Awaitable[T]], *arguments: Any) -> T:
        """The result of a coroutine function, run in the server's loop."""

        async def call() -> T:
            return await make(*arguments)

        return asyncio.run_coroutine_threadsafe(call(), self._loop).result(timeout=30)

    def do(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call a plain function in the server's loop."""

        async def call() -> None:
            function(*arguments)

        self.run(call)

    def set_engine_state(self, state: EngineState, cause: str = "as the test wants") -> None:
        """Let the engine change its state."""
        self.do(self.engine.health.transition, state, cause)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.port}"

    @property
    def channel(self) -> grpc.Channel:
        if self._channel is None:
            self._channel = grpc.insecure_channel(self.address)
        return self._channel

    def stub(self, method: str, channel: grpc.Channel | None = None, *, raw: bool = False) -> Any:
        """The callable of one method of the service; with `raw` it takes bytes as they are."""
        return call_method(channel or self.channel, method, raw=raw)

    def infer(self, request: Any, **options: Any) -> Any:
        return self.stub("ModelInfer")(request, timeout=options.pop("timeout", 20), **options)

    def __exit__(self, *exception: object) -> None:
        if self._channel is not None:
            self._channel.close()
        self.run(self.server.stop, 0)
        self.run(self._tracing.close)
        self._end_loop()

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        self._loop.close()


def call_method(channel: grpc.Channel, method: str, *, raw: bool = False) -> Any:
    """The callable of one method of the service on `channel`; with `raw` it takes bytes as they are."""
    descriptor = next(m for m in service_methods() if m.name == method)
    response = message_class(descriptor.output_type.name)
    make = channel.stream_stream if descriptor.client_streaming else channel.unary_unary
    return make(
        f"/{SERVICE_NAME}/{method}",
        request_serializer=None if raw else lambda message: message.SerializeToString(),
        response_deserializer=response.FromString,
    )


def infer_request(text: str | list[str] | None = "hello", **fields: Any) -> Any:
    """A ModelInferRequest with typed contents; `parameters` take Python values."""
    parameters = fields.pop("parameters", {})
    request = message_class("ModelInferRequest")(**{"model_name": "demo", **fields})
    if text is not None:
        texts = [text] if isinstance(text, str) else text
        tensor = request.inputs.add(name="text_input", datatype="BYTES", shape=[len(texts)])
        tensor.contents.bytes_contents.extend(item.encode() for item in texts)
    for name, value in parameters.items():
        choice = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}[type(value)]
        setattr(request.parameters[name], choice, value)
    return request


def outputs_of(response: Any) -> dict[str, list[Any]]:
    """The values of every output: raw contents, BYTES or INT64."""
    assert not any(output.HasField("contents") for output in response.outputs)
    values: dict[str, list[Any]] = {}
    for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        found = values[output.name] = []
        if output.datatype == "INT64":
            found += struct.unpack(f"<{len(raw) // 8}q", raw)
        while output.datatype == "BYTES" and raw:
            (size,) = struct.unpack_from("<I", raw)
            found.append(raw[4 : 4 + size])
            raw = raw[4 + size :]
        assert len(found) == math.prod(output.shape), output
    return values


def texts_of(response: Any) -> list[str]:
    """The `text_output` of a response."""
    return [item.decode() for item in outputs_of(response)["text_output"]]
