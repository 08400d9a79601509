"""Grammars, compiled by llguidance, and a cache of them.

A grammar is compiled for a vocabulary once, and every request gets a copy, which takes microseconds: copies share what the
lexer has found out about tokens. llguidance counts its own steps, which bounds what one mask may take; what compiling may take
is bounded by `structured.admission` only.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence

import llguidance
from llguidance.gbnf_to_lark import any_to_lark

from pagoda.errors import InvalidRequestError
from pagoda.structured.matcher import GrammarMatcher, OutputMatcher, TextMatcher
from pagoda.structured.reasoning import Reasoning
from pagoda.structured.spec import GrammarSpec
from pagoda.structured.structural_tag import json_source, lark_of_structural_tag
from pagoda.structured.vocabulary import GrammarVocabulary

# A space, or a line break with indentation: models that may print blanks without end sometimes do.
_WHITESPACE = r"(?:\n[ \t]{0,40}| )"
_JSON_OPTIONS = {
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_flexible": True,
    "whitespace_pattern": _WHITESPACE,
    "lenient": False,
    "coerce_one_of": False,
}
_COMPACT_JSON_OPTIONS = {**_JSON_OPTIONS, "whitespace_flexible": False, "whitespace_pattern": None}

_LIMITS = llguidance.LLParserLimits(
    max_items_in_row=10_000,
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,  # 14 ms
    step_max_items=50_000,
    max_lexer_states=20_000,  # 2 kB each
    max_grammar_size=200_000,
    verbose_errors=False,
)
_CACHE_BYTES = 256 << 20
_MAX_ERROR_CHARACTERS = 300


class GrammarCompiler:
    """Compiles grammars for one vocabulary; keeps the last ones, as many as fit `cache_bytes`. Safe between threads."""

    def __init__(self, vocabulary: GrammarVocabulary, cache_bytes: int = _CACHE_BYTES) -> None:
        self.vocabulary = vocabulary
        self._cache_bytes = cache_bytes
        self._cached_bytes = 0
        self._cached: OrderedDict[tuple[str, str, bool], tuple[llguidance.LLMatcher, int]] = OrderedDict()
        self._lock = threading.Lock()

    def is_cached(self, spec: GrammarSpec) -> bool:
        """Whether `matcher` takes microseconds."""
        return not spec.has_grammar or _key(spec) in self._cached

    def matcher(
        self,
        spec: GrammarSpec,
        *,
        eos_token_ids: Sequence[int] = (),
        stop_token_ids: Sequence[int] = (),
        min_tokens: int = 0,
        ignore_eos: bool = False,
    ) -> OutputMatcher:
        """A matcher at the beginning of the output, see `GrammarMatcher`. Raises `InvalidRequestError`."""
        tokenizer = self.vocabulary.tokenizer
        reasoning = Reasoning(spec, lambda token_id: bytes(tokenizer.decode_bytes([token_id])))
        if not spec.has_grammar:
            return TextMatcher(tokenizer.vocab_size, reasoning)
        special = frozenset(self.vocabulary.special_tokens.values())
        return GrammarMatcher(
            self._compiled(spec).deep_copy(),
            reasoning,
            vocab_size=tokenizer.vocab_size,
            vocabulary_eos_ids=tokenizer.eos_tokens,
            end_ids=(*eos_token_ids, *(token_id for token_id in stop_token_ids if token_id in special)),
            stop_token_ids=stop_token_ids,
            min_tokens=min_tokens,
            ignore_eos=ignore_eos,
        )

    def _compiled(self, spec: GrammarSpec) -> llguidance.LLMatcher:
        key = _key(spec)
        with self._lock:
            if key in self._cached:
                self._cached.move_to_end(key)
                return self._cached[key][0]
        compiled = compile_grammar(spec, self.vocabulary)
        # What it takes is not told; a small one takes 130 kB, and states of the lexer are added while it is used.
        num_bytes = (256 << 10) + 64 * len(spec.source)
        with self._lock:
            if key not in self._cached:
                self._cached[key] = compiled, num_bytes
                self._cached_bytes += num_bytes
            while self._cached_bytes > self._cache_bytes and len(self._cached) > 1:
                self._cached_bytes -= self._cached.popitem(last=False)[1][1]
        return compiled


def _key(spec: GrammarSpec) -> tuple[str, str, bool]:
    return spec.kind, spec.source, spec.whitespace


def compile_grammar(spec: GrammarSpec, vocabulary: GrammarVocabulary) -> llguidance.LLMatcher:
    """Compile without a cache. Raises `InvalidRequestError` with llguidance's words."""
    matcher = llguidance.LLMatcher(vocabulary.tokenizer, _source(spec, vocabulary), log_level=0, limits=_LIMITS)
    if matcher.is_error():
        raise grammar_error(spec, matcher.get_error())
    return matcher


def grammar_error(spec: GrammarSpec, error: str) -> InvalidRequestError:
    """The error for a grammar that llguidance refuses, in one line."""
    reason = " ".join(error.split())
    if reason.startswith("panic:"):
        reason = "it has more parts than can be compiled"
    reason = reason if len(reason) <= _MAX_ERROR_CHARACTERS else f"{reason[:_MAX_ERROR_CHARACTERS]}..."
    return InvalidRequestError(f"this {spec.kind} cannot be enforced: {reason}", spec.kind)


def _source(spec: GrammarSpec, vocabulary: GrammarVocabulary) -> str:
    """The grammar as llguidance reads it."""
    from_lark = llguidance.LLMatcher.grammar_from_lark
    options = _JSON_OPTIONS if spec.whitespace else _COMPACT_JSON_OPTIONS
    if spec.kind == "json_object":
        return llguidance.LLMatcher.grammar_from_json_schema(json_source({"type": "object"}, options))
    if spec.kind == "json_schema":
        return llguidance.LLMatcher.grammar_from_json_schema(json_source(json.loads(spec.source), options))
    if spec.kind == "regex":
        return llguidance.LLMatcher.grammar_from_regex(spec.source)
    if spec.kind == "choice":
        return from_lark(
            "start: " + " | ".join(json.dumps(each, ensure_ascii=False) for each in json.loads(spec.source))
        )
    if spec.kind == "structural_tag":
        return from_lark(lark_of_structural_tag(json.loads(spec.source), vocabulary.special_tokens, options))
    try:
        return from_lark(any_to_lark(spec.source))  # Lark itself, or llama.cpp's GBNF
    except Exception as error:  # the converter raises what its parser met
        raise grammar_error(spec, f"it is neither Lark nor GBNF: {error}") from error
