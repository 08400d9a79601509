"""Recall of a value among many keys: a long message with facts, then questions about any of them.

Held-out and training items differ by their whole fact sheet: keys, values and order are drawn anew, so a value can only be
read from the context.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from lexicon import KEY_WORDS
from stories import story

LINE = "- {key}: {value}"
SENTENCE = "The value of {key} is {value}."


@dataclass(frozen=True)
class FactSheet:
    """Facts, and the message that states them."""

    facts: dict[str, str]
    text: str


def fact_sheet(random: Random, num_facts: int, as_sentences: bool | None = None, filler: bool = False) -> FactSheet:
    """`num_facts` facts as lines or sentences; with `filler`, stories stand between the sentences."""
    keys = random.sample(KEY_WORDS, num_facts)
    worded = random.random() < 0.2
    values = random.choices(KEY_WORDS, k=num_facts) if worded else [str(random.randint(100, 999)) for _ in keys]
    facts = dict(zip(keys, values, strict=True))
    if as_sentences is None:
        as_sentences = random.random() < 0.4
    if not (as_sentences or filler):
        lines = [LINE.format(key=key, value=value) for key, value in facts.items()]
        return FactSheet(facts, "Remember this list:\n" + "\n".join(lines))
    parts = []
    for key, value in facts.items():
        if filler and random.random() < 0.5:
            parts.append(story(random))
        parts.append(SENTENCE.format(key=key, value=value))
    return FactSheet(facts, "Remember this: " + " ".join(parts))


def ask_one(random: Random, sheet: FactSheet) -> tuple[str, str]:
    """A question about one fact, with its answer."""
    key = random.choice(list(sheet.facts))
    form = random.choice(["What is the value of {}?", "What is {}?", "Tell me the value of {}."])
    return form.format(key), SENTENCE.format(key=key, value=sheet.facts[key])


def ask_many(random: Random, sheet: FactSheet, most: int = 16) -> tuple[str, str]:
    """A question about several facts, with its answer, a line each."""
    keys = random.sample(list(sheet.facts), min(random.randint(2, most), len(sheet.facts)))
    answer = "\n".join(LINE.format(key=key, value=sheet.facts[key]) for key in keys)
    return f"List the values of {', '.join(keys)}.", answer
