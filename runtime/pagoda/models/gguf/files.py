"""The small files of a checkpoint's directory, derived from a GGUF file.

Whoever reads a checkpoint does so through `models.checkpoint_files`, by names in its directory. Where the checkpoint is a GGUF
file, that module asks here: config.json, generation_config.json, tokenizer.json and tokenizer_config.json then are what
transformers' conversion would have written. Nothing is written anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from pagoda.models.gguf.config import config_json, generation_config_json
from pagoda.models.gguf.reader import GgufFile, read_gguf
from pagoda.models.gguf.tokenizer import tokenizer_config_json, tokenizer_json


def _in_json(values_of: Callable[[GgufFile], dict[str, Any]]) -> Callable[[GgufFile], bytes]:
    return lambda file: json.dumps(values_of(file), indent=2, ensure_ascii=False).encode()


DERIVED: Mapping[str, Callable[[GgufFile], bytes]] = {
    "config.json": _in_json(config_json),
    "generation_config.json": _in_json(generation_config_json),
    "tokenizer.json": tokenizer_json,
    "tokenizer_config.json": _in_json(tokenizer_config_json),
}


def is_gguf(checkpoint: Path) -> bool:
    """Whether a checkpoint is a file, and so a GGUF file: all others are directories."""
    return checkpoint.is_file()


def derived_file(path: Path, name: str) -> bytes | None:
    """The content of the file `name` of a checkpoint that is the GGUF file `path`; None: it has none of that name.

    Raises `CheckpointError` as `read_gguf`, and for what the file says of its model that is not supported.
    """
    return _derived(read_gguf(path), name) if name in DERIVED else None


@lru_cache(maxsize=8)
def _derived(file: GgufFile, name: str) -> bytes:
    """By the object that `read_gguf` gives, one as long as the file is the same."""
    return DERIVED[name](file)
