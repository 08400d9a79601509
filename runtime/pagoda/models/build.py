"""From a model's configuration to the model."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

import torch

from pagoda.models.config import ModelConfig
from pagoda.models.decoder import DecoderForCausalLM
from pagoda.models.layers.builder import ChooseMethod, LinearKind, unquantized
from pagoda.models.layers.linear import LinearMethod
from pagoda.models.loading.latent import latent_method
from pagoda.models.loading.packed import DeferredFloatMethod
from pagoda.models.quantization.layers import quantized_method
from pagoda.models.quantization.schemes import AT_LOAD, QuantizationConfig
from pagoda.models.registry import FAMILIES
from pagoda.models.sharding import Shard
from pagoda.parallel.groups import SINGLE_RANK, ParallelGroups

_MTP = "pagoda.models.mtp:MTPLayer"


def build_model(
    model_config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    groups: ParallelGroups = SINGLE_RANK,
    quantization: QuantizationConfig | None = None,
    *,
    packed: bool = False,
    max_model_len: int | None = None,
) -> DecoderForCausalLM:
    """The part of the model that this rank of `groups` holds, ready for `models.loading.loader`.

    Its weights are allocated in `dtype` on `device`, once and unfilled. Not so those of linear layers that are quantized, or
    all of them where `packed` is set, in a form that the CPU's compiled kernels read: float32 or bfloat16, not float16.
    `max_model_len`: the longest context that will be served; None: the longest that the model can.

    Raises:
        CheckpointError: layers that run as one are not quantized alike.
        ConfigError: the ranks' shares do not fit the groups of a quantization.
    """
    path = _MTP if model_config.is_mtp else FAMILIES[model_config.architecture].model
    module, _, name = path.partition(":")
    model_class: type[DecoderForCausalLM] = getattr(importlib.import_module(module), name)
    model = model_class(
        model_config,
        groups,
        dtype=dtype,
        device=torch.device(device),
        choose_method=_chooser(model_config, dtype, quantization, packed=packed),
        longest=max_model_len,
    ).eval()
    model.quantization = quantization
    return model


def _chooser(
    config: ModelConfig, dtype: torch.dtype, quantization: QuantizationConfig | None, *, packed: bool
) -> ChooseMethod:
    if quantization is None and not packed:
        return unquantized

    def choose(prefix: str, inputs: Shard, parts: Mapping[str, Shard], kind: LinearKind) -> LinearMethod | None:
        method = None
        is_rounded = quantization is not None and quantization.method in AT_LOAD
        if quantization is not None and not kind.is_router and not (is_rounded and kind.latent_heads is not None):
            method = quantized_method(prefix, inputs, parts, quantization, config, is_head=kind.is_head)
        if kind.latent_heads is not None:
            return latent_method(prefix, dtype, kind.latent_heads, method, packed=packed)
        if method is None and packed:
            return DeferredFloatMethod(prefix, dtype)
        return method

    return choose
