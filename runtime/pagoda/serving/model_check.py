"""What is wrong with a model and its settings, as far as small files of the checkpoint say it: before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pagoda.config.schema import PagodaConfig
from pagoda.engine.core.kv_sizing import check_model_limit
from pagoda.errors import ConfigError
from pagoda.models.checkpoint_source import checkpoint_directory
from pagoda.models.config import ModelConfig
from pagoda.models.quantization.schemes import choose_quantization
from pagoda.models.sharding import check_layout
from pagoda.models.weight_files import weight_files
from pagoda.parallel.layout import ParallelLayout
from pagoda.text.checkpoint_defaults import read_checkpoint_defaults


def check_model(config: PagodaConfig) -> None:
    """Check config.json, generation_config.json and the names of weight files; nothing, if the model is not here yet.

    Raises `CheckpointError` or `ConfigError`, which names all settings that do not fit the model.
    """
    if config.model is None or not Path(config.model).expanduser().is_dir():
        return
    directory = checkpoint_directory(config.model)
    model = ModelConfig.from_directory(directory) if config.generation_config == "auto" else None
    model = ModelConfig.from_directory(directory, generation=False)
    read_checkpoint_defaults(config)
    if config.load_format != "dummy":
        weight_files(directory)
    problems: list[str] = []
    _collect(
        problems,
        lambda: check_layout(model, ParallelLayout(config.tensor_parallel_size, config.pipeline_parallel_size)),
    )
    _collect(
        problems,
        lambda: choose_quantization(
            config.quantization, config.quantization_group_size, model.quantization, model.linear_input_sizes
        ),
    )
    _collect(problems, lambda: check_model_limit(config.max_model_len or 1, model.max_context_length))
    if problems:
        raise ConfigError("\n".join(problems))


def _collect(problems: list[str], check: Callable[[], object]) -> None:
    try:
        check()
    except ConfigError as error:
        problems.append(str(error))
