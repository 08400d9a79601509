"""A process that compiles grammars on trial, with a limit of memory, and is killed when one takes too long.

llguidance counts most of what compiling takes, but not all: some schemas of a few bytes never come to an end, and a thread
cannot be stopped. A grammar that has passed here is compiled again where it is used.

    request    length, 4 bytes, big, and JSON      {"tokenizer": directory, "vocab_size": …}, then the fields of `GrammarSpec`
    answer     the same                            {} or {"error": message, "param": name}
"""

from __future__ import annotations

import json
import random
import resource
import sys
import time
from typing import Any, BinaryIO

import numpy as np

from pagoda.errors import ConfigError, InvalidRequestError
from pagoda.structured.compiler import compile_grammar, grammar_error
from pagoda.structured.matcher import GrammarMatcher
from pagoda.structured.reasoning import Reasoning
from pagoda.structured.spec import GrammarSpec
from pagoda.structured.vocabulary import GrammarVocabulary

LENGTH_BYTES = 4
_MEMORY_BYTES = 512 << 20
# A walk over random tokens finds what only shows when a grammar is used: masks that take long, rows with too many items.
_NUM_TRIAL_TOKENS = 48
_MAX_MASK_SECONDS = 0.05


def encode(message: dict[str, Any]) -> bytes:
    """A message as it goes over the pipe."""
    body = json.dumps(message).encode("ascii")
    return len(body).to_bytes(LENGTH_BYTES, "big") + body


def try_grammar(spec: GrammarSpec, vocabulary: GrammarVocabulary) -> None:
    """Compile a grammar and follow it for some tokens. Raises `InvalidRequestError` for one that cannot be enforced."""
    matcher = GrammarMatcher(
        compile_grammar(spec, vocabulary),
        Reasoning(spec, lambda _: b""),
        vocab_size=vocabulary.tokenizer.vocab_size,
        vocabulary_eos_ids=vocabulary.tokenizer.eos_tokens,
        end_ids=(),
        ignore_eos=True,
    )
    choose = random.Random(0).choice
    words = np.empty((1, matcher.num_words), dtype=np.int32)
    for _ in range(_NUM_TRIAL_TOKENS):
        started = time.process_time()
        matcher.fill(words)
        taken = time.process_time() - started
        if matcher.error is not None:
            raise grammar_error(spec, matcher.error)
        if taken > _MAX_MASK_SECONDS:
            raise grammar_error(spec, f"it takes {1000 * taken:.0f} ms to find the tokens that it allows")
        allowed = np.unpackbits(words[0].view(np.uint8), bitorder="little").nonzero()[0].tolist()
        if not allowed or matcher.advance(choose(allowed)):
            return
        if matcher.error is not None:
            raise grammar_error(spec, matcher.error)


def main() -> None:
    """Answer requests on the standard streams until their end, which comes when the server has died."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    setup = _read(source)
    if setup is None:
        return
    try:
        vocabulary = GrammarVocabulary.from_directory(setup["tokenizer"], setup["vocab_size"])
    except ConfigError as error:
        sink.write(encode({"error": str(error), "param": None}))
        sink.flush()
        return
    if sys.platform == "linux":
        with open("/proc/self/statm", encoding="ascii") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY_BYTES,) * 2)
    answer: dict[str, Any] = {}
    while True:
        sink.write(encode(answer))
        sink.flush()
        request = _read(source)
        if request is None:
            return
        answer = _answer(GrammarSpec(**request), vocabulary)


def _answer(spec: GrammarSpec, vocabulary: GrammarVocabulary) -> dict[str, Any]:
    try:
        try_grammar(spec, vocabulary)
    except InvalidRequestError as error:
        return {"error": str(error), "param": error.param}
    except (MemoryError, RecursionError) as error:
        refused = grammar_error(spec, f"it takes too much to be compiled ({type(error).__name__})")
        return {"error": str(refused), "param": refused.param}
    return {}


def _read(source: BinaryIO) -> dict[str, Any] | None:
    header = source.read(LENGTH_BYTES)
    if len(header) < LENGTH_BYTES:
        return None
    message: dict[str, Any] = json.loads(source.read(int.from_bytes(header, "big")))
    return message


if __name__ == "__main__":
    main()
