"""The built-in demo model: a trained checkpoint in the package (docs/demo-model.md describes it)."""

from __future__ import annotations

from pathlib import Path

from pagoda.errors import CheckpointError

DIRECTORY = Path(__file__).resolve().parent.parent / "demo_model"


def demo_checkpoint() -> Path:
    """The demo model's checkpoint directory: Hugging Face format, Llama, bfloat16, context of 2048 tokens.

    Raises:
        CheckpointError: the package was installed without its data files.
    """
    if not (DIRECTORY / "model.safetensors").is_file():
        raise CheckpointError(
            f"the built-in demo model is missing from {DIRECTORY}: install pagoda with its data files"
        )
    return DIRECTORY
