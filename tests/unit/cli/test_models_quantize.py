"""`pagoda models quantize`: what it writes is what quantization at load gives, and transformers' layout of it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from pagoda.cli.main import main as pagoda
from pagoda.errors import CheckpointError, ConfigError
from pagoda.models.build import build_model
from pagoda.models.checkpoint_source import demo_checkpoint
from pagoda.models.config import ModelConfig
from pagoda.models.decoder import DecoderForCausalLM
from pagoda.models.dummy import DummySpec, write_dummy_checkpoint
from pagoda.models.loading.loader import load_weights
from pagoda.models.quantization import writing
from pagoda.models.quantization.quality import ScoredText, Scores, in_windows, score
from pagoda.models.quantization.schemes import QuantizationConfig, choose_quantization
from pagoda.models.quantization.writing import write_quantized_checkpoint
from tests.support.kernel_backends import reference_kernels
from tests.support.model_families import family_config
from tests.support.model_harness import save_random_checkpoint

__all__ = ["reference_kernels"]
pytestmark = pytest.mark.usefixtures("reference_kernels")

SPEC = DummySpec(hidden_size=64, intermediate_size=96, num_layers=2, num_shards=2)
SIZES = (64, 64, 96)


def no_progress(done: int, total: int) -> None:
    assert 0 <= done <= total


def loaded(directory: Path, quantization: QuantizationConfig | None) -> DecoderForCausalLM:
    model = build_model(ModelConfig.from_directory(directory), torch.float32, quantization=quantization)
    load_weights(model, directory)
    return model


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("tied", [False, True])
def test_written_checkpoint_equals_quantization_at_load(
    kind: str, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = DummySpec(hidden_size=64, intermediate_size=96, num_layers=2, num_shards=2, tie_word_embeddings=tied)
    source = write_dummy_checkpoint(tmp_path / "source", spec)
    monkeypatch.setattr(writing, "_SHARD_BYTES", 50_000)
    write_quantized_checkpoint(source, tmp_path / "new" / "quantized", kind, None, no_progress)
    written = tmp_path / "new" / "quantized"
    assert len(list(written.glob("model-*-of-*.safetensors"))) > 1
    assert (written / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    stored = ModelConfig.from_directory(written).quantization
    assert stored is not None
    at_load = loaded(source, choose_quantization(kind, None, None, SIZES))
    tokens = [ScoredText(tuple(range(3, 40)))]
    ours, theirs = (score(model, tokens, lambda: None) for model in (at_load, loaded(written, stored)))
    assert torch.equal(ours.logprobs, theirs.logprobs)


@pytest.mark.parametrize("name", ["phi3-window", "qwen3-moe", "mixtral"])
def test_fused_layers_and_experts_are_written_as_they_are_named(name: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    save_random_checkpoint(family_config(name), source)
    write_quantized_checkpoint(source, tmp_path / "quantized", "int8", None, no_progress)
    stored = ModelConfig.from_directory(tmp_path / "quantized").quantization
    assert stored is not None
    at_load = loaded(source, choose_quantization("int8", None, None, SIZES))
    tokens = [ScoredText(tuple(range(3, 40)))]
    ours, theirs = (score(model, tokens, lambda: None) for model in (at_load, loaded(tmp_path / "quantized", stored)))
    assert torch.equal(ours.logprobs, theirs.logprobs)
    names = {name for file in (tmp_path / "quantized").glob("*.safetensors") for name in load_file(file)}
    written = ("qkv_proj.weight_scale", ".experts.0.w1.weight_scale", ".experts.0.gate_proj.weight_scale")
    assert any(name.endswith(written) for name in names)
    assert not any(name.endswith(".gate.weight_scale") for name in names)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_experts_in_one_tensor_become_layers_of_their_own(kind: str, tmp_path: Path) -> None:
    config = family_config("gpt-oss")
    config.intermediate_size, config.head_dim = 64, 32
    save_random_checkpoint(config, tmp_path / "source")
    write_quantized_checkpoint(tmp_path / "source", tmp_path / "quantized", kind, None, no_progress)
    stored = ModelConfig.from_directory(tmp_path / "quantized").quantization
    sizes = ModelConfig.from_directory(tmp_path / "source").linear_input_sizes
    at_load = loaded(tmp_path / "source", choose_quantization(kind, None, None, sizes))
    tokens = [ScoredText(tuple(range(3, 40)))]
    ours, theirs = (score(model, tokens, lambda: None) for model in (at_load, loaded(tmp_path / "quantized", stored)))
    assert torch.equal(ours.logprobs, theirs.logprobs)
    names = {name for file in (tmp_path / "quantized").glob("*.safetensors") for name in load_file(file)}
    assert "model.layers.0.mlp.experts.3.up_proj.weight_scale" in names
    assert not any(name.endswith(".gate_up_proj") for name in names)


def test_int4_layout_is_that_of_compressed_tensors(tmp_path: Path) -> None:
    source = write_dummy_checkpoint(tmp_path / "source", DummySpec(hidden_size=64, intermediate_size=96, num_layers=1))
    write_quantized_checkpoint(source, tmp_path / "quantized", "int4", 32, no_progress)
    tensors = load_file(tmp_path / "quantized" / "model.safetensors")
    name = "model.layers.0.mlp.gate_proj."
    assert tensors[name + "weight_packed"].shape == (96, 8)
    assert tensors[name + "weight_packed"].dtype == torch.int32
    assert tensors[name + "weight_scale"].shape == (96, 2)
    assert tensors[name + "weight_zero_point"].shape == (12, 2)
    assert tensors[name + "weight_shape"].tolist() == [96, 64]
    assert tensors["lm_head.weight"].dtype == torch.float32
    weight = load_file(source / "model.safetensors")[name + "weight"]
    word, zero_word = int(tensors[name + "weight_packed"][5, 3]), int(tensors[name + "weight_zero_point"][0, 0])
    q, zero = word >> 8 & 15, zero_word >> 20 & 15  # input 26, the third of its word; output 5, the sixth of its word
    scale = float(tensors[name + "weight_scale"][5, 0])
    assert (q - zero) * scale == pytest.approx(float(weight[5, 26]), abs=scale / 2 * 1.001)


def test_quality_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_dummy_checkpoint(tmp_path / "source", SPEC)
    text = tmp_path / "text.txt"
    text.write_text("a pagoda has many roofs " * 40)
    options = ["--quantization", "int4", "--group-size", "32", "--text", str(text)]
    assert pagoda(["models", "quantize", str(source), str(tmp_path / "out"), *options]) == 0
    report = capsys.readouterr().out
    rows = dict(re.findall(r"^(.*?)\s{2,}(.*)$", report, re.MULTILINE))
    assert rows[""].split("  ")[0] == "source, float32"
    assert rows[""].endswith("int4 (4 bits, groups of 32), float32")
    before, after = map(float, rows["perplexity"].split())
    assert after != before
    assert 0 < float(rows["same first choice"].split("%")[0]) < 100
    assert float(rows["mean Δ logprob"]) > 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"


def test_score_is_that_of_the_logits(tmp_path: Path) -> None:
    """Perplexity of a whole text equals that of its tokens, wherever scoring begins."""
    model = loaded(demo_checkpoint(), None)
    ids = tuple(range(5, 45))
    (whole, tail) = (score(model, [ScoredText(ids, first)], lambda: None) for first in (1, 30))
    assert len(whole.choices) == 39
    torch.testing.assert_close(whole.logprobs[29:], tail.logprobs)
    assert whole.agreement(whole) == 1.0
    assert whole.logprob_error(whole) == 0.0
    assert whole.perplexity > 1.0


def test_scores_are_compared_place_by_place() -> None:
    ours = Scores(torch.tensor([-1.0, -2.0, -3.0, -4.0]), torch.tensor([1, 2, 3, 4]))
    theirs = Scores(torch.tensor([-1.5, -1.5, -3.0, -4.0]), torch.tensor([1, 2, 9, 4]))
    assert ours.agreement(theirs) == 0.75
    assert ours.logprob_error(theirs) == 0.25


def test_bfloat16_checkpoint_is_compared_with_itself_in_float32(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    has_bfloat16 = SimpleNamespace(instruction_sets=("avx512_bf16",))
    monkeypatch.setattr("pagoda.platform.hardware.cpu_report", lambda: has_bfloat16)
    source = write_dummy_checkpoint(tmp_path / "source", replace(SPEC, dtype="bfloat16"))
    text = tmp_path / "text.txt"
    text.write_text("a pagoda has many roofs")
    command = ["models", "quantize", str(source), str(tmp_path / "out"), "--quantization", "int8", "--text", str(text)]
    assert pagoda(command) == 0
    header = capsys.readouterr().out.splitlines()[0].split("  ")
    assert [part.strip() for part in header if part] == [
        "source, float32",
        "int8 (8 bits, a scale for each output), bfloat16",
    ]


def test_long_texts_are_cut_in_windows() -> None:
    pieces = in_windows(range(1025))
    assert [len(piece.token_ids) for piece in pieces] == [512, 512]


def test_what_cannot_be_quantized_is_refused(tmp_path: Path) -> None:
    source = write_dummy_checkpoint(tmp_path / "source", SPEC)
    with pytest.raises(CheckpointError, match="exists already"):
        write_quantized_checkpoint(source, tmp_path, "int8", None, no_progress)
    with pytest.raises(ConfigError, match="possible: 32"):
        write_quantized_checkpoint(source, tmp_path / "out", "int4", 128, no_progress)
    write_quantized_checkpoint(source, tmp_path / "once", "int8", None, no_progress)
    with pytest.raises(ConfigError, match="quantized already"):
        write_quantized_checkpoint(tmp_path / "once", tmp_path / "twice", "int4", None, no_progress)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["once", "source"]
