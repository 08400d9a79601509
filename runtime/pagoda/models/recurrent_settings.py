"""What cannot be had together with recurrent layers, refused before anything is loaded."""

from __future__ import annotations

from pagoda.config.schema import PagodaConfig
from pagoda.errors import ConfigError
from pagoda.models.config import ModelConfig


def check_recurrent_settings(config: PagodaConfig, model: ModelConfig) -> None:
    """Raise `ConfigError` for a setting that a model with recurrent layers is not served with.

    Drafts: the state behind a refused one holds it, and cannot be taken back to the token before.
    """
    if not model.has_recurrent_layers:
        return
    if config.speculation is not None:
        raise ConfigError(
            f"speculative_config: {model.architecture} has recurrent layers, whose state cannot go back behind a draft that "
            "is refused; serve it without speculative decoding"
        )
