"""Where a checkpoint is: a directory, a Hugging Face id, or nothing, which means the demo model."""

from __future__ import annotations

import re
from pathlib import Path

from pagoda.errors import CheckpointError

_DEMO_DIRECTORY = Path(__file__).resolve().parent.parent / "demo_model"
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
_TORCH_FILES = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]
# Weights a second time, in the layout of their authors.
_DUPLICATES = ["original/*", "consolidated*"]


def checkpoint_directory(model: str | None, revision: str | None = None, download_dir: str | None = None) -> Path:
    """The local directory of `model`; a Hugging Face id is downloaded into (or found in) the hub's cache, or `download_dir`.

    `revision`: a branch, tag or commit of it. Raises `CheckpointError` saying what was looked for where.
    """
    if model is None:
        return demo_checkpoint()
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{model} is a file: a checkpoint is a directory with config.json and *.safetensors")
    if not _HUB_ID.fullmatch(model):
        raise CheckpointError(f"there is no directory {model}, and it is no Hugging Face id (owner/name) either")
    return _from_hub(model, revision, download_dir)


def demo_checkpoint() -> Path:
    """The built-in demo model's directory: Hugging Face format, Llama, bfloat16, context of 2048 tokens (docs/demo-model.md).

    Raises:
        CheckpointError: the package was installed without its data files.
    """
    if not (_DEMO_DIRECTORY / "model.safetensors").is_file():
        raise CheckpointError(
            f"the built-in demo model is missing from {_DEMO_DIRECTORY}: install pagoda with its data files"
        )
    return _DEMO_DIRECTORY


def _from_hub(model: str, revision: str | None, download_dir: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    def download(patterns: list[str]) -> Path:
        return Path(
            snapshot_download(
                model,
                revision=revision,
                cache_dir=download_dir,
                allow_patterns=patterns,
                ignore_patterns=_DUPLICATES,
            )
        )

    try:
        directory = download(_FILES)
        has_safetensors = any(directory.glob("*.safetensors"))
        return directory if has_safetensors else download([*_FILES, *_TORCH_FILES])
    except LocalEntryNotFoundError:
        raise CheckpointError(
            f"there is no directory {model}, it is not in the Hugging Face cache, and the hub cannot be reached"
        ) from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(f"{model} could not be had from the Hugging Face hub: {error}") from error
