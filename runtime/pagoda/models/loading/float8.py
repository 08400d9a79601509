"""Weights stored in float8 beside their scales, which are read as the floats that they stand for: `stored * scale`.

    name.weight              float8 [N, K]
    name.weight_scale_inv    [ceil(N / 128), ceil(K / 128)]     DeepSeek V3, Qwen3-FP8, MiniMax M2: one for each block
    name.weight_scale        [N, 1], or one number              compressed-tensors, ModelOpt

Stacked experts have one more dimension in front of both.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from pagoda.errors import CheckpointError
from pagoda.models.checkpoint_files import shown, shown_name
from pagoda.models.loading.stored_tensor import StoredTensor

logger = logging.getLogger(__name__)

FLOAT8_TYPES = ("F8_E4M3", "F8_E5M2")
_SCALE_TYPES = ("F32", "F16", "BF16", "F8_E8M0")
_SCALES = ("_scale_inv", "_scale")
# Of the dynamic or static quantization of activations, which stay floats here.
_IGNORED = (".input_scale", ".activation_scale")
_MAX_BLOCK = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Float8StoredTensor(StoredTensor):
    """Read as float32, which `dtype` says. `scale`: its scales; `block`: elements of each dimension that share one."""

    scale: StoredTensor
    block: tuple[int, ...]


def with_float8_scaled(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors, those in float8 with their scales in them, and the scales gone.

    Raises `CheckpointError` for one without scales, or with scales of a shape that does not fit.
    """
    if not any(tensor.dtype in FLOAT8_TYPES for tensor in tensors.values()):
        return tensors
    found = dict(tensors)
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOAT8_TYPES:
            continue
        scale_name = next((f"{name}{suffix}" for suffix in _SCALES if f"{name}{suffix}" in tensors), None)
        if scale_name is None:
            raise CheckpointError(
                f"tensor {shown_name(name)} in {tensor.file} is of {tensor.dtype} and has no scale beside it "
                f"({', '.join(name.rpartition('.')[2] + suffix for suffix in _SCALES)})"
            )
        scale = found.pop(scale_name)
        found[name] = Float8StoredTensor(
            tensor.name, tensor.file, tensor.shape, "F32", scale=scale, block=_block(name, tensor, scale)
        )
    logger.info("weights in float8 are read as floats")
    return {name: tensor for name, tensor in found.items() if not name.endswith(_IGNORED)}


def _block(name: str, tensor: StoredTensor, scale: StoredTensor) -> tuple[int, ...]:
    """How many elements of each dimension share a scale."""
    counts = scale.shape
    if len(counts) < len(tensor.shape):  # one number for all, or for each expert
        counts = (*counts, *(1,) * (len(tensor.shape) - len(counts)))
    block = tuple(map(_share, tensor.shape, counts)) if len(counts) == len(tensor.shape) else ()
    if scale.dtype not in _SCALE_TYPES or not block or not all(block):
        raise CheckpointError(
            f"the scales of tensor {shown_name(name)} in {tensor.file} have shape {shown(list(scale.shape))} and type "
            f"{scale.dtype}, which does not fit its shape {shown(list(tensor.shape))}"
        )
    return block


def _share(size: int, count: int) -> int:
    """Elements of a dimension of `size` that share one of `count` scales: blocks are powers of two; 0: there is none."""
    if count in (1, size):
        return size if count == 1 else 1
    block = 2
    while block <= _MAX_BLOCK and -(-size // block) > count:
        block *= 2
    return block if -(-size // block) == count else 0


def scaled(
    values: torch.Tensor, index: tuple[slice, ...], tensor: Float8StoredTensor, scales: torch.Tensor
) -> torch.Tensor:
    """What the elements `index` of the stored tensor, `values`, stand for, in float32; `scales`: all of them."""
    wide, factors = values.float(), scales.float()
    factors = factors.view(*factors.shape, *(1,) * (wide.dim() - factors.dim()))
    shape = tensor.stored_shape or tensor.shape
    slices = [*index, *(slice(None),) * (wide.dim() - len(index))]
    for dim, (part, block, size) in enumerate(zip(slices, tensor.block, shape, strict=True)):
        if block >= size:
            continue
        start, stop, _ = part.indices(size)
        places = torch.arange(start, stop) // block
        factors = factors.index_select(dim, places)
    return wide * factors
