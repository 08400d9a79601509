"""Chat prompts on many subjects, to which a head is trained on the answers: tasks times subjects, in an order by a seed."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

TASKS = """\
What is {}?
Explain {} to a child of ten.
Explain in three sentences what matters about {}.
Write a short story about {}.
Write a poem about {}.
Give me five tips about {}.
What are the advantages and disadvantages of {}?
How did {} change over the last hundred years?
Write a letter to a friend about {}.
List ten facts about {}.
Why do people care about {}?
What should a beginner know about {}?
Plan a lesson about {} for a school class.
What are common mistakes with {}?
Compare {} today with {} in the past.
Describe {} with all five senses.
Write a dialogue between two people about {}.
Summarize what is known about {}.
How would you start a business around {}?
Ask me three questions about {} and answer them.
What is the future of {}?
Write an advertisement for {}.
How does {} work?
Give me a short history of {}.
What does a day with {} look like?
Write step by step instructions that have to do with {}.
Which tools does one need for {}?
Rewrite this sentence politely: I do not like {} and never will.
Write a Python program that has to do with {}.
Make a table of things to buy for {}."""

SUBJECTS = """\
bread|rivers|the violin|volcanoes|chess|gardening|the Roman Empire|bees|solar power|trains|mathematics|tea|dinosaurs|
football|the heart|electric cars|libraries|winter|the printing press|whales|jazz|bridges|sleep|coral reefs|painting|
the internet|honey|mountains|the stock market|running|cheese|robots|the theatre|spiders|clouds|democracy|coffee|
the brain|sailing|photography|Egypt|recycling|birds|the Olympic Games|cooking|algebra|desert plants|telephones|wolves|
glass|friendship|tax|camping|vitamins|the moon|knitting|hospitals|rice|earthquakes|passwords|castles|dentists|gravity|
cats|databases|chocolate|tides|maps|swimming|the piano|wind|insurance|novels|cities|penguins|magnets|forests|
music festivals|water|the alphabet|horses|light|bicycles|salt|farming|sorting algorithms|family dinners|
public speaking|oceans|job interviews|puppets|the weather|hiking|bacteria|clocks|comics|Japan|vegetables|satellites|
breathing|budgeting|islands|marketing|elephants|the guitar|statistics|soap|holidays|trees|translation|potatoes|
lightning|newspapers|frogs|dancing|hotels|fractions|wool|airports|trust|spreadsheets|ants|pottery|rainbows|stress|
pizza|the Renaissance|owls|batteries|teamwork|snow|apples|encryption|fishing|bakeries|tunnels|wine|yoga|schools|
planets"""

# What only the model's answers to are compared with, never trained on.
HELD_OUT_SUBJECTS = """\
steam engines|lemons|the saxophone|tigers|rockets|hats|web servers|the Vikings|eggs|meditation|lighthouses|glaciers|
skateboards|owning a dog|Brazil|printers|onions|the kidneys|juggling|parachutes|probability|mosquitoes|street art|
pancakes|submarines"""


def prompts(seed: int, *, held_out: bool = False) -> Iterator[str]:
    """Every task with every subject, shuffled."""
    subjects = [name.strip() for name in (HELD_OUT_SUBJECTS if held_out else SUBJECTS).replace("\n", "").split("|")]
    pairs = [(task, subject) for task in TASKS.splitlines() for subject in subjects if subject]
    Random(seed).shuffle(pairs)
    for task, subject in pairs:
        yield task.format(*[subject] * task.count("{}"))
