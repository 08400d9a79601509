"""How a checkpoint describes its rotary position embedding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pagoda.errors import CheckpointError
from pagoda.models.checkpoint_files import shown
from pagoda.models.config_reader import ConfigReader

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")

# What keeps frequencies and lengths finite; models have a theta of 1e4 to 1e9, and factors up to 128.
MIN_THETA, MAX_THETA = 1.5, 1e12
MIN_FACTOR, MAX_FACTOR = 1e-3, 1e6
MAX_PARAMETER = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding: base frequency `theta` and how it is stretched to longer contexts.

    `rope_type` is one of `ROPE_TYPES`. `factor` is the stretch of every type but `default`.
    `original_max_position_embeddings` is the context length before the stretch. `low_freq_factor` and `high_freq_factor`
    belong to llama3; the rest to yarn, where None means "not given" as transformers understands it.
    """

    rope_type: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position_embeddings: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def max_context_length(self, max_position_embeddings: int) -> int:
        """Longest sequence, in tokens, that the stretched positions are meant for."""
        if self.rope_type in ("linear", "dynamic"):
            return int(max_position_embeddings * self.factor)
        if self.rope_type == "yarn":
            return max(max_position_embeddings, int(self.original_max_position_embeddings * self.factor))
        return max_position_embeddings


def read_rope_config(model: ConfigReader, max_position_embeddings: int) -> RopeConfig:
    """The rope part of config.json, in transformers 5's spelling (`rope_parameters`) or the older one.

    Older: `rope_scaling` (null or an object whose type is under `rope_type` or `type`) and `rope_theta`, side by side. Where
    both are given, `rope_scaling` is all that counts, as in transformers.
    Raises `CheckpointError` for a type that is not supported or a parameter that is missing or impossible.
    """
    values: dict[str, Any] = model.mapping("rope_scaling") or model.mapping("rope_parameters")
    if any(isinstance(value, dict) for value in values.values()):
        raise CheckpointError(f"{model.where}: rope_parameters that differ between layers are not supported")
    rope = ConfigReader(values, f"{model.where}, rope parameters")
    rope_type = rope.string("rope_type", rope.string("type", "default"))
    if rope_type not in ROPE_TYPES:
        raise CheckpointError(
            f"{model.where}: rope type {shown(rope_type)} is not supported; supported: {', '.join(ROPE_TYPES)}"
        )
    theta = _theta(rope, _theta(model, 10000.0))
    if rope_type == "default":
        return RopeConfig(theta=theta, original_max_position_embeddings=max_position_embeddings)
    if rope_type in ("linear", "dynamic"):
        return RopeConfig(
            rope_type=rope_type,
            theta=theta,
            factor=_factor(rope),
            original_max_position_embeddings=max_position_embeddings,
        )
    # As in transformers, a length beside the rope parameters takes precedence over one among them.
    original = model.integer(
        "original_max_position_embeddings", rope.integer("original_max_position_embeddings", max_position_embeddings)
    )
    if rope_type == "llama3":
        low_freq_factor = rope.number("low_freq_factor", high=MAX_PARAMETER)
        return RopeConfig(
            rope_type=rope_type,
            theta=theta,
            factor=_factor(rope),
            original_max_position_embeddings=original,
            low_freq_factor=low_freq_factor,
            high_freq_factor=rope.number("high_freq_factor", low=low_freq_factor, high=MAX_PARAMETER),
        )
    return RopeConfig(
        rope_type=rope_type,
        theta=theta,
        factor=_factor(rope, max_position_embeddings / original),
        original_max_position_embeddings=original,
        attention_factor=rope.optional_number("attention_factor", high=MAX_PARAMETER, low_allowed=True),
        beta_fast=rope.number("beta_fast", 32.0, high=MAX_PARAMETER),
        beta_slow=rope.number("beta_slow", 1.0, high=MAX_PARAMETER),
        mscale=rope.optional_number("mscale", high=MAX_PARAMETER, low_allowed=True),
        mscale_all_dim=rope.optional_number("mscale_all_dim", high=MAX_PARAMETER, low_allowed=True),
        truncate=rope.flag("truncate", True),
    )


def _theta(reader: ConfigReader, default: float) -> float:
    return reader.number("rope_theta", default, low=MIN_THETA, high=MAX_THETA, low_allowed=True)


def _factor(reader: ConfigReader, default: float | None = None) -> float:
    return reader.number("factor", default, low=MIN_FACTOR, high=MAX_FACTOR, low_allowed=True)
