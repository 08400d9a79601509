"""The real models, where they have been fetched."""

from __future__ import annotations

from pathlib import Path

import pytest

MODELS = Path(__file__).resolve().parents[2] / ".models"
FILE = MODELS / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="package")
def real_model() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file of type Q4_1, with its embedding, which is its head, in Q8_0."""
    if not FILE.is_file():
        pytest.skip("the real model is not here: `make real-model` fetches it (177 MB)")
    return FILE


@pytest.fixture(scope="package")
def real_embedder() -> Path:
    """all-MiniLM-L6-v2, a checkpoint of Sentence Transformers in float32."""
    directory = MODELS / "all-MiniLM-L6-v2"
    if not (directory / "model.safetensors").is_file():
        pytest.skip("the real embedding model is not here: `make real-model` fetches it (177 MB)")
    return directory
