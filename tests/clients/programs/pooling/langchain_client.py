"""`langchain-openai`: embeddings of texts, and of the token ids that it makes of long ones."""

from __future__ import annotations

import sys

from langchain_openai import OpenAIEmbeddings

url, model = sys.argv[1:3]
texts = ["A cat sleeps on the sofa.", "Berlin is the capital of Germany.", "Bread is baked from flour."]
embeddings = OpenAIEmbeddings(model=model, base_url=f"{url}/v1", api_key="none", check_embedding_ctx_length=False)
vectors = embeddings.embed_documents(texts)
assert len(vectors) == 3
assert all(abs(sum(x * x for x in vector) - 1) < 1e-3 for vector in vectors)
assert max(abs(a - b) for a, b in zip(vectors[1], embeddings.embed_query(texts[1]), strict=True)) < 1e-6
question = embeddings.embed_query("What is Germany's capital?")
similarities = [sum(x * y for x, y in zip(vector, question, strict=True)) for vector in vectors]
assert similarities.index(max(similarities)) == 1, similarities
short = OpenAIEmbeddings(
    model=model, base_url=f"{url}/v1", api_key="none", check_embedding_ctx_length=False, dimensions=16
)
assert len(short.embed_query("a cat")) == 16
