"""Which executor runs the model: one rank in this process, several on this machine, or several in a Ray cluster."""

from __future__ import annotations

from pagoda.config.schema import PagodaConfig
from pagoda.execution.executor import Executor
from pagoda.execution.in_process import InProcessExecutor
from pagoda.models.config import ModelConfig
from pagoda.models.encoders.config import EncoderConfig


def create_executor(config: PagodaConfig, model_config: ModelConfig | EncoderConfig) -> Executor:
    """The configured executor. Raises `ConfigError` if this machine cannot run it."""
    if isinstance(model_config, EncoderConfig):
        return InProcessExecutor(config, model_config)
    backend = config.distributed_executor_backend
    if backend == "auto" and config.ray_address is not None:
        backend = "ray"
    if backend == "auto" and config.tensor_parallel_size * config.pipeline_parallel_size > 1:
        backend = "mp"
    if backend == "auto":
        return InProcessExecutor(config, model_config)
    if backend == "mp":
        # Imported here: a single rank needs none of it, nor msgspec.
        from pagoda.distributed.multi_process import multi_process_executor

        return multi_process_executor(config, model_config)
    from pagoda.distributed.ray.executor import ray_executor

    return ray_executor(config, model_config)
