"""Which kernels a rank runs on, whether they take packed weights, and the workspace that they need."""

from __future__ import annotations

import logging

import torch

from pagoda.config.values import format_bytes
from pagoda.errors import ConfigError
from pagoda_kernels import backend
from pagoda_kernels.cpu.build import BuildError

logger = logging.getLogger(__name__)


def choose_cpu_kernels(setting: str) -> None:
    """Make the backend that `cpu_kernels` names the active one: compiled, reference, or auto.

    auto: the compiled kernels, or the reference, with a warning, where they cannot be built or run.

    Raises:
        ConfigError: `compiled` where they cannot be built or run.
    """
    if setting == "reference":
        backend.use_backend("reference")
        return
    try:
        backend.use_backend("cpu")
        level = _compiled_level()
    except (BuildError, OSError) as error:
        if setting == "compiled":
            raise ConfigError(f"cpu_kernels=compiled: {error}") from error
        backend.use_backend("reference")
        logger.warning(
            "the compiled CPU kernels are not available (%s): falling back to the reference kernels in torch, at half the "
            "speed or less",
            error,
        )
        return
    logger.info("CPU kernels: compiled, for %s", level)


def _compiled_level() -> str:
    """The instruction set that the compiled kernels run on; `BuildError` where this processor has none of theirs."""
    from pagoda_kernels.cpu.operators import active_level, available_levels

    if not available_levels():
        raise BuildError("this processor has no AVX2")
    return active_level()


def choose_gpu_kernels() -> None:
    """Make the Triton backend the active one.

    Raises:
        ConfigError: Triton is not installed.
    """
    try:
        backend.use_backend("triton")
    except ImportError as error:
        raise ConfigError(
            f"device=cuda needs Triton, which cannot be imported ({error}): pip install triton"
        ) from error


def reserve_decode_workspace(max_num_seqs: int, num_heads: int, head_dim: int, device: torch.device) -> None:
    """Allocate what attention needs for batches of decode rows, before the KV cache is sized."""
    held = backend.active.reserve_workspace(max_num_seqs, num_heads, head_dim, device)
    logger.info("workspace of decode attention: %s", format_bytes(held))


def packs_weights(dtype: torch.dtype) -> bool:
    """Whether linear layers of a model in `dtype` are packed as they are read."""
    return dtype in backend.active.packed_dtypes
