"""How a checkpoint describes its rotary position embedding."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pagoda.errors import CheckpointError
from pagoda.models.checkpoint_files import shown
from pagoda.models.config_reader import ConfigReader

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional")

# What keeps frequencies and lengths finite; models have a theta of 1e4 to 1e9, and factors up to 128.
MIN_THETA, MAX_THETA = 1.5, 1e12
MIN_FACTOR, MAX_FACTOR = 1e-3, 1e6
MAX_PARAMETER = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding: base frequency `theta` and how it is stretched to longer contexts.

    `rope_type` is one of `ROPE_TYPES`. `factor` is the stretch of every type but `default`.
    `original_max_position_embeddings` is the context length before the stretch. `low_freq_factor` and `high_freq_factor`
    belong to llama3; `short_factors` and `long_factors`, one for each pair of dimensions, to longrope, which takes the first
    for contexts up to the original length and the second for longer ones; the rest to yarn, where None means "not given" as
    transformers understands it (`attention_factor` is longrope's, too).

    `query_scaling`: beyond the original length, rotated queries grow by `1 + query_scaling * log(1 + position // original)`
    (Llama 4, Ministral 3).

    Of each head, the first `partial_rotary_factor` is rotated; of type proportional, that share of the pairs of the whole
    head, the others standing still. `interleaved`: dimension 2i is turned with 2i + 1, and not with
    the one half of the rotated dimensions away (GPT-NeoX).
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
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    partial_rotary_factor: float = 1.0
    interleaved: bool = False
    query_scaling: float = 0.0

    def rotary_dim(self, head_dim: int) -> int:
        """Dimensions of a head of `head_dim` that are rotated."""
        if self.rope_type == "proportional":
            return head_dim
        return int(head_dim * self.partial_rotary_factor)

    def max_context_length(self, max_position_embeddings: int) -> int:
        """Longest sequence, in tokens, that the stretched positions are meant for."""
        if self.rope_type in ("linear", "dynamic"):
            return int(max_position_embeddings * self.factor)
        if self.rope_type == "yarn":
            return max(max_position_embeddings, int(self.original_max_position_embeddings * self.factor))
        return max_position_embeddings


def yarn_mscale(factor: float, mscale: float) -> float:
    """What yarn multiplies by where positions are stretched by `factor`."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def with_query_scaling(model: ConfigReader, rope: RopeConfig) -> RopeConfig:
    """`rope`, with what `llama_4_scaling_beta` says in the rope part of config.json."""
    values = ConfigReader(
        model.mapping("rope_scaling") or model.mapping("rope_parameters"), f"{model.where}, rope parameters"
    )
    beta = values.optional_number("llama_4_scaling_beta", high=MAX_PARAMETER, low_allowed=True)
    return replace(rope, query_scaling=beta or 0.0)


def with_default_rope(model: ConfigReader, rope: dict[str, Any]) -> ConfigReader:
    """`model`, with `rope` as its parameters where it has none."""
    if model.mapping("rope_parameters") or model.mapping("rope_scaling"):
        return model
    return ConfigReader({**model.values, "rope_parameters": rope}, model.where)


def read_rope_config(
    model: ConfigReader,
    max_position_embeddings: int,
    *,
    theta: float = 10000.0,
    partial_rotary_factor: float = 1.0,
    interleaved: bool = False,
    aliases: Mapping[str, str] | None = None,
    original: int | None = None,
) -> RopeConfig:
    """The rope part of config.json, in transformers 5's spelling (`rope_parameters`) or the older one, for all layers alike.

    Older: `rope_scaling` (null or an object whose type is under `rope_type` or `type`) and `rope_theta`, side by side. Where
    both are given, `rope_scaling` is all that counts, as in transformers. The rest are the family's own: defaults, `aliases`
    of rope types, and `original`, the context length before the stretch where none stands beside the rope parameters.
    Raises `CheckpointError` for a type that is not supported or a parameter that is missing or impossible.
    """
    values: dict[str, Any] = model.mapping("rope_scaling") or model.mapping("rope_parameters")
    if any(isinstance(value, dict) for value in values.values()):
        raise CheckpointError(
            f"{model.where}: rope_parameters that differ between layers are not supported by this model"
        )
    own_name = values.get("rope_type", values.get("type"))
    if aliases and isinstance(own_name, str) and own_name in aliases:
        values = {**values, "rope_type": aliases[own_name]}
    if original is not None and model.values.get("original_max_position_embeddings") is None:
        values = {**values, "original_max_position_embeddings": original}
    return _rope_config(
        model, values, max_position_embeddings, _theta(model, theta), partial_rotary_factor, interleaved
    )


def read_rope_of_layer_types(
    model: ConfigReader, max_position_embeddings: int, thetas: dict[str, float], *, local_theta_key: str | None = None
) -> dict[str, RopeConfig]:
    """The rope of each kind of layer (`full_attention`, `sliding_attention`), with the family's default `thetas`.

    transformers 5 has an object for each kind in `rope_parameters`. Older checkpoints have `rope_theta` and `rope_scaling` for
    layers of full attention, and the sliding ones' theta under `local_theta_key` (None: they have the same).
    """
    values = model.mapping("rope_parameters")
    ropes = {}
    for kind, default in thetas.items():
        own = ConfigReader(values, f"{model.where}, rope_parameters").mapping(kind)
        is_full = kind == "full_attention"
        if is_full:
            own = {**own, **model.mapping("rope_scaling")}
        key = "rope_theta" if is_full or local_theta_key is None else local_theta_key
        theta = model.number(key, default, low=MIN_THETA, high=MAX_THETA, low_allowed=True)
        ropes[kind] = _rope_config(model, own, max_position_embeddings, theta, 1.0, interleaved=False)
    return ropes


def _rope_config(
    model: ConfigReader,
    values: dict[str, Any],
    max_position_embeddings: int,
    theta: float,
    partial_rotary_factor: float,
    interleaved: bool,
) -> RopeConfig:
    rope = ConfigReader(values, f"{model.where}, rope parameters")
    rope_type = rope.string("rope_type", rope.string("type", "default"))
    if rope_type not in ROPE_TYPES:
        raise CheckpointError(
            f"{model.where}: rope type {shown(rope_type)} is not supported; supported: {', '.join(ROPE_TYPES)}"
        )
    of_all_types: dict[str, Any] = {
        "rope_type": rope_type,
        "theta": _theta(rope, theta),
        "partial_rotary_factor": _share(rope, _share(model, partial_rotary_factor)),
        "interleaved": interleaved,
    }
    if rope_type == "default":
        return RopeConfig(**of_all_types, original_max_position_embeddings=max_position_embeddings)
    if rope_type == "proportional":
        return RopeConfig(
            **of_all_types, factor=_factor(rope, 1.0), original_max_position_embeddings=max_position_embeddings
        )
    if rope_type in ("linear", "dynamic"):
        return RopeConfig(
            **of_all_types, factor=_factor(rope), original_max_position_embeddings=max_position_embeddings
        )
    # As in transformers, a length beside the rope parameters takes precedence over one among them.
    original = model.integer(
        "original_max_position_embeddings", rope.integer("original_max_position_embeddings", max_position_embeddings)
    )
    if rope_type == "llama3":
        low_freq_factor = rope.number("low_freq_factor", high=MAX_PARAMETER)
        return RopeConfig(
            **of_all_types,
            factor=_factor(rope),
            original_max_position_embeddings=original,
            low_freq_factor=low_freq_factor,
            high_freq_factor=rope.number("high_freq_factor", low=low_freq_factor, high=MAX_PARAMETER),
        )
    attention_factor = rope.optional_number("attention_factor", high=MAX_PARAMETER, low_allowed=True)
    factor = _factor(rope, max_position_embeddings / original)
    if rope_type == "longrope":
        return RopeConfig(
            **of_all_types,
            factor=factor,
            original_max_position_embeddings=original,
            attention_factor=attention_factor,
            short_factors=rope.numbers("short_factor", low=MIN_FACTOR, high=MAX_FACTOR),
            long_factors=rope.numbers("long_factor", low=MIN_FACTOR, high=MAX_FACTOR),
        )
    return RopeConfig(
        **of_all_types,
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=attention_factor,
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


def _share(reader: ConfigReader, default: float) -> float:
    return reader.number("partial_rotary_factor", default, high=1.0)
