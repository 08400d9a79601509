"""Weights in a file that torch.save wrote (pytorch_model.bin)."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch

from pagoda.errors import CheckpointError
from pagoda.models.checkpoint_files import shown, shown_reason

# A pickle has a few hundred bytes for each tensor; what it describes is made in memory.
MAX_PICKLE_BYTES = 64 << 20

# Names of element types as in headers of safetensors files.
_TYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def type_name(tensor: torch.Tensor) -> str:
    """The element type as a safetensors header spells it."""
    return _TYPE_NAMES.get(tensor.dtype) or str(tensor.dtype)


def load_torch_file(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of `file` by name, mapped (a file of the format before torch 1.6: read); no code in it is run.

    What else is in the file is left out, as transformers does. Raises `CheckpointError`: it is no such file, is cut off, needs
    code to be read (`weights_only`), or holds no tensors by name.
    """
    try:
        is_zip = zipfile.is_zipfile(file)
        if is_zip:
            _check_pickle_size(file)
        values = torch.load(file, map_location="cpu", weights_only=True, mmap=True if is_zip else None)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} is not read: it is no file of torch.save, or holds more than tensors, for which code in it would be "
            "run; convert it to safetensors where you trust it"
        ) from error
    except CheckpointError:
        raise
    except Exception as error:  # torch's unpickler raises whatever it comes upon in what it reads
        raise CheckpointError(f"{file} is not a whole file of torch.save: {shown_reason(error)}") from error
    if not isinstance(values, Mapping):
        raise CheckpointError(f"{file} must hold tensors by name, found {type(values).__name__}")
    tensors = {name: value for name, value in values.items() if isinstance(name, str) and _is_dense(value)}
    if not tensors:
        raise CheckpointError(f"{file} must hold tensors by name; under its names {shown(list(values))} are none")
    return tensors


def _is_dense(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_quantized


def _check_pickle_size(file: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        size = sum(info.file_size for info in archive.infolist() if info.filename.endswith(".pkl"))
    if size > MAX_PICKLE_BYTES:
        raise CheckpointError(f"{file} describes its tensors in {size} bytes; at most {MAX_PICKLE_BYTES} are allowed")
