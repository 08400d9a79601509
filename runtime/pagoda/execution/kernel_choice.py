"""Which kernels a rank runs on, the form in which they want weights, and the memory they need besides."""

from __future__ import annotations

import logging

import torch

from pagoda.config.values import format_bytes
from pagoda.errors import ConfigError
from pagoda_kernels import backend
from pagoda_kernels.cpu.build import BuildError

logger = logging.getLogger(__name__)


def choose_cpu_kernels(asked: str) -> None:
    """Let this process's operations run on the compiled kernels (`asked` = auto, compiled) or the torch ones (reference).

    Where the compiled ones are not there and cannot be built, `auto` takes the torch ones and says in one line what is lost.

    Raises:
        ConfigError: they were asked for and are not to be had.
    """
    if asked == "reference":
        backend.use_backend("reference")
        return
    try:
        backend.use_backend("cpu")
    except (BuildError, OSError) as error:
        if asked == "compiled":
            raise ConfigError(f"cpu_kernels=compiled: {error}") from error
        backend.use_backend("reference")
        logger.warning(
            "the compiled CPU kernels are missing (%s): torch's own take their place, at half the speed or less", error
        )
        return
    from pagoda_kernels.cpu.operators import active_level, available_levels

    if not available_levels():
        if asked == "compiled":
            raise ConfigError("cpu_kernels=compiled: this processor has no AVX2")
        backend.use_backend("reference")
        logger.warning("this processor has no AVX2: torch's own kernels take the compiled ones' place, more slowly")
        return
    logger.info("CPU kernels: compiled, for %s", active_level())


def choose_gpu_kernels() -> None:
    """Let this process's operations run on the Triton kernels.

    Raises:
        ConfigError: Triton is not installed.
    """
    try:
        backend.use_backend("triton")
    except ImportError as error:
        raise ConfigError(
            f"device=cuda needs Triton, which cannot be imported ({error}): install pagoda[gpu]"
        ) from error


def reserve_decode_workspace(max_num_seqs: int, num_heads: int, head_dim: int, device: torch.device) -> None:
    """Take the memory that attention needs for batches of decode rows, before the KV cache takes what is left."""
    held = backend.active.reserve_workspace(max_num_seqs, num_heads, head_dim, device)
    logger.info("workspace of decode attention: %s", format_bytes(held))


def packs_weights(dtype: torch.dtype) -> bool:
    """Whether linear layers of a model in `dtype` are packed as they are read."""
    return dtype in backend.active.packed_dtypes
