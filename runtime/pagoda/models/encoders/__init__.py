"""Encoders: transformers whose tokens see those after them, too. They keep nothing in a KV cache."""
