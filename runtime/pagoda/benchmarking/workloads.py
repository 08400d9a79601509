"""Workloads: conversations of one or several turns, generated from a seed. Equal arguments give equal workloads."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from pagoda.benchmarking.prompts import Content, PromptSource
from pagoda.errors import InvalidRequestError


@dataclass(frozen=True, slots=True)
class Turn:
    """One request: what the user adds to the conversation, and the most tokens of the answer."""

    content: Content
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns that follow each other: each is sent after the answer to the one before, with all of the history before it.

    `history`: what came before the first turn, from user and assistant in turns.
    """

    turns: tuple[Turn, ...]
    history: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LengthRange:
    """Lengths in tokens, drawn evenly from `low` to `high`, both included."""

    low: int
    high: int

    def __post_init__(self) -> None:
        if self.low < 1 or self.high < self.low:
            raise InvalidRequestError(
                f"lengths from {self.low} to {self.high} tokens are impossible: 1 or more, lower first"
            )

    @classmethod
    def parse(cls, text: str) -> LengthRange:
        """`128`, or `64:256`. Raises `InvalidRequestError` for anything else."""
        low, colon, high = text.partition(":")
        try:
            return cls(int(low), int(high if colon else low))
        except ValueError:
            raise InvalidRequestError(f"{text!r} is no length: write 128, or 64:256 for a range") from None

    def draw(self, rng: random.Random) -> int:
        return rng.randint(self.low, self.high)


def random_prompts(
    source: PromptSource, count: int, input_tokens: LengthRange, output_tokens: LengthRange, seed: int
) -> list[Conversation]:
    """`count` prompts that have nothing in common."""
    rng = random.Random(seed)
    conversations = []
    for _ in range(count):
        num_input, num_output = input_tokens.draw(rng), output_tokens.draw(rng)
        conversations.append(Conversation((Turn(source.make(rng, num_input), num_output),)))
    return conversations


def shared_prefix_prompts(
    source: PromptSource,
    count: int,
    num_prefixes: int,
    prefix_tokens: LengthRange,
    suffix_tokens: LengthRange,
    output_tokens: LengthRange,
    seed: int,
) -> list[Conversation]:
    """`count` prompts, each one of `num_prefixes` beginnings with an end of its own; beginnings come in random order.

    Raises `InvalidRequestError` when there are more prefixes than prompts.
    """
    if not 1 <= num_prefixes <= count:
        raise InvalidRequestError(f"{num_prefixes} prefixes for {count} prompts: 1 to {count} can be used")
    rng = random.Random(seed)
    prefixes = [source.make(rng, prefix_tokens.draw(rng)) for _ in range(num_prefixes)]
    chosen = [prefixes[number % num_prefixes] for number in range(count)]
    rng.shuffle(chosen)
    conversations = []
    for prefix in chosen:
        content = source.join(prefix, source.make(rng, suffix_tokens.draw(rng)))
        conversations.append(Conversation((Turn(content, output_tokens.draw(rng)),)))
    return conversations


def multi_turn_conversations(
    source: PromptSource,
    count: int,
    num_turns: LengthRange,
    input_tokens: LengthRange,
    output_tokens: LengthRange,
    seed: int,
) -> list[Conversation]:
    """`count` conversations; `input_tokens` is what each turn adds."""
    rng = random.Random(seed)
    return [
        Conversation(
            tuple(
                Turn(source.make(rng, input_tokens.draw(rng)), output_tokens.draw(rng))
                for _ in range(num_turns.draw(rng))
            )
        )
        for _ in range(count)
    ]


def agent_sessions(
    source: PromptSource,
    count: int,
    num_prefixes: int,
    prefix_tokens: LengthRange,
    num_turns: LengthRange,
    input_tokens: LengthRange,
    output_tokens: LengthRange,
    seed: int,
) -> list[Conversation]:
    """`count` sessions of coding agents: many turns over a long beginning that they share, with short answers.

    A session begins with one of `num_prefixes` beginnings (instructions and tools); `input_tokens` is what each turn adds,
    the result of a tool mostly. So nearly all of a turn's prompt was in the one before.
    Raises `InvalidRequestError` when there are more beginnings than sessions.
    """
    first_turns = shared_prefix_prompts(source, count, num_prefixes, prefix_tokens, input_tokens, output_tokens, seed)
    rng = random.Random(f"agent {seed}")
    return [
        Conversation(
            (
                *first.turns,
                *(
                    Turn(source.make(rng, input_tokens.draw(rng)), output_tokens.draw(rng))
                    for _ in range(num_turns.draw(rng) - 1)
                ),
            )
        )
        for first in first_turns
    ]


def check_fits(conversations: Sequence[Conversation], max_model_len: int) -> None:
    """Raise `InvalidRequestError` if a conversation of token ids cannot fit into `max_model_len` tokens."""
    for conversation in conversations:
        contents = [turn.content for turn in conversation.turns]
        if not all(isinstance(content, tuple) for content in contents):
            continue
        needed = sum(len(turn.content) + turn.output_tokens for turn in conversation.turns)
        if needed > max_model_len:
            raise InvalidRequestError(
                f"input and output lengths add up to {needed} tokens, and the model takes {max_model_len}"
            )
