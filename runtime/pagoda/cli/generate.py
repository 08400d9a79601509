"""`pagoda generate`: complete prompts offline, from arguments, a file or standard input, to text or JSON lines."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from pagoda.cli.offline import (
    add_sampling_options,
    check_one_choice,
    is_model,
    loaded_llm,
    make_parser,
    parse,
    sampling_params,
)
from pagoda.cli.parser import CommandParser
from pagoda.errors import InvalidRequestError
from pagoda.sampling.output import FinishReason
from pagoda.sampling.params import SamplingParams
from pagoda.text.output import CompletionOutput, RequestOutput

if TYPE_CHECKING:
    from pagoda.llm import LLM

DESCRIPTION = (
    "Completes prompts without a server: `pagoda generate ./Qwen3-0.6B 'Once upon'`. Prompts are arguments, or come from "
    "--input, or, with neither, are all of standard input as one prompt. The first argument is the model where it is a "
    "checkpoint or a path; else --model gives it, or the built-in demo model runs."
)


@dataclass(frozen=True, slots=True)
class PromptLine:
    """One thing to complete: a text, token ids or a conversation, with sampling of its own where the input gave some."""

    prompt: str | list[int] | None = None
    messages: list[dict[str, Any]] | None = None
    sampling: dict[str, Any] = field(default_factory=dict)


def run(arguments: Sequence[str]) -> int:
    """Complete the prompts of a command line; 1 if any of them failed in the engine."""
    own, config = parse(_parser(), arguments, _take_model)
    lines = _read_prompts(own)
    # What is impossible is said before a model is loaded, and that the output cannot be written before it is generated.
    params = [sampling_params(config, own, **line.sampling) for line in lines]
    if own.stream:
        _check_stream(params)
    with _open_output(own.output) as sink, loaded_llm(config) as llm:
        prompts = [_prompt(llm, line, as_chat=own.chat) for line in lines]
        if own.stream:
            _stream(llm, prompts, params, sink, own.format)
            return 0
        progress = own.progress if own.progress is not None else len(prompts) > 1 and sys.stderr.isatty()
        outputs = llm.generate(prompts, params, progress=progress)
        _write(outputs, sink, own.format)
    return _report_failures(outputs)


def _parser() -> CommandParser:
    parser = make_parser("generate", DESCRIPTION)
    parser.usage = "pagoda generate [MODEL] [PROMPT ...] [OPTIONS]"
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="text to complete; before it, the model may stand")
    add_sampling_options(parser)
    parser.add_argument("--input", metavar="FILE", help="prompts from a file, - for standard input")
    parser.add_argument(
        "--input-format",
        choices=["text", "lines", "jsonl"],
        help="the file is one prompt, a prompt on each line, or a JSON object on each line with `prompt` (text or token ids) "
        "or `messages`, and sampling parameters by name; default: jsonl for *.jsonl, else lines",
    )
    parser.add_argument("--output", metavar="FILE", default="-", help="where results go; default: standard output")
    parser.add_argument(
        "--format", choices=["text", "jsonl"], default="text", help="texts, or one JSON object for each completion"
    )
    parser.add_argument("--chat", action="store_true", help="each prompt is what a user says: apply the chat template")
    parser.add_argument("--stream", action="store_true", help="write as it is generated (one prompt only)")
    parser.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        help="show a bar; default: for several prompts on a terminal",
    )
    return parser


def _take_model(own: argparse.Namespace) -> str | None:
    """The first word, where it is the model and not a prompt."""
    is_followed = len(own.prompts) > 1 or own.input is not None
    if own.prompts and is_model(own.prompts[0], is_followed=is_followed):
        return str(own.prompts.pop(0))
    return None


def _check_stream(params: list[SamplingParams]) -> None:
    if len(params) != 1:
        raise InvalidRequestError(f"--stream takes one prompt, not {len(params)}", "prompt")
    check_one_choice(params[0], "--stream shows one completion")


def _read_prompts(own: argparse.Namespace) -> list[PromptLine]:
    if own.prompts and own.input:
        raise InvalidRequestError(
            "prompts were given as arguments and by --input: only one of them can count", "prompt"
        )
    if own.prompts:
        return [PromptLine(prompt) for prompt in own.prompts]
    path = own.input or "-"
    text = sys.stdin.read() if path == "-" else _read_file(path)
    kind = own.input_format or ("jsonl" if path.endswith(".jsonl") else "lines" if own.input else "text")
    if kind == "text":
        lines = [PromptLine(text)] if text else []
    elif kind == "lines":
        lines = [PromptLine(line) for line in text.splitlines() if line]
    else:
        lines = [_json_line(number, line) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
    if not lines:
        raise InvalidRequestError(
            "there is no prompt: give one as an argument, by --input or on standard input", "prompt"
        )
    return lines


def _read_file(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"--input {path} cannot be read: {error}", "input") from error


def _json_line(number: int, line: str) -> PromptLine:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise InvalidRequestError(f"line {number} of the input is not JSON: {error}", "input") from error
    if not isinstance(value, dict) or ("prompt" in value) == ("messages" in value):
        raise InvalidRequestError(
            f"line {number} of the input must be an object with either prompt or messages", "input"
        )
    prompt, messages = value.pop("prompt", None), value.pop("messages", None)
    if not isinstance(prompt if messages is None else messages, str | list):
        raise InvalidRequestError(f"line {number} of the input: a prompt is a text or a list of token ids", "input")
    if unknown := value.keys() - SamplingParams.__dataclass_fields__.keys():
        names = ", ".join(sorted(unknown))
        raise InvalidRequestError(f"line {number} of the input has unknown sampling parameters: {names}", "input")
    return PromptLine(prompt, messages, {name: _plain(name, item) for name, item in value.items()})


def _plain(name: str, value: Any) -> Any:
    """A JSON value as `SamplingParams` takes it: lists as tuples, a lone stop string as one, token ids as numbers."""
    if name in ("stop", "bad_words") and isinstance(value, str):
        return (value,)
    if name == "logit_bias" and isinstance(value, dict):
        return {int(token_id): bias for token_id, bias in value.items()}
    return tuple(value) if isinstance(value, list) else value


def _prompt(llm: LLM, line: PromptLine, *, as_chat: bool) -> str | list[int]:
    if line.messages is not None:
        return llm.encode_chat(line.messages)
    if as_chat:
        return llm.encode_chat([{"role": "user", "content": line.prompt}])
    assert line.prompt is not None, "a line has a prompt or messages"
    return line.prompt


def _open_output(path: str) -> AbstractContextManager[TextIO]:
    if path == "-":
        return nullcontext(sys.stdout)
    try:
        return Path(path).open("w", encoding="utf-8")
    except OSError as error:
        raise InvalidRequestError(f"--output {path} cannot be written: {error}", "output") from error


def _stream(
    llm: LLM, prompts: list[str | list[int]], params: list[SamplingParams], sink: TextIO, output_format: str
) -> None:
    with closing(llm.stream(prompts[0], params[0])) as chunks:
        for chunk in chunks:
            sink.write(chunk.text if output_format == "text" else json.dumps(asdict(chunk), ensure_ascii=False) + "\n")
            sink.flush()
    if output_format == "text":
        sink.write("\n")


def _write(outputs: list[RequestOutput], sink: TextIO, output_format: str) -> None:
    is_one = len(outputs) == 1 and len(outputs[0].outputs) == 1
    for number, output in enumerate(outputs, start=1):
        for completion in output.outputs:
            if output_format == "jsonl":
                sink.write(json.dumps(_as_json(output, completion), ensure_ascii=False) + "\n")
            elif is_one:
                sink.write(completion.text + "\n")
            else:
                sink.write(f"=== prompt {number}, choice {completion.index + 1}\n{completion.text}\n")


_COMPLETION_FIELDS = ("index", "text", "token_ids", "logprobs", "finish_reason", "stop_reason", "error")


def _as_json(output: RequestOutput, completion: CompletionOutput) -> dict[str, Any]:
    fields = {**asdict(completion), "text": completion.text}
    result: dict[str, Any] = {
        "prompt": output.prompt,
        "num_prompt_tokens": len(output.prompt_token_ids),
        "num_cached_tokens": output.num_cached_tokens,
        **{name: fields[name] for name in _COMPLETION_FIELDS},
    }
    if completion.index == 0 and output.prompt_logprobs is not None:
        result["prompt_logprobs"] = [entry and asdict(entry) for entry in output.prompt_logprobs]
    return {name: value for name, value in result.items() if value is not None}


def _report_failures(outputs: list[RequestOutput]) -> int:
    failed = [c for output in outputs for c in output.outputs if c.finish_reason is FinishReason.ERROR]
    for completion in failed:
        print(f"pagoda generate: {completion.error}", file=sys.stderr)
    return 1 if failed else 0
