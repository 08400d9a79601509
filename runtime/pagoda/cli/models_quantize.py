"""`pagoda models quantize` writes a quantized checkpoint and says what it loses; `convert` writes one out of a GGUF file."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pagoda.config.values import format_bytes
from pagoda.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from rich.progress import Progress

    from pagoda.models.decoder import DecoderForCausalLM
    from pagoda.models.quantization.quality import ScoredText, Scores
    from pagoda.models.quantization.schemes import QuantizationConfig


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("source", metavar="SOURCE", help="directory, GGUF file or Hugging Face id")
    parser.add_argument("destination", metavar="DEST", type=Path, help="directory to write; must not exist yet")
    parser.add_argument("--quantization", required=True, choices=("int8", "int4"), help="bits of the weights")
    parser.add_argument(
        "--group-size", type=int, metavar="N", help="inputs that share a scale, with int4: 32, 64 or 128"
    )
    parser.add_argument("--text", type=Path, metavar="FILE", help="text to measure quality on; default: conversations")


def run(own: argparse.Namespace) -> int:
    """Quantize, then compare what `pagoda serve` would run with the source in float32."""
    from pagoda.models.checkpoint_source import checkpoint_directory
    from pagoda.models.config import ModelConfig

    if own.group_size is not None and own.quantization != "int4":
        raise ConfigError(f"group-size={own.group_size}: needs --quantization int4")
    source = checkpoint_directory(own.source)
    ModelConfig.from_directory(source)  # what is no model is said before anything large is imported

    import torch

    from pagoda.models.quantization.quality import score
    from pagoda.models.quantization.writing import write_quantized_checkpoint

    texts = _texts(source, own.text)
    with _progress() as bar:
        task = bar.add_task("quantize", total=None)
        quantization = write_quantized_checkpoint(
            source,
            own.destination,
            own.quantization,
            own.group_size,
            lambda done, total: bar.update(task, completed=done, total=total),
        )
        task = bar.add_task("compare", total=2 * len(texts))
        scores: list[Scores] = []
        dtypes: list[str] = []
        for directory, dtype in ((source, torch.float32), (own.destination, None)):
            model = load_on_cpu(directory, dtype)
            scores.append(score(model, texts, lambda: bar.advance(task)))
            dtypes.append(str(model.dtype).removeprefix("torch."))
            del model
    headers = (f"source, {dtypes[0]}", f"{quantization}, {dtypes[1]}")
    print(_report(headers, (source, own.destination), *scores))
    return 0


def convert(own: argparse.Namespace) -> int:
    """Write a GGUF file as a directory."""
    import torch

    from pagoda.models.checkpoint_source import checkpoint_directory
    from pagoda.models.config import ModelConfig
    from pagoda.models.quantization.writing import write_float_checkpoint

    source = checkpoint_directory(own.source)
    dtype = own.dtype or ModelConfig.from_directory(source).dtype
    with _progress() as bar:
        task = bar.add_task("convert", total=None)
        write_float_checkpoint(
            source,
            own.destination,
            getattr(torch, dtype),
            lambda done, total: bar.update(task, completed=done, total=total),
        )
    print(f"{own.destination}: {format_bytes(_weight_bytes(own.destination))} in {dtype}")
    return 0


def load_on_cpu(
    directory: Path, dtype: torch.dtype | None = None, quantization: QuantizationConfig | None = None
) -> DecoderForCausalLM:
    """The model in a directory on the CPU's kernels; None: in the dtype and quantized as `pagoda serve` would run it."""
    import torch

    from pagoda.engine.core.auto import choose_dtype
    from pagoda.execution.kernel_choice import choose_cpu_kernels, packs_weights
    from pagoda.models.build import build_model
    from pagoda.models.config import ModelConfig
    from pagoda.models.fused_layers import fuse_layers
    from pagoda.models.loading.loader import load_weights, with_tie_as_stored
    from pagoda.platform.hardware import cpu_report

    config = with_tie_as_stored(ModelConfig.from_directory(directory), directory)
    choose_cpu_kernels("auto")
    if dtype is None:
        dtype = getattr(torch, choose_dtype("auto", config.dtype, None, cpu_report().instruction_sets).value)
    quantization = quantization or config.quantization
    model = build_model(config, dtype, "cpu", quantization=quantization, packed=packs_weights(dtype))
    load_weights(model, directory)
    fuse_layers(model)
    return model


def _texts(source: Path, file: Path | None) -> list[ScoredText]:
    """The text of `file`, or the built-in conversations, of which the answers are scored."""
    from pagoda.models.quantization.quality import ScoredText, in_windows
    from pagoda.models.quantization.sample_text import sample_conversations
    from pagoda.text.operations import TextOperations

    operations = TextOperations(str(source))
    if file is not None:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"text={file}: cannot be read as text: {error}") from error
        if pieces := in_windows(operations.tokenizer.encode(text)):
            return pieces
        raise ConfigError(f"text={file}: holds fewer than two tokens")
    texts = []
    for question, answer in sample_conversations():
        if operations.tokenizer.has_chat_template:
            prompt = operations.chat_template.render([{"role": "user", "content": question}])
        else:
            prompt = f"{question}\n"
        before = operations.tokenizer.encode(prompt, add_special_tokens=not operations.tokenizer.has_chat_template)
        after = operations.tokenizer.encode(answer, add_special_tokens=False)
        texts.append(ScoredText((*before, *after), len(before)))
    return texts


def _report(headers: tuple[str, str], directories: tuple[Path, Path], before: Scores, after: Scores) -> str:
    sizes = [format_bytes(_weight_bytes(directory)) for directory in directories]
    rows = [
        ("", *headers),
        ("weights", *sizes),
        ("perplexity", f"{before.perplexity:.4f}", f"{after.perplexity:.4f}"),
        ("same first choice", "", f"{after.agreement(before):.2%} of {len(before.choices)} tokens"),
        ("mean Δ logprob", "", f"{after.logprob_error(before):.4f}"),
    ]
    return "\n".join(f"{name:<20}{left:<18}{right}" for name, left, right in rows)


def _weight_bytes(directory: Path) -> int:
    if directory.is_file():
        return directory.stat().st_size
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


@contextmanager
def _progress() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        yield bar
