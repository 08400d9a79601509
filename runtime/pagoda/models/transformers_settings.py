"""Settings that a model which runs through transformers cannot have."""

from __future__ import annotations

from pagoda.config.schema import PagodaConfig
from pagoda.errors import ConfigError
from pagoda.models.config import ModelConfig


def check_transformers_settings(config: PagodaConfig, model: ModelConfig) -> None:
    """Raise `ConfigError` that names all of them; nothing for a model of a family of Pagoda's own."""
    if model.transformers is None:
        return
    problems = []
    if config.quantization is not None:
        problems.append(
            f"quantization={config.quantization}: the weights are transformers', which are not rounded here"
        )
    if config.kv_cache_dtype != "auto":
        problems.append(f"kv_cache_dtype={config.kv_cache_dtype}: keys and values are kept in the model's dtype")
    if config.task not in ("auto", "generate"):
        problems.append(f"task={config.task}: it generates")
    if config.speculation is not None and config.speculation.method == "eagle3":
        problems.append("speculative_config: an EAGLE-3 head reads hidden states of layers of Pagoda's own")
    if config.enable_lora:
        problems.append("enable_lora: adapters are put into layers of Pagoda's own")
    if problems:
        why = f"{model.architecture} runs through transformers (model_impl={config.model_impl})"
        raise ConfigError("\n".join(f"{problem}; {why}" for problem in problems))
