"""OpenAI's routes with types of our own: KServe's import vLLM."""
