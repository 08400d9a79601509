"""`pagoda chat`: talk to a model in the terminal. Works with piped input too: each line is a turn."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pagoda.cli.chat_input import read_message, start_line_editor
from pagoda.cli.offline import (
    add_model,
    add_sampling_options,
    check_one_choice,
    loaded_llm,
    make_parser,
    parse,
    sampling_names,
    sampling_params,
)
from pagoda.cli.parser import CommandParser
from pagoda.config.names import nearest
from pagoda.errors import ConfigError, InvalidRequestError

if TYPE_CHECKING:
    from pagoda.config.schema import PagodaConfig
    from pagoda.llm import LLM
    from pagoda.sampling.params import SamplingParams

DESCRIPTION = (
    "Talks to a model in the terminal: `pagoda chat ./Qwen3-0.6B`. Ctrl-C stops an answer, Ctrl-D leaves, /help lists the "
    "commands. What is pasted is one message, however many lines it has; of piped input each line is one."
)
GREETING = "/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves"
HELP = """\
/system [TEXT]       what the conversation opens with; none: show it
/set [NAME [VALUE]]  a sampling parameter, as in /set temperature 0.6; VALUE default: the checkpoint's; none: show them
/retry               another answer to the last message
/save FILE           the conversation, as JSON
/load FILE           a conversation that was saved, or a list of messages
/reset               forget the conversation
/quit                leave; Ctrl-D does, too"""


def run(arguments: Sequence[str]) -> int:
    """Talk until the input ends or `/quit`."""
    parser = make_parser("chat", DESCRIPTION)
    add_model(parser)
    parser.add_argument("--system", metavar="TEXT", help="a system message that opens the conversation")
    add_sampling_options(parser)
    own, config = parse(parser, arguments)
    sampling = ChatSampling(config, own)
    is_terminal = sys.stdin.isatty()
    with loaded_llm(config) as llm:
        conversation = Conversation(llm, sampling, own.system, shows_speed=is_terminal and sys.stdout.isatty())
        conversation.check_template()
        if is_terminal:
            start_line_editor()
            print(GREETING)
        _talk(conversation, is_terminal)
    return 0


class ChatSampling:
    """The sampling parameters of a conversation, which may change between its turns."""

    def __init__(self, config: PagodaConfig, own: argparse.Namespace) -> None:
        """Raises `InvalidRequestError` for options of `own` that are impossible."""
        self._config = config
        self._own = own
        self._parser = CommandParser("/set", add_help=False)
        add_sampling_options(self._parser)
        self.params = self._checked(own)

    def given(self) -> dict[str, Any]:
        """The parameters that somebody chose; the others are the checkpoint's."""
        return {name: value for name in sampling_names() if (value := getattr(self._own, name)) is not None}

    def set(self, name: str, value: str) -> None:
        """Change one; `default` is the checkpoint's. Raises `ConfigError` or `InvalidRequestError` and leaves all as it is."""
        key = name.lstrip("-").replace("-", "_")
        if value == "default" and key in sampling_names():
            changes: dict[str, Any] = {key: None}
        else:
            flag = f"--{key}"
            word = {"true": flag, "false": f"--no-{key}"}.get(value.lower(), f"{flag}={value}")
            parsed = vars(self._parser.parse_args([word]))
            changes = {changed: new for changed, new in parsed.items() if new is not None}
        own = argparse.Namespace(**{**vars(self._own), **changes})
        self.params = self._checked(own)
        self._own = own

    def _checked(self, own: argparse.Namespace) -> SamplingParams:
        params = sampling_params(self._config, own)
        check_one_choice(params, "a conversation has one answer to each turn")
        return params


class Conversation:
    """The messages so far, and the model that answers them."""

    def __init__(self, llm: LLM, sampling: ChatSampling, system: str | None, *, shows_speed: bool = False) -> None:
        self._llm = llm
        self.sampling = sampling
        self._shows_speed = shows_speed
        self.messages: list[dict[str, str]] = []
        self.system = system

    @property
    def system(self) -> str | None:
        """The system message."""
        opening = self.messages[:1]
        return opening[0]["content"] if opening and opening[0]["role"] == "system" else None

    @system.setter
    def system(self, text: str | None) -> None:
        rest = self.messages[self.system is not None :]
        self.messages = [*([{"role": "system", "content": text}] if text else []), *rest]

    def check_template(self) -> None:
        """Raise `InvalidRequestError` if this model cannot chat."""
        self._llm.encode_chat([*self.messages, {"role": "user", "content": ""}])

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = self.messages[: self.system is not None]

    def answer(self, text: str) -> None:
        """Print the answer to `text` as it comes. Ctrl-C ends it; what was printed is part of the conversation.

        Raises `InvalidRequestError` when the conversation does not fit the context; then `text` is not part of it.
        """
        turn = [*self.messages, {"role": "user", "content": text}]
        pieces: list[str] = []
        num_tokens, began, first = 0, time.monotonic(), 0.0
        try:
            with closing(self._llm.stream(self._llm.encode_chat(turn), self.sampling.params)) as chunks:
                for chunk in chunks:
                    first = first or time.monotonic()
                    num_tokens += len(chunk.token_ids)
                    pieces.append(chunk.text)
                    print(chunk.text, end="", flush=True)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        print(flush=True)
        if self._shows_speed and num_tokens:
            print(speed_line(num_tokens, first - began, time.monotonic() - first))
        self.messages = [*turn, {"role": "assistant", "content": "".join(pieces)}]

    def retry(self) -> None:
        """Answer the last message again. Raises `InvalidRequestError` where there is none."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise InvalidRequestError("there is no answer yet that could be made again")
        before = self.messages
        *self.messages, question, _ = before
        try:
            self.answer(question["content"])
        except BaseException:  # raised on: whatever ends it, Ctrl-C too, the conversation is as it was
            self.messages = before
            raise

    def save(self, path: Path) -> None:
        """Write the conversation to a new file. Raises `InvalidRequestError` where that cannot be."""
        content = {"messages": self.messages, "sampling": self.sampling.given()}
        try:
            with path.expanduser().open("x", encoding="utf-8") as file:
                json.dump(content, file, indent=2, ensure_ascii=False)
                file.write("\n")
        except OSError as error:
            raise InvalidRequestError(f"{path} cannot be written: {error.strerror}") from error

    def load(self, path: Path) -> None:
        """Go on with a saved conversation. Raises `InvalidRequestError` for a file that holds none."""
        try:
            content = json.loads(path.expanduser().read_text(encoding="utf-8"))
        except OSError as error:
            raise InvalidRequestError(f"{path} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise InvalidRequestError(f"{path} is not JSON: {error}") from error
        messages = content.get("messages") if isinstance(content, dict) else content
        if not isinstance(messages, list) or not all(map(_is_message, messages)):
            raise InvalidRequestError(f"{path} has no list of messages, each with a role and content, both text")
        self.messages = [{"role": message["role"], "content": message["content"]} for message in messages]


def _is_message(value: object) -> bool:
    return (
        isinstance(value, dict)
        and value.get("role") in ("system", "user", "assistant")
        and isinstance(value.get("content"), str)
    )


def speed_line(num_tokens: int, to_first: float, after_first: float) -> str:
    """What an answer took, in words. `to_first`, `after_first`: seconds to the first token, and from there."""
    rate = f", {(num_tokens - 1) / after_first:.1f} tokens/s" if num_tokens > 1 and after_first > 0 else ""
    return f"[{num_tokens} tokens{rate}, first after {to_first:.2f} s]"


def _talk(conversation: Conversation, is_terminal: bool) -> None:
    while (text := read_message("> " if is_terminal else "", is_terminal)) is not None:
        # What has several lines was pasted: it may well begin with a slash.
        is_command = text.startswith("/") and "\n" not in text
        if is_command and text in ("/quit", "/exit", "/bye"):
            return
        try:
            if is_command:
                _command(conversation, *_word_and_rest(text))
            elif text:
                conversation.answer(text)
        except InvalidRequestError as error:
            print(f"pagoda chat: {error}{'' if is_command else ' (/reset starts over)'}", file=sys.stderr)
        except ConfigError as error:
            print(f"pagoda chat: {error}", file=sys.stderr)


def _word_and_rest(text: str) -> tuple[str, str]:
    word, _, rest = text.partition(" ")
    return word, rest.strip()


def _command(conversation: Conversation, word: str, rest: str) -> None:
    command = _COMMANDS.get(word)
    if command is None:
        hint = nearest(word, [*_COMMANDS, "/quit"]) or "; /help lists the commands"
        raise ConfigError(f"there is no {word[:40]}{hint}")
    command(conversation, rest)


def _system(conversation: Conversation, text: str) -> None:
    if text:
        conversation.system = text
    print(f"system: {conversation.system or 'none'}")


def _set(conversation: Conversation, text: str) -> None:
    name, value = _word_and_rest(text)
    key = name.lstrip("-").replace("-", "_")
    if key and key not in sampling_names():
        raise ConfigError(f"{key}: no sampling parameter{nearest(key, sampling_names())}")
    if value:
        conversation.sampling.set(name, value)
    params, given = conversation.sampling.params, conversation.sampling.given()
    for shown in [key] if key else sampling_names():
        print(f"{shown} = {getattr(params, shown)}{'' if shown in given else '    (default)'}")


def _file(text: str) -> Path:
    if not text:
        raise ConfigError("a file is needed, as in /save conversation.json")
    return Path(text)


_COMMANDS: dict[str, Callable[[Conversation, str], None]] = {
    "/help": lambda conversation, _: print(HELP),
    "/system": _system,
    "/set": _set,
    "/retry": lambda conversation, _: conversation.retry(),
    "/save": lambda conversation, text: conversation.save(_file(text)),
    "/load": lambda conversation, text: conversation.load(_file(text)),
    "/reset": lambda conversation, _: conversation.reset(),
}
