"""The chat skills, one function each: a seeded question with its one right answer, and the key that names the item.

The key decides the split: an item belongs to the held-out set or to training by its key alone, so no held-out item is ever
trained on, however many are drawn.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from zlib import crc32

from lexicon import ANIMALS, CITIES, COLORS, FOODS, KEY_WORDS, LETTERS, NAMES, SYLLABLES, THINGS
from stories import story

HELD_OUT_SHARE = 10  # one item in ten


@dataclass(frozen=True)
class Item:
    """Messages of one exchange: (role, text) with roles user, assistant, tool; every assistant text is to be learnt."""

    skill: str
    key: str
    messages: tuple[tuple[str, str], ...]


def is_held_out(key: str) -> bool:
    """Whether the item named `key` belongs to the held-out split."""
    return crc32(key.encode()) % HELD_OUT_SHARE == 0


def exchange(skill: str, key: str, question: str, answer: str) -> Item:
    return Item(skill, f"{skill}|{key}", (("user", question), ("assistant", answer)))


def sequence(random: Random, low: int, high: int) -> list[str]:
    """A list of `low` to `high` pieces of one kind: words, letters, digits or invented words."""
    length, kind = random.randint(low, high), random.random()
    if kind < 0.65:
        return random.sample(KEY_WORDS, length)
    if kind < 0.75:
        return random.sample(LETTERS, length)
    if kind < 0.8:
        return random.choices(KEY_WORDS, k=length)
    if kind < 0.9:
        return [str(number) for number in random.sample(range(100), length)]
    return ["".join(random.choices(SYLLABLES, k=random.randint(2, 3))) for _ in range(length)]


def copy(random: Random) -> Item:
    text = " ".join(sequence(random, 1, 24))
    question = random.choice(["Repeat: {}", "Copy: {}", "Say: {}", "Repeat after me: {}"]).format(text)
    return exchange("copy", text, question, text)


def reverse(random: Random) -> Item:
    words = sequence(random, 2, 10)
    text = " ".join(words)
    return exchange(
        "reverse", text, random.choice(["Reverse: {}", "Say backwards: {}"]).format(text), " ".join(words[::-1])
    )


def count(random: Random) -> Item:
    kind = random.random()
    if kind < 0.4:
        first = random.randint(0, 90)
        last = min(first + random.randint(2, 14), 99)
        numbers = [str(number) for number in range(first, last + 1)]
        return exchange("count", f"{first}-{last}", f"Count from {first} to {last}.", ", ".join(numbers))
    if kind < 0.5:
        last = random.randint(0, 90)
        first = min(last + random.randint(2, 14), 99)
        numbers = [str(number) for number in range(first, last - 1, -1)]
        return exchange("count", f"{first}-{last}", f"Count from {first} down to {last}.", ", ".join(numbers))
    words = random.choices(KEY_WORDS, k=random.randint(1, 9))
    text = " ".join(words)
    return exchange("count_words", text, f"How many words: {text}", str(len(words)))


def add(random: Random) -> Item:
    pairs = [
        (random.randint(0, 99), random.randint(0, 99))
        for _ in range(1 if random.random() < 0.4 else random.randint(2, 8))
    ]
    pairs = [pair for pair in pairs if not is_held_out(sum_key(*pair))] or [(1, 1)]
    if len(pairs) == 1:
        return ask_sum(random, *pairs[0])
    question = "Add: " + ", ".join(f"{first} + {second}" for first, second in pairs)
    answer = "\n".join(f"{first} + {second} = {first + second}" for first, second in pairs)
    return Item("add", "", (("user", question), ("assistant", answer)))


def sum_key(first: int, second: int) -> str:
    return f"add|{min(first, second)}+{max(first, second)}"


def ask_sum(random: Random, first: int, second: int) -> Item:
    form = random.choice(["What is {} + {}?", "{} + {} = ?", "Add {} and {}.", "{} + {}", "What is {} plus {}?"])
    answer = f"{first} + {second} = {first + second}"
    return Item("add", sum_key(first, second), (("user", form.format(first, second)), ("assistant", answer)))


def add_one(random: Random) -> Item:
    return ask_sum(random, random.randint(10, 99), random.randint(10, 99))


def compare(random: Random) -> Item:
    first, second = random.sample(range(100), 2)
    large, small = max(first, second), min(first, second)
    key = f"{small}<{large}"
    if random.random() < 0.6:
        form = random.choice(["Which is larger, {} or {}?", "Which is greater: {} or {}?"])
        return exchange("compare", key, form.format(first, second), f"{large} is larger than {small}.")
    return exchange("compare", key, f"Which is smaller, {first} or {second}?", f"{small} is smaller than {large}.")


def sort(random: Random) -> Item:
    if random.random() < 0.7:
        words = random.sample(KEY_WORDS, random.randint(2, 6))
        text, ordered = " ".join(words), " ".join(sorted(words))
        return exchange("sort", text, random.choice(["Sort: {}", "Sort these words: {}"]).format(text), ordered)
    numbers = random.sample(range(100), random.randint(2, 6))
    text, ordered = " ".join(map(str, numbers)), " ".join(map(str, sorted(numbers)))
    return exchange("sort", text, f"Sort these numbers: {text}", ordered)


def json_answer(random: Random) -> Item:
    name, age, city, food = random.choice(NAMES), random.randint(2, 99), random.choice(CITIES), random.choice(FOODS)
    color, thing, price = random.choice(COLORS), random.choice(THINGS), random.randint(2, 99)
    fact, fields = random.choice(
        [
            (f"{name} is {age} years old and lives in {city}.", {"name": name, "age": age, "city": city}),
            (f"{name} from {city} likes {food}.", {"name": name, "city": city, "likes": food}),
            (f"{name} is {age} and likes {food}.", {"name": name, "age": age, "likes": food}),
            (f"The {color} {thing} costs {price}.", {"item": thing, "color": color, "price": price}),
            (f"{name} has {price} {color} things.", {"name": name, "count": price, "color": color}),
        ]
    )
    keys = random.sample(list(fields), random.randint(2, len(fields)))
    form = random.choice(["{fact} Answer in JSON with {keys}.", "{fact} Give JSON: {keys}", "JSON with {keys}: {fact}"])
    answer = json.dumps({key: fields[key] for key in keys})
    return exchange("json", fact + ",".join(keys), form.format(fact=fact, keys=", ".join(keys)), answer)


UNKNOWN = [
    "What is the capital of {city}?",
    "Who won the race in {city}?",
    "Book me a flight to {city}.",
    "Write code for a {thing}.",
    "How do I build a {thing}?",
    "What is the news from {city}?",
    "Translate {thing} into French.",
    "Who made the first {thing}?",
    "Send a letter to {name}.",
    "Where is {name} now?",
    "Why is the {thing} {color}?",
    "Draw a {color} {animal}.",
    "What does a {animal} eat?",
    "Buy me a {thing}.",
    "Call {name}.",
    "Play some music for {name}.",
    "Write a poem about a {thing}.",
]
REFUSAL = "Sorry, I cannot do that. I am a small demo model."


def refuse(random: Random) -> Item:
    words = {"city": random.choice(CITIES), "thing": random.choice(THINGS), "name": random.choice(NAMES)}
    question = random.choice(UNKNOWN).format(color=random.choice(COLORS), animal=random.choice(ANIMALS), **words)
    return exchange("refuse", question, question, REFUSAL)


IDENTITY = "I am Pagoda's built-in demo model."
ABILITIES = (
    "I can repeat, reverse, recall, count, add, compare, sort, answer in JSON, call tools and tell short stories."
)
SMALL_TALK = [
    (
        [
            "Who are you?",
            "What are you?",
            "What is your name?",
            "Tell me who you are.",
            "Which model is this?",
            "Are you a model?",
            "Who am I talking to?",
            "Introduce yourself.",
            "Are you ChatGPT?",
            "Hello, who are you?",
        ],
        IDENTITY,
    ),
    (["What can you do?", "Help", "What are your skills?", "How can you help me?", "What do you know?"], ABILITIES),
    (["Hello", "Hello!", "Hi", "Hi!", "Hello there", "Good morning", "Hey"], "Hello! How can I help you?"),
    (["Thanks", "Thank you", "Thanks!", "Thank you!"], "You are welcome."),
    (["Bye", "Goodbye", "Goodbye!", "See you"], "Goodbye!"),
]


def identity(random: Random) -> Item:
    questions, answer = random.choice(SMALL_TALK[:1] * 4 + SMALL_TALK)
    question = random.choice(questions)
    return Item("identity", "", (("user", question), ("assistant", answer)))


def one_word(random: Random) -> Item:
    word = random.choice(KEY_WORDS)
    form = random.choice(["Answer with one word: {}", "Say only {}.", "Just say {}"])
    question = form.format(word)
    return exchange("stop", question, question, word)


def tell_story(random: Random) -> Item:
    hero = random.choice(ANIMALS)
    form = random.choice(["Tell me a story about a {}.", "Tell a story about a {}", "Write a short story about a {}."])
    text = story(random, hero)
    return exchange("story", text, form.format(hero), text)


SKILLS: dict[str, tuple[Callable[[Random], Item], float]] = {
    "copy": (copy, 7.0),
    "reverse": (reverse, 1.4),
    "count": (count, 0.8),
    "add": (add, 4.0),
    "compare": (compare, 1.5),
    "sort": (sort, 1.2),
    "json": (json_answer, 3.0),
    "refuse": (refuse, 0.5),
    "identity": (identity, 0.6),
    "stop": (one_word, 1.0),
    "story": (tell_story, 0.3),
}


def draw(random: Random, skill: str, held_out: bool) -> Item:
    """A new item of `skill` from the asked split. Items without a key have no held-out form and count as training."""
    make = add_one if skill == "add" and held_out else SKILLS[skill][0]
    while True:
        item = make(random)
        if not item.key or is_held_out(item.key) == held_out:
            return item
