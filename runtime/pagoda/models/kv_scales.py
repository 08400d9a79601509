"""What the numbers of a float8 KV cache count: one scale for the keys of a layer, one for its values.

A checkpoint that was calibrated for such a cache carries them as tensors of one number:

    model.layers.3.self_attn.k_scale            compressed-tensors
    model.layers.3.self_attn.k_proj.k_scale     ModelOpt

Without them every number counts once. That is what vLLM does, too, and rarely wrong: keys and values of trained models are far
from the ends of float8's range (448 for e4m3), beyond which they would be cut off.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path

from pagoda.errors import CheckpointError
from pagoda.models.checkpoint_files import shown
from pagoda.models.decoder import DecoderForCausalLM, DecoderLayer
from pagoda.models.loading.checkpoint import FLOAT_TYPES, StoredTensors, stored_tensors, with_model_names
from pagoda.models.loading.stored_tensor import StoredTensor
from pagoda.models.weight_files import weight_files

logger = logging.getLogger(__name__)


def set_kv_scales(model: DecoderForCausalLM, directory: str | Path | None) -> None:
    """Let the layers of `model` keep their keys and values as float8, with the scales in `directory` (None: no checkpoint).

    Raises `CheckpointError` for a scale that is no positive number, or that only one of keys and values has.
    """
    stored = stored_tensors(weight_files(Path(directory))) if directory is not None else {}
    prefixes = [f"model.layers.{index}.self_attn." for index in model.shard.layers]
    names = {name for prefix in prefixes for which in "kv" for name in _names(prefix, which)}
    stored = with_model_names(stored, names, model.config.names)
    num_calibrated = 0
    for prefix, layer in zip(prefixes, model.layers, strict=True):
        assert isinstance(layer, DecoderLayer)
        k_scale, v_scale = (_read_scale(stored, prefix, which) for which in ("k", "v"))
        if (k_scale is None) != (v_scale is None):
            raise CheckpointError(f"{directory} has a scale for only one of keys and values under {prefix}*")
        num_calibrated += k_scale is not None
        layer.self_attn.kv_scales = (k_scale or 1.0, v_scale or 1.0)
    logger.info("float8 KV cache: scales of %d of %d layers from the checkpoint", num_calibrated, len(model.layers))


def _names(prefix: str, which: str) -> tuple[str, str]:
    return f"{prefix}{which}_scale", f"{prefix}{which}_proj.{which}_scale"


def _read_scale(stored: Mapping[str, StoredTensor], prefix: str, which: str) -> float | None:
    """The scale of the keys (`which` = k) or values (v) of the layer under `prefix`; None where there is none."""
    name = next((name for name in _names(prefix, which) if name in stored), None)
    if name is None:
        return None
    tensor = stored[name]
    is_one = math.prod(tensor.shape) == 1 and tensor.dtype in FLOAT_TYPES
    value = StoredTensors(stored).read(name).item() if is_one else None
    if value is None or not math.isfinite(value) or value <= 0:
        found = f"shape {shown(list(tensor.shape))} and type {tensor.dtype}" if value is None else value
        raise CheckpointError(
            f"tensor {name} in {tensor.file} must be one positive number, the scale of a tensor, found {found}"
        )
    return float(value)
