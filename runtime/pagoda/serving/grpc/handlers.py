"""What every RPC passes: parsing, API key, errors as status codes, log lines, and the end of streams at shutdown.

A large message is in memory twice: as it came, and as token ids or texts. See `InferMessage`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass

from pagoda.errors import (
    DeadlineExceededError,
    EngineNotReadyError,
    ErrorKind,
    InvalidRequestError,
)
from pagoda.serving.auth import audit
from pagoda.serving.auth.routes import METHODS
from pagoda.serving.auth.scopes import Access
from pagoda.serving.context import ServingContext
from pagoda.serving.grpc.call import Call, CallError
from pagoda.serving.grpc.codec import InferMessage
from pagoda.serving.grpc.connection import Handler
from pagoda.serving.grpc.message_reader import MessageReader, Received
from pagoda.serving.grpc.messages import SERVICE_NAME, ModelInferRequest, service_methods
from pagoda.serving.grpc.service import ClientGoneError, InferenceService
from pagoda.serving.grpc.wire import check_cost
from pagoda.serving.inference_headers import inference_headers_var, read_headers
from pagoda.serving.json_decoding import LARGE_BYTES
from pagoda.serving.stalled_client import StalledClientTimeout
from pagoda.serving.status import ErrorReport, report
from pagoda.serving.tracing.seam import CallSpan
from pagoda.serving.v2.service import V2Service

logger = logging.getLogger("pagoda.serving.grpc")

METHODS_WITH_TENSORS = frozenset({"ModelInfer", "ModelStreamInfer"})
LOGGED_METHODS = METHODS_WITH_TENSORS
# A status message travels percent-encoded in a header, of which clients take 8 KiB by default.
MAX_STATUS_MESSAGE_BYTES = 1536

Parser = Callable[[Received], Awaitable[Any]]
UnaryMethod = Callable[[Any, float | None], Awaitable[Any]]


class InferenceHandlers:
    """The handlers of the service; `stopping` is set when the server shuts down."""

    def __init__(
        self, context: ServingContext, service: V2Service, reader: MessageReader, stopping: asyncio.Event
    ) -> None:
        self._context = context
        self._reader = reader
        self._send_timeout = context.config.send_timeout_seconds
        self._stopping = stopping
        self._service = InferenceService(
            service, context.decoding, lambda error: self._report("ModelStreamInfer", error)
        )

    def handlers(self) -> dict[str, Handler]:
        """A handler for each method of the descriptor, by its path; one that is not implemented fails here, at start."""
        service = self._service
        unary: dict[str, UnaryMethod] = {
            "ServerLive": service.server_live,
            "ServerReady": service.server_ready,
            "ModelReady": service.model_ready,
            "ServerMetadata": service.server_metadata,
            "ModelMetadata": service.model_metadata,
            "ModelInfer": service.model_infer,
            "ModelConfig": service.model_config,
            "ModelStatistics": service.model_statistics,
            "RepositoryIndex": service.repository_index,
            "RepositoryModelLoad": service.repository_model_load,
            "RepositoryModelUnload": service.repository_model_unload,
        }
        handlers: dict[str, Handler] = {}
        for method in service_methods():
            parse = self._parser(method)
            handlers[f"/{SERVICE_NAME}/{method.name}"] = (
                self._unary(method.name, parse, unary[method.name], is_empty=not method.input_type.fields)
                if method.name in unary
                else self._stream(method.name, parse)
            )
        return handlers

    def _parser(self, method: MethodDescriptor) -> Parser:
        """Makes the messages of a method; a large one beside the event loop, if it holds no more than a request may."""
        if method.name in METHODS_WITH_TENSORS:
            return self._parse_infer
        make = GetMessageClass(method.input_type).FromString

        async def parse(received: Received) -> Any:
            return _parsed(make, received.content)

        return parse

    async def _parse_infer(self, received: Received) -> InferMessage:
        content = received.content
        if len(content) <= LARGE_BYTES:
            return InferMessage(_parsed(ModelInferRequest.FromString, content), on_release=received.release)
        max_characters = self._context.models.json_limits.max_characters

        def checked() -> InferMessage:
            split = check_cost(content, ModelInferRequest.DESCRIPTOR, max_characters)
            return InferMessage(_parsed(ModelInferRequest.FromString, split.rest), split.contents, received.release)

        return await self._context.decoding.run(len(content), checked)

    def _unary(self, name: str, parse: Parser, method: UnaryMethod, *, is_empty: bool) -> Handler:
        """`is_empty`: the request has no fields, so nothing of it is received."""
        access = _access_of(name)
        longest = None if name in METHODS_WITH_TENSORS else LARGE_BYTES

        async def handle(call: Call) -> bytes | None:
            async def respond() -> Any:
                is_known = await self.admit(access, call)
                if is_empty:
                    received: Received | None = Received(b"")
                elif is_known:
                    call.works()
                    received = await self._reader.read(call, longest)
                else:
                    received = await self._reader.read_unknown(call)
                    call.works()
                if received is None:
                    raise InvalidRequestError("the call has no message")
                try:
                    return await method(await parse(received), call.time_remaining())
                finally:
                    received.release()

            response = await self._guard(name, call, respond)
            serialized: bytes = response.SerializeToString()
            return serialized

        return handle

    def _stream(self, name: str, parse: Parser) -> Handler:
        access = _access_of(name)

        async def handle(call: Call) -> None:
            one_at_a_time = asyncio.Lock()
            stalled = asyncio.Event()
            watch = StalledClientTimeout(self._send_timeout, TimeoutError)

            async def write(message: Any) -> None:
                async with one_at_a_time:
                    if stalled.is_set():
                        raise ClientGoneError
                    try:
                        # Those of a sequence that goes on are serialized already.
                        serialized = message if isinstance(message, bytes) else message.SerializeToString()
                        await watch.run(call.write(serialized))
                    except TimeoutError as error:
                        stalled.set()
                        raise ClientGoneError from error

            async def respond() -> None:
                await self.admit(access, call)
                call.works()
                messages = self._messages(parse, call, stalled, access)
                await self._service.model_stream_infer(messages, write, call.time_remaining)
                if stalled.is_set():
                    raise DeadlineExceededError(f"no response was read for {self._send_timeout:g} s")

            try:
                await self._guard(name, call, respond)
            finally:
                watch.close()

        return handle

    async def _guard(self, name: str, call: Call, respond: Callable[[], Awaitable[Any]]) -> Any:
        """The response of `respond`, or the status of its error; one log line either way."""
        with (
            audit.recorded(_access_of(name), name, call.address, lambda: call.code.name),
            self._span(name, call) as call.span,
        ):
            return await self._guarded(name, call, respond)

    def _span(self, name: str, call: Call) -> CallSpan:
        def status() -> tuple[int, str]:
            return call.code.value[0], call.code.name

        return self._context.tracing.grpc_call(f"{SERVICE_NAME}/{name}", call.metadata.get, status)

    async def _guarded(self, name: str, call: Call, respond: Callable[[], Awaitable[Any]]) -> Any:
        started = time.monotonic()
        level = logging.INFO if name in LOGGED_METHODS else logging.DEBUG
        try:
            response = await respond()
        except asyncio.CancelledError:
            logger.log(level, "%s cancelled after %.3f s", name, time.monotonic() - started)
            raise
        except CallError:
            raise
        except Exception as error:  # whatever it is, the client gets a status and the log the rest
            failure = self._report(name, error)
        else:
            logger.log(level, "%s OK in %.3f s", name, time.monotonic() - started)
            return response
        retry_after = failure.retry_after_seconds
        trailers = () if retry_after is None else (("retry-after", str(retry_after)),)
        call.code = grpc.StatusCode[failure.grpc_code]
        raise CallError(call.code, _clipped(failure.message), trailers)

    async def admit(self, access: Access, call: Call) -> bool:
        """Let the current task speak for the caller; whether it may do more than what is public.

        Raises what `ApiKeys.admit` does.
        """
        metadata = call.metadata
        caller = await self._context.keys.admit(access, metadata.get("authorization"), call.address)
        if access is Access.INFER:
            call.span.begin()
            inference_headers_var.set(read_headers(metadata.get, self._context.config.inference_objectives or {}))
            await self._context.turns.begin(caller)
        return bool(caller.scopes)

    def _report(self, name: str, error: Exception) -> ErrorReport:
        """The report of `error` for the client; counts it, and logs it, with its trace if it is internal."""
        failure = report(error)
        self._context.metrics.count_error(failure.kind)
        if failure.kind is ErrorKind.INTERNAL:
            logger.error("%s failed", name, exc_info=error)
        else:
            logger.info("%s %s: %s", name, failure.grpc_code, _clipped(failure.message))
        return failure

    async def _messages(
        self, parse: Parser, call: Call, stalled: asyncio.Event, access: Access
    ) -> AsyncGenerator[Any, None]:
        """The messages of a stream, until the client closes its side or reads nothing (`stalled`).

        Raises `EngineNotReadyError` when the server shuts down, and what `ApiKeys.check_again` does.
        """
        stopping = asyncio.ensure_future(self._stopping.wait())
        stalling = asyncio.ensure_future(stalled.wait())
        try:
            while True:
                arrival = asyncio.ensure_future(self._reader.read_next(call))
                try:
                    await asyncio.wait((arrival, stopping, stalling), return_when=asyncio.FIRST_COMPLETED)
                finally:
                    arrival.cancel()  # without effect if it is done
                if stalled.is_set():
                    return
                if not arrival.done():
                    raise EngineNotReadyError("the server is shutting down; open a stream to another replica")
                received = arrival.result()
                del arrival  # it may be large
                if received is None:
                    return
                try:
                    self._context.keys.check_again(access)
                    message = await parse(received)
                except BaseException:  # raised on: nobody else gives its memory back
                    received.release()
                    raise
                yield message
        finally:
            stopping.cancel()
            stalling.cancel()


def _access_of(name: str) -> Access:
    return METHODS[f"/{SERVICE_NAME}/{name}"]


def _parsed(make: Callable[[bytes | bytearray], Any], content: bytes | bytearray) -> Any:
    try:
        return make(content)
    except DecodeError as error:
        raise InvalidRequestError(f"the message is not a valid request: {error}") from None


def _clipped(message: str) -> str:
    encoded = message.encode("utf-8", "replace")
    if len(encoded) <= MAX_STATUS_MESSAGE_BYTES:
        return message
    return encoded[:MAX_STATUS_MESSAGE_BYTES].decode("utf-8", "ignore") + "..."
