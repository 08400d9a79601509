"""Bodies that cost more than their bytes: long, wide, deep and compressed, for every route that takes one."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import grpc
import httpx
from hypothesis import strategies as st

from pagoda.serving.grpc.messages import ModelInferRequest, message_class
from tests.support.measured_server import Cost, MeasuredServer

MODEL = "/v2/models/demo"
REST_ROUTES = {
    "completions": "/v1/completions",
    "completions render": "/v1/completions/render",
    "chat": "/v1/chat/completions",
    "chat render": "/v1/chat/completions/render",
    "invocations": "/invocations",
    "tokenize": "/tokenize",
    "detokenize": "/detokenize",
    "messages": "/v1/messages",
    "count_tokens": "/v1/messages/count_tokens",
    "responses": "/v1/responses",
    "decisions": "/v1/decisions",
    "ollama chat": "/api/chat",
    "ollama generate": "/api/generate",
    "ollama show": "/api/show",
    "tgi": "/generate",
    "tgi stream": "/generate_stream",
    "tgi root": "/",
    "infer": f"{MODEL}/infer",
    "generate": f"{MODEL}/generate",
    "generate_stream": f"{MODEL}/generate_stream",
    "index": "/v2/repository/index",
    "load": "/v2/repository/models/demo/load",
    "unload": "/v2/repository/models/demo/unload",
    "settings": "/settings",
    "load adapter": "/v1/load_lora_adapter",
    "unload adapter": "/v1/unload_lora_adapter",
}
NOT_POST = {"/settings": "PATCH"}
POOLING_ROUTES = {
    "embeddings": "/v1/embeddings",
    "pooling": "/pooling",
    "classify": "/classify",
    "score": "/score",
    "rerank": "/rerank",
    "cohere rerank": "/v2/rerank",
}
"""Of a model that pools; one that generates refuses them, after it has decoded the body."""
_COMPLETIONS = (
    *("prompt", "stop", "bad_words", "logit_bias", "allowed_token_ids", "stop_token_ids", "tools", "unknown"),
    *("stream_options", "max_tokens", "user", "cache_salt", "structured_outputs", "guided_choice", "guided_json"),
    "logprob_token_ids",
)
_CHAT = (
    *("messages", "stop", "bad_words", "logit_bias", "chat_template_kwargs", "response_format", "tools", "unknown"),
    *("modalities", "prediction", "tool_choice"),
)
FIELDS: dict[str, tuple[str, ...]] = {
    "completions": _COMPLETIONS,
    "completions render": ("prompt", "stop", "logit_bias", "unknown"),
    "chat": _CHAT,
    "chat render": ("messages", "tools", "chat_template_kwargs", "unknown"),
    "invocations": ("messages", "prompt", "input", "unknown"),
    "messages": ("messages", "system", "tools", "stop_sequences", "thinking", "unknown"),
    "count_tokens": ("messages", "system", "tools"),
    "responses": ("input", "instructions", "tools", "text", "previous_response_id", "unknown"),
    "decisions": ("input", "questions", "chat_template_kwargs", "unknown"),
    "ollama chat": ("messages", "tools", "options", "format", "unknown"),
    "ollama generate": ("prompt", "system", "context", "options", "format", "unknown"),
    "ollama show": ("model", "verbose", "unknown"),
    "tgi": ("inputs", "parameters", "unknown"),
    "tgi stream": ("inputs", "parameters"),
    "tgi root": ("inputs", "stream"),
    "tokenize": ("prompt", "messages", "chat_template_kwargs", "unknown"),
    "detokenize": ("tokens", "unknown"),
    "infer": ("inputs", "outputs", "parameters", "id", "text_input", "input_ids", "stop", "shape", "parameter"),
    "generate": ("text_input", "input_ids", "parameters", "stop", "logit_bias", "id", "unknown"),
    "generate_stream": ("text_input", "stop", "id"),
    "index": ("ready", "unknown"),
    "load": ("parameters",),
    "unload": ("parameters",),
    "settings": ("settings", "log_level", "max_num_seqs", "unknown"),
    "load adapter": ("lora_name", "lora_path", "base_model_name", "unknown"),
    "unload adapter": ("lora_name", "unknown"),
    "embeddings": ("input", "dimensions", "prompt_name", "user", "unknown"),
    "pooling": ("input", "task", "unknown"),
    "classify": ("input", "user", "unknown"),
    "score": ("text_1", "text_2", "queries", "documents", "instruction", "unknown"),
    "rerank": ("query", "documents", "texts", "instruction", "unknown"),
    "cohere rerank": ("query", "documents", "unknown"),
}
"""Where a value can be put, by route; of `infer`, also names of tensors."""
_TALK = '[{"role":"user","content":"hi"}]'
_RIGHT: dict[str, dict[str, str]] = {
    "completions": {"max_tokens": "1", "prompt": '"a"'},
    "completions render": {"max_tokens": "1", "prompt": '"a"'},
    "chat": {"max_tokens": "1", "messages": _TALK},
    "chat render": {"max_tokens": "1", "messages": _TALK},
    "invocations": {"max_tokens": "1"},
    "messages": {"max_tokens": "1", "messages": _TALK},
    "count_tokens": {"max_tokens": "1", "messages": _TALK},
    "responses": {"max_output_tokens": "1", "input": '"hi"'},
    "decisions": {"input": '"hi"', "questions": '[{"type":"predicate","name":"a","instructions":"It is so."}]'},
    "ollama chat": {"messages": _TALK, "options": '{"num_predict":1}'},
    "ollama generate": {"prompt": '"a"', "options": '{"num_predict":1}'},
    "tgi": {"inputs": '"a"', "parameters": '{"max_new_tokens":1}'},
    "tgi stream": {"inputs": '"a"', "parameters": '{"max_new_tokens":1}'},
    "tgi root": {"inputs": '"a"', "parameters": '{"max_new_tokens":1}'},
    "generate": {"text_input": '"a"', "max_tokens": "1"},
    "generate_stream": {"text_input": '"a"', "max_tokens": "1"},
    "embeddings": {"input": '"a"'},
    "pooling": {"input": '"a"'},
    "classify": {"input": '"a"'},
    "score": {"text_1": '"a"', "text_2": '"b"'},
    "rerank": {"query": '"a"', "documents": '["b"]'},
    "cohere rerank": {"query": '"a"', "documents": '["b"]'},
}
"""Members of a request that is right, as JSON."""
VALUES: dict[str, tuple[str, str, str]] = {
    "ids": ("[", "257", "]"),
    "small ids": ("[", "1", "]"),
    "wide ids": ("[", "123456", "]"),
    "negative": ("[", "-1", "]"),
    "floats": ("[", "1.5", "]"),
    "nulls": ("[", "null", "]"),
    "empty strings": ("[", '""', "]"),
    "strings": ("[", '"ab"', "]"),
    "lists": ("[", "[]", "]"),
    "lists of one": ("[", "[1]", "]"),
    "objects": ("[", "{}", "]"),
    "messages": ("[", '{"role":"user","content":"a"}', "]"),
    "parts": ('[{"role":"user","content":[', '{"type":"text","text":"a"}', "]}]"),
    "keys": ("{", '"%d":1', "}"),
    "letters": ('"', "a", '"'),
    "words": ('"', "word word, ", '"'),
    "digits": ('"', "7", '"'),
    "letters and an emoji": ('"\N{GRINNING FACE}', "a", '"'),
    "emoji": ('"', "\N{GRINNING FACE}", '"'),
    "escapes": ('"', r"\u00e9", '"'),
    "escaped emoji": ('"', r"\ud83d\ude00", '"'),
    "quotes": ('"', r"\"\\", '"'),
    "controls": ('"', r"\u0001", '"'),
}
WITH_COMMA = frozenset(name for name, (head, _, _) in VALUES.items() if head[0] in "[{")


@dataclass(frozen=True)
class Body:
    """`path`: of REST, or the method of gRPC. `size`: bytes when uncompressed."""

    path: str
    content: bytes
    size: int
    headers: tuple[tuple[str, str], ...] = ()

    @property
    def is_grpc(self) -> bool:
        return not self.path.startswith("/")

    def deflated(self) -> Body:
        """The same, compressed."""
        return Body(self.path, zlib.compress(self.content), self.size, (*self.headers, ("content-encoding", "deflate")))


def value(kind: str, size: int, end: str = "") -> str:
    """JSON of about `size` bytes; `end`: a last element."""
    head, element, tail = VALUES[kind]
    if kind == "keys":
        return head + ",".join(element % number for number in range(max(1, size // 10))) + tail
    separator = "," if kind in WITH_COMMA else ""
    count = max(1, size // len((element + separator).encode()))
    return head + separator.join([element] * count + ([end] if end and separator else [])) + tail


def nested(depth: int) -> str:
    """Lists in lists."""
    return "[" * depth + "]" * depth


def rest_body(route: str, field: str, json_value: str, **others: Any) -> Body:
    """A request of `route` that is right but for `field`."""
    members: dict[str, str] = {name: json.dumps(other) for name, other in others.items()}
    if route == "infer":
        members |= _infer_members(field, json_value)
    else:
        members |= {**_RIGHT.get(route, {}), field: json_value}
        if field == "input_ids":
            del members["text_input"]
    content = ("{" + ",".join(f'"{name}":{text}' for name, text in members.items()) + "}").encode()
    return Body({**REST_ROUTES, **POOLING_ROUTES}[route], content, len(content))


def _infer_members(field: str, json_value: str) -> dict[str, str]:
    text = '{"name":"text_input","datatype":"BYTES","shape":[1],"data":["a"]}'
    if field in ("inputs", "outputs", "parameters", "id"):
        return {"inputs": f"[{text}]", "parameters": '{"max_tokens":1}', field: json_value}
    if field == "shape":
        tensor = f'{{"name":"text_input","datatype":"BYTES","shape":{json_value},"data":["a"]}}'
        return {"inputs": f"[{tensor}]"}
    if field == "parameter":
        return {"inputs": f"[{text}]", "parameters": f'{{"max_tokens":1,"allowed_token_ids":{json_value}}}'}
    datatype = "INT64" if field == "input_ids" else "BYTES"
    count = max(1, json_value.count(",") + 1)
    tensor = f'{{"name":"{field}","datatype":"{datatype}","shape":[{count}],"data":{json_value}}}'
    others = "" if field in ("input_ids", "text_input") else f",{text}"
    return {"inputs": f"[{tensor}{others}]", "parameters": '{"max_tokens":1}'}


def grpc_body(method: str, content: bytes) -> Body:
    """A message of this serialized form."""
    return Body(method, content, len(content))


def infer_message(**fields: Any) -> Any:
    """A right `ModelInferRequest`, and `fields` in it."""
    message = ModelInferRequest(model_name="demo")
    message.parameters["max_tokens"].int64_param = 1
    for name, content in fields.items():
        setattr(message, name, content)
    return message


def _tensor(name: str, datatype: str, shape: list[int]) -> Any:
    message = infer_message()
    message.inputs.add(name=name, datatype=datatype, shape=shape)
    return message


def grpc_typed_ids(size: int, *, each_alone: bool = False) -> bytes:
    """One-byte ids as typed contents, `[t]` or `[n, 1]`."""
    message = _tensor("input_ids", "INT64", [size, 1] if each_alone else [size])
    message.inputs[0].contents.int64_contents.extend([1] * size)
    return bytes(message.SerializeToString())


def grpc_raw_ids(size: int, *, each_alone: bool = False) -> bytes:
    """Ids in binary, `[t]` or `[n, 1]`."""
    count = size // 8
    message = _tensor("input_ids", "INT64", [count, 1] if each_alone else [count])
    message.raw_input_contents.append(struct.pack("<q", 300) * count)
    return bytes(message.SerializeToString())


def grpc_raw_texts(size: int) -> bytes:
    """Texts of three characters in binary."""
    count = size // 7
    message = _tensor("text_input", "BYTES", [count])
    message.raw_input_contents.append(struct.pack("<I3s", 3, b"abc") * count)
    return bytes(message.SerializeToString())


def grpc_typed_texts(size: int) -> bytes:
    """Empty texts as typed contents."""
    count = size // 2
    message = _tensor("text_input", "BYTES", [count])
    message.inputs[0].contents.bytes_contents.extend([b""] * count)
    return bytes(message.SerializeToString())


def grpc_repeated(field: int, size: int) -> bytes:
    """Field number `field` of the message, empty, again and again: `inputs`, `outputs`, `parameters`, raw contents."""
    return bytes(infer_message().SerializeToString()) + bytes([field << 3 | 2, 0]) * (size // 2)


def grpc_unpacked_ids(size: int) -> bytes:
    """Ids that each have a tag of their own."""
    tensor = bytes(_tensor("input_ids", "INT64", [size // 2]).inputs[0].SerializeToString())
    ids = b"\x18\x01" * (size // 2)
    inner = tensor + b"\x2a" + _varint(len(ids)) + ids
    return bytes(infer_message().SerializeToString()) + b"\x2a" + _varint(len(inner)) + inner


def grpc_long_text(size: int) -> bytes:
    """One text."""
    message = _tensor("text_input", "BYTES", [1])
    message.inputs[0].contents.bytes_contents.append(b"7" * size)
    return bytes(message.SerializeToString())


def grpc_deep(size: int) -> bytes:
    """Unknown groups in groups."""
    return bytes(infer_message().SerializeToString()) + b"\xa3\x06" * (size // 4) + b"\xa4\x06" * (size // 4)


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 127:
        encoded.append(number & 127 | 128)
        number >>= 7
    return bytes([*encoded, number])


def index_message(size: int) -> bytes:
    """Of a method that needs no more than a name."""
    return bytes(message_class("RepositoryIndexRequest")(repository_name="r" * size).SerializeToString())


GRPC: dict[str, Callable[[int], bytes]] = {
    "typed ids": grpc_typed_ids,
    "typed ids [n, 1]": lambda size: grpc_typed_ids(size, each_alone=True),
    "unpacked ids": grpc_unpacked_ids,
    "raw ids": grpc_raw_ids,
    "raw ids [n, 1]": lambda size: grpc_raw_ids(size, each_alone=True),
    "raw texts": grpc_raw_texts,
    "typed texts": grpc_typed_texts,
    "long text": grpc_long_text,
    "parameters": lambda size: grpc_repeated(4, size),
    "inputs": lambda size: grpc_repeated(5, size),
    "outputs": lambda size: grpc_repeated(6, size),
    "raw contents": lambda size: grpc_repeated(7, size),
    "unknown fields": lambda size: grpc_repeated(12, size),
    "deep": grpc_deep,
    "long id": lambda size: bytes(infer_message(id="i" * size).SerializeToString()),
    "long version": lambda size: bytes(infer_message(model_version="v" * size).SerializeToString()),
    "long model": lambda size: bytes(infer_message(model_name="\x01" * size).SerializeToString()),
}


def rest_bodies(max_bytes: int, routes: Iterable[str] = tuple(FIELDS)) -> st.SearchStrategy[Body]:
    """Of any of `routes`, with one field of any of `VALUES`, in lists or not, as it is or compressed."""
    places = st.sampled_from([(route, field) for route in routes for field in FIELDS[route]])

    def make(place: tuple[str, str], kind: str, size: int, end: str, depth: int, is_deflated: bool) -> Body:
        json_value = "[" * depth + value(kind, size, end) + "]" * depth
        body = rest_body(*place, json_value)
        return body.deflated() if is_deflated else body

    ends = st.sampled_from(["", '"x"', "null", "[1]", "1e400", "{"])
    return st.one_of(
        st.builds(
            make, places, st.sampled_from(list(VALUES)), _sizes(max_bytes), ends, st.integers(0, 3), st.booleans()
        ),
        st.builds(lambda place, size: rest_body(*place, nested(size // 2)), places, _sizes(max_bytes)),
    )


def grpc_bodies(max_bytes: int) -> st.SearchStrategy[Body]:
    """Messages that hold much of one thing, for the methods with tensors and for one without."""
    return st.one_of(
        st.builds(
            lambda kind, size: grpc_body("ModelInfer", GRPC[kind](size)), st.sampled_from(list(GRPC)), _sizes(max_bytes)
        ),
        st.builds(lambda size: grpc_body("RepositoryIndex", index_message(size)), _sizes(max_bytes)),
    )


def _sizes(max_bytes: int) -> st.SearchStrategy[int]:
    """As many small ones as large ones."""
    return st.integers(0, 100).map(lambda part: max(8, int(max_bytes ** (0.6 + 0.4 * part / 100))))


@dataclass(frozen=True)
class Answer:
    """The status, of HTTP as digits, of gRPC by its name, and the bytes of the body or of the status message."""

    status: str
    size: int

    @property
    def is_error(self) -> bool:
        return self.status not in ("200", "OK")


def send(server: MeasuredServer, body: Body, seconds: float = 120) -> Answer:
    """The whole answer is read."""
    if not body.is_grpc:
        url = f"http://127.0.0.1:{server.port}{body.path}"
        method = NOT_POST.get(body.path, "POST")
        with httpx.stream(method, url, content=body.content, headers=dict(body.headers), timeout=seconds) as answer:
            size = sum(map(len, answer.iter_raw()))
        return Answer(str(answer.status_code), size)
    options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}", options=options) as channel:
        try:
            whole = channel.unary_unary(f"/inference.GRPCInferenceService/{body.path}")(body.content, timeout=seconds)
        except grpc.RpcError as error:
            return Answer(str(error.code().name), len(error.details() or ""))  # type: ignore[attr-defined]
    return Answer("OK", len(whole))


def cost_of(server: MeasuredServer, body: Body) -> tuple[Answer, Cost]:
    """The answer, and what it cost."""
    with server.measured() as cost:
        answer = send(server, body)
    return answer, cost


MAX_ERROR_BYTES = 2048
MAX_STALL_SECONDS = 0.1
MAX_MEMORY_RATIO = 5
MEMORY_ALLOWANCE = 8 * 2**20
"""What a request takes whatever its size, and what the allocator keeps."""
FAULTS = frozenset({"500", "502", "504", "INTERNAL", "UNKNOWN", "DEADLINE_EXCEEDED"})
TRIES = 4
"""What a body costs, it costs each time; what the machine does beside it, it does not."""


def check_cost(server: MeasuredServer, body: Body) -> Cost:
    """Fail if `body` costs more than any may, or is answered with a fault or a long error; returns the least that it cost."""
    least = Cost(float("inf"), 2**62)
    for _ in range(TRIES):
        answer, cost = cost_of(server, body)
        assert answer.status not in FAULTS, (answer, body.path, body.content[:200])
        assert not answer.is_error or answer.size <= MAX_ERROR_BYTES, (answer, body.path, body.content[:200])
        least = Cost(min(least.stall, cost.stall), min(least.memory, cost.memory))
        if least.stall < MAX_STALL_SECONDS and least.memory < MAX_MEMORY_RATIO * body.size + MEMORY_ALLOWANCE:
            return least
    raise AssertionError(
        f"{body.path}: a body of {body.size} bytes stopped the loop for {least.stall:.3f} s and took {least.memory} bytes: "
        f"{body.content[:200]!r}"
    )
