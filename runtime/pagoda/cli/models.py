"""`pagoda models`: look at a checkpoint, quantize or convert one, or make one with random weights."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import Field, fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pagoda.cli import models_quantize
from pagoda.cli.parser import CommandParser
from pagoda.config.values import format_bytes
from pagoda.errors import CheckpointError

DTYPES = ("float32", "bfloat16", "float16")


def run(arguments: Sequence[str]) -> int:
    """Run `inspect`, `quantize`, `convert` or `make-dummy`."""
    parser = CommandParser(prog="pagoda models", description="Look at checkpoints, quantize, convert or make one.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    inspect = commands.add_parser("inspect", help="print what a checkpoint is and what it needs")
    inspect.add_argument("model", help="directory, GGUF file or Hugging Face id")
    inspect.add_argument("--json", action="store_true", help="one JSON object")
    quantize = commands.add_parser(
        "quantize", help="write a checkpoint with int8 or int4 weights, and what that costs it"
    )
    models_quantize.add_options(quantize)
    convert = commands.add_parser("convert", help="write a GGUF file as a directory in Hugging Face format, of floats")
    convert.add_argument("source", metavar="SOURCE", help="GGUF file, or Hugging Face id of one: owner/name:Q4_K_M")
    convert.add_argument("destination", metavar="DEST", type=Path, help="directory to write; must not exist yet")
    convert.add_argument(
        "--dtype", choices=DTYPES, help="type of the weights; default: that of the model as far as the file tells"
    )
    make = commands.add_parser("make-dummy", help="write a small checkpoint with random weights and a tokenizer")
    make.add_argument("directory", type=Path, help="must not exist yet")
    _add_dummy_options(make)
    own = parser.parse_args(arguments)
    if own.command == "inspect":
        facts = inspect_checkpoint(own.model)
        print(json.dumps(facts, indent=2) if own.json else _as_text(facts))
        return 0
    return {"quantize": models_quantize.run, "convert": models_quantize.convert, "make-dummy": _make_dummy}[
        own.command
    ](own)


def inspect_checkpoint(model: str) -> dict[str, Any]:
    """What the checkpoint `model` is; sizes in bytes, lengths in tokens.

    Raises:
        CheckpointError: it is not there, or no model that can be served.
    """
    from pagoda.models.checkpoint_source import checkpoint_directory
    from pagoda.models.config import ModelConfig
    from pagoda.models.layer_config import MoE
    from pagoda.models.weight_size import ELEMENT_BYTES, expected_weight_bytes

    directory = checkpoint_directory(model)
    config = ModelConfig.from_directory(directory, model_impl="auto")
    element_bytes = ELEMENT_BYTES[config.dtype]
    experts = [layer.mlp.num_experts for layer in config.layers if isinstance(layer.mlp, MoE)]
    return {
        "directory": str(directory),
        "architecture": config.architecture,
        "parameters": config.num_parameters(),
        "parameters_per_token": config.num_parameters_per_token(),
        "dtype": config.dtype,
        "quantization": str(config.quantization or "none"),
        "weight_bytes": expected_weight_bytes(config, config.dtype, config.quantization, packed=True),
        "file_bytes": sum(file.stat().st_size for file in _weight_files(directory)),
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "attention_heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "experts": max(experts, default=0),
        "layers_with_window": sum(window is not None for window in config.layer_windows),
        "vocab_size": config.vocab_size,
        "tied_embeddings": config.tie_word_embeddings,
        "max_model_len": config.max_context_length,
        "kv_bytes_per_token": config.kv_bytes_per_token(element_bytes),
        "kv_bytes_per_sequence": config.kv_bytes_per_sequence(element_bytes),
        "state_bytes_per_sequence": config.kv_groups(1).state_bytes(),
    }


def _weight_files(checkpoint: Path) -> list[Path]:
    from pagoda.models.checkpoint_files import checkpoint_file, names_ending_with
    from pagoda.models.gguf.files import is_gguf
    from pagoda.models.weight_files import weight_files

    if is_gguf(checkpoint):
        return weight_files(checkpoint)
    return [checkpoint_file(checkpoint, name) for name in names_ending_with(checkpoint, (".safetensors",))]


def _as_text(facts: dict[str, Any]) -> str:
    def text(key: str, value: Any) -> str:
        if "bytes" in key:
            return format_bytes(value)
        return f"{value:,}" if key.startswith("parameters") else str(value)

    return "\n".join(f"{key.replace('_', ' '):<22} {text(key, value)}" for key, value in facts.items())


def _make_dummy(own: argparse.Namespace) -> int:
    from pagoda.models.dummy import DummySpec, write_dummy_checkpoint

    given = {f.name: getattr(own, f.name) for f in fields(DummySpec) if getattr(own, f.name) is not None}
    directory = write_dummy_checkpoint(own.directory, DummySpec(**given))
    print(_as_text(inspect_checkpoint(str(directory))))
    return 0


def _add_dummy_options(parser: argparse.ArgumentParser) -> None:
    """One option for each field of `DummySpec`, named and typed as the field."""
    from pagoda.models.dummy import DummySpec

    types = get_type_hints(DummySpec)
    for field in fields(DummySpec):
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(flag, default=None, **_argument_of(field, types[field.name]))


def _argument_of(field: Field[Any], annotation: Any) -> dict[str, Any]:
    """Keyword arguments of `add_argument` for a field."""
    told = f"default: {field.default}"
    if get_origin(annotation) is Literal:
        return {"choices": get_args(annotation), "help": told}
    without_none = [member for member in get_args(annotation) if member is not NoneType]
    kind = without_none[0] if NoneType in get_args(annotation) else annotation
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction, "help": told}
    if kind in (int, float):
        return {"type": kind, "help": told, "metavar": kind.__name__.upper()}
    return {"type": _json_object, "help": "a JSON object", "metavar": "JSON"}


def _json_object(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{text!r} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{text!r} is no JSON object")
    return content
