"""What the programs of all clients share: their arguments, questions that the demo model can answer, and a checker of answers.

Each program runs in the environment of its client, which has nothing of Pagoda's.
"""

from __future__ import annotations

import argparse
import os

# Nothing here goes anywhere but to the server under test.
os.environ.setdefault("OPENAI_API_KEY", "none")
os.environ.setdefault("ANTHROPIC_API_KEY", "none")

SUM = "What is 27 + 45?"
SUM_ANSWER = "27 + 45 = 72"
WEATHER = "What is the weather in Rome?"
PERSON = "Mia is 34 years old and lives in Oslo. Answer in JSON with name, age."
WEATHER_DESCRIPTION = "Weather of a city"
WEATHER_RESULT = "20 degrees"
WEATHER_ANSWER = "It is 20 degrees in Rome."


class Server:
    """`url`: without a path. `is_demo`: answers are known word for word; of another model only their form is."""

    def __init__(self) -> None:
        parser = argparse.ArgumentParser()
        parser.add_argument("url")
        parser.add_argument("model")
        parser.add_argument("--demo", action="store_true")
        own = parser.parse_args()
        self.url, self.model, self.is_demo = own.url, own.model, own.demo
        self.openai_url = f"{self.url}/v1"

    def says(self, text: str | None, expected: str) -> None:
        """Check an answer."""
        assert text, "the answer is empty"
        assert not self.is_demo or text.strip() == expected, f"{text!r} is not {expected!r}"

    def is_person(self, name: str, age: int) -> None:
        """Check a person that was asked for with PERSON."""
        assert isinstance(name, str)
        assert isinstance(age, int)
        assert not self.is_demo or (name, age) == ("Mia", 34), (name, age)
