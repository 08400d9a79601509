"""The main program of a tokenizer process: loads a tokenizer, then answers one request after another until its input ends."""

from __future__ import annotations

import json
import os
import sys
from typing import BinaryIO

from pagoda.errors import PagodaError
from pagoda.process_control import NICENESS, lower_thread_priority
from pagoda.text.frames import LENGTH_BYTES, encode_error, encode_frame
from pagoda.text.workers import WorkerOptions


def serve(source: BinaryIO, sink: BinaryIO) -> None:
    """Answer the frames of `source` on `sink`; returns on EOF of `source`, which comes when the server has died."""
    first = _read_frame(source)
    if first is None:
        return
    try:
        operations = WorkerOptions(**json.loads(first)).load()
    except PagodaError as error:
        _write(sink, encode_error(error))
        return
    _write(sink, encode_frame({"result": True}))
    while (frame := _read_frame(source)) is not None:
        request = json.loads(frame)
        try:
            answer = encode_frame({"result": operations.call(request["operation"], request["arguments"])})
        except PagodaError as error:
            answer = encode_error(error)
        _write(sink, answer)


def _read_frame(source: BinaryIO) -> bytes | None:
    header = source.read(LENGTH_BYTES)
    if len(header) < LENGTH_BYTES:
        return None
    return source.read(int.from_bytes(header, "big"))


def _write(sink: BinaryIO, frame: bytes) -> None:
    sink.write(frame)
    sink.flush()


def main() -> None:
    """Serve on the standard streams. Other output goes to standard error and cannot break the protocol."""
    sink = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    lower_thread_priority(NICENESS)
    serve(sys.stdin.buffer, sink)


if __name__ == "__main__":
    main()
