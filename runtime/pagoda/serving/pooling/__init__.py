"""Embeddings, scores, reranking and classification, in the shapes of OpenAI, vLLM, Jina and Cohere."""
