"""`pagoda chat`: talk to a model in the terminal. Works with piped input too: each line is a turn."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING

from pagoda.cli.offline import check_one_choice, loaded_llm, make_parser, parse, sampling_params
from pagoda.errors import InvalidRequestError
from pagoda.sampling.params import SamplingParams

if TYPE_CHECKING:
    from pagoda.llm import LLM

DESCRIPTION = "Talks to a model in the terminal. Ctrl-C stops an answer, /reset starts over, /quit or Ctrl-D leaves."
HELP = "/reset: forget the conversation   /quit: leave   /help: this   Ctrl-C: stop an answer"


def run(arguments: Sequence[str]) -> int:
    """Talk until the input ends or `/quit`."""
    parser = make_parser("chat", DESCRIPTION)
    parser.add_argument("--system", metavar="TEXT", help="a system message that opens the conversation")
    own, config = parse(parser, arguments)
    with loaded_llm(config) as llm:
        sampling = sampling_params(llm, own)
        check_one_choice(sampling, "a conversation has one answer to each turn")
        conversation = Conversation(llm, sampling, own.system)
        conversation.check_template()
        _talk(conversation)
    return 0


class Conversation:
    """The messages so far, and the model that answers them."""

    def __init__(self, llm: LLM, sampling: SamplingParams, system: str | None) -> None:
        self._llm = llm
        self._sampling = sampling
        self._system = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, str]] = list(self._system)

    def check_template(self) -> None:
        """Raise `InvalidRequestError` if this model cannot chat."""
        self._llm.encode_chat([*self._system, {"role": "user", "content": ""}])

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = list(self._system)

    def answer(self, text: str) -> None:
        """Print the answer to `text` as it comes. Ctrl-C ends it; what was printed is part of the conversation.

        Raises `InvalidRequestError` when the conversation does not fit the context; then `text` is not part of it.
        """
        turn = [*self.messages, {"role": "user", "content": text}]
        pieces: list[str] = []
        try:
            with closing(self._llm.stream(self._llm.encode_chat(turn), self._sampling)) as chunks:
                for chunk in chunks:
                    pieces.append(chunk.text)
                    print(chunk.text, end="", flush=True)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        print(flush=True)
        self.messages = [*turn, {"role": "assistant", "content": "".join(pieces)}]


def _talk(conversation: Conversation) -> None:
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        import readline  # noqa: F401 (gives `input` a line editor and a history)

        print(HELP)
    while (text := _read_turn(is_terminal)) is not None:
        if text == "/quit":
            return
        if text == "/reset":
            conversation.reset()
        elif text == "/help":
            print(HELP)
        elif text.startswith("/"):
            print(f"there is no {text.split()[0]}. {HELP}", file=sys.stderr)
        elif text:
            try:
                conversation.answer(text)
            except InvalidRequestError as error:
                print(f"pagoda chat: {error} (/reset starts over)", file=sys.stderr)


def _read_turn(is_terminal: bool) -> str | None:
    """The next line without the space around it; None when there are no more. Ctrl-C drops a line that was begun."""
    while True:
        try:
            return input("> " if is_terminal else "").strip()
        except EOFError:
            return None
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            print()
