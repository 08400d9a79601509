"""Schemas that others wrote: each is refused by name, or every complete output is valid under it."""

from __future__ import annotations

import random

import numpy as np
import pytest

from pagoda.errors import InvalidRequestError
from pagoda.structured.matcher import GrammarMatcher
from pagoda.structured.spec import GrammarSpec
from tests.support.schema_sets import Schemas, error_of, kubernetes_objects, openai_objects, test_suite
from tests.unit.structured.test_matcher import EOS, compiler, matcher_of, text_of

test_suite.__test__ = False  # type: ignore[attr-defined]
_FREE_TOKENS = 40
_MOST_TOKENS = 150


def random_output(matcher: GrammarMatcher, seed: int) -> str | None:
    """A text of random allowed tokens, which from some length on goes where it ends soonest; None if it does not end."""
    generator = random.Random(seed)
    lengths = {b'"': 0, b"}": 0, b"]": 0, b'"}': 0, b'"]': 0}
    words = np.zeros((1, matcher.num_words), dtype=np.int32)
    output: list[int] = []
    for count in range(_MOST_TOKENS):
        matcher.fill(words)
        allowed = np.unpackbits(words[0].view(np.uint8), bitorder="little").nonzero()[0].tolist()
        assert allowed
        token_id = generator.choice(allowed)
        if count > _FREE_TOKENS:
            decode = compiler().vocabulary.tokenizer.decode_bytes
            token_id = generator.choice([each for each in allowed if decode([each]) in lengths] or allowed)
        if EOS in allowed and (count > _FREE_TOKENS or generator.random() < 0.5):
            return text_of(output)
        output.append(token_id)
        if matcher.advance(token_id):
            return text_of(output)
        assert matcher.error is None
    return None


def check(schemas: Schemas, seeds: range) -> tuple[int, int]:
    """How many schemas are taken, and how many outputs were complete; all of these are valid."""
    num_taken = num_complete = 0
    for name, schema in schemas.items():
        try:
            spec = GrammarSpec.of_json_schema(schema)
            compiler().matcher(spec)
        except InvalidRequestError:
            continue
        num_taken += 1
        for seed in seeds:
            text = random_output(matcher_of(spec), seed)
            if text is not None:
                assert error_of(schema, text) is None, (name, error_of(schema, text))
                num_complete += 1
    return num_taken, num_complete


def some_of(schemas: Schemas, every: int) -> Schemas:
    return {name: schemas[name] for name in sorted(schemas)[::every]}


def test_a_part_of_all_sets() -> None:
    num_taken, num_complete = check({**some_of(test_suite(), 6), **some_of(kubernetes_objects(), 20)}, range(1))
    assert num_taken > 70
    assert num_complete > 50


@pytest.mark.slow
@pytest.mark.parametrize("schemas", [test_suite, kubernetes_objects, openai_objects], ids=lambda made: made.__name__)
def test_all_of_a_set(schemas) -> None:
    num_taken, num_complete = check(schemas(), range(6))
    assert num_taken > 100
    assert num_complete > 300
