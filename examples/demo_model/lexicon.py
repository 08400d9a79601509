"""The words the demo model knows. Every list is free of duplicates; all of KEY_WORDS may name a value to recall."""

# ruff: noqa: SIM905 (word lists read best as text)

from __future__ import annotations

ANIMALS = """ant badger bat bear beaver bee camel cat cow crab crane crow deer dog dolphin donkey dove duck eagle elk
falcon finch fish fly fox frog goat goose hare hawk hen heron horse kitten lamb lion lizard lynx mole monkey
moose mouse otter owl ox panda parrot pig pony puppy rabbit raven robin seal shark sheep snail snake sparrow
spider swan tiger toad turtle walrus whale wolf worm zebra""".split()

THINGS = """anchor apple arrow axe bag ball banana banner barrel basket bell belt bench berry blanket boat book boot
bottle bowl box branch bread brick bridge broom brush bucket butter button cable cake candle canoe carpet
carrot castle chain chair chalk cheese cherry chest clock cloud coat coin comb compass copper corn cotton
cradle crown cup curtain desk diamond door drum engine fan feather fence flag flame flower flute fork fountain
garden gate glass glove gold grape hammer harbor harp hat helmet hill honey horn house iron island ivory
jacket jar jewel kettle key kite knife ladder lamp lantern leaf lemon letter lock lute magnet map marble mask
meadow melon mirror moon mountain nail needle nest net oak oar ocean onion orange oven paint palace paper
peach pear pearl pen pencil pepper piano pillow pine pipe plate plum pocket pond pot potato quilt rail rain
ring river road roof rope rose ruby saddle sail salt sand scarf seed shell ship shoe silk silver spoon star
stone storm straw sugar sun table tea tent thread ticket tomato tower train tree trumpet tunnel umbrella
valley vase violin wagon wall watch water wheel whistle window wing wood wool""".split()

COLORS = "red blue green yellow white black brown gray pink purple".split()
ADJECTIVES = "little old young brave quiet clever happy kind gentle curious tired hungry proud shy lucky busy".split()
NAMES = """Anna Ben Clara David Ella Felix Grace Hugo Ida Jack Kate Leo Mia Noah Olga Paul Rosa Sam Tom Vera Will Zoe
Emma Max Nina Oscar Lily Finn Ruth Mark""".split()
CITIES = """Oslo Paris Rome Berlin Madrid London Vienna Prague Dublin Lisbon Athens Cairo Tokyo Delhi Lima Boston Geneva
Milan Warsaw Helsinki""".split()
FOODS = "apples bread cake carrots cheese cherries corn grapes honey lemons melons nuts pears plums rice soup".split()
PLACES = "forest river garden village lake hill meadow harbor castle valley beach bridge".split()

KEY_WORDS = sorted(set(ANIMALS + THINGS + COLORS))
SYLLABLES = [first + second for first in "bdfgklmnprstvz" for second in "aeiou"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def distinct(words: list[str]) -> list[str]:
    """`words` in order, each once."""
    return list(dict.fromkeys(words))


ANIMALS, THINGS = distinct(ANIMALS), distinct(THINGS)
