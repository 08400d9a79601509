"""Generates the demo model's data: conversations over all skills, recall over long contexts, stories and drills.

Everything follows from a seed: `python generate_data.py --seed 1 --count 5` prints the same five documents everywhere.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

import tokenizer as text_format
from recall import ask_many, ask_one, fact_sheet
from skills import SKILLS, draw, is_held_out, sequence, sum_key
from stories import story
from tools import TOOLS, system_text, tool_item

STORY_WEIGHT = 0.25
SYSTEMS = [
    "You are a helpful assistant.",
    "You are a friendly assistant. Answer briefly.",
    "Answer the user.",
    "Be brief.",
]
Pieces = list[tuple[str, float]]  # text and the weight of its tokens in the loss


@dataclass(frozen=True)
class Mixture:
    """Shares of the kinds of documents."""

    conversation: float = 0.42
    tools: float = 0.07
    recall: float = 0.18
    drill: float = 0.18
    repeats: float = 0.11
    story: float = 0.04


EARLY = Mixture(conversation=0.34, tools=0.04, recall=0.20, drill=0.08, repeats=0.32, story=0.02)  # looking back first
SHORT = Mixture(conversation=0.70, tools=0.16, recall=0.08, drill=0.02, repeats=0.02, story=0.02)  # one or two turns
LONG = Mixture(conversation=0.16, tools=0.05, recall=0.70, drill=0.02, repeats=0.05, story=0.02)  # from 1024 tokens


def learnt(pieces: list[tuple[str, bool]]) -> Pieces:
    return [(text, float(weight)) for text, weight in pieces]


def system_of(random: Random) -> str:
    return text_format.DEFAULT_SYSTEM if random.random() < 0.8 else random.choice(SYSTEMS)


def conversation(random: Random, room: int, fits: Callable[[Pieces], bool]) -> Pieces:
    """Turns over random skills until `room` tokens are full."""
    names, weights = list(SKILLS), [weight for _, weight in SKILLS.values()]
    pieces = learnt(text_format.render([], system_of(random)))
    return extend(pieces, fits, lambda: draw(random, random.choices(names, weights)[0], held_out=False).messages)


def tool_conversation(random: Random, room: int, fits: Callable[[Pieces], bool]) -> Pieces:
    """Turns that need the offered tools, with other skills in between."""
    tools = random.sample(TOOLS, random.randint(1, min(4, len(TOOLS))))
    pieces = learnt(text_format.render([], system_text(tools, system_of(random))))

    def turn() -> tuple[tuple[str, str], ...]:
        if random.random() < 0.2:
            return draw(random, random.choice(list(SKILLS)), held_out=False).messages
        item = tool_item(random, tools)
        while is_held_out(item.key):
            item = tool_item(random, tools)
        return item.messages

    return extend(pieces, fits, turn)


def recall_conversation(random: Random, room: int, fits: Callable[[Pieces], bool]) -> Pieces:
    """A fact sheet over 25 to 80 percent of `room`, then questions about it, some other turns in between."""
    filler = random.random() < 0.15
    tokens_per_fact = 55 if filler else 9
    num_facts = max(2, int((room - 40) * random.uniform(0.25, 0.8) / tokens_per_fact))
    sheet = fact_sheet(random, min(num_facts, 230), filler=filler)
    pieces = learnt(text_format.render([], system_of(random)))
    first = True

    def turn() -> tuple[tuple[str, str], ...]:
        nonlocal first
        if not first and random.random() < 0.1:
            return draw(random, random.choice(list(SKILLS)), held_out=False).messages
        question, answer = ask_one(random, sheet) if random.random() < 0.5 else ask_many(random, sheet)
        if first:
            first = False
            question = f"{sheet.text}\n{question}"
        return (("user", question), ("assistant", answer))

    return extend(pieces, fits, turn)


def drill(random: Random, room: int, fits: Callable[[Pieces], bool]) -> Pieces:
    """Plain lines of sums, the densest way to practise them; only the results are learnt."""
    pieces: Pieces = []
    while True:
        first, second = random.randint(0, 99), random.randint(0, 99)
        if is_held_out(sum_key(first, second)):
            continue
        line: Pieces = [(f"{first} + {second} = ", 0.0), (f"{first + second}\n", 1.0)]
        if not fits(pieces + line):
            return pieces
        pieces += line


def repeats(random: Random, room: int, fits: Callable[[Pieces], bool]) -> Pieces:
    """A list of words or numbers again and again, the densest way to learn to look back; its first time is not learnt.

    It stands on one line or on a line each: a word after a space and one at a line's start are different tokens.
    """
    words = sequence(random, 3, 24)
    forms = [" " + " ".join(words) + "\n", "\n".join(words) + "\n"]
    pieces: Pieces = [(random.choice(forms), 0.0)]
    while fits([*pieces, line := (random.choice(forms), 1.0)]):
        pieces.append(line)
    return pieces


def stories(random: Random, room: int, fits: Callable[[Pieces], bool]) -> Pieces:
    """Stories one after the other, each ended by the end-of-text token."""
    pieces: Pieces = []
    while True:
        text = story(random)
        if is_held_out(f"story|{text}"):
            continue
        line = [(text + text_format.END_OF_TEXT, STORY_WEIGHT)]
        if not fits(pieces + line):
            return pieces or [(text, STORY_WEIGHT)]
        pieces += line


def extend(pieces: Pieces, fits: Callable[[Pieces], bool], turn: Callable[[], tuple[tuple[str, str], ...]]) -> Pieces:
    """Add turns to a conversation while they fit; two misses end it."""
    misses = 0
    while misses < 2:
        longer = learnt(text_format.render(turn()))[1:]
        if fits(pieces + longer):
            pieces = pieces + longer
        else:
            misses += 1
    return pieces


KINDS: dict[str, Callable[[Random, int, Callable[[Pieces], bool]], Pieces]] = {
    "conversation": conversation,
    "tools": tool_conversation,
    "recall": recall_conversation,
    "drill": drill,
    "repeats": repeats,
    "story": stories,
}


def document(random: Random, room: int, mixture: Mixture, fits: Callable[[Pieces], bool]) -> Pieces:
    """One document of at most `room` tokens (as `fits` measures), of a kind drawn from `mixture`."""
    kind = random.choices(list(KINDS), [getattr(mixture, name) for name in KINDS])[0]
    return KINDS[kind](random, room, fits)


def texts(seed: int, count: int, room: int = 400, mixture: Mixture | None = None) -> Iterator[str]:
    """`count` documents as plain text of about `room` words and marks, for the tokenizer and for reading."""
    random = Random(seed)
    for _ in range(count):
        pieces = document(random, room, mixture or Mixture(), lambda pieces: sum(map(rough_length, pieces)) <= room)
        yield "".join(text for text, _ in pieces)


def rough_length(piece: tuple[str, float]) -> int:
    return 1 + len(piece[0]) // 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=5)
    parser.add_argument("--room", type=int, default=400, help="length of a document, about tokens")
    arguments = parser.parse_args()
    for text in texts(arguments.seed, arguments.count, arguments.room):
        print(text, end="\n" + "-" * 80 + "\n")


if __name__ == "__main__":
    main()
