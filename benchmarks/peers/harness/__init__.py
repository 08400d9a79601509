"""Runs the same checkpoint and prompts through several engines, one after the other, and compares. See benchmarks/NOTES.md."""
