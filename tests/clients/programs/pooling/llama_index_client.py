"""`llama-index-embeddings-openai-like`: vectors of texts in batches, and of a query."""

from __future__ import annotations

import sys

from llama_index.core.schema import TextNode
from llama_index.embeddings.openai_like import OpenAILikeEmbedding

url, model = sys.argv[1:3]
texts = ["A cat sleeps on the sofa.", "Berlin is the capital of Germany.", "Bread is baked from flour."]
embedding = OpenAILikeEmbedding(
    model_name=model, api_base=f"{url}/v1", api_key="none", embed_batch_size=2, max_retries=0
)
vectors = embedding.get_text_embedding_batch(texts)
assert len(vectors) == 3
query = embedding.get_query_embedding("What is Germany's capital?")
scores = [embedding.similarity(query, vector) for vector in vectors]
assert scores.index(max(scores)) == 1, scores
nodes = embedding([TextNode(text=text) for text in texts])
assert [len(node.embedding) for node in nodes] == [len(query)] * 3
