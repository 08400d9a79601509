"""`cohere`: reranking by its second API."""

from __future__ import annotations

import sys

import cohere

url, model = sys.argv[1:3]
documents = ["A cat sleeps on the sofa.", "Berlin is the capital of Germany.", "Bread is baked from flour."]
client = cohere.ClientV2(api_key="none", base_url=url)
answer = client.rerank(model=model, query="What is Germany's capital?", documents=documents, top_n=2)
assert answer.results[0].index == 1, answer
assert len(answer.results) == 2
assert answer.results[0].relevance_score > answer.results[1].relevance_score
try:
    client.rerank(model=model, query="q", documents=[])
except cohere.errors.BadRequestError:
    pass
else:
    raise AssertionError("no documents are an error")
