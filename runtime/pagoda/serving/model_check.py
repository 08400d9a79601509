"""What is wrong with a model and its settings, as far as small files of the checkpoint say it: before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from pagoda.config.schema import PagodaConfig
from pagoda.engine.core.auto import resolve
from pagoda.engine.core.kv_sizing import check_model_limit
from pagoda.errors import ConfigError
from pagoda.models.checkpoint_files import is_checkpoint
from pagoda.models.checkpoint_source import checkpoint_directory
from pagoda.models.config import check_model_device
from pagoda.models.encoders.config import EncoderConfig
from pagoda.models.pooling_config import check_pooling, read_model, read_pooler
from pagoda.models.quantization.schemes import choose_quantization
from pagoda.models.recurrent_settings import check_recurrent_settings
from pagoda.models.sharding import check_layout
from pagoda.models.transformers_settings import check_transformers_settings
from pagoda.models.weight_files import weight_files
from pagoda.parallel.layout import ParallelLayout
from pagoda.platform.hardware import cpu_report, may_have_gpu
from pagoda.text.checkpoint_defaults import read_checkpoint_defaults


def check_model(config: PagodaConfig) -> None:
    """Check config.json, generation_config.json and the names of weight files; nothing, if the model is not here yet.

    Raises `CheckpointError` or `ConfigError`, which names all settings that do not fit the model.
    """
    if config.model is not None and not is_checkpoint(Path(config.model).expanduser()):
        return
    directory = checkpoint_directory(config.model, gguf=config.quantization == "gguf")
    model = read_model(
        directory,
        generation=config.generation_config == "auto",
        task=config.task,
        model_impl=config.model_impl,
    )
    pooler = read_pooler(config, directory, model)
    if pooler is not None:
        check_pooling(config, model)
    if isinstance(model, EncoderConfig):
        weight_files(directory)
        check_model_limit(config.max_model_len or 1, model.max_context_length)
        return
    if pooler is None:
        read_checkpoint_defaults(replace(config, model=str(directory)))
    if config.load_format != "dummy":
        weight_files(directory)
    problems: list[str] = []
    _collect(
        problems,
        lambda: check_layout(
            model,
            ParallelLayout(config.tensor_parallel_size, config.pipeline_parallel_size, config.enable_expert_parallel),
        ),
    )
    _collect(
        problems,
        lambda: choose_quantization(
            config.quantization, config.quantization_group_size, model.quantization, model.linear_input_sizes
        ),
    )
    _collect(problems, lambda: check_transformers_settings(config, model))
    _collect(problems, lambda: check_recurrent_settings(config, model))
    _collect(problems, lambda: check_model_limit(config.max_model_len or 1, model.max_context_length))
    _collect(problems, lambda: check_model_device(model, "cuda" if config.device == "cuda" else "cpu"))
    if config.device == "cpu" or not may_have_gpu():
        _collect(problems, lambda: resolve(config, checkpoint_dtype=model.dtype, cpu=cpu_report()))
    if problems:
        raise ConfigError("\n".join(problems))


def _collect(problems: list[str], check: Callable[[], object]) -> None:
    try:
        check()
    except ConfigError as error:
        problems.append(str(error))
