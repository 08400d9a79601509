"""Where a checkpoint is: a directory, a GGUF file, a Hugging Face id, or nothing, which means the demo model."""

from __future__ import annotations

import re
from pathlib import Path

from pagoda.errors import CheckpointError
from pagoda.models.checkpoint_files import names_ending_with, shown_name
from pagoda.models.gguf.reader import SUFFIX as GGUF_SUFFIX

_DEMO_DIRECTORY = Path(__file__).resolve().parent.parent / "demo_model"
_DEMO_HEAD_DIRECTORY = _DEMO_DIRECTORY.with_name("demo_model_eagle3")
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
_TORCH_FILES = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]
# Weights a second time, in the layout of their authors.
_DUPLICATES = ["original/*", "consolidated*"]
# Of a repository that holds a model as GGUF files of many types: one of them, owner/name:Q4_K_M, as llama.cpp and vLLM do.
_GGUF_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*):(\w[\w.-]*)")
_LATER_SHARD = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")
_WEIGHTS = (".safetensors", ".bin")


def checkpoint_directory(
    model: str | None, revision: str | None = None, download_dir: str | None = None, *, gguf: bool = False
) -> Path:
    """The local directory of `model`, or its GGUF file; a Hugging Face id is downloaded into (or found in) the hub's cache, or
    `download_dir`.

    `revision`: a branch, tag or commit of it. Of a directory with no other weights, or with `gguf` of any, the GGUF file in it
    is the checkpoint. Raises `CheckpointError` saying what was looked for where.
    """
    if model is None:
        return demo_checkpoint()
    path = Path(model).expanduser()
    if path.is_dir():
        return _gguf_in(path, gguf) or path
    if path.exists():
        return path
    if (named := _GGUF_ID.fullmatch(model)) is not None:
        return _gguf_from_hub(named[1], named[2], revision, download_dir)
    if not _HUB_ID.fullmatch(model):
        raise CheckpointError(
            f"there is no directory {model}, no GGUF file, and it is no Hugging Face id (owner/name, or owner/name:Q4_K_M "
            "for a GGUF file) either"
        )
    return _from_hub(model, revision, download_dir)


def _gguf_in(directory: Path, wanted: bool) -> Path | None:
    """The GGUF file of a directory, the first shard of several, where it is the checkpoint."""
    if not wanted and names_ending_with(directory, _WEIGHTS):
        return None
    names = [name for name in names_ending_with(directory, (GGUF_SUFFIX,)) if not _LATER_SHARD.search(name)]
    # Beside a model there may be the encoder of its pictures.
    models = [name for name in names if not name.startswith("mmproj")]
    if len(models) > 1:
        raise CheckpointError(
            f"{directory} holds {len(models)} GGUF models ({', '.join(map(shown_name, models[:8]))}): name the file itself"
        )
    if wanted and not models:
        raise CheckpointError(f"quantization=gguf: {directory} holds no GGUF file")
    return directory / models[0] if models else None


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


def demo_head() -> Path:
    """The directory of the demo model's EAGLE-3 head (docs/demo-model.md).

    Raises:
        CheckpointError: the package was installed without its data files.
    """
    if not (_DEMO_HEAD_DIRECTORY / "model.safetensors").is_file():
        raise CheckpointError(
            f"the demo model's EAGLE-3 head is missing from {_DEMO_HEAD_DIRECTORY}: install pagoda with its data files"
        )
    return _DEMO_HEAD_DIRECTORY


def _from_hub(model: str, revision: str | None, download_dir: str | None) -> Path:
    directory = _download(model, revision, download_dir, _FILES)
    if any(directory.glob("*.safetensors")):
        return directory
    return _download(model, revision, download_dir, [*_FILES, *_TORCH_FILES])


def _gguf_from_hub(model: str, kind: str, revision: str | None, download_dir: str | None) -> Path:
    directory = _download(model, revision, download_dir, [f"*{kind}*{GGUF_SUFFIX}"])
    found = [path for path in sorted(directory.rglob(f"*{GGUF_SUFFIX}")) if kind.lower() in path.name.lower()]
    files = [path for path in found if not _LATER_SHARD.search(path.name) and not path.name.startswith("mmproj")]
    if not files:
        raise CheckpointError(f"{model} holds no GGUF file with {kind} in its name")
    # The shortest name: UD-Q4_K_XL beside Q4_K_XL has more in it than was asked for.
    return min(files, key=lambda path: (len(path.name), path.name))


def _download(model: str, revision: str | None, download_dir: str | None, patterns: list[str]) -> Path:
    from pagoda.models import hub  # whose library takes long to import

    return hub.download(model, revision, download_dir, patterns, _DUPLICATES)
