"""Health and reflection, which need no key: the services of the grpc packages, whose messages `MessageReader` receives."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from pagoda.errors import InvalidRequestError, PagodaError
from pagoda.serving.status import report

Read = Callable[[grpc.aio.ServicerContext], Awaitable[bytes | None]]
"""Gives the next message of a call, None at its end; raises `PagodaError`."""


class PublicServices:
    """Takes the place of a server where the packages register their services; `generic_handlers` are then the server's."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self.generic_handlers: list[grpc.GenericRpcHandler] = []

    def add_generic_rpc_handlers(self, handlers: object) -> None:
        """Called by the packages; the same handlers come by their names, too."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, grpc.RpcMethodHandler]) -> None:
        """Called by the packages."""
        reading = {name: _reading(handler, self._read) for name, handler in handlers.items()}
        self.generic_handlers.append(grpc.method_handlers_generic_handler(service, reading))


def _reading(handler: grpc.RpcMethodHandler, read: Read) -> grpc.RpcMethodHandler:
    """`handler`, whatever its kind, as one of streams that asks for its messages."""

    async def messages(call: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        while (message := await read(call)) is not None:
            try:
                yield handler.request_deserializer(message)
            except DecodeError as error:
                raise InvalidRequestError(f"the message is not a valid request: {error}") from None

    async def only_message(call: grpc.aio.ServicerContext) -> Any:
        async for message in messages(call):
            return message
        raise InvalidRequestError("the call has no message")

    async def respond(_: object, call: grpc.aio.ServicerContext) -> Any:
        try:
            if handler.unary_unary is not None:
                return await handler.unary_unary(await only_message(call), call)
            if handler.unary_stream is not None:
                return await handler.unary_stream(await only_message(call), call)
            async for response in handler.stream_stream(messages(call), call):
                await call.write(response)
            return None
        except PagodaError as error:
            failure = report(error)
            return await call.abort(grpc.StatusCode[failure.grpc_code], failure.message)

    make = (
        grpc.stream_unary_rpc_method_handler
        if handler.unary_unary is not None
        else grpc.stream_stream_rpc_method_handler
    )
    return make(respond, response_serializer=handler.response_serializer)
