"""Health and reflection, which need no key: the services of the grpc packages, whose messages `MessageReader` receives."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from pagoda.errors import InvalidRequestError, PagodaError
from pagoda.serving.grpc.call import Call, CallError
from pagoda.serving.grpc.connection import Handler
from pagoda.serving.grpc.message_reader import Received
from pagoda.serving.status import report

Read = Callable[[Call], Awaitable[Received | None]]
"""Gives the next message of a call, None at its end; raises `PagodaError`."""


class PublicServices:
    """Takes the place of a server where the packages register their services; `handlers` are then the server's, by path."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self.handlers: dict[str, Handler] = {}

    def add_generic_rpc_handlers(self, handlers: object) -> None:
        """Called by the packages; the same handlers come by their names, too."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, grpc.RpcMethodHandler]) -> None:
        """Called by the packages."""
        for name, handler in handlers.items():
            self.handlers[f"/{service}/{name}"] = _reading(handler, self._read)


def _reading(handler: grpc.RpcMethodHandler, read: Read) -> Handler:
    """`handler`, whatever its kind, as one that asks for its messages."""

    async def messages(call: Call) -> AsyncIterator[Any]:
        while (received := await read(call)) is not None:
            call.works()
            try:
                yield handler.request_deserializer(received.content)
            except DecodeError as error:
                raise InvalidRequestError(f"the message is not a valid request: {error}") from None
            finally:
                received.release()

    async def only_message(call: Call) -> Any:
        async for message in messages(call):
            return message
        raise InvalidRequestError("the call has no message")

    async def respond(call: Call) -> bytes | None:
        serialize = handler.response_serializer
        try:
            if handler.unary_unary is not None:
                response: bytes = serialize(await handler.unary_unary(await only_message(call), call))
                return response
            responses = (
                handler.unary_stream(await only_message(call), call)
                if handler.unary_stream is not None
                else handler.stream_stream(messages(call), call)
            )
            async for message in responses:
                await call.write(serialize(message))
        except PagodaError as error:
            failure = report(error)
            raise CallError(grpc.StatusCode[failure.grpc_code], failure.message) from error
        return None

    return respond
