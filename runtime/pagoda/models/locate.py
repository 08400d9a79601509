"""Where a checkpoint lies on this machine: a directory as given, the demo model, or a download from the Hugging Face hub."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from pagoda.config.schema import PagodaConfig
from pagoda.errors import CheckpointError
from pagoda.models.dummy import ensure_demo_checkpoint

TOKENIZER_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
CHECKPOINT_FILES = (*TOKENIZER_FILES, "*.safetensors")


def with_local_checkpoint(config: PagodaConfig) -> PagodaConfig:
    """`config` with `model` and `tokenizer` replaced by directories on this machine; the model's name stays.

    Called once, before engine and tokenizers start: they read directories only.

    Raises:
        CheckpointError: as `locate_checkpoint`.
    """
    tokenizer = None if config.tokenizer is None else str(locate_checkpoint(config.tokenizer, TOKENIZER_FILES))
    return dataclasses.replace(
        config,
        model=str(locate_checkpoint(config.model)),
        model_name=config.served_model_name,
        tokenizer=tokenizer,
    )


def locate_checkpoint(model: str | None, files: tuple[str, ...] = CHECKPOINT_FILES) -> Path:
    """The directory of `model`: a directory, a Hugging Face id (fetched into its cache), or None for the demo model.

    `files`: patterns of the files to fetch.

    Raises:
        CheckpointError: there is neither such a directory nor, as far as can be seen from here, such a Hugging Face id.
    """
    if model is None:
        return ensure_demo_checkpoint()
    directory = Path(model).expanduser()
    if directory.is_dir():
        return directory.absolute()
    if directory.exists():
        raise CheckpointError(f"model {model} is a file: it must be a directory in Hugging Face format")
    if model.startswith(("/", ".", "~")):
        raise CheckpointError(f"model {model}: there is no such directory")
    return _fetch(model, files)


def _fetch(model: str, files: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=list(files)))
    except Exception as error:  # whatever the hub's client and its transport raise, the model is not here
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(
            f"model {model} is no directory here, and it cannot be fetched as a Hugging Face id: {reason}"
        ) from error
