"""Short stories from a grammar: a hero, a place, a wish, a trouble, a helper, an end that fits them all."""

from __future__ import annotations

from random import Random

from lexicon import ADJECTIVES, ANIMALS, COLORS, NAMES, PLACES, THINGS

OPENINGS = [
    "Once upon a time there was a {adjective} {hero} named {name}.",
    "Once upon a time, a {adjective} {hero} named {name} lived near the {place}.",
    "There once was a {hero} called {name}, who was very {adjective}.",
    "Long ago, in a {place} far away, lived a {adjective} {hero} named {name}.",
]
WISHES = [
    "{name} wanted a {color} {thing} more than anything.",
    "Every day {name} looked for a {color} {thing}.",
    "One day {name} found a {color} {thing} by the {place}.",
    "One morning {name} went to the {place} to find a {thing}.",
]
TROUBLES = [
    "But the {thing} was gone, and {name} was sad.",
    "But the {thing} fell into the water.",
    "Then the rain came, and {name} could not find the way home.",
    "But a {other} had taken the {thing}.",
]
HELPS = [
    'A {adjective2} {helper} came and said, "I can help you."',
    '"Do not cry," said a {adjective2} {helper}. "We will look together."',
    "Then {name} met a {adjective2} {helper}, and they became friends.",
]
ENDS = [
    "Together they found the {thing}, and {name} was happy again.",
    "The {helper} gave the {thing} back to {name}, and they laughed all day.",
    "They went home together and shared some bread. {name} was never alone again.",
    "In the end {name} gave the {thing} to the {helper} as a gift.",
]
CLOSINGS = ["The end.", "And they lived happily ever after.", "That night {name} slept well."]


def story(random: Random, hero: str | None = None) -> str:
    """One story of five or six sentences; `hero` fixes the animal it is about."""
    hero = hero or random.choice(ANIMALS)
    helper, other = random.sample([animal for animal in ANIMALS if animal != hero], 2)
    adjective, second_adjective = random.sample(ADJECTIVES, 2)
    words = {
        "hero": hero,
        "helper": helper,
        "other": other,
        "name": random.choice(NAMES),
        "place": random.choice(PLACES),
        "thing": random.choice(THINGS),
        "color": random.choice(COLORS),
        "adjective": adjective,
        "adjective2": second_adjective,
    }
    parts = [random.choice(options) for options in (OPENINGS, WISHES, TROUBLES, HELPS, ENDS)]
    if random.random() < 0.6:
        parts.append(random.choice(CLOSINGS))
    text = " ".join(part.format(**words) for part in parts)
    for vowel in "aeio":
        text = text.replace(f" a {vowel}", f" an {vowel}").replace(f"A {vowel}", f"An {vowel}")
    return text
