"""The generation defaults of a checkpoint: EOS tokens and sampling parameters."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pagoda.config.schema import PagodaConfig
from pagoda.errors import ConfigError
from pagoda.models.checkpoint_files import has_file, read_json_object
from pagoda.models.config import CONFIG_FILE, GENERATION_CONFIG_FILE, ModelConfig
from pagoda.models.pooling_config import read_model, read_pooler
from pagoda.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class CheckpointDefaults:
    """`model_eos_token_ids`: what the model's files name. `sampling`: fields of `SamplingParams` that they recommend.

    `max_tokens`: of a request that gives none, `default_max_tokens` before `max_new_tokens` of the checkpoint.
    """

    model_eos_token_ids: tuple[int, ...]
    sampling: dict[str, Any]
    vocab_size: int
    max_tokens: int | None = None

    def eos_token_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """The ids that end generation: the model's, then the tokenizer's own."""
        unique = dict.fromkeys((*self.model_eos_token_ids, tokenizer.eos_token_id))
        return tuple(token_id for token_id in unique if token_id is not None and token_id < self.vocab_size)


def pools(config: PagodaConfig) -> bool:
    """Whether the configured model pools, and so generates nothing. Raises what `read_checkpoint_defaults` does."""
    if config.model is None:
        raise ConfigError("model is not set: there is no checkpoint to read")
    return (
        read_pooler(config, config.model, read_model(config.model, generation=False, model_impl=config.model_impl))
        is not None
    )


def read_checkpoint_defaults(config: PagodaConfig) -> CheckpointDefaults:
    """Read config.json and, unless `generation_config` is `none`, generation_config.json of the configured model.

    Raises `CheckpointError` for a configuration that cannot be read and `ConfigError` when no model is configured.
    """
    if config.model is None:
        raise ConfigError("model is not set: there is no checkpoint to read")
    directory = Path(config.model)
    generation: dict[str, Any] = {}
    if config.generation_config == "auto" and has_file(directory, GENERATION_CONFIG_FILE):
        generation = read_json_object(directory, GENERATION_CONFIG_FILE)
    overridden = config.override_generation_config or {}
    model = ModelConfig.from_dicts(
        read_json_object(directory, CONFIG_FILE),
        {**generation, **overridden},
        where=str(directory / CONFIG_FILE),
        model_impl=config.model_impl,
        generation_where="override_generation_config" if overridden else str(directory / GENERATION_CONFIG_FILE),
    )
    recommended = asdict(model.generation)
    # do_sample is ignored: the client decides by its temperature.
    del recommended["do_sample"]
    max_new_tokens = recommended.pop("max_new_tokens")
    return CheckpointDefaults(
        model_eos_token_ids=model.eos_token_ids,
        sampling={name: value for name, value in recommended.items() if value is not None},
        vocab_size=model.vocab_size,
        max_tokens=config.default_max_tokens or max_new_tokens,
    )
