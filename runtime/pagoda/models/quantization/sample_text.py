"""Conversations of the kinds that the demo model knows, for measuring quality where no text is given."""

# ruff: noqa: SIM905 (a word list reads best as text)

from __future__ import annotations

import json
from collections.abc import Iterator
from random import Random

_WORDS = """
anchor apple badger basket bell blanket boat bridge brush button camel candle castle chain clock cloud copper crown
deer dolphin door drum eagle fence flute forest fountain garden goat hammer harbor hat island jacket kettle kite ladder
lamp lemon lion meadow mirror moon needle nest onion otter paint panda pencil piano river road rose sail shell silver
spoon star table tiger tower train umbrella valley violin wagon whale window wolf zebra
""".split()
_PEOPLE = (("Mia", "Oslo"), ("Noah", "Rome"), ("Emma", "Paris"), ("Leo", "Lima"), ("Anna", "Cairo"), ("Max", "Tokyo"))
_SEED = 11


def sample_conversations(rounds: int = 12) -> Iterator[tuple[str, str]]:
    """Questions with their answers, always the same: sums, facts of a list, comparing, counting, repeating, JSON."""
    random = Random(_SEED)
    for _ in range(rounds):
        first, second = random.randint(10, 89), random.randint(10, 89)
        yield f"What is {first} + {second}?", f"{first} + {second} = {first + second}"
        facts = {word: random.randint(100, 999) for word in random.sample(_WORDS, 12)}
        asked = random.choice(list(facts))
        lines = "\n".join(f"- {word}: {value}" for word, value in facts.items())
        yield f"Remember this list:\n{lines}\nWhat is the value of {asked}?", f"The value of {asked} is {facts[asked]}."
        low, high = sorted(random.sample(range(10, 99), 2))
        yield f"Which is larger, {low} or {high}?", f"{high} is larger than {low}."
        yield f"Count from {low} to {low + 6}.", ", ".join(map(str, range(low, low + 7)))
        words = " ".join(random.sample(_WORDS, 8))
        yield f"Repeat: {words}", words
        name, city = random.choice(_PEOPLE)
        age = random.randint(20, 79)
        yield (
            f"{name} is {age} years old and lives in {city}. Answer in JSON with name, age, city.",
            json.dumps({"name": name, "age": age, "city": city}),
        )
