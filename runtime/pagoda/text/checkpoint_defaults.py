"""The generation defaults of a checkpoint: EOS tokens and sampling parameters."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pagoda.config.schema import PagodaConfig
from pagoda.errors import ConfigError
from pagoda.models.checkpoint_files import read_json_object
from pagoda.models.config import CONFIG_FILE, ModelConfig
from pagoda.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class CheckpointDefaults:
    """`model_eos_token_ids`: what the model's files name. `sampling`: fields of `SamplingParams` that they recommend."""

    model_eos_token_ids: tuple[int, ...]
    sampling: dict[str, Any]
    vocab_size: int

    def eos_token_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """The ids that end generation: the model's, then the tokenizer's own."""
        unique = dict.fromkeys((*self.model_eos_token_ids, tokenizer.eos_token_id))
        return tuple(token_id for token_id in unique if token_id is not None and token_id < self.vocab_size)


def read_checkpoint_defaults(config: PagodaConfig) -> CheckpointDefaults:
    """Read config.json and, unless `generation_config` is `none`, generation_config.json of the configured model.

    Raises `CheckpointError` for a configuration that cannot be read and `ConfigError` when no model is configured.
    """
    if config.model is None:
        raise ConfigError("model is not set: there is no checkpoint to read")
    if config.generation_config == "none":
        directory = Path(config.model)
        model = ModelConfig.from_dicts(read_json_object(directory, CONFIG_FILE), where=str(directory / CONFIG_FILE))
    else:
        model = ModelConfig.from_directory(config.model)
    recommended = asdict(model.generation)
    # do_sample is ignored: the client decides by its temperature.
    del recommended["do_sample"]
    return CheckpointDefaults(
        model_eos_token_ids=model.eos_token_ids,
        sampling={name: value for name, value in recommended.items() if value is not None},
        vocab_size=model.vocab_size,
    )
