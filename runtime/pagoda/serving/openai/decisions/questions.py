"""Questions as the model reads them, and answers out of the probabilities of the tokens that may answer them."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice, product
from string import ascii_lowercase, ascii_uppercase, digits
from typing import Any
from weakref import WeakKeyDictionary

from typing_extensions import override

from pagoda.errors import InvalidRequestError, NotSupportedError, shown
from pagoda.serving.openai.decisions.types import MAX_OPTIONS
from pagoda.text.tokenizer import Tokenizer

_MAX_JSON_DEPTH = 32
_ABOUT = "About the text above:"


@dataclass(frozen=True, slots=True)
class Label:
    """What the model is to say for one option: a single token."""

    text: str
    token_id: int


class Question(ABC):
    """A checked question. `name`: of its answer; `instructions`: what is asked."""

    type: str

    def __init__(self, question: Mapping[str, Any], where: str) -> None:
        name = question.get("name")
        if name is not None and not isinstance(name, str):
            raise InvalidRequestError(f"{where}: name must be a string, got {shown(name)}", "questions")
        self.name = name
        self.instructions = part_text(question.get("instructions"), f"{where}: instructions")
        if not self.instructions:
            raise InvalidRequestError(f"{where}: instructions must not be empty", "questions")

    @abstractmethod
    def labels(self, tokenizer: Tokenizer) -> list[Label]:
        """One for each option. Raises `NotSupportedError` where the vocabulary has no tokens for them."""

    @abstractmethod
    def text(self, labels: Sequence[Label]) -> str:
        """The question as it stands in the prompt."""

    @abstractmethod
    def answer(self, probabilities: Sequence[float]) -> dict[str, Any]:
        """The answer's members, of the probabilities of its options, which add up to 1."""


class Predicate(Question):
    """Whether a statement is true of the input."""

    type = "predicate"

    @override
    def labels(self, tokenizer: Tokenizer) -> list[Label]:
        words = [_label(tokenizer, word) for word in ("Yes", "No")]
        found = [label for label in words if label is not None]
        return found if len(found) == len(words) else letters(tokenizer, len(words))

    @override
    def text(self, labels: Sequence[Label]) -> str:
        yes, no = (label.text for label in labels)
        answer = f"Answer only with {yes} or {no}"
        meaning = "." if yes == "Yes" else f": {yes} for yes, {no} for no."
        return f"{_ABOUT} {self.instructions}\n\nIs this so? {answer}{meaning}"

    @override
    def answer(self, probabilities: Sequence[float]) -> dict[str, Any]:
        return {"type": self.type, "name": self.name, "probability": probabilities[0]}


class _Options(Question):
    """A question with options that the request names, each of which is shown behind a letter."""

    ending: str

    def __init__(self, question: Mapping[str, Any], where: str, member: str, key: str) -> None:
        super().__init__(question, where)
        options = question.get(member)
        if not isinstance(options, list) or not 2 <= len(options) <= MAX_OPTIONS:
            found = len(options) if isinstance(options, list) else shown(options)
            raise InvalidRequestError(
                f"{where}: {member} must be a list of 2 to {MAX_OPTIONS} objects, got {found}", "questions"
            )
        self.values: list[str | bool] = []
        self._shown: list[str] = []
        kinds = (str, bool) if key == "value" else (str,)
        for option in options:
            value = option.get(key) if isinstance(option, dict) else None
            if not isinstance(value, kinds) or value == "":
                kind = " or ".join({str: "a text", bool: "a boolean"}[each] for each in kinds)
                raise InvalidRequestError(f"{where}: each of {member} needs {kind} in {key}", "questions")
            description = option.get("description")
            if description is not None and not isinstance(description, str):
                raise InvalidRequestError(
                    f"{where}: a description must be a text, got {shown(description)}", "questions"
                )
            text = value if isinstance(value, str) else str(value).lower()
            self.values.append(value)
            self._shown.append(f"{text}: {description}" if description else text)
        if len({(type(value), value) for value in self.values}) < len(self.values):
            raise InvalidRequestError(f"{where}: two of {member} have the same {key}", "questions")

    @override
    def labels(self, tokenizer: Tokenizer) -> list[Label]:
        return letters(tokenizer, len(self.values))

    @override
    def text(self, labels: Sequence[Label]) -> str:
        options = "\n".join(f"{label.text}. {text}" for label, text in zip(labels, self._shown, strict=True))
        return f"{_ABOUT} {self.instructions}\n\n{options}\n\n{self.ending}"


class Choice(_Options):
    """Which of several options fits."""

    type = "choice"
    ending = "Answer only with the letter of the option that fits best."

    def __init__(self, question: Mapping[str, Any], where: str) -> None:
        super().__init__(question, where, "choices", "value")

    @override
    def answer(self, probabilities: Sequence[float]) -> dict[str, Any]:
        best = max(range(len(probabilities)), key=probabilities.__getitem__)
        return {
            "type": self.type,
            "name": self.name,
            "choice": self.values[best],
            "probabilities": [
                {"value": value, "probability": probability}
                for value, probability in zip(self.values, probabilities, strict=True)
            ],
            "confidence": confidence(probabilities),
        }


class Score(_Options):
    """Which of several ordered levels fits."""

    type = "score"
    ending = (
        "These are levels, from the lowest to the highest. Answer only with the letter of the level that fits best."
    )

    def __init__(self, question: Mapping[str, Any], where: str) -> None:
        super().__init__(question, where, "levels", "label")

    @override
    def answer(self, probabilities: Sequence[float]) -> dict[str, Any]:
        return {
            "type": self.type,
            "name": self.name,
            "score": math.fsum(level * probability for level, probability in enumerate(probabilities)),
            "probabilities": [
                {"value": level, "label": label, "probability": probability}
                for level, (label, probability) in enumerate(zip(self.values, probabilities, strict=True))
            ],
            "confidence": confidence(probabilities),
        }


_KINDS: dict[str, type[Predicate | Choice | Score]] = {kind.type: kind for kind in (Predicate, Choice, Score)}


def questions_of(given: Sequence[Mapping[str, Any]]) -> list[Question]:
    """The questions of a request, whose types are known. Raises `InvalidRequestError`."""
    return [_KINDS[question["type"]](question, f"questions[{index}]") for index, question in enumerate(given)]


def part_text(content: object, where: str) -> str:
    """The text of a string, or of parts of type input_text and input_json."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequestError(f"{where} must be a text, or a list of parts", "questions")
    return "\n".join(_text(part, where) for part in content)


def json_as_text(part: Mapping[str, Any], where: str) -> str:
    """The text of a part of type input_json: compact JSON."""
    data = part.get("data")
    if not isinstance(data, dict | list):
        raise InvalidRequestError(f"{where}: a part of type input_json needs an object or a list in data")
    if _depth(data) > _MAX_JSON_DEPTH:
        raise InvalidRequestError(f"{where}: a part of type input_json is nested more than {_MAX_JSON_DEPTH} deep")
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"))


def confidence(probabilities: Sequence[float]) -> float:
    """How far the greatest is above that of options that are all equally likely: 0 there, 1 where it is certain."""
    even = 1 / len(probabilities)
    return max(0.0, (max(probabilities) - even) / (1 - even))


def letters(tokenizer: Tokenizer, count: int) -> list[Label]:
    """A, B, …, AA, …, aa, …, a, …, 0, …: those that are one token. Raises `NotSupportedError` where there are too few."""
    known = _known_letters.get(tokenizer)
    if known is None:
        pairs = (map("".join, product(letters, repeat=2)) for letters in (ascii_uppercase, ascii_lowercase))
        names = chain(ascii_uppercase, *pairs, ascii_lowercase, digits)
        known = _known_letters[tokenizer] = list(islice(_distinct(tokenizer, names), MAX_OPTIONS))
    if len(known) < count:
        raise NotSupportedError(
            f"a question with {count} options: this model's vocabulary has single tokens for {len(known)} only",
            "questions",
        )
    return known[:count]


_known_letters: WeakKeyDictionary[Tokenizer, list[Label]] = WeakKeyDictionary()


def _distinct(tokenizer: Tokenizer, names: Iterator[str]) -> Iterator[Label]:
    used = set()
    for name in names:
        label = _label(tokenizer, name)
        if label is not None and label.token_id not in used:
            used.add(label.token_id)
            yield label


def _label(tokenizer: Tokenizer, text: str) -> Label | None:
    """`text`, if it is a token that says it: not one for what is unknown."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    return Label(text, ids[0]) if len(ids) == 1 and tokenizer.decode(ids).strip() == text else None


def _text(part: object, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "input_image":
        raise NotSupportedError(f"{where}: a part of type input_image is not supported; only text is")
    if kind == "input_json":
        assert isinstance(part, dict)
        return json_as_text(part, where)
    text = part.get("text") if isinstance(part, dict) else None
    if kind != "input_text" or not isinstance(text, str):
        raise InvalidRequestError(f"{where}: a part must be of type input_text or input_json, got {shown(kind)}")
    return text


def _depth(value: object) -> int:
    deepest, level = 0, [value]
    while level:
        deepest += 1
        if deepest > _MAX_JSON_DEPTH:
            break
        level = [
            inner
            for item in level
            if isinstance(item, dict | list)
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
    return deepest
