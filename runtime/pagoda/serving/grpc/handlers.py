"""What every RPC passes: parsing, API key, errors as status codes, log lines, and the end of streams at shutdown.

Messages are parsed here and not by grpc, whose status for a malformed one is INTERNAL.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any
from urllib.parse import unquote

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass

from pagoda.errors import (
    DeadlineExceededError,
    EngineNotReadyError,
    ErrorKind,
    InvalidRequestError,
    RequestTooLargeError,
)
from pagoda.serving.auth import audit
from pagoda.serving.auth.routes import METHODS
from pagoda.serving.auth.scopes import Access
from pagoda.serving.context import ServingContext
from pagoda.serving.grpc.message_reader import MessageReader
from pagoda.serving.grpc.messages import SERVICE_NAME, service_methods
from pagoda.serving.grpc.service import ClientGoneError, InferenceService
from pagoda.serving.grpc.wire import check_cost
from pagoda.serving.json_decoding import LARGE_BYTES
from pagoda.serving.stalled_client import StalledClientTimeout
from pagoda.serving.status import ErrorReport, report
from pagoda.serving.v2.service import V2Service

logger = logging.getLogger("pagoda.serving.grpc")

METHODS_WITH_TENSORS = frozenset({"ModelInfer", "ModelStreamInfer"})
LOGGED_METHODS = METHODS_WITH_TENSORS
# A status message travels percent-encoded in a header, of which clients take 8 KiB by default.
MAX_STATUS_MESSAGE_BYTES = 1536
LAST_STATUS_SECONDS = 5.0
"""For the status to reach a client that has stopped reading."""

Parser = Callable[[bytes], Awaitable[Any]]
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

    def generic_handler(self) -> grpc.GenericRpcHandler:
        """A handler for each method of the descriptor; one that is not implemented fails here, at start."""
        service = self._service
        unary: dict[str, UnaryMethod] = {
            "ServerLive": service.server_live,
            "ServerReady": service.server_ready,
            "ModelReady": service.model_ready,
            "ServerMetadata": service.server_metadata,
            "ModelMetadata": service.model_metadata,
            "ModelInfer": service.model_infer,
            "ModelConfig": service.model_config,
            "RepositoryIndex": service.repository_index,
            "RepositoryModelLoad": service.repository_model_load,
            "RepositoryModelUnload": service.repository_model_unload,
        }
        handlers = {}
        for method in service_methods():
            parse = self._parser(method)
            if method.name in unary:
                # One of streams, so that the message is received when the key was checked.
                behavior = self._unary(method.name, parse, unary[method.name], is_empty=not method.input_type.fields)
                handlers[method.name] = grpc.stream_unary_rpc_method_handler(behavior, response_serializer=_serialize)
            else:
                stream = self._stream(method.name, parse)
                handlers[method.name] = grpc.stream_stream_rpc_method_handler(stream, response_serializer=_serialize)
        return grpc.method_handlers_generic_handler(SERVICE_NAME, handlers)

    def _parser(self, method: MethodDescriptor) -> Parser:
        """Makes the messages of a method; a large one beside the event loop, if it holds no more than a request may."""
        make = GetMessageClass(method.input_type).FromString

        async def parse(raw: bytes) -> Any:
            if len(raw) > LARGE_BYTES and method.name not in METHODS_WITH_TENSORS:
                raise RequestTooLargeError(f"a message of {method.name} may have {LARGE_BYTES} bytes, got {len(raw)}")
            return await self._context.decoding.run(len(raw), lambda: checked(raw))

        def checked(raw: bytes) -> Any:
            if len(raw) > LARGE_BYTES:
                check_cost(raw, method.input_type, self._context.json_limits.max_characters)
            try:
                return make(raw)
            except DecodeError as error:
                raise InvalidRequestError(f"the message is not a valid request: {error}") from None

        return parse

    def _unary(self, name: str, parse: Parser, method: UnaryMethod, *, is_empty: bool) -> Callable[..., Awaitable[Any]]:
        """`is_empty`: the request has no fields, so nothing of it is received."""
        access = _access_of(name)

        async def handle(_: object, call: grpc.aio.ServicerContext) -> Any:
            async def respond() -> Any:
                is_known = await self.admit(access, call)
                raw = b"" if is_empty else await self._reader.read(call, is_known=is_known)
                if raw is None:
                    raise InvalidRequestError("the call has no message")
                message = await parse(raw)
                del raw  # it may be large
                return await method(message, call.time_remaining())

            return await self._guard(name, call, respond)

        return handle

    def _stream(self, name: str, parse: Parser) -> Callable[..., Awaitable[None]]:
        access = _access_of(name)

        async def handle(raw_messages: AsyncIterator[bytes], call: grpc.aio.ServicerContext) -> None:
            one_at_a_time = asyncio.Lock()
            stalled = asyncio.Event()
            watch = StalledClientTimeout(self._send_timeout, TimeoutError)

            async def write(message: Any) -> None:
                async with one_at_a_time:
                    if stalled.is_set():
                        raise ClientGoneError
                    try:
                        await watch.run(call.write(message))
                    except grpc.aio.BaseError as error:
                        # The connection was closed, or the call is over; grpc cancels this task a moment later.
                        raise ClientGoneError from error
                    except TimeoutError as error:
                        stalled.set()
                        raise ClientGoneError from error

            async def respond() -> None:
                await self.admit(access, call)
                messages = self._messages(parse, raw_messages, stalled, access)
                await self._service.model_stream_infer(messages, write, call.time_remaining)
                if stalled.is_set():
                    raise DeadlineExceededError(f"no response was read for {self._send_timeout:g} s")

            try:
                await self._guard(name, call, respond)
            finally:
                watch.close()

        return handle

    async def _guard(self, name: str, call: grpc.aio.ServicerContext, respond: Callable[[], Awaitable[Any]]) -> Any:
        """The response of `respond`, or the status of its error; one log line either way."""
        with audit.recorded(_access_of(name), name, _address(call), lambda: _outcome(call)):
            return await self._guarded(name, call, respond)

    async def _guarded(self, name: str, call: grpc.aio.ServicerContext, respond: Callable[[], Awaitable[Any]]) -> Any:
        started = time.monotonic()
        level = logging.INFO if name in LOGGED_METHODS else logging.DEBUG
        try:
            response = await respond()
        except asyncio.CancelledError:
            logger.log(level, "%s cancelled after %.3f s", name, time.monotonic() - started)
            raise
        except Exception as error:  # whatever it is, the client gets a status and the log the rest
            failure = self._report(name, error)
        else:
            logger.log(level, "%s OK in %.3f s", name, time.monotonic() - started)
            return response
        retry_after = failure.retry_after_seconds
        trailers = () if retry_after is None else (("retry-after", str(retry_after)),)
        async with asyncio.timeout(LAST_STATUS_SECONDS):
            return await call.abort(grpc.StatusCode[failure.grpc_code], _clipped(failure.message), trailers)

    async def admit(self, access: Access, call: grpc.aio.ServicerContext) -> bool:
        """Let the current task speak for the caller; whether it may do more than what is public.

        Raises what `ApiKeys.admit` does.
        """
        metadata = dict(call.invocation_metadata() or ())
        caller = await self._context.keys.admit(access, metadata.get("authorization"), _address(call))
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
        self, parse: Parser, raw_messages: AsyncIterator[bytes], stalled: asyncio.Event, access: Access
    ) -> AsyncGenerator[Any, None]:
        """The messages of a stream, until the client closes its side or reads nothing (`stalled`).

        Raises `EngineNotReadyError` when the server shuts down, and what `ApiKeys.check_again` does.
        """
        iterator = aiter(raw_messages)
        stopping = asyncio.ensure_future(self._stopping.wait())
        stalling = asyncio.ensure_future(stalled.wait())
        try:
            while True:
                arrival = asyncio.ensure_future(anext(iterator))
                try:
                    await asyncio.wait((arrival, stopping, stalling), return_when=asyncio.FIRST_COMPLETED)
                finally:
                    arrival.cancel()  # without effect if it is done
                if stalled.is_set():
                    return
                if not arrival.done():
                    raise EngineNotReadyError("the server is shutting down; open a stream to another replica")
                try:
                    raw = arrival.result()
                except StopAsyncIteration:
                    return
                self._context.keys.check_again(access)
                message = await parse(raw)
                del raw, arrival  # they may be large
                yield message
        finally:
            stopping.cancel()
            stalling.cancel()


def _outcome(call: grpc.aio.ServicerContext) -> str:
    """The name of the status that the call has so far."""
    code: grpc.StatusCode | None = call.code()
    return code.name if isinstance(code, grpc.StatusCode) else "OK"


def _access_of(name: str) -> Access:
    return METHODS[f"/{SERVICE_NAME}/{name}"]


def _address(call: grpc.aio.ServicerContext) -> str:
    """The address of the client: `ipv4:10.0.0.1:4711` is `10.0.0.1`, `ipv6:%5B::1%5D:4711` is `::1`."""
    kind, _, rest = call.peer().partition(":")
    return unquote(rest).rpartition(":")[0].strip("[]") if kind in ("ipv4", "ipv6") else rest


def _serialize(message: Any) -> bytes:
    """The bytes of a message, or those that a stream has made of one itself."""
    return message if isinstance(message, bytes) else message.SerializeToString()


def _clipped(message: str) -> str:
    encoded = message.encode("utf-8", "replace")
    if len(encoded) <= MAX_STATUS_MESSAGE_BYTES:
        return message
    return encoded[:MAX_STATUS_MESSAGE_BYTES].decode("utf-8", "ignore") + "..."
