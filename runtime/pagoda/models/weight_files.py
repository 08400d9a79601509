"""Which files of a checkpoint hold its weights. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pagoda.errors import CheckpointError
from pagoda.models.checkpoint_files import (
    MAX_NAMES_IN_ERROR,
    checkpoint_file,
    has_file,
    names_ending_with,
    read_json_object,
    shown_name,
)
from pagoda.models.gguf.files import is_gguf
from pagoda.models.gguf.reader import read_gguf

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TORCH_FILE = "pytorch_model.bin"
TORCH_INDEX_FILE = "pytorch_model.bin.index.json"

# Weights in other forms: the ends of their files' names, and what they are.
_OTHER_WEIGHTS = {
    "adapter_model.safetensors": "a LoRA adapter without its base model",
    "adapter_model.bin": "a LoRA adapter without its base model",
    ".pth": "PyTorch weights in their author's own layout",
    ".pt": "PyTorch weights in their author's own layout",
    ".ckpt": "a training checkpoint",
    ".h5": "TensorFlow weights",
    ".msgpack": "Flax weights",
    ".onnx": "ONNX",
    ".safetensors": f"safetensors under another name than {SINGLE_FILE}, without {INDEX_FILE}",
    ".bin": f"files under another name than {TORCH_FILE}, without {TORCH_INDEX_FILE}",
}

MAX_INDEX_BYTES = 64 << 20


def weight_files(directory: Path) -> list[Path]:
    """The files that hold the weights, found in transformers' order: safetensors before torch.save, one file before an index.

    Of a GGUF file: its shards.

    Raises `CheckpointError` where there are none, and for one that is missing, no regular file or outside of `directory`.
    """
    if is_gguf(directory):
        return list(read_gguf(directory).files)
    for single, index in ((SINGLE_FILE, INDEX_FILE), (TORCH_FILE, TORCH_INDEX_FILE)):
        if has_file(directory, single):
            return [checkpoint_file(directory, single)]
        if has_file(directory, index):
            return _files_in_index(directory, index)
    raise CheckpointError(f"{directory} holds no weights that can be loaded: {_what_is_there(directory)}")


def _files_in_index(directory: Path, index: str) -> list[Path]:
    weight_map = read_json_object(directory, index, max_bytes=MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{directory / index}: weight_map must be an object of tensor names and file names")
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not has_file(directory, name)]
    if missing:
        raise CheckpointError(f"{directory / index} names files that do not exist: {listed(missing)}")
    return [checkpoint_file(directory, name) for name in names]


def _what_is_there(directory: Path) -> str:
    expected = f"expected {SINGLE_FILE} or {INDEX_FILE} (or the same of {TORCH_FILE})"
    for ending, description in _OTHER_WEIGHTS.items():
        if names := names_ending_with(directory, (ending,)):
            return f"{shown_name(names[0])} is {description}; {expected}: convert it with transformers' save_pretrained"
    return expected


def listed(names: Iterable[str]) -> str:
    """The first few of `names` for an error message, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - MAX_NAMES_IN_ERROR} more" if len(ordered) > MAX_NAMES_IN_ERROR else ""
    return ", ".join(map(shown_name, ordered[:MAX_NAMES_IN_ERROR])) + more
