"""Writes a quantized checkpoint in the layout of compressed-tensors, which vLLM and transformers read too."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pagoda.errors import CheckpointError
from pagoda.models.build import build_model
from pagoda.models.checkpoint_files import checkpoint_file, read_json_object
from pagoda.models.config import CONFIG_FILE, ModelConfig
from pagoda.models.loading.checkpoint import StoredTensor, StoredTensors, stored_tensors, with_model_names
from pagoda.models.loading.loader import check_weights, with_tie_as_stored
from pagoda.models.loading.packed import deferred_layers
from pagoda.models.quantization.layers import DeferredQuantizedMethod
from pagoda.models.quantization.layouts import pack_words
from pagoda.models.quantization.rounding import QuantizedRows, round_rows
from pagoda.models.quantization.schemes import HEAD, QuantizationConfig, WeightScheme, choose_quantization
from pagoda.models.weight_files import INDEX_FILE, SINGLE_FILE, weight_files

_SHARD_BYTES = 2 << 30
_INT8_ACTIVATIONS = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}

WriteListener = Callable[[int, int], None]  # bytes of the source read, and of all of it


def write_quantized_checkpoint(
    source: Path, destination: Path, kind: str, group_size: int | None, progress: WriteListener
) -> QuantizationConfig:
    """Round the layers' linear weights of `source` to `kind` (int8 or int4) and write all of it to `destination`.

    Embedding, head, norms and biases stay as they are. `destination` appears whole or not at all; at most one file's worth of
    it, 2 GiB, is in memory.

    Raises:
        CheckpointError: the source is no model that can be served, or the destination exists or cannot be written.
        ConfigError: the source is quantized already, or the group size does not fit it.
    """
    config = with_tie_as_stored(ModelConfig.from_directory(source), source)
    quantization = choose_quantization(kind, group_size, config.quantization, config.linear_input_sizes)
    assert quantization is not None
    names = check_weights(config, None, source)
    if destination.exists():
        raise CheckpointError(f"{destination} exists already: name a directory that does not")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=destination.parent, prefix=f".{destination.name}-") as directory:
            whole = Path(directory) / "checkpoint"
            _copy_other_files(source, whole)
            stored = with_model_names(stored_tensors(weight_files(source)), names)
            _write_weights(stored, whole, _schemes(config, quantization), progress)
            _write_config(source, whole, quantization)
            whole.rename(destination)
    except OSError as error:
        raise CheckpointError(f"{destination} cannot be written: {error}") from error
    return quantization


def _schemes(config: ModelConfig, quantization: QuantizationConfig) -> dict[str, WeightScheme]:
    """How each weight that is rounded is, by the tensor's name."""
    model = build_model(config, torch.float32, "meta", quantization=quantization)
    schemes: dict[str, WeightScheme] = {}
    for _, method in deferred_layers(model):
        assert isinstance(method, DeferredQuantizedMethod)
        schemes |= {
            f"{method.prefix}{part}.weight": scheme for part, scheme in method.schemes.items() if scheme is not HEAD
        }
    return schemes


def _copy_other_files(source: Path, whole: Path) -> None:
    """Everything in the source's directory but the weights: tokenizer, templates, defaults of generation."""
    whole.mkdir()
    for file in source.iterdir():
        if file.is_file() and not file.name.endswith(
            (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pth", ".gguf")
        ):
            shutil.copyfile(checkpoint_file(source, file.name), whole / file.name)


def _write_weights(
    stored: dict[str, StoredTensor], whole: Path, schemes: dict[str, WeightScheme], progress: WriteListener
) -> None:
    shards: list[Path] = []
    names_of: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}

    def flush() -> None:
        file = whole / f"part-{len(shards)}"
        save_file(pending, file, {"format": "pt"})
        file.chmod(0o644)  # as the other files: the model may be served by another user
        shards.append(file)
        names_of.append(list(pending))
        pending.clear()

    total_bytes = 0
    for tensors in _converted(stored, schemes, progress):
        size = sum(tensor.nbytes for tensor in tensors.values())
        if pending and sum(tensor.nbytes for tensor in pending.values()) + size > _SHARD_BYTES:
            flush()
        pending |= tensors
        total_bytes += size
    flush()
    if len(shards) == 1:
        shards[0].rename(whole / SINGLE_FILE)
        return
    weight_map: dict[str, str] = {}
    for number, (file, names) in enumerate(zip(shards, names_of, strict=True), 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        file.rename(whole / name)
        weight_map |= dict.fromkeys(names, name)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (whole / INDEX_FILE).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _converted(
    stored: dict[str, StoredTensor], schemes: dict[str, WeightScheme], progress: WriteListener
) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors to write for each stored one, with memory of their own."""
    done, total = 0, sum(tensor.file.stat().st_size for tensor in {t.file: t for t in stored.values()}.values())
    source = StoredTensors(stored)
    for name in stored:
        values = source.read(name)
        done += values.nbytes
        scheme = schemes.get(name)
        yield {name: values.clone()} if scheme is None else _quantized(name.removesuffix(".weight"), values, scheme)
        progress(done, total)
    progress(total, total)


def _quantized(name: str, weight: torch.Tensor, scheme: WeightScheme) -> dict[str, torch.Tensor]:
    rows = round_rows(weight, scheme.bits, scheme.group_size, slice(0, weight.shape[1]))
    tensors = {"weight_scale": rows.scales.contiguous()}
    if scheme.bits == 8:
        tensors["weight"] = (rows.values.to(torch.int16) - 128).to(torch.int8)
    else:
        tensors |= _packed(rows, weight.shape)
    return {f"{name}.{key}": tensor for key, tensor in tensors.items()}


def _packed(rows: QuantizedRows, shape: torch.Size) -> dict[str, torch.Tensor]:
    assert rows.zeros is not None
    return {
        "weight_packed": pack_words(rows.values, 4),
        "weight_zero_point": pack_words(rows.zeros.T, 4).T.contiguous(),
        "weight_shape": torch.tensor(shape, dtype=torch.int64),
    }


def _write_config(source: Path, whole: Path, quantization: QuantizationConfig) -> None:
    values = read_json_object(source, CONFIG_FILE)
    values["quantization_config"] = compressed_tensors_config(quantization.groups[0].scheme)
    (whole / CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def compressed_tensors_config(scheme: WeightScheme) -> dict[str, Any]:
    """`quantization_config` for layers that are all rounded alike: int8 with int8 activations, or int4 with zeros."""
    is_int8 = scheme.bits == 8
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "strategy": "channel" if scheme.group_size is None else "group",
        "group_size": scheme.group_size,
        "symmetric": is_int8,
        "dynamic": False,
        "actorder": None,
    }
    layout = "int-quantized" if is_int8 else "pack-quantized"
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": _INT8_ACTIVATIONS if is_int8 else None,
        "output_activations": None,
        "format": layout,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }
