"""The checkpoints under comparison: random weights of well-known shapes, and each engine's own form of them.

All lie under one folder and are made once; a conversion runs in the environment of the engine that needs it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

# `pagoda models make-dummy` options.
MODELS: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        "family": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_layers": 28,
        "num_heads": 16,
        "num_kv_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 4096,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    },
    "llama-15m": {
        "family": "llama",
        "hidden_size": 288,
        "intermediate_size": 768,
        "num_layers": 6,
        "num_heads": 6,
        "num_kv_heads": 6,
        "head_dim": 48,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    },
}
PEERS_FOLDER = Path(".peers")
CONVERTERS = {"openvino": "convert_openvino.py", "llamacpp": "convert_gguf.py"}
HERE = Path(__file__).resolve().parent.parent


def python_of(engine: str) -> Path:
    """The interpreter of an engine's environment; Pagoda's is the one that this runs in."""
    if engine == "pagoda":
        return Path(sys.executable)
    return (PEERS_FOLDER / engine / "bin/python").absolute()


def checkpoint(model: str) -> Path:
    """The Hugging Face checkpoint, written if it is not there yet."""
    directory = PEERS_FOLDER / "models" / model
    if not directory.exists():
        options: list[str] = []
        for name, value in MODELS[model].items():
            flag = name.replace("_", "-")
            options += [f"--{flag}"] if value is True else [f"--{flag}", str(value)]
        command = [str(python_of("pagoda")), "-m", "pagoda.cli.main", "models", "make-dummy", str(directory), *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return directory.absolute()


def converted(model: str, engine: str, weights: str) -> str:
    """The engine's own form of the checkpoint, made if it is not there yet; "" for an engine that reads it as it is.

    Raises `CalledProcessError` when the conversion fails; its output is the last part of what it said.
    """
    if engine not in CONVERTERS:
        return ""
    target = PEERS_FOLDER / "models" / f"{model}-{engine}-{weights}"
    if not target.exists():
        command = [str(python_of(engine)), str(HERE / CONVERTERS[engine]), str(checkpoint(model)), str(target), weights]
        subprocess.run(command, check=True, capture_output=True, text=True)
    return str(target.absolute())
