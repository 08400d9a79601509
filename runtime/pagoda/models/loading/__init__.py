"""Checkpoint files into parameters."""
