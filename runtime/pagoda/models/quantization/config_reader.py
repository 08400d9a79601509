"""Reads `quantization_config` of a checkpoint's config.json: GPTQ, AWQ, compressed-tensors, and what is derived for GGUF."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, cast

import regex

from pagoda.errors import CheckpointError
from pagoda.models.checkpoint_files import shown, shown_name
from pagoda.models.config_reader import ConfigReader
from pagoda.models.gguf.ggml_types import BY_NAME
from pagoda.models.quantization.schemes import IN_CHECKPOINTS, QuantizationConfig, SchemeGroup, WeightScheme

MAX_PATTERNS = 1 << 14
MAX_GROUPS = 256
MAX_PATTERN_CHARACTERS = 1024


def read_quantization(config: ConfigReader) -> QuantizationConfig | None:
    """The quantization in config.json; None if there is none, or one of float8, whose weights are read as floats.

    Raises:
        CheckpointError: a method, or a variety of one, that is not supported; says what is.
    """
    values = config.mapping("quantization_config")
    if not values:
        return None
    reader = ConfigReader(values, f"{config.where}: quantization_config")
    method = reader.string("quant_method")
    if method == "gptq":
        return _gptq(reader)
    if method == "awq":
        return _awq(reader)
    if method == "compressed-tensors":
        return _compressed_tensors(reader)
    if method == "gguf" and "layers" in values:
        return _gguf(reader)
    if method == "mxfp4":
        return _mxfp4()
    if method == "fp8":
        return None
    raise CheckpointError(
        f"{reader.where}: quant_method {shown(method)} is not supported; supported: {', '.join(IN_CHECKPOINTS)}"
    )


def _mxfp4() -> QuantizationConfig:
    """gpt-oss's: the experts are quantized, and nothing else."""
    scheme = WeightScheme(layout="mxfp4", bits=8, group_size=32)
    experts = SchemeGroup(targets=(r"re:.*\.mlp\.experts\.",), scheme=scheme)
    return QuantizationConfig(method="mxfp4", groups=(experts,))


def _gptq(reader: ConfigReader) -> QuantizationConfig:
    if reader.mapping("dynamic"):
        raise CheckpointError(f"{reader.where}: dynamic (other settings for some layers) is not supported with gptq")
    version = reader.string("checkpoint_format", "gptq")
    if version not in ("gptq", "gptq_v2"):
        raise CheckpointError(
            f"{reader.where}: checkpoint_format {shown(version)} is not supported; supported: gptq, gptq_v2"
        )
    scheme = WeightScheme(
        layout="gptq",
        bits=_bits(reader, "bits", 4, 8),
        group_size=_group_size(reader),
        has_zeros=True,
        zeros_less_one=version == "gptq",
    )
    ignore = () if reader.flag("lm_head", False) else ("lm_head",)
    return QuantizationConfig(method="gptq", groups=(SchemeGroup(targets=("Linear",), scheme=scheme),), ignore=ignore)


def _awq(reader: ConfigReader) -> QuantizationConfig:
    version = reader.string("version", "gemm").lower()
    if version != "gemm":
        raise CheckpointError(f"{reader.where}: version {shown(version)} is not supported; supported: gemm")
    if not reader.flag("zero_point", True):
        raise CheckpointError(f"{reader.where}: zero_point=false is not supported with awq; supported: true")
    scheme = WeightScheme(layout="awq", bits=_bits(reader, "bits", 4), group_size=_group_size(reader), has_zeros=True)
    # A part of a name is enough to leave a layer out.
    skipped = tuple(f"re:.*{re.escape(part)}" for part in _patterns(reader, "modules_to_not_convert"))
    groups = (SchemeGroup(targets=("Linear",), scheme=scheme),)
    return QuantizationConfig(method="awq", groups=groups, ignore=("lm_head", *skipped))


def _gguf(reader: ConfigReader) -> QuantizationConfig:
    """As `models.gguf.config` derives it: the names of layers by the type that they are stored in."""
    layers = ConfigReader(reader.mapping("layers"), f"{reader.where}.layers")
    groups = []
    for name in layers.values:
        kind = BY_NAME.get(name)
        if kind is None or kind.stored == "float":
            raise CheckpointError(f"{layers.where}: {shown(name)} is no type of quantized GGUF tensors")
        scheme = WeightScheme(
            layout="gguf",
            bits=kind.stored,
            group_size=kind.group,
            has_mins=kind.has_mins,
            block_groups=kind.block_groups,
        )
        groups.append(SchemeGroup(targets=_patterns(layers, name), scheme=scheme))
    return QuantizationConfig(method="gguf", groups=tuple(groups))


def _compressed_tensors(reader: ConfigReader) -> QuantizationConfig | None:
    if reader.mapping("sparsity_config").get("format", "dense") != "dense":
        raise CheckpointError(f"{reader.where}: sparse weights (sparsity_config) are not supported; supported: dense")
    _check_kv_cache(ConfigReader(reader.mapping("kv_cache_scheme"), f"{reader.where}.kv_cache_scheme"))
    if reader.mapping("transform_config"):
        raise CheckpointError(f"{reader.where}: rotated weights (transform_config) are not supported; supported: none")
    groups = reader.mapping("config_groups")
    if groups and all(map(_is_float8, groups.values())):
        return None
    if not 1 <= len(groups) <= MAX_GROUPS:
        raise reader.error("config_groups", f"an object with at least 1 and at most {MAX_GROUPS} groups")
    group_reader = ConfigReader(groups, reader.where)
    read = tuple(
        _scheme_group(group_reader.mapping(name), f"{reader.where}: config_groups.{shown_name(name)}", reader)
        for name in groups
    )
    ignore = _patterns(reader, "ignore")
    return QuantizationConfig(method="compressed-tensors", groups=read, ignore=ignore)


def _is_float8(group: Any) -> bool:
    weights = group.get("weights") if isinstance(group, dict) else None
    return isinstance(weights, dict) and (weights.get("type"), weights.get("num_bits")) == ("float", 8)


def _scheme_group(values: Mapping[str, Any], where: str, parent: ConfigReader) -> SchemeGroup:
    reader = ConfigReader(values, where)
    layout = reader.string("format", parent.string("format"))
    if layout not in ("pack-quantized", "int-quantized"):
        raise CheckpointError(
            f"{where}: format {shown(layout)} is not supported; supported: pack-quantized, int-quantized"
        )
    if reader.mapping("output_activations"):
        raise CheckpointError(f"{where}: output_activations are not supported; supported: null")
    _check_activations(ConfigReader(reader.mapping("input_activations"), f"{where}.input_activations"))
    weights = ConfigReader(reader.mapping("weights"), f"{where}.weights")
    if weights.string("type", "int") != "int":
        raise CheckpointError(f"{weights.where}: type {shown(weights.string('type'))} is not supported; supported: int")
    strategy = weights.string("strategy", "group" if weights.values.get("group_size") else "channel")
    if strategy not in ("channel", "group"):
        raise CheckpointError(
            f"{weights.where}: strategy {shown(strategy)} is not supported; supported: channel, group"
        )
    scheme = WeightScheme(
        layout=cast(Literal["pack-quantized", "int-quantized"], layout),
        bits=_bits(weights, "num_bits", 4, 8),
        group_size=_group_size(weights) if strategy == "group" else None,
        has_zeros=not weights.flag("symmetric", True),
    )
    return SchemeGroup(targets=_patterns(reader, "targets"), scheme=scheme)


def _check_kv_cache(reader: ConfigReader) -> None:
    """Scales for a float8 KV cache may be there; `kv_cache_dtype` says whether there is such a cache."""
    if not reader.values:
        return
    found = {
        "type": reader.string("type", "float"),
        "num_bits": reader.integer("num_bits", 8),
        "strategy": reader.string("strategy", "tensor"),
    }
    for key, allowed in {"type": "float", "num_bits": 8, "strategy": "tensor"}.items():
        if found[key] != allowed:
            raise CheckpointError(f"{reader.where}: {key}={shown(found[key])} is not supported; supported: {allowed!r}")


def _check_activations(reader: ConfigReader) -> None:
    """Activations are always rounded to int8, for each token as it comes."""
    if not reader.values:
        return
    found = {
        "type": reader.string("type", "int"),
        "num_bits": reader.integer("num_bits", 8),
        "strategy": reader.string("strategy", "token"),
        "dynamic": reader.values.get("dynamic", False) is True,
        "symmetric": reader.flag("symmetric", True),
    }
    for key, allowed in {"type": "int", "num_bits": 8, "strategy": "token", "dynamic": True, "symmetric": True}.items():
        if found[key] != allowed:
            raise CheckpointError(
                f"{reader.where}: {key}={shown(reader.values.get(key))} is not supported; supported: {allowed!r}"
            )


def _bits(reader: ConfigReader, key: str, *allowed: Literal[4, 8]) -> Literal[4, 8]:
    value = reader.integer(key)
    for bits in allowed:
        if value == bits:
            return bits
    raise CheckpointError(f"{reader.where}: {key}={value} is not supported; supported: {', '.join(map(str, allowed))}")


def _group_size(reader: ConfigReader) -> int | None:
    """-1 means all inputs."""
    value = reader.integer("group_size", low=-1)
    if value == -1:
        return None
    if value < 8 or value % 8:
        raise CheckpointError(f"{reader.where}: group_size={value} is not supported; supported: multiples of 8, and -1")
    return value


def _patterns(reader: ConfigReader, key: str) -> tuple[str, ...]:
    patterns = reader.strings(key)
    if len(patterns) > MAX_PATTERNS or any(len(pattern) > MAX_PATTERN_CHARACTERS for pattern in patterns):
        raise reader.error(key, f"a list of up to {MAX_PATTERNS} strings of up to {MAX_PATTERN_CHARACTERS} characters")
    for pattern in patterns:
        if pattern.startswith("re:"):
            try:
                regex.compile(pattern[3:])
            except (regex.error, RecursionError) as error:
                raise CheckpointError(
                    f"{reader.where}: {key} has {shown(pattern)}, which is no regular expression: {error}"
                ) from error
    return patterns
