"""Clients of every door of a real server, who keep books: what each asked, what came, and how it ended.

An `Answer` is checked as it comes in: exactly one end, and nothing after it. A connection that closes without saying why, an
answer after the end, a stream with `[DONE]` behind an error: each is an `AssertionError` of the client that saw it.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc
import httpx

from pagoda.serving.grpc.messages import SERVICE_NAME, message_class, service_methods
from tests.support.grpc_harness import texts_of

DOORS = ("generate", "generate_stream", "infer", "completions", "chat", "grpc", "grpc_stream")
WHOLE_DOORS = ("generate", "infer", "chat", "grpc")  # their answers come in one piece
CHAT_TEXTS = frozenset({"chat"})
"""Doors whose prompt goes through the chat template, so the text is another."""
RETRIABLE_KINDS = ("queue_full", "not_ready", "engine_dead")
RETRIABLE_STATUSES = (429, 503)
RETRIABLE_CODES = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)


class Server(Protocol):
    """Where REST and gRPC are."""

    port: int
    grpc_port: int


@dataclass(frozen=True)
class Ask:
    """One greedy request."""

    door: str
    prompt: str
    max_tokens: int

    @property
    def text_key(self) -> tuple[bool, str, int]:
        """Requests with equal keys have equal texts."""
        return self.door in CHAT_TEXTS, self.prompt, self.max_tokens


@dataclass
class Answer:
    """What one request got. `end`: finished, failed (accepted, then an error), refused (an error at once) or left."""

    ask: Ask
    text: str = ""
    end: str = ""
    error: str = ""
    is_retriable: bool = False

    def close(self, end: str, error: str = "", *, is_retriable: bool = False) -> None:
        """The request ends; it does so once."""
        assert not self.end, f"{self.ask} ended as {self.end} ({self.error}) and again as {end} ({error})"
        self.end, self.error, self.is_retriable = end, error, is_retriable


@dataclass
class Books:
    """All answers of a load."""

    answers: list[Answer] = field(default_factory=list)

    def count(self) -> Counter[str]:
        """How many ended in which way."""
        return Counter(answer.end for answer in self.answers)

    @property
    def summary(self) -> str:
        """The count in words."""
        return ", ".join(f"{number} {end}" for end, number in sorted(self.count().items()))

    def of(self, *ends: str) -> list[Answer]:
        """The answers that ended like this."""
        return [answer for answer in self.answers if answer.end in ends]

    def check(self, references: dict[tuple[bool, str, int], str]) -> None:
        """Every request ended, and what it got is what it would have got alone: all of it, or the beginning."""
        for answer in self.answers:
            assert answer.end, f"{answer.ask} never ended"
            reference = references[answer.ask.text_key]
            if answer.end == "finished":
                assert answer.text == reference, f"{answer.ask}: {answer.text!r} is not {reference!r}"
            else:
                shown = answer.text.rstrip("\ufffd")
                assert reference.startswith(shown), f"{answer.ask} began {shown!r}, not like {reference!r}"


class Clients:
    """Connections to one server, with an API key where it asks for one; used inside of one event loop, as a context."""

    def __init__(
        self, server: Server, seconds: float = 120.0, key: str | None = None, *, host: str = "127.0.0.1"
    ) -> None:
        self._seconds = seconds
        self._headers = {} if key is None else {"authorization": f"Bearer {key}"}
        self._http = httpx.AsyncClient(
            base_url=f"http://{host}:{server.port}",
            timeout=seconds,
            limits=httpx.Limits(max_connections=None),
            headers=self._headers,
        )
        self._channel = grpc.aio.insecure_channel(f"{host}:{server.grpc_port}")

    async def __aenter__(self) -> Clients:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._http.aclose()
        await self._channel.close()

    async def run(self, ask: Ask, leave_after: float | None = None) -> Answer:
        """Ask, and read the answer to its end, or leave after so many pieces of it (0: before the first).

        An answer that comes in one piece is left before it.
        """
        answer = Answer(ask)
        pieces = {
            "generate": self._whole,
            "infer": self._whole,
            "chat": self._whole,
            "generate_stream": self._events,
            "completions": self._events,
            "grpc": self._grpc,
            "grpc_stream": self._grpc_stream,
        }[ask.door](answer)
        if leave_after is None:
            async for _ in pieces:
                pass
            assert answer.end, f"{ask} was closed without an end after {answer.text!r}"
        else:
            await self._leave(answer, pieces, leave_after)
        return answer

    @staticmethod
    async def _leave(answer: Answer, pieces: AsyncGenerator[None, None], after: float) -> None:
        async with aclosing(pieces):
            num_read = 0
            with suppress(TimeoutError):
                async with asyncio.timeout(0.05 if after == 0 or answer.ask.door in WHOLE_DOORS else None):
                    async for _ in pieces:
                        num_read += 1
                        if num_read >= after:
                            break
        if not answer.end:
            answer.close("left")

    async def _whole(self, answer: Answer) -> AsyncGenerator[None, None]:
        path, body = rest_request(answer.ask)
        response = await self._http.post(path, json=body)
        if response.status_code != 200:
            _close_with_error(answer, response)
        else:
            answer.text = text_of_whole(answer.ask.door, response.json())
            answer.close("finished")
        yield

    async def _events(self, answer: Answer) -> AsyncGenerator[None, None]:
        path, body = rest_request(answer.ask)
        async with self._http.stream("POST", path, json=body) as response:
            if response.status_code != 200:
                await response.aread()
                _close_with_error(answer, response)
                return
            async for line in response.aiter_lines():
                if line and not line.startswith(":"):
                    take_event(answer, line)
                    yield

    async def _grpc(self, answer: Answer) -> AsyncGenerator[None, None]:
        try:
            response = await self._stub("ModelInfer")(
                grpc_request(answer.ask), timeout=self._seconds, metadata=self._metadata
            )
        except grpc.aio.AioRpcError as error:
            _close_with_status(answer, error)
        else:
            answer.text = texts_of(response)[0]
            answer.close("finished")
        yield

    async def _grpc_stream(self, answer: Answer) -> AsyncGenerator[None, None]:
        async def requests() -> AsyncIterator[Any]:
            yield grpc_request(answer.ask)

        call = self._stub("ModelStreamInfer")(requests(), timeout=self._seconds, metadata=self._metadata)
        try:
            async for message in call:
                response = message.infer_response
                if message.error_message:
                    code = grpc.StatusCode[response.parameters["error_code"].string_param]
                    end = "failed" if answer.text else "refused"
                    answer.close(end, message.error_message, is_retriable=code in RETRIABLE_CODES)
                else:
                    answer.text += texts_of(response)[0]
                    if response.parameters["triton_final_response"].bool_param:
                        answer.close("finished")
                yield
        except grpc.aio.AioRpcError as error:
            # A stream outlives its requests: that it is closed is nothing to one that has ended.
            if not answer.end:
                _close_with_status(answer, error)
        finally:
            call.cancel()

    @property
    def _metadata(self) -> tuple[tuple[str, str], ...]:
        return tuple(self._headers.items())

    def _stub(self, method: str) -> Any:
        descriptor = next(entry for entry in service_methods() if entry.name == method)
        make = self._channel.stream_stream if descriptor.client_streaming else self._channel.unary_unary
        return make(
            f"/{SERVICE_NAME}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=message_class(descriptor.output_type.name).FromString,
        )


def rest_request(ask: Ask) -> tuple[str, dict[str, Any]]:
    """Path and body of a request over REST."""
    sampling = {"max_tokens": ask.max_tokens, "temperature": 0, "ignore_eos": True}
    if ask.door == "infer":
        tensor = {"name": "text_input", "shape": [1], "datatype": "BYTES", "data": [ask.prompt]}
        return "/v2/models/demo/infer", {"inputs": [tensor], "parameters": sampling}
    if ask.door == "completions":
        return "/v1/completions", {"prompt": ask.prompt, "stream": True, **sampling}
    if ask.door == "chat":
        return "/v1/chat/completions", {"messages": [{"role": "user", "content": ask.prompt}], **sampling}
    return f"/v2/models/demo/{ask.door}", {"text_input": ask.prompt, "parameters": sampling}


def grpc_request(ask: Ask) -> Any:
    """The message of a request over gRPC."""
    request = message_class("ModelInferRequest")(model_name="demo")
    tensor = request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(ask.prompt.encode())
    request.parameters["max_tokens"].int64_param = ask.max_tokens
    request.parameters["temperature"].double_param = 0.0
    request.parameters["ignore_eos"].bool_param = True
    return request


def text_of_whole(door: str, content: dict[str, Any]) -> str:
    """The text in an answer that is one body."""
    if door == "infer":
        (output,) = [entry for entry in content["outputs"] if entry["name"] == "text_output"]
        return str(output["data"][0])
    if door == "chat":
        return str(content["choices"][0]["message"]["content"])
    return str(content["text_output"])


def take_event(answer: Answer, line: str) -> None:
    """Take in one line of a stream of events."""
    data = line.removeprefix("data: ")
    if data == "[DONE]":
        assert answer.end == "finished", f"{answer.ask} is [DONE] after {answer.end or 'no end'}"
        return
    content = json.loads(data)
    if "error" in content:
        code = content["code"] if "code" in content else content["error"]["code"]
        answer.close("failed", str(content["error"]), is_retriable=code in RETRIABLE_KINDS)
        return
    piece = content["choices"][0] if "choices" in content else content
    answer.text += piece["text"] if "choices" in content else piece["text_output"]
    if piece.get("finish_reason") is not None:
        answer.close("finished")


def _close_with_error(answer: Answer, response: httpx.Response) -> None:
    assert "error" in response.json(), response.text
    is_retriable = response.status_code in RETRIABLE_STATUSES
    assert is_retriable == ("retry-after" in response.headers), response.headers
    answer.close("refused", f"{response.status_code} {response.text}", is_retriable=is_retriable)


def _close_with_status(answer: Answer, error: grpc.aio.AioRpcError) -> None:
    end = "failed" if answer.text else "refused"
    answer.close(end, f"{error.code().name} {error.details()}", is_retriable=error.code() in RETRIABLE_CODES)


async def run_all(clients: Clients, asks: Iterable[Ask]) -> Books:
    """All of `asks` at once."""
    return Books(await asyncio.gather(*(clients.run(ask) for ask in asks)))


@asynccontextmanager
async def load(
    clients: Clients, asks: list[Ask], *, num_clients: int, drop: float = 0.0, seed: int = 0
) -> AsyncIterator[Books]:
    """Clients that ask one thing after another while the block runs, and end what they are at when it is left.

    `drop`: the share of requests whose client means to leave in the middle; a short answer may be over by then.
    """
    books = Books()
    is_over = False

    async def one(number: int) -> None:
        choice = random.Random(f"client {seed} {number}")
        while not is_over:
            leaves = choice.random() < drop
            answer = await clients.run(choice.choice(asks), choice.choice((0, 1, 2, 5, 9)) if leaves else None)
            books.answers.append(answer)
            if answer.end in ("refused", "failed"):
                await asyncio.sleep(0.5)

    tasks = [asyncio.create_task(one(number)) for number in range(num_clients)]
    try:
        yield books
        is_over = True
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
