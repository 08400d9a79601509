"""Writes checkpoints of the Hugging Face format, which vLLM and transformers read, too: quantized, in the layout of
compressed-tensors, or of floats, out of a GGUF file.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pagoda.errors import CheckpointError
from pagoda.models.build import build_model
from pagoda.models.checkpoint_files import checkpoint_file, names_ending_with, read_file, read_json_object
from pagoda.models.config import CONFIG_FILE, ModelConfig
from pagoda.models.gguf.files import is_gguf
from pagoda.models.loading.checkpoint import StoredTensors, stored_tensors, with_model_names
from pagoda.models.loading.loader import check_weights, with_tie_as_stored
from pagoda.models.loading.packed import deferred_layers
from pagoda.models.loading.stored_tensor import StoredTensor
from pagoda.models.quantization.layers import DeferredQuantizedMethod
from pagoda.models.quantization.layouts import pack_words
from pagoda.models.quantization.rounding import QuantizedRows, round_rows
from pagoda.models.quantization.schemes import HEAD, QuantizationConfig, WeightScheme, choose_quantization
from pagoda.models.weight_files import INDEX_FILE, SINGLE_FILE, weight_files

_SHARD_BYTES = 2 << 30
_MAX_FILE_BYTES = 64 << 20  # of those that are derived from a GGUF file
_INT8_ACTIVATIONS = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}

WriteListener = Callable[[int, int], None]  # bytes of the source read, and of all of it


@dataclass(frozen=True, slots=True)
class _Rounding:
    """What is rounded, by stored names: `schemes` of weights that stay one tensor; `stacks` of experts side by side, for which
    the format has no place: each becomes a layer of the name given, read from `parts` by its weight's name.
    """

    schemes: dict[str, WeightScheme] = field(default_factory=dict)
    stacks: dict[str, list[tuple[str, WeightScheme]]] = field(default_factory=dict)
    parts: dict[str, StoredTensor] = field(default_factory=dict)


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
    rounding = _rounding(config, quantization, names)
    _write_checkpoint(config, source, destination, names, rounding, None, quantization, progress)
    return quantization


def write_float_checkpoint(source: Path, destination: Path, dtype: torch.dtype, progress: WriteListener) -> None:
    """Write all of `source`, a GGUF file, to `destination`, with its weights dequantized and rounded to `dtype`.

    As `write_quantized_checkpoint`. Raises `CheckpointError`: the source is no GGUF file, or no model that can be served, or
    the destination exists or cannot be written.
    """
    if not is_gguf(source):
        raise CheckpointError(f"{source} is no GGUF file: a directory is what it would be converted to")
    config = with_tie_as_stored(ModelConfig.from_directory(source), source)
    names = check_weights(config, None, source)
    _write_checkpoint(config, source, destination, names, _Rounding(), dtype, None, progress)


def _write_checkpoint(
    config: ModelConfig,
    source: Path,
    destination: Path,
    names: dict[str, StoredTensor],
    rounding: _Rounding,
    dtype: torch.dtype | None,
    quantization: QuantizationConfig | None,
    progress: WriteListener,
) -> None:
    if destination.exists():
        raise CheckpointError(f"{destination} exists already: name a directory that does not")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=destination.parent, prefix=f".{destination.name}-") as directory:
            whole = Path(directory) / "checkpoint"
            _copy_other_files(source, whole)
            stored = with_model_names(stored_tensors(weight_files(source)), names)
            _write_weights(stored, whole, rounding, dtype, progress)
            _write_config(source, whole, dtype, quantization, config)
            whole.rename(destination)
    except OSError as error:
        raise CheckpointError(f"{destination} cannot be written: {error}") from error


def _rounding(config: ModelConfig, quantization: QuantizationConfig, names: dict[str, StoredTensor]) -> _Rounding:
    """What of the model's linear layers is rounded, and how; `names`: stored tensors by the model's names."""
    model = build_model(config, torch.float32, "meta", quantization=quantization)
    rounding = _Rounding(parts=names)
    for _, method in deferred_layers(model):
        assert isinstance(method, DeferredQuantizedMethod)
        for part, scheme in method.schemes.items():
            layer = f"{method.prefix}{part}"
            tensor = names.get(f"{layer}.weight")
            if scheme is HEAD or tensor is None:
                continue
            if tensor.part is not None and tensor.part.expert is not None:
                rounding.stacks.setdefault(tensor.name, []).append((layer, scheme))
            else:
                rounding.schemes[tensor.name] = scheme
    return rounding


def _copy_other_files(source: Path, whole: Path) -> None:
    """Everything in the source's directory but the weights: tokenizer, templates, defaults of generation."""
    whole.mkdir()
    if is_gguf(source):
        for name in names_ending_with(source, (".json",)):
            (whole / name).write_bytes(read_file(source, name, _MAX_FILE_BYTES))
        return
    for file in source.iterdir():
        if file.is_file() and not file.name.endswith(
            (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pth", ".gguf")
        ):
            shutil.copyfile(checkpoint_file(source, file.name), whole / file.name)


def _write_weights(
    stored: dict[str, StoredTensor],
    whole: Path,
    rounding: _Rounding,
    dtype: torch.dtype | None,
    progress: WriteListener,
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
    for tensors in _converted(stored, rounding, dtype, progress):
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
    stored: dict[str, StoredTensor],
    rounding: _Rounding,
    dtype: torch.dtype | None,
    progress: WriteListener,
) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors to write for each stored one, with memory of their own; floats in `dtype`, or as they are."""
    done, total = 0, sum(tensor.file.stat().st_size for tensor in {t.file: t for t in stored.values()}.values())
    source, parts = StoredTensors(stored), StoredTensors(rounding.parts)
    for name, tensor in stored.items():
        if (layers := rounding.stacks.get(tensor.name)) is not None:
            for layer, scheme in layers:
                values = parts.read(f"{layer}.weight")
                done += values.nbytes
                yield _quantized(layer, values, scheme)
                progress(min(done, total), total)
            continue
        values = source.read(name)
        done += values.nbytes
        own = rounding.schemes.get(tensor.name)
        yield (
            {name: values.to(dtype or values.dtype, copy=True)}
            if own is None
            else _quantized(name.removesuffix(".weight"), values, own)
        )
        progress(min(done, total), total)
    progress(total, total)


def _quantized(name: str, weight: torch.Tensor, scheme: WeightScheme) -> dict[str, torch.Tensor]:
    rows = round_rows(weight, scheme.bits, scheme.group_size, slice(0, weight.shape[1]))
    tensors = {"weight_scale": rows.scales.contiguous()}
    if scheme.bits == 8:
        tensors["weight"] = (rows.values.to(torch.int16) - 128).to(torch.int8).contiguous()
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


def _write_config(
    source: Path, whole: Path, dtype: torch.dtype | None, quantization: QuantizationConfig | None, config: ModelConfig
) -> None:
    values = read_json_object(source, CONFIG_FILE)
    values.pop("quantization_config", None)
    if dtype is not None:
        values["dtype"] = str(dtype).removeprefix("torch.")
    if quantization is not None:
        floats = dict.fromkeys(linear.name.rpartition(".")[2] for linear in config.linears() if linear.stays_float)
        ignored = [f"re:.*\\.{name}$" for name in floats]
        values["quantization_config"] = compressed_tensors_config(quantization.groups[0].scheme, ignored)
    (whole / CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def compressed_tensors_config(scheme: WeightScheme, ignored: Sequence[str] = ()) -> dict[str, Any]:
    """`quantization_config` for layers that are all rounded alike: int8 with int8 activations, or int4 with zeros.

    `ignored`: those that stay floats beside the head.
    """
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
        "ignore": ["lm_head", *ignored],
        "kv_cache_scheme": None,
    }
