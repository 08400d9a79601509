"""Chat templates rendered in a process of their own, where one can do no more than use up its own limits.

A jinja sandbox keeps a template from the server's objects, not from its time and memory: one expression can make gigabytes,
one loop need not end, and a thread that does either can neither be stopped nor kept from the interpreter lock. Here
every request has CPU time and memory that follow from its size.

    ┌──────────────────────┬──────────────────┐
    │ length, 4 bytes, big │ JSON, ASCII only │    as in `frames`: first the templates, then the arguments of each `render`
    └──────────────────────┴──────────────────┘
"""

from __future__ import annotations

import json
import logging
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any, TypeVar

import jinja2

from pagoda.errors import ConfigError, InvalidRequestError, PagodaError, RequestFailedError
from pagoda.models.checkpoint_files import shown_reason
from pagoda.process_control import NICENESS, environment_of_parser, lower_process_priority
from pagoda.text.chat_template import ChatTemplate, Message
from pagoda.text.frames import LENGTH_BYTES, encode_error, encode_frame, result_of

logger = logging.getLogger(__name__)
T = TypeVar("T")

# A chat of many short messages takes about 0.3 us a byte, any other less; reading its JSON some 10 bytes of memory a byte.
_CPU_SECONDS, _CPU_SECONDS_PER_BYTE = 0.1, 1e-6
_MEMORY_BYTES, _MEMORY_BYTES_PER_BYTE = 128 << 20, 32
_COMPILE_SECONDS = 10.0
# On top of the CPU time: what a machine that is busy with other things needs, and what one step of a template may take.
_GRACE_SECONDS = 2.0


class TemplateProcess:
    """`ChatTemplate.render` in another process, which is started with the object and replaced when it does not answer.

    Raises `ConfigError` for templates that do not compile. Safe between threads, which take turns.
    """

    def __init__(self, template: ChatTemplate) -> None:
        self._setup = encode_frame({"templates": template.sources, "special_tokens": template.special_tokens})
        self._turn = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._start()
        except (InvalidRequestError, OSError, EOFError) as error:
            self._end()
            raise ConfigError(f"the chat template cannot be used: {error}") from error

    def render(self, messages: Sequence[Message], **arguments: Any) -> str:
        """As `ChatTemplate.render`; raises `InvalidRequestError` also for a request that takes more than its limits."""
        try:
            frame = encode_frame({"messages": messages, **arguments})
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidRequestError(f"the conversation holds what is not JSON ({error})", "messages") from error
        with self._turn:
            if self._process is None:
                self._start()
            try:
                prompt: str = self._exchange(frame, _cpu_seconds(len(frame)) + _GRACE_SECONDS)
            except (TimeoutError, OSError, EOFError) as error:
                self._end()
                logger.warning("the chat template process was replaced: %s", error or type(error).__name__)
                raise _out_of_limits("more time or memory") from None
        return prompt

    def close(self) -> None:
        """End the process; the object is not used after that."""
        with self._turn:
            self._end()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pagoda.text.template_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=environment_of_parser({"MALLOC_ARENA_MAX": "1"}),
        )
        lower_process_priority(self._process.pid, NICENESS)
        self._exchange(self._setup, _COMPILE_SECONDS + 5 * _GRACE_SECONDS)

    def _exchange(self, frame: bytes, seconds: float) -> Any:
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        deadline = time.monotonic() + seconds
        source, sink = self._process.stdout.fileno(), self._process.stdin.fileno()
        # The process reads a whole request before it does anything, so that writing one never takes long.
        rest = memoryview(frame)
        while rest:
            rest = rest[os.write(sink, rest) :]
        length = int.from_bytes(_read(source, LENGTH_BYTES, deadline), "big")
        return result_of(_read(source, length, deadline))

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()


def _read(source: int, num_bytes: int, deadline: float) -> bytes:
    parts = []
    # Not select(2), which takes no descriptor above 1023: each connection is one.
    readable = select.poll()
    readable.register(source, select.POLLIN)
    while num_bytes:
        if not readable.poll(1e3 * max(0.0, deadline - time.monotonic())):
            raise TimeoutError("it did not answer")
        part = os.read(source, num_bytes)
        if not part:
            raise EOFError("it ended")
        parts.append(part)
        num_bytes -= len(part)
    return b"".join(parts)


def _cpu_seconds(num_bytes: int) -> float:
    return _CPU_SECONDS + _CPU_SECONDS_PER_BYTE * num_bytes


def _out_of_limits(what: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"the chat template takes {what} to render these messages than a request of this size may", "messages"
    )


# ---- in the process ----------------------------------------------------------------------------------------------------


class _OutOfTimeError(BaseException):
    """Not an `Exception`, so that nothing on the way takes it for a fault of its own."""


def main() -> None:
    """Answer requests on the standard streams until their end, which comes when the server has died."""
    sink = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    source = sys.stdin.buffer
    signal.signal(signal.SIGPROF, _interrupt)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    used_bytes = _used_bytes()
    template: ChatTemplate | None = None
    while len(header := source.read(LENGTH_BYTES)) == LENGTH_BYTES:
        length = int.from_bytes(header, "big")
        if used_bytes is not None:
            limit = used_bytes + _MEMORY_BYTES + _MEMORY_BYTES_PER_BYTE * length
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        request = json.loads(source.read(length))
        try:
            if template is None:
                template, result = _compiled(**request), None
            else:
                result = _rendered(template, request, _cpu_seconds(length))
            answer = encode_frame({"result": result})
        except PagodaError as error:
            answer = encode_error(error)
        sink.write(answer)
        sink.flush()


def _compiled(templates: Mapping[str, str], special_tokens: Mapping[str, str]) -> ChatTemplate:
    template = ChatTemplate(templates, special_tokens)
    try:
        _within(_COMPILE_SECONDS, template.compile)
    except (_OutOfTimeError, MemoryError, RecursionError) as error:
        raise InvalidRequestError(f"it takes too much to be compiled ({type(error).__name__})") from error
    except (jinja2.TemplateError, ValueError, SyntaxError) as error:
        raise InvalidRequestError(f"it cannot be compiled: {shown_reason(error)}") from error
    return template


def _rendered(template: ChatTemplate, arguments: Mapping[str, Any], seconds: float) -> str:
    try:
        return _within(seconds, lambda: template.render(**arguments))
    except _OutOfTimeError:
        raise _out_of_limits(f"more CPU time ({seconds:.1f} s)") from None
    except MemoryError:
        raise _out_of_limits("more memory") from None
    except (RecursionError, SystemError):  # the latter where the time is up at the very depth where the stack is
        raise _out_of_limits("more nested calls") from None
    except PagodaError:
        raise
    except Exception as error:  # any: the template is the checkpoint's or the client's code
        raise RequestFailedError(
            f"rendering the chat template failed: {type(error).__name__}: {shown_reason(error)}"
        ) from error


def _within(seconds: float, call: Callable[[], T]) -> T:
    """The result of `call()`; raises `_OutOfTimeError` after a step of the interpreter once it took that much CPU time."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        return call()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise _OutOfTimeError


def _used_bytes() -> int | None:
    """Address space that this process uses; None where that is not known, so that memory is not limited."""
    if sys.platform != "linux":
        return None
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    main()
