"""What a constrained answer must be: the record that a request carries from its parser to the engine."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from pagoda.config.sizes import exact_bytes
from pagoda.errors import InvalidRequestError

GrammarKind = Literal["json_schema", "json_object", "regex", "choice", "grammar", "structural_tag", "text"]

MAX_SOURCE_BYTES = 128 << 10
MAX_JSON_CHARACTERS = 4 * MAX_SOURCE_BYTES  # with blanks and escapes
MAX_CHOICES = 1000
MAX_DEPTH = 64
_KINDS = get_args(GrammarKind)
_LARGEST_INTEGER_DIGITS = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class GrammarSpec:
    """A grammar that an answer keeps to. Construction checks form and size; whether it compiles is known at admission.

    `source`: for `json_schema` the schema, for `structural_tag` the tag, for `choice` a list of strings, each as JSON; for
    `regex` a regular expression and for `grammar` a grammar in llguidance's Lark, as they are; empty for `json_object`.
    `whitespace`: between the tokens of JSON, one space or one line break with indentation, or none. `starts_after`: ids of the
    tokens that end the reasoning; the grammar begins behind their first occurrence in the output. Empty: at its beginning.
    `opened_by`: there is reasoning only if the output begins with these tokens, with a grammar one; empty: it always begins
    within the reasoning.
    `reasoning_budget`: so many tokens of reasoning at most, then those of `starts_after` come; `reasoning_left_by`: tokens
    that end the reasoning, too, such as the marker of a call. `text` is any text: only the reasoning is bounded.
    `reasoning_in_grammar`: the grammar is of the whole output, and has the reasoning in it.
    Raises `InvalidRequestError`.
    """

    kind: GrammarKind
    source: str = ""
    whitespace: bool = True
    starts_after: tuple[int, ...] = ()
    opened_by: tuple[int, ...] = ()
    reasoning_budget: int | None = None
    reasoning_left_by: tuple[int, ...] = ()
    reasoning_in_grammar: bool = False

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise InvalidRequestError(f"there is no structured output of kind {self.kind!r}", "structured_outputs")
        try:
            size = len(self.source.encode())
        except UnicodeEncodeError:
            raise InvalidRequestError(f"{self.kind} has half a character (a lone surrogate)", self.kind) from None
        if size > MAX_SOURCE_BYTES:
            raise InvalidRequestError(
                f"{self.kind} has {exact_bytes(size)}; at most {exact_bytes(MAX_SOURCE_BYTES)} are allowed", self.kind
            )
        if not self.source and self.kind not in ("json_object", "text"):
            raise InvalidRequestError(f"{self.kind} is empty", self.kind)

    @classmethod
    def of_json_schema(cls, schema: Mapping[str, Any] | bool | str) -> GrammarSpec:
        """An answer that is valid under a JSON schema (a string is parsed first)."""
        if isinstance(schema, str):
            schema = _parse(schema, "json_schema")
        if not isinstance(schema, Mapping | bool):
            raise InvalidRequestError(
                f"json_schema must be an object or a boolean, not {type(schema).__name__}", "json_schema"
            )
        return cls(kind="json_schema", source=_dump(schema, "json_schema"))

    @classmethod
    def of_json_object(cls) -> GrammarSpec:
        """Any JSON object."""
        return cls(kind="json_object")

    @classmethod
    def of_regex(cls, pattern: str) -> GrammarSpec:
        """An answer that a regular expression (Rust's `regex` syntax) matches as a whole."""
        return cls(kind="regex", source=_text(pattern, "regex"))

    @classmethod
    def of_choice(cls, choices: Sequence[str]) -> GrammarSpec:
        """One of these texts."""
        is_list = isinstance(choices, list | tuple)
        if not is_list or not all(isinstance(each, str) and each for each in choices):
            raise InvalidRequestError("choice must be a list of texts that are not empty", "choice")
        if not 1 <= len(choices) <= MAX_CHOICES:
            raise InvalidRequestError(f"choice has {len(choices)} texts; 1 to {MAX_CHOICES} are allowed", "choice")
        return cls(kind="choice", source=_dump(list(choices), "choice"))

    @classmethod
    def of_grammar(cls, grammar: str) -> GrammarSpec:
        """An answer of a context-free grammar in Lark's syntax, as llguidance reads it."""
        return cls(kind="grammar", source=_text(grammar, "grammar"))

    @classmethod
    def of_structural_tag(cls, tag: Mapping[str, Any] | str) -> GrammarSpec:
        """Free text in which tags open parts that keep to schemas; see `structured.structural_tag` for its form."""
        if isinstance(tag, str):
            tag = _parse(tag, "structural_tag")
        if not isinstance(tag, Mapping):
            raise InvalidRequestError("structural_tag must be an object", "structural_tag")
        return cls(kind="structural_tag", source=_dump(tag, "structural_tag"))

    @property
    def has_grammar(self) -> bool:
        """Whether the answer keeps to a grammar, which then knows where it may end."""
        return self.kind != "text"

    @property
    def alone(self) -> GrammarSpec:
        """The grammar without the reasoning before it."""
        return GrammarSpec(kind=self.kind, source=self.source, whitespace=self.whitespace)

    @property
    def parsed(self) -> Any:
        """The source as the client wrote it: a JSON value, or a text."""
        return json.loads(self.source) if self.kind in ("json_schema", "structural_tag", "choice") else self.source

    def after(self, token_ids: Sequence[int], opened_by: Sequence[int] = ()) -> GrammarSpec:
        """The same grammar, which begins behind these tokens: the end of the reasoning."""
        return replace(self, starts_after=tuple(token_ids), opened_by=tuple(opened_by))


def check_length(text: str, name: str) -> None:
    """Refuse JSON, before it is parsed, that cannot be a source of allowed size."""
    if len(text) > MAX_JSON_CHARACTERS:
        raise InvalidRequestError(f"{name} has {len(text)} characters; at most {MAX_JSON_CHARACTERS} are allowed", name)


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise InvalidRequestError(f"{name} must be a string, not {type(value).__name__}", name)
    return value


def _parse(text: str, name: str) -> Any:
    check_length(text, name)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"{name} is not valid JSON: {error}", name) from None


def _dump(value: object, name: str) -> str:
    """`value` as compact JSON, in the order of its keys: that of properties is the order of the answer."""
    _Size(name).add(value, 0)
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


class _Size:
    """Adds up a JSON value, and raises for one that is too large before anything is made of it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._left = MAX_SOURCE_BYTES

    def add(self, value: object, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise InvalidRequestError(f"{self._name} is nested deeper than {MAX_DEPTH} levels", self._name)
        self._take(2)
        if isinstance(value, str):
            self._take(len(value))
        elif isinstance(value, Mapping):
            for key, item in value.items():
                if not isinstance(key, str):
                    raise InvalidRequestError(f"{self._name} has an object with a key that is no string", self._name)
                self._take(len(key))
                self.add(item, depth + 1)
        elif isinstance(value, list | tuple):
            for item in value:
                self.add(item, depth + 1)
        elif isinstance(value, int) and abs(value) >= 10**_LARGEST_INTEGER_DIGITS:
            raise InvalidRequestError(
                f"{self._name} has an integer of more than {_LARGEST_INTEGER_DIGITS} digits", self._name
            )
        elif value is not None and not (isinstance(value, int | float) and math.isfinite(value)):
            raise InvalidRequestError(
                f"{self._name} has a value of type {type(value).__name__} that is no JSON value", self._name
            )

    def _take(self, num_bytes: int) -> None:
        self._left -= num_bytes
        if self._left < 0:
            raise InvalidRequestError(
                f"{self._name} is too large: at most {exact_bytes(MAX_SOURCE_BYTES)} are allowed", self._name
            )
