"""Workloads out of a file: one prompt a line, JSON lines, or conversations in the form of ShareGPT."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from pagoda.benchmarking.workloads import Conversation, LengthRange, Turn
from pagoda.errors import InvalidRequestError

_USERS = ("human", "user")


def read_workload(path: Path, count: int, output_tokens: LengthRange, seed: int) -> list[Conversation]:
    """`count` conversations from `path`, in random order; a shorter file is used again from its beginning.

    `*.jsonl`: an object on each line. `*.json`: a list of objects. Anything else: a prompt on each line. An object has
    `prompt`, `messages` (OpenAI's) or `conversations` (ShareGPT's: `from` and `value`), and may have `output_tokens`. Of a
    conversation the users' turns are sent; the answers are the server's own. Raises `InvalidRequestError` saying where the
    file is wrong.
    """
    rng = random.Random(seed)
    entries = _entries(path)
    if not entries:
        raise InvalidRequestError(f"{path} has no prompts")
    contents = [_contents(entry, f"{path}, entry {number}") for number, entry in enumerate(entries, start=1)]
    rng.shuffle(contents)
    chosen = [contents[number % len(contents)] for number in range(count)]
    return [
        Conversation(tuple(Turn(text, fixed or output_tokens.draw(rng)) for text in texts)) for texts, fixed in chosen
    ]


def _entries(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"{path} cannot be read: {error}") from error
    if path.suffix == ".json":
        content = _json(text, str(path))
        if not isinstance(content, list):
            raise InvalidRequestError(f"{path} must be a list of objects")
        return content
    lines = [(number, line) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
    if path.suffix == ".jsonl":
        return [_json(line, f"{path}, line {number}") for number, line in lines]
    return [{"prompt": line} for _, line in lines]


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InvalidRequestError(f"{where} is not JSON: {error}") from error


def _contents(entry: Any, where: str) -> tuple[list[str], int | None]:
    """The users' texts of an entry, and its own output length."""
    known = [name for name in ("prompt", "messages", "conversations") if isinstance(entry, dict) and name in entry]
    if len(known) != 1:
        raise InvalidRequestError(f"{where} must be an object with one of prompt, messages or conversations")
    value = entry[known[0]]
    if known[0] == "prompt":
        texts = [value]
    else:
        role, text = ("role", "content") if known[0] == "messages" else ("from", "value")
        if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
            raise InvalidRequestError(f"{where}: {known[0]} must be a list of objects with {role} and {text}")
        texts = [message.get(text) for message in value if message.get(role) in _USERS]
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise InvalidRequestError(f"{where} has no text of a user, or an empty one")
    fixed = entry.get("output_tokens")
    if fixed is not None and (not isinstance(fixed, int) or isinstance(fixed, bool) or fixed < 1):
        raise InvalidRequestError(f"{where}: output_tokens must be an integer of 1 or more, not {fixed!r}")
    return texts, fixed
