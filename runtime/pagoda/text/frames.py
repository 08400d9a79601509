"""The protocol between the server and a tokenizer process: JSON in frames, over the process's own pipes.

    ┌──────────────────────┬──────────────────┐
    │ length, 4 bytes, big │ JSON, ASCII only │      request   {"operation": name, "arguments": {…}}
    └──────────────────────┴──────────────────┘      answer    {"result": …} or {"error": {"kind", "message", "param"}}

The first request holds the fields of `WorkerOptions`; its answer says that the tokenizer is loaded.
"""

from __future__ import annotations

import json
from typing import Any

from pagoda.errors import ErrorKind, InvalidRequestError, PagodaError, error_of

LENGTH_BYTES = 4


def encode_frame(message: Any) -> bytes:
    """A message as it goes over the pipe."""
    body = json.dumps(message).encode("ascii")
    return len(body).to_bytes(LENGTH_BYTES, "big") + body


def encode_error(error: PagodaError) -> bytes:
    """The answer for a call that failed."""
    param = error.param if isinstance(error, InvalidRequestError) else None
    return encode_frame({"error": {"kind": error.kind, "message": str(error), "param": param}})


def result_of(body: bytes) -> Any:
    """The result in an answer; raises the error in it."""
    answer = json.loads(body)
    if "error" not in answer:
        return answer["result"]
    error = answer["error"]
    raised = error_of(ErrorKind(error["kind"]), error["message"])
    if isinstance(raised, InvalidRequestError):
        raised.param = error["param"]
    raise raised
