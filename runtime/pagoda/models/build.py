"""From a model's configuration to the model."""

from __future__ import annotations

import importlib

import torch

from pagoda.models.config import ModelConfig
from pagoda.models.decoder import DecoderForCausalLM
from pagoda.models.loading.packed import pack_when_loaded
from pagoda.models.quantization.layers import quantize_layers
from pagoda.models.quantization.schemes import QuantizationConfig
from pagoda.models.registry import FAMILIES
from pagoda.parallel.groups import SINGLE_RANK, ParallelGroups


def build_model(
    model_config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    groups: ParallelGroups = SINGLE_RANK,
    quantization: QuantizationConfig | None = None,
    *,
    packed: bool = False,
) -> DecoderForCausalLM:
    """The part of the model that this rank of `groups` holds, ready for `models.loading.loader`.

    Its weights are allocated in `dtype` on `device`, once and unfilled. Not so those of linear layers that are quantized, or
    all of them where `packed` is set, in a form that the CPU's compiled kernels read: float32 or bfloat16, not float16.
    """
    module, _, name = FAMILIES[model_config.architecture].model.partition(":")
    model_class: type[DecoderForCausalLM] = getattr(importlib.import_module(module), name)
    model = model_class(model_config, groups, dtype=dtype, device=torch.device(device)).eval()
    if quantization is not None:
        quantize_layers(model, quantization)
    if packed:
        pack_when_loaded(model)
    return model
