"""Which kernels a rank runs on, and what is made of a loaded model for them."""

from __future__ import annotations

import logging

from pagoda.errors import ConfigError
from pagoda.models.decoder import DecoderForCausalLM
from pagoda.models.fused_layers import fuse_layers
from pagoda.models.packing import pack_linear_layers
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


def prepare_model(model: DecoderForCausalLM) -> None:
    """Bring a loaded model into the form that the kernels in use want."""
    if backend.active.name == "cpu" and model.device.type == "cpu":
        pack_linear_layers(model)
        fuse_layers(model)
