"""The real all-MiniLM-L6-v2, where it has been fetched (`make real-model`)."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from pagoda import LLM

pytestmark = pytest.mark.real_model

SUBJECTS = ("The capital of France", "A cat", "My grandmother's bicycle", "The stock market", "Photosynthesis")
PREDICATES = (
    "is a city on the river Seine.",
    "sleeps on the sofa all day, and hunts mice at night when nobody is looking.",
    "fell sharply after the announcement of new tariffs on imported steel, cars and microchips last Thursday.",
    "turns light into chemical energy.",
    "was stolen!",
    "needs repair: its chain is rusty, its brakes squeal, and both of its tyres have been flat since the spring.",
    "is what we talked about yesterday",
    "kostet mehr, als man denkt.",
)
TEXTS = [f"{subject} {predicate}" for subject, predicate in product(SUBJECTS, PREDICATES)]


@pytest.fixture(scope="module")
def expected(real_embedder: Path) -> torch.Tensor:
    """What transformers gives in float32, pooled as Sentence Transformers does."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(real_embedder), AutoModel.from_pretrained(real_embedder).eval()
    vectors = []
    with torch.no_grad():
        for text in TEXTS:
            encoded = tokenizer(text, return_tensors="pt")
            vectors.append(F.normalize(model(**encoded).last_hidden_state[0].mean(0), dim=0))
    return torch.stack(vectors)


def embedded(real_embedder: Path, **settings: str) -> torch.Tensor:
    with LLM(str(real_embedder), **settings) as llm:
        return torch.tensor([output.embedding for output in llm.embed(TEXTS)])


def test_vectors_and_ranks_are_those_of_transformers(real_embedder: Path, expected: torch.Tensor) -> None:
    found = embedded(real_embedder)
    assert F.cosine_similarity(found, expected).min() >= 0.99999
    assert (found - expected).abs().max() < 1e-5
    # 5 queries with 40 documents each: the order of all of them.
    ranks = (found[::8] @ found.T).argsort(dim=1, descending=True)
    assert torch.equal(ranks, (expected[::8] @ expected.T).argsort(dim=1, descending=True))


@pytest.mark.parametrize("settings", [{"quantization": "int8"}, {"dtype": "bfloat16"}])
def test_int8_and_bfloat16_stay_close(real_embedder: Path, expected: torch.Tensor, settings: dict[str, str]) -> None:
    assert F.cosine_similarity(embedded(real_embedder, **settings), expected).min() >= 0.999
