"""The endpoints under load: one class per protocol, over one HTTP session.

An adapter's `send` calls `on_piece` when a piece of text has arrived, before it is processed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson
from typing_extensions import override

from pagoda.benchmarking.prompts import Content

DONE = b"[DONE]"
DATA = b"data:"
MAX_ERROR_CHARACTERS = 300
READ_BUFFER_BYTES = 2**20


class RequestFailure(Exception):  # noqa: N818 - a result that is counted, not an error of this program
    """A failed request. `kind` is the category it is counted in; the text has the details."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


@dataclass(slots=True)
class Answer:
    """The response. Counts are the server's own; None where it gives none. `pieces` is the number of text events."""

    text: str = ""
    pieces: int = 0
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    ended: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The server, and what all requests have in common. `extra_body`: further members of the body, which take precedence."""

    base_url: str
    model: str
    api_key: str | None = None
    ignore_eos: bool = True
    temperature: float = 0.0
    extra_body: Mapping[str, Any] = field(default_factory=dict)

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"}

    def sampling(self, output_tokens: int) -> dict[str, Any]:
        """Sampling parameters by the names that the routes share."""
        given = {"max_tokens": output_tokens, "temperature": self.temperature}
        return {**given, "ignore_eos": True} if self.ignore_eos else given


class Endpoint(ABC):
    """One kind of endpoint. `takes_token_ids`: prompts may be ids, so that their lengths are exact."""

    takes_token_ids = True
    streams = True

    @abstractmethod
    async def send(self, prompt: tuple[Content, ...], output_tokens: int, on_piece: Callable[[], None]) -> Answer:
        """Send a request and read the response to its end. `prompt`: turns of user and assistant, the user last.

        Raises:
            RequestFailure: there was no complete answer.
        """

    @abstractmethod
    async def close(self) -> None:
        """Close all connections."""


class HttpEndpoint(Endpoint):
    """What the routes over HTTP share: a session, errors by kind, events."""

    def __init__(self, target: Target, timeout_seconds: float) -> None:
        self.target = target
        # No limit on connections: a client that queues would hide the server's own queue. The loop must be running.
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=timeout_seconds),
            headers=target.headers,
            read_bufsize=READ_BUFFER_BYTES,
        )

    @override
    async def close(self) -> None:
        await self._session.close()

    @abstractmethod
    def request(self, prompt: tuple[Content, ...], output_tokens: int) -> tuple[str, dict[str, Any]]:
        """Path and body."""

    @abstractmethod
    def take(self, content: dict[str, Any], answer: Answer) -> str:
        """Update `answer` from an event or body; returns its text."""

    @override
    async def send(self, prompt: tuple[Content, ...], output_tokens: int, on_piece: Callable[[], None]) -> Answer:
        path, body = self.request(prompt, output_tokens)
        answer = Answer()
        try:
            async with self._session.post(
                self.target.base_url + path, data=orjson.dumps(body), headers={"Content-Type": "application/json"}
            ) as response:
                await _check_status(response)
                async for content in self._contents(response):
                    self._take_content(content, answer, on_piece)
        except TimeoutError as error:
            raise RequestFailure("timeout", "no complete answer in time") from error
        except aiohttp.ClientConnectorError as error:
            raise RequestFailure("connection refused", str(error)) from error
        except aiohttp.ClientError as error:
            raise RequestFailure("connection lost", f"{type(error).__name__}: {error}") from error
        if not answer.ended:
            raise RequestFailure("incomplete", "the response ended without a finish reason")
        return answer

    def _take_content(self, content: dict[str, Any], answer: Answer, on_piece: Callable[[], None]) -> None:
        if "error" in content:
            raise RequestFailure("error in stream", str(content["error"])[:MAX_ERROR_CHARACTERS])
        text = self.take(content, answer)
        if text:
            answer.text += text
            answer.pieces += 1
            on_piece()

    async def _contents(self, response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
        """The events of a stream, or the one body of a whole answer."""
        if not self.streams:
            yield _parsed(await response.read())
            return
        async for line in response.content:
            if not line.startswith(DATA):
                continue
            data = line[len(DATA) :].strip()
            if data == DONE:
                return
            yield _parsed(data)


class OpenAICompletions(HttpEndpoint):
    """`/v1/completions`, streamed."""

    @override
    def request(self, prompt: tuple[Content, ...], output_tokens: int) -> tuple[str, dict[str, Any]]:
        body = {"prompt": joined(prompt), **_streamed(self.target, output_tokens)}
        return "/v1/completions", body

    @override
    def take(self, content: dict[str, Any], answer: Answer) -> str:
        _take_usage(content, answer)
        text = ""
        for choice in content.get("choices", ()):
            text += choice.get("text") or ""
            answer.ended |= choice.get("finish_reason") is not None
        return text


class OpenAIChat(HttpEndpoint):
    """`/v1/chat/completions`, streamed. Prompts are text: the server's template makes tokens of them."""

    takes_token_ids = False

    @override
    def request(self, prompt: tuple[Content, ...], output_tokens: int) -> tuple[str, dict[str, Any]]:
        messages = [
            {"role": "assistant" if number % 2 else "user", "content": text} for number, text in enumerate(prompt)
        ]
        return "/v1/chat/completions", {"messages": messages, **_streamed(self.target, output_tokens)}

    @override
    def take(self, content: dict[str, Any], answer: Answer) -> str:
        _take_usage(content, answer)
        text = ""
        for choice in content.get("choices", ()):
            delta = choice.get("delta") or {}
            text += (delta.get("content") or "") + (delta.get("reasoning_content") or "")
            answer.ended |= choice.get("finish_reason") is not None
        return text


class V2Generate(HttpEndpoint):
    """`/v2/models/M/generate_stream`, Triton's generate extension."""

    @override
    def request(self, prompt: tuple[Content, ...], output_tokens: int) -> tuple[str, dict[str, Any]]:
        content = joined(prompt)
        given = {"text_input": content} if isinstance(content, str) else {"input_ids": content}
        parameters = {**self.target.sampling(output_tokens), **self.target.extra_body}
        return f"/v2/models/{self.target.model}/generate_stream", {**given, "parameters": parameters}

    @override
    def take(self, content: dict[str, Any], answer: Answer) -> str:
        if content.get("finish_reason") is not None:
            answer.ended = True
            answer.prompt_tokens = content.get("num_input_tokens")
            answer.output_tokens = content.get("num_output_tokens")
        return str(content.get("text_output") or "")


class V2Infer(HttpEndpoint):
    """`/v2/models/M/infer`: one body, so that the first token comes with the last."""

    streams = False

    @override
    def request(self, prompt: tuple[Content, ...], output_tokens: int) -> tuple[str, dict[str, Any]]:
        content = joined(prompt)
        if isinstance(content, str):
            tensor = {"name": "text_input", "shape": [1], "datatype": "BYTES", "data": [content]}
        else:
            tensor = {"name": "input_ids", "shape": [len(content)], "datatype": "INT64", "data": content}
        parameters = {**self.target.sampling(output_tokens), **self.target.extra_body}
        return f"/v2/models/{self.target.model}/infer", {"inputs": [tensor], "parameters": parameters}

    @override
    def take(self, content: dict[str, Any], answer: Answer) -> str:
        outputs = {tensor["name"]: tensor["data"] for tensor in content.get("outputs", ())}
        if "text_output" in outputs:
            answer.ended = True
            answer.prompt_tokens = outputs.get("num_input_tokens", [None])[0]
            answer.output_tokens = outputs.get("num_output_tokens", [None])[0]
        return str(outputs.get("text_output", [""])[0])


def joined(prompt: tuple[Content, ...]) -> Content:
    """A conversation as one text, or the ids of its only turn."""
    if len(prompt) == 1:
        return prompt[0]
    assert all(isinstance(part, str) for part in prompt), "a conversation of several turns is text"
    return "\n".join(str(part) for part in prompt)


def _streamed(target: Target, output_tokens: int) -> dict[str, Any]:
    return {
        "model": target.model,
        **target.sampling(output_tokens),
        "stream": True,
        "stream_options": {"include_usage": True},
        **target.extra_body,
    }


def _take_usage(content: dict[str, Any], answer: Answer) -> None:
    usage = content.get("usage")
    if usage:
        answer.prompt_tokens = usage.get("prompt_tokens")
        answer.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        answer.output_tokens = usage.get("completion_tokens")


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        content = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise RequestFailure("not JSON", data[:MAX_ERROR_CHARACTERS].decode(errors="replace")) from error
    if not isinstance(content, dict):
        raise RequestFailure("not JSON", f"no object: {data[:MAX_ERROR_CHARACTERS]!r}")
    return content


async def _check_status(response: aiohttp.ClientResponse) -> None:
    if response.status != 200:
        text = await response.text(errors="replace")
        raise RequestFailure(f"HTTP {response.status}", text[:MAX_ERROR_CHARACTERS])


async def get_json(target: Target, path: str, timeout_seconds: float, body: object | None = None) -> Any:
    """The answer of one GET (or, with `body`, POST) outside of the measurement.

    Raises:
        RequestFailure: no connection, an error status, or a response that is not JSON.
    """
    timeout = aiohttp.ClientTimeout(total=timeout_seconds)
    try:
        async with aiohttp.ClientSession(timeout=timeout, headers=target.headers) as session:
            method = "GET" if body is None else "POST"
            async with session.request(method, target.base_url + path, json=body) as response:
                await _check_status(response)
                return _parsed(await response.read())
    except aiohttp.ClientConnectorError as error:
        raise RequestFailure("connection refused", str(error)) from error
    except (TimeoutError, aiohttp.ClientError) as error:
        raise RequestFailure("connection lost", f"{type(error).__name__}: {error}") from error
