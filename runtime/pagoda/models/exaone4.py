"""EXAONE 4: norms behind attention and MLP, queries and keys normalized by head; where some layers slide, the others know no
positions (NoPE)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pagoda.models.config_reader import ConfigReader
from pagoda.models.family import (
    Family,
    by_kind,
    read_attention,
    read_layer_types,
    read_mlp,
    read_norm,
    read_positions,
)
from pagoda.models.layer_config import POST_NORM, LayerConfig
from pagoda.models.rope_config import read_rope_config


def _read(reader: ConfigReader) -> dict[str, Any]:
    positions, window = read_positions(reader, 2048), reader.optional_integer("sliding_window", 4096)
    attention = read_attention(
        reader,
        num_kv_heads=32,
        head_dim=None,
        rope=read_rope_config(reader, positions),
        qk_norm="head",
        window=window,
    )
    sliding = LayerConfig(attention=attention, mlp=read_mlp(reader), norms=POST_NORM)
    full = replace(sliding, attention=replace(attention, window=None, rope=attention.rope if window is None else None))
    pattern = 1 if window is None else _pattern(reader)
    kinds = read_layer_types(reader, lambda layer: bool((layer + 1) % pattern))
    return {
        "layers": by_kind(kinds, {"full_attention": full, "sliding_attention": sliding}),
        "max_position_embeddings": positions,
        "max_context_length": max(positions, attention.rope.max_context_length(positions) if attention.rope else 0),
        "norm": read_norm(reader, 1e-5),
    }


def _pattern(reader: ConfigReader) -> int:
    """Every so many layers one sees everything: a number, or letters such as LLLG."""
    pattern = reader.values.get("sliding_window_pattern")
    if isinstance(pattern, str):
        if pattern != "L" * (len(pattern) - 1) + "G" or len(pattern) > 64:
            raise reader.error(
                "sliding_window_pattern", "a number of layers, or L for each layer that slides and one G"
            )
        return len(pattern)
    return reader.integer("sliding_window_pattern", 4)


EXAONE4 = Family("exaone4", "Exaone4ForCausalLM", _read)
