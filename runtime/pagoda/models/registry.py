"""From a model's configuration to the model."""

from __future__ import annotations

import importlib

import torch

from pagoda.models.config import ModelConfig
from pagoda.models.decoder import DecoderForCausalLM
from pagoda.models.families import FAMILIES


def build_model(
    model_config: ModelConfig, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> DecoderForCausalLM:
    """The model with its weights allocated in `dtype` on `device`, once and unfilled, ready for `models.loader`."""
    module, _, name = FAMILIES[model_config.architecture].model.partition(":")
    model_class: type[DecoderForCausalLM] = getattr(importlib.import_module(module), name)
    return model_class(model_config, dtype=dtype, device=torch.device(device)).eval()
