"""Questions whose answers the built-in demo model knows, so that tests can check what a whole stack means."""

# ruff: noqa: SIM905 (a word list reads best as text)

from __future__ import annotations

from dataclasses import dataclass
from random import Random

WORDS = """anchor ant apple arrow axe badger bag ball banana banner barrel basket bat bear beaver bee bell belt bench berry
black blanket blue boat book boot bottle bowl box branch bread brick bridge broom brown brush bucket butter button
cable cake camel candle canoe carpet carrot castle cat chain chair chalk cheese cherry chest clock cloud coat coin
comb compass copper corn cotton cow crab cradle crane crow crown cup curtain deer desk diamond dog dolphin donkey
door dove drum duck eagle elk engine falcon fan feather fence finch fish flag flame flower flute fly fork fountain
fox frog garden gate glass glove goat gold goose grape gray green hammer harbor hare harp hat hawk helmet hen heron
hill honey horn horse house iron island ivory jacket jar jewel kettle key kite kitten knife ladder lamb lamp
lantern leaf lemon letter lion lizard lock lute lynx magnet map marble mask meadow melon mirror mole monkey moon
moose mountain mouse nail needle nest net oak oar ocean onion orange otter oven owl ox paint palace panda paper
parrot peach pear pearl pen pencil pepper piano pig pillow pine pink pipe plate plum pocket pond pony pot potato
puppy purple quilt rabbit rail rain raven red ring river road robin roof rope rose ruby saddle sail salt sand scarf
seal seed shark sheep shell ship shoe silk silver snail snake sparrow spider spoon star stone storm straw sugar sun
swan table tea tent thread ticket tiger toad tomato tower train tree trumpet tunnel turtle umbrella valley vase
violin wagon wall walrus watch water whale wheel whistle white window wing wolf wood wool worm yellow zebra""".split()

Message = dict[str, str]


@dataclass(frozen=True)
class FactSheet:
    """Keys with numbers, in the order in which the message states them."""

    facts: dict[str, int]

    @classmethod
    def draw(cls, seed: int, count: int) -> FactSheet:
        random = Random(f"fact sheet {seed}")
        return cls({word: random.randint(100, 999) for word in random.sample(WORDS, count)})

    def ask(self, position: int) -> tuple[list[Message], str]:
        """The conversation that asks for the fact at `position`, and the number that must be in its answer."""
        key, value = list(self.facts.items())[position]
        lines = "\n".join(f"- {key}: {value}" for key, value in self.facts.items())
        question = f"Remember this list:\n{lines}\nWhat is the value of {key}?"
        return [{"role": "user", "content": question}], f"The value of {key} is {value}."


def ask(text: str) -> list[Message]:
    """A conversation of one question."""
    return [{"role": "user", "content": text}]


WEATHER_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
IDENTITY = "I am Pagoda's built-in demo model."
