"""Chat prompts of many kinds, for `collect.py --prompts`: JSON lists of messages, a line each.

    python mixed_prompts.py --count 6000 --merge self.jsonl > prompts.jsonl
    python mixed_prompts.py --count 200 --held-out > held-out.jsonl

Short questions, arithmetic, translation, writing to order, code and lists, with what they are about drawn from lists; and
tasks that come with a text: the documentation of Python's modules and of the packages installed, which is text of many authors
that is there already. `--merge` shuffles in what `self_prompts.py` has written. Held-out prompts are about other things and
other modules.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from random import Random
from textwrap import dedent
from zlib import crc32

from prompts import HELD_OUT_SUBJECTS, SUBJECTS, TASKS

SHORTEST_TEXT, LONGEST_TEXT = 120, 700

PEOPLE = """\
Albert Einstein|Cleopatra|Leonardo da Vinci|Nelson Mandela|Ada Lovelace|Mozart|Isaac Newton|Frida Kahlo|
Charles Darwin|Rosa Parks|Galileo|Jane Austen|Napoleon|Mahatma Gandhi|Beethoven|Amelia Earhart|Plato|
Abraham Lincoln|Florence Nightingale|Alan Turing|Vincent van Gogh|Joan of Arc|Nikola Tesla|Agatha Christie|
Julius Caesar|Grace Hopper|Confucius|Pablo Picasso|Aristotle|Queen Victoria|Martin Luther King|Louis Pasteur|Homer|
Genghis Khan|Charles Dickens|Michelangelo"""
COUNTRIES = """\
Germany|Japan|Kenya|Canada|Peru|Norway|India|Egypt|Italy|Vietnam|Mexico|Poland|Greece|Turkey|Chile|Sweden|Thailand|
Nigeria|Spain|Ireland|Argentina|Portugal|Morocco|Austria|Iceland|Cuba|South Korea|New Zealand|Finland|Hungary"""
WORDS = """\
brave|ambiguous|resilient|ancient|generous|fragile|curious|abundant|eloquent|tranquil|stubborn|clever|gloomy|swift|
humble|vivid|obscure|diligent|loud|lazy|ephemeral|nostalgia|candid|benevolent|meticulous|gratitude|paradox|empathy|
zeal|pragmatic|ubiquitous|whimsical|austere|jubilant|solitude|melancholy|tedious|frugal|astute|novice"""
PHRASES = """\
see you tomorrow|thank you very much|where is the station|I am hungry|happy birthday|how much does it cost|
good night|I do not understand|my name is Anna|what time is it|I love music|the book is on the table|
please open the window|we are late|it is raining today|can you help me|the food is very good|I would like a coffee|
have a nice day|the train leaves at nine"""
LANGUAGES = "French|Spanish|German|Italian|Portuguese|Dutch|Latin|Swedish"
QUESTIONS = """\
How do birds fly?|Why is the sea salty?|What is a black hole?|How do I change a flat tyre?|Why do we dream?|
What is the speed of light?|How does a microwave oven work?|How do I write a resume?|What is inflation?|
Why do cats purr?|How do I start learning to cook?|What is the difference between a virus and a bacterium?|
How is paper made?|What is DNA?|Why do we have time zones?|How do I fall asleep faster?|What makes a good leader?|
What is an algorithm?|How do airplanes fly?|How do I save money every month?|What is the greenhouse effect?|
Why do we yawn?|What is the Pythagorean theorem?|How does a fridge work?|
What is the difference between a simile and a metaphor?|How do I train a puppy?|What is the meaning of life?|
How old is the Earth?|What is blockchain?|How do I get rid of ants?|What is a prime number?|
Why is recycling important?|How do computers store data?|What is the freezing point of water?|
How many continents are there?|What is the largest mammal?|What causes thunder?|What is an adjective?|
How do I clean a keyboard?|How do you make lemonade?|What is the longest river in the world?|
What is the difference between TCP and UDP?|How do I prepare for a marathon?|What is a balanced diet?|
What are tectonic plates?|How do I make friends in a new city?|What is quantum mechanics?|How do solar panels work?|
What is an API?|How do I iron a shirt?|What is the chemical formula of table salt?|Who invented the telephone?|
When did the Second World War end?|How do plants grow?|What is the capital of the United States?|
How do I fix a leaking tap?|Why do stars twinkle?|What is a haiku?|How do whales breathe?|
What is the difference between a lake and a pond?|What is artificial intelligence?|How do I apologize to a friend?"""
THINGS = """\
animals that live in the sea|fruits that are red|countries in Europe|musical instruments|ways to save energy|
kinds of trees|things to do on a rainy day|healthy snacks|programming languages|famous paintings|indoor plants|
kinds of cheese|hobbies for the evening|uses of baking soda|board games|words that rhyme with "day"|
inventions of the 20th century|card games|exercises without equipment|presents for a grandmother|
reasons to learn history|rules for a shared kitchen|vegetables that grow in spring|birds that cannot fly|
interview questions|titles for a novel about the sea|ways to greet somebody|kinds of clouds|parts of a car|
uses of an old newspaper"""
FUNCTIONS = """\
adds two numbers|checks whether a number is prime|counts the vowels of a string|finds the largest number of a list|
computes a factorial|sorts a list of words by length|removes duplicates from a list|
checks whether a word is a palindrome|reads a file and counts its lines|converts Celsius to Fahrenheit|
merges two sorted lists|computes the Fibonacci numbers|finds the most common word of a text|flattens a nested list|
computes the average of a list|counts characters in a dictionary|generates a random password|
rounds prices to two digits|finds the longest word in a sentence|swaps two variables|
checks whether a year is a leap year|implements binary search|computes the greatest common divisor|
capitalizes every word"""
CODE_LANGUAGES = "Python|JavaScript|Java|C|Go|Rust|Bash|C++"
QUERIES = """\
selects all customers from Berlin|joins orders and customers|finds the five most expensive products|
deletes orders that are older than a year|updates the price of a product|counts the employees of every department|
selects the names of students with a grade above 90|creates a table of books|finds customers without any order"""
FORMS = "a haiku|a limerick|a short poem|a slogan|the first line of a story|a riddle|a joke|a tweet|a headline|a toast"
MAILS = """\
ask for a meeting next week|say that I am ill today|thank a colleague for the help|complain about a late delivery|
invite friends to a party|decline an invitation|ask for a refund|apply for a job as a baker|
remind a client of an invoice|congratulate a friend on a new job|ask a neighbour to water the plants|
apologize for being late"""
WRONG = """\
He go to school every day.|Me and him was at the park.|I has two brother.|She have went home.|
They is playing football.|The childs was happy.|I don't got no time.|Its a nice weather today.|
We was walking to the store yesterday.|He can sings very good."""
PLAIN = """\
hey can you send me the report|that movie was awful|I can't come tomorrow|give me the keys|the soup is cold|
you are wrong|this plan won't work|we need more money|wait for me|the room is too small|I want to leave now|
your code has a bug"""
PAIRS = """\
tea and coffee|books and films|trains and planes|summer and winter|dogs and horses|cities and villages|
gold and silver|running and swimming|Python and Java|rice and pasta|lakes and rivers|renting and buying|
paper and screens|moons and planets"""
TEXT_TASKS = """\
Summarize the following text in two sentences:|Rewrite the following text in simpler words:|
What is the main idea of this text?|List the key points of the text below:|Give the following text a title:|
Write three questions about this text and answer them:|Explain this text to a beginner:|
Repeat the following text with its mistakes corrected:|Rewrite this text in a friendly tone:|
Who might have written this, and for whom?|Continue this text:|Make this text shorter:"""
CODE_TASKS = """\
Explain what this code does:|Write a docstring for this function:|Rewrite this function with better names:|
Find possible bugs in this code:|Write a test for this function:|Summarize this function in one sentence:"""
MODULES = """\
argparse|ast|asyncio|base64|bisect|calendar|cmd|collections|configparser|contextlib|copy|csv|dataclasses|datetime|
decimal|difflib|dis|email|enum|fileinput|fnmatch|fractions|ftplib|functools|getpass|gettext|glob|graphlib|gzip|
hashlib|heapq|hmac|html|http|imaplib|inspect|ipaddress|json|linecache|locale|logging|mailbox|mimetypes|numbers|
operator|optparse|os|pathlib|pdb|pickle|pkgutil|platform|pprint|profile|queue|quopri|random|re|sched|secrets|
selectors|shelve|shlex|shutil|smtplib|socket|sqlite3|statistics|string|subprocess|tarfile|tempfile|textwrap|
threading|timeit|tokenize|trace|traceback|types|typing|unittest|urllib|uuid|warnings|wave|weakref|webbrowser|
zipfile|zoneinfo"""


def entries(text: str) -> list[str]:
    return [entry.strip() for entry in text.replace("\n", "").split("|")]


def is_held_out(name: str) -> bool:
    """Every tenth name, always the same."""
    return crc32(name.encode()) % 10 == 0


def documentation(*, held_out: bool) -> tuple[list[str], list[str]]:
    """Paragraphs of descriptions and docstrings, and the sources of short functions."""
    texts: dict[str, None] = {}
    sources: dict[str, None] = {}
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"] or ""
        if is_held_out(name) == held_out:
            texts.update(dict.fromkeys(paragraphs(distribution.metadata.get_payload() or "")))
            for file in distribution.files or []:
                if file.name.upper().startswith(("LICENSE", "COPYING", "NOTICE")) and not file.name.endswith(".py"):
                    path = Path(str(distribution.locate_file(file)))
                    texts.update(dict.fromkeys(paragraphs(path.read_text(errors="ignore")) if path.is_file() else []))
    for name in entries(MODULES):
        if is_held_out(name) == held_out:
            __import__(name)
            of_module = vars(sys.modules[name]).values()
            functions = [each for each in of_module if inspect.isfunction(each)]
            classes = [each for each in of_module if inspect.isclass(each)]
            functions += [each for kind in classes for each in vars(kind).values() if inspect.isfunction(each)]
            for each in [sys.modules[name], *functions]:
                texts.update(dict.fromkeys(paragraphs(inspect.getdoc(each) or "")))
            for function in functions:
                if function.__module__ == name and SHORTEST_TEXT < len(source := source_of(function)) < LONGEST_TEXT:
                    sources[source] = None
    return list(texts), list(sources)


def source_of(function: Callable[..., object]) -> str:
    """Nothing, of a function that was made without a file."""
    try:
        return dedent(inspect.getsource(function))
    except OSError:
        return ""


def paragraphs(text: str) -> Iterator[str]:
    """Paragraphs of prose."""
    for block in re.split(r"\n\s*\n", text):
        words = " ".join(block.split())
        letters = sum(each.isalpha() or each == " " for each in words)
        if SHORTEST_TEXT < len(words) < LONGEST_TEXT and letters > 0.9 * len(words):
            yield words


def kinds(random: Random, *, held_out: bool) -> dict[Callable[[], str], float]:
    """What makes a prompt, and how often it is asked."""
    texts, sources = documentation(held_out=held_out)

    def one(choices: str) -> str:
        every = entries(choices)
        return random.choice([each for each in every if is_held_out(each) == held_out] or every)

    def number(most: int) -> int:
        return random.randint(2, most)

    subjects = HELD_OUT_SUBJECTS if held_out else SUBJECTS

    def subject() -> str:
        return random.choice(entries(subjects))

    def task() -> str:
        text, about = random.choice(TASKS.splitlines()), subject()
        return text.replace("{}", about)

    return {
        task: 4,
        lambda: one(QUESTIONS): 1,
        lambda: f"What is the capital of {one(COUNTRIES)}?": 0.3,
        lambda: (
            f"{random.choice(['Tell me about', 'What is', 'Give me a recipe from', 'Why should I visit'])} {one(COUNTRIES)}."
        ): 0.4,
        lambda: (
            f"{random.choice(['Who was', 'What is known about', 'What did the world learn from'])} {one(PEOPLE)}?"
        ): 0.8,
        lambda: (
            f'{random.choice(["What does the word", "How do I use the word", "Where does the word"])} "{one(WORDS)}" '
            f"{random.choice(['mean', 'come from', 'appear in a sentence'])}?"
        ): 0.5,
        lambda: (
            f'Give me {random.choice(["a synonym", "an antonym", "three synonyms", "an example sentence"])} of "{one(WORDS)}".'
        ): 0.4,
        lambda: f'Translate "{one(PHRASES)}" into {one(LANGUAGES)}.': 0.6,
        lambda: f"What is {number(99)} {random.choice(['plus', 'times', 'minus', '+', '*'])} {number(99)}?": 0.4,
        lambda: f"I have {number(20)} apples and eat {number(5)} of them each day. How long do they last?": 0.2,
        lambda: (
            f"{random.choice(['Name', 'List', 'Give me'])} {random.choice(['three', 'five', 'ten', 'some'])} {one(THINGS)}."
        ): 1,
        lambda: f"Write a {one(CODE_LANGUAGES)} function that {one(FUNCTIONS)}.": 1,
        lambda: f"Write a SQL query that {one(QUERIES)}.": 0.4,
        lambda: f"Write {one(FORMS)} about {subject()}.": 1,
        lambda: f"Write {random.choice(['a polite email', 'a short email', 'a letter'])} to {one(MAILS)}.": 0.6,
        lambda: f'{random.choice(["Correct this sentence", "Fix the grammar"])}: "{one(WRONG)}"': 0.3,
        lambda: f'{random.choice(["Say this more politely", "Rewrite this formally"])}: "{one(PLAIN)}"': 0.4,
        lambda: f"{random.choice(['Compare', 'What is the difference between'])} {one(PAIRS)}.": 0.5,
        lambda: f"{one(TEXT_TASKS)}\n\n{random.choice(texts)}": 2,
        lambda: f"{one(CODE_TASKS)}\n\n```python\n{random.choice(sources)}```": 0.7,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--held-out", action="store_true", help="about what no other prompt is about")
    parser.add_argument("--merge", type=Path, nargs="*", default=[], help="files of prompts that are shuffled in")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    random = Random(options.seed + 1_000_000 * options.held_out)
    weights = kinds(random, held_out=options.held_out)
    lines: dict[str, None] = {}
    for make in random.choices(list(weights), list(weights.values()), k=options.count):
        lines[json.dumps([{"role": "user", "content": make()}])] = None
    every = [*lines, *(line for file in options.merge for line in file.read_text().splitlines())]
    random.shuffle(every)
    print("\n".join(every))


if __name__ == "__main__":
    main()
