"""Which linear layers of a model are quantized, and how their checkpoint stores them."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import regex  # as re, but a match can be given a time limit

from pagoda.errors import CheckpointError, ConfigError

# Where a layer's values come from: rounded at load from a float weight, or stored as the formats of these names lay them out.
Layout = Literal["float", "gptq", "awq", "pack-quantized", "int-quantized", "gguf", "mxfp4"]

MATCH_SECONDS = 2.0
GROUP_SIZES = (32, 64, 128)
AT_LOAD = ("int8", "int4")
IN_CHECKPOINTS = ("gptq", "awq", "compressed-tensors", "mxfp4")
DEQUANTIZE = "dequantize"


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightScheme:
    """How one layer is quantized: `weight = scale * (stored - zero)`, with `stored` of `bits` bits, unsigned.

    `group_size` consecutive inputs share scale and zero; None: all inputs do. `has_zeros`: the checkpoint says where zero is;
    else it is in the middle. `zeros_less_one`: it stores zeros with one subtracted, as GPTQ did first. `has_mins`: instead of
    zeros there is what a stored 0 stands for, `weight = scale * stored + min`. `block_groups`: scales, and mins, of so many
    groups are integers times a number of their block; 0: there are no blocks.
    """

    layout: Layout
    bits: Literal[4, 8]
    group_size: int | None = None
    has_zeros: bool = False
    zeros_less_one: bool = False
    has_mins: bool = False
    block_groups: int = 0

    def num_groups(self, in_features: int) -> int:
        """Groups of a layer with `in_features` inputs."""
        return 1 if self.group_size is None else in_features // self.group_size

    def __str__(self) -> str:
        sharing = "a scale for each output" if self.group_size is None else f"groups of {self.group_size}"
        return f"{self.bits} bits, {sharing}"


# Of a head that no scheme names. It is the greatest weight of a small model, and hardly loses anything by 8 bits.
HEAD = WeightScheme(layout="float", bits=8)


def common_scheme(schemes: Iterable[WeightScheme]) -> WeightScheme:
    """The one that holds layers of GGUF files that run as one, each without loss: the most bits and the smallest groups."""
    all_of = list(schemes)
    if len(set(all_of)) == 1:
        return all_of[0]
    return replace(
        max(all_of, key=lambda scheme: scheme.bits),
        group_size=min(scheme.group_size or 0 for scheme in all_of),
        has_mins=any(scheme.has_mins for scheme in all_of),
        block_groups=0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemeGroup:
    """Layers that are quantized alike. `targets`: names, `Linear` for all, or `re:` and a regular expression."""

    targets: tuple[str, ...]
    scheme: WeightScheme


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationConfig:
    """What of a model is quantized; `ignore`, written like targets, is not. The first group that names a layer counts."""

    method: str
    groups: tuple[SchemeGroup, ...]
    ignore: tuple[str, ...] = ()

    def scheme_of(self, name: str) -> WeightScheme | None:
        """How the linear layer of that name in the checkpoint is stored; None: as floats."""
        return self._scheme_of(name, timeout=None)

    def check_patterns(self, names: Iterable[str]) -> None:
        """Match every name once. Raises `CheckpointError` if that takes longer than regular expressions of good faith need."""
        deadline = time.monotonic() + MATCH_SECONDS
        try:
            for name in names:
                self._scheme_of(name, timeout=deadline - time.monotonic())
        except TimeoutError:
            raise CheckpointError(
                f"quantization_config: the regular expressions for layers take longer than {MATCH_SECONDS:g} s to match the "
                "names of this model's layers; use simpler ones, or the names themselves"
            ) from None

    def _scheme_of(self, name: str, timeout: float | None) -> WeightScheme | None:
        if _matches(self.ignore, name, timeout):
            return None
        return next((group.scheme for group in self.groups if _matches(group.targets, name, timeout)), None)

    def from_floats(self) -> QuantizationConfig:
        """The same, rounded from float weights: for dummy weights."""
        groups = tuple(replace(group, scheme=replace(group.scheme, layout="float")) for group in self.groups)
        return replace(self, groups=groups)

    def __str__(self) -> str:
        schemes = dict.fromkeys(str(group.scheme) for group in self.groups)
        return f"{self.method} ({'; '.join(schemes)})"


def choose_quantization(
    asked: str | None, group_size: int | None, stored: QuantizationConfig | None, input_sizes: tuple[int, ...]
) -> QuantizationConfig | None:
    """How the model is quantized; None: not at all.

    Args:
        asked, group_size: the settings `quantization` and `quantization_group_size`. A GGUF file can be dequantized, and
            rounded again, as others cannot.
        stored: what the checkpoint is.
        input_sizes: the inputs of the model's linear layers, those of all ranks together.

    Raises:
        ConfigError: what is asked for does not fit the checkpoint, or the group size not the model.
    """
    can_dequantize = stored is not None and stored.method == "gguf"
    if asked == DEQUANTIZE and can_dequantize:
        return None
    if asked in AT_LOAD:
        if stored is not None and not can_dequantize:
            raise ConfigError(
                f"quantization={asked}: the checkpoint is quantized already, {stored}; leave quantization out, or take the "
                "checkpoint that it was made from"
            )
        group = None if asked == "int8" else _group_size(group_size, input_sizes)
        scheme = WeightScheme(layout="float", bits=8 if asked == "int8" else 4, group_size=group)
        return QuantizationConfig(
            method=asked, groups=(SchemeGroup(targets=("Linear",), scheme=scheme),), ignore=("lm_head",)
        )
    if asked is not None and (stored is None or stored.method != asked):
        found = "not quantized" if stored is None else f"quantized by {stored.method}"
        raise ConfigError(
            f"quantization={asked}: the checkpoint is {found}; allowed: {', '.join(AT_LOAD)} for one that is not quantized, "
            f"the method that config.json names for one that is, {DEQUANTIZE} for a GGUF file, or none"
        )
    return stored


def check_device(quantization: QuantizationConfig, device: str, dtype: str) -> None:
    """Raise `ConfigError` if a quantized model cannot run on that device or in that dtype."""
    can_dequantize = quantization.method == "gguf"
    if device != "cpu":
        raise ConfigError(
            f"quantization: {quantization.method} runs on a CPU only in this version, not on {device}"
            + (f"; use quantization={DEQUANTIZE}" if can_dequantize else "")
        )
    if dtype == "float16":
        allowed = f"one of these, auto, or quantization={DEQUANTIZE}" if can_dequantize else "one of these, or auto"
        raise ConfigError(f"dtype=float16: quantized models run in bfloat16 or float32; use {allowed}")


def _group_size(asked: int | None, input_sizes: tuple[int, ...]) -> int:
    fitting = [size for size in GROUP_SIZES if not any(inputs % size for inputs in input_sizes)]
    sizes = ", ".join(map(str, sorted(set(input_sizes))))
    if not fitting:
        raise ConfigError(
            f"quantization=int4: this model's layers have {sizes} inputs, not all a multiple of 32; use int8"
        )
    if asked is None:
        return 64 if 64 in fitting else 32
    if asked not in fitting:
        raise ConfigError(
            f"quantization_group_size={asked}: this model's layers have {sizes} inputs; "
            f"possible: {', '.join(map(str, fitting))}"
        )
    return asked


def _matches(patterns: tuple[str, ...], name: str, timeout: float | None) -> bool:
    """Raises `TimeoutError` after `timeout` seconds of processor time."""
    if name in patterns or "Linear" in patterns:
        return True
    if timeout is not None and timeout <= 0:
        raise TimeoutError
    expressions = (pattern[3:] for pattern in patterns if pattern.startswith("re:"))
    return any(regex.match(expression, name, timeout=timeout) for expression in expressions)
