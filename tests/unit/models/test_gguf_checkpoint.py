"""A GGUF file is the checkpoint that it was made of: configuration, tokenizer, template, and every weight to the last bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pagoda.cli.models import inspect_checkpoint
from pagoda.cli.models import run as run_models
from pagoda.errors import CheckpointError, ConfigError
from pagoda.models.build import build_model
from pagoda.models.checkpoint_source import checkpoint_directory
from pagoda.models.config import ModelConfig
from pagoda.models.decoder import DecoderForCausalLM
from pagoda.models.dummy import DummySpec, write_dummy_checkpoint
from pagoda.models.gguf.blocks import unpack_blocks
from pagoda.models.gguf.ggml_types import BY_NAME
from pagoda.models.layers.embedding import quantized_rows
from pagoda.models.loading.checkpoint import StoredTensors, stored_tensors
from pagoda.models.loading.loader import check_weights, load_weights
from pagoda.models.loading.packed import PackedLinearMethod, linear_layers
from pagoda.models.quantization.schemes import QuantizationConfig, choose_quantization
from pagoda.models.quantization.writing import write_quantized_checkpoint
from pagoda.parallel.groups import ParallelGroups, PipelineParallelGroup, TensorParallelGroup
from pagoda.parallel.layout import ParallelLayout
from pagoda.text.tokenizer import Tokenizer
from pagoda_kernels.reference.linear import unpack
from tests.support.gguf_files import float_tensor, gguf_bytes, metadata_of, random_blocks, write_gguf
from tests.support.kernel_backends import reference_kernels

__all__ = ["reference_kernels"]
pytestmark = pytest.mark.usefixtures("reference_kernels")

FAMILIES = ("llama", "qwen2", "qwen3")
TEXTS = ("Hello, world! 123  45\n\n x", "<|im_start|>user\nhi<|im_end|>", "São João 日本語 🙂 don't", "\t\r\n  a")
BLOCKED = [name for name, kind in BY_NAME.items() if kind.stored != "float"]
Q4_K_M = {"v_proj": "Q6_K", "down_proj": "Q6_K", "embed_tokens": "Q6_K"}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each family, by its name, as llama.cpp has it, too."""
    specs = {
        family: DummySpec(
            family=family, num_layers=2, hidden_size=256, intermediate_size=512, num_heads=4, num_kv_heads=2, head_dim=64,
            tie_word_embeddings=family != "qwen3",
        )
        for family in FAMILIES
    }  # fmt: skip
    parent = tmp_path_factory.mktemp("families")
    return {family: write_dummy_checkpoint(parent / family, spec) for family, spec in specs.items()}


@pytest.mark.parametrize("kind", BLOCKED)
def test_blocks_are_dequantized_as_by_the_package_gguf(kind: str) -> None:
    rng = np.random.default_rng(7)
    blocks = rng.integers(0, 256, (50, 2 * BY_NAME[kind].nbytes), dtype=np.uint8)
    found = unpack_blocks(BY_NAME[kind], torch.from_numpy(blocks)).floats().numpy()
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    assert found.shape == expected.shape
    assert ((found.view(np.uint32) == expected.view(np.uint32)) | (np.isnan(found) & np.isnan(expected))).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_configuration_tokenizer_and_weights_are_those_of_the_directory(
    directories: dict[str, Path], family: str, tmp_path: Path
) -> None:
    directory, path = directories[family], tmp_path / "model.gguf"
    worth = write_gguf(directory, path, directory.name)
    found, expected = ModelConfig.from_directory(path), ModelConfig.from_directory(directory)
    assert replace(found, eos_token_ids=(), generation=expected.generation) == replace(
        expected, eos_token_ids=(), dtype="float32", norm=found.norm
    )
    assert found.norm.eps == pytest.approx(expected.norm.eps)
    tokenizer, reference = Tokenizer.from_directory(path), Tokenizer.from_directory(directory)
    assert set(found.eos_token_ids) >= {reference.eos_token_id}
    assert tokenizer.chat_templates == reference.chat_templates
    for text in TEXTS:
        ids = reference.encode(text)
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == reference.decode(ids)
    source = StoredTensors(check_weights(found, None, path))
    for name, weight in worth.items():
        assert torch.equal(source.read(name), torch.from_numpy(weight))
        part = slice(1, len(weight) - 1)
        assert torch.equal(source.read(name, part), torch.from_numpy(weight[part]))


class UnconnectedTensorGroup(TensorParallelGroup):
    """A rank's place in a group that is never used."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


def loaded(
    path: Path, rank: int = 0, size: int = 1, quantization: QuantizationConfig | None = None
) -> DecoderForCausalLM:
    config = ModelConfig.from_directory(path)
    layout = ParallelLayout(size, 1)
    groups = ParallelGroups(
        layout, layout.coordinates(rank), UnconnectedTensorGroup(rank, size), PipelineParallelGroup()
    )
    model = build_model(config, torch.float32, "cpu", groups, quantization or config.quantization, packed=True)
    load_weights(model, path)
    return model


def check_packed(model: DecoderForCausalLM, worth: dict[str, np.ndarray]) -> None:
    """Every packed weight of a rank, where it lies in the whole, stands for what the file holds."""
    for prefix, layer in linear_layers(model):
        assert isinstance(layer.method, PackedLinearMethod)
        rows = unpack(layer.method.weight).split([shard.size for shard in layer.parts.values()])
        for (part, shard), found in zip(layer.parts.items(), rows, strict=True):
            expected = torch.from_numpy(worth[f"{prefix}{part}.weight"])[shard.slice, layer.inputs.slice]
            # Where a zero becomes a min, `s * q + m` for `s * (q - z)`, one rounding is another.
            torch.testing.assert_close(found[: shard.length], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("family", "kinds", "num_ranks"),
    [
        *(("llama", kind, 1) for kind in BLOCKED),
        *((family, "Q4_K_M", num_ranks) for family in FAMILIES for num_ranks in (1, 2)),
        ("llama", "Q4_1", 2),
    ],
)
def test_quantized_layers_are_packed_without_loss(
    directories: dict[str, Path], tmp_path: Path, family: str, kinds: str, num_ranks: int
) -> None:
    def kind_of(name: str) -> str:
        module = name.split(".")[-2]
        if "norm" in name or name.endswith("bias"):
            return "F32"
        return Q4_K_M.get(module, "Q4_K") if kinds == "Q4_K_M" else kinds

    path = tmp_path / "model.gguf"
    worth = write_gguf(directories[family], path, family, kind_of)
    for rank in range(num_ranks):
        check_packed(loaded(path, rank, num_ranks), worth)
    config = ModelConfig.from_directory(path)
    assert config.quantization is not None
    assert config.quantization.method == "gguf"


def test_a_tied_embedding_is_looked_up_in_the_packed_head(directories: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    worth = write_gguf(directories["llama"], path, "llama", lambda name: "Q8_0" if "embed" in name else "F32")
    model = loaded(path)
    assert isinstance(model.lm_head.method, PackedLinearMethod)
    ids = torch.tensor([0, 5, model.config.vocab_size - 1])
    expected = torch.from_numpy(worth["model.embed_tokens.weight"])[ids]
    assert torch.equal(quantized_rows(model.lm_head.method.weight, ids), expected)
    assert torch.equal(model.embed_tokens(ids), expected)


def test_layers_can_be_dequantized_or_rounded_again(tmp_path: Path) -> None:
    directory = write_dummy_checkpoint(tmp_path / "llama", DummySpec(num_layers=1))
    path = tmp_path / "model.gguf"
    worth = write_gguf(directory, path, "llama", lambda name: "Q4_1" if "_proj" in name else "F32")
    config = ModelConfig.from_directory(path)
    sizes = config.linear_input_sizes
    assert choose_quantization("gguf", None, config.quantization, sizes) == config.quantization
    assert choose_quantization("dequantize", None, config.quantization, sizes) is None
    int8 = choose_quantization("int8", None, config.quantization, sizes)
    assert int8 is not None
    assert int8.method == "int8"
    with pytest.raises(ConfigError, match="quantization=dequantize: the checkpoint is not quantized"):
        choose_quantization("dequantize", None, None, sizes)
    model = build_model(config, torch.float32, "cpu", packed=True)
    load_weights(model, path)
    check_packed(model, worth)


def test_llama3_rope_is_recovered_from_its_factors(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    spec = DummySpec(num_layers=1, rope_scaling={**rope, "original_max_position_embeddings": 8192})
    directory = write_dummy_checkpoint(tmp_path / "llama", spec)
    expected = ModelConfig.from_directory(directory).layers[0].attention.rope
    from pagoda.models.layers.rope import build_rotary_embedding

    head_dim = ModelConfig.from_directory(directory).head_dim
    plain = replace(expected, rope_type="default", factor=1.0)
    angles = [
        build_rotary_embedding(kind, head_dim, torch.device("cpu"))(torch.tensor([1])) for kind in (plain, expected)
    ]
    inverse = [torch.atan2(sine, cosine)[0] for cosine, sine in angles]
    tensors = {"token_embd.weight": float_tensor(np.zeros((8, spec.hidden_size)))}
    tensors["rope_freqs.weight"] = float_tensor((inverse[0] / inverse[1]).numpy())
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes(metadata_of(directory, "llama"), tensors))
    assert ModelConfig.from_directory(path).layers[0].attention.rope == expected


def test_sentencepiece_vocabularies_are_cut_as_by_transformers(tmp_path: Path) -> None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer, get_gguf_tokenizer

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = [
        "▁",
        "h",
        "e",
        "l",
        "o",
        "w",
        "r",
        "d",
        "he",
        "ll",
        "lo",
        "▁he",
        "llo",
        "▁hello",
        "wor",
        "or",
        "ld",
        "▁w",
        "▁world",
        "▁wor",
    ]
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*pieces, *words, "<tool>"],
        "tokenizer.ggml.scores": [0.0] * len(pieces) + [-float(n) for n in range(len(words))] + [0.0],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(words) + [4],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "llama.context_length": 8, "llama.embedding_length": 8, "llama.block_count": 1, "llama.feed_forward_length": 8,
        "llama.attention.head_count": 2, "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }  # fmt: skip
    path = tmp_path / "model.gguf"
    path.write_bytes(
        gguf_bytes(metadata, {"token_embd.weight": float_tensor(np.zeros((len(pieces) + len(words) + 1, 8)))})
    )
    tokenizer = Tokenizer.from_directory(path)
    architecture, description, _ = get_gguf_tokenizer(str(path))
    reference, _ = convert_gguf_tokenizer(architecture, description)
    for text in ("hello world", " hello  world", "héllo 🙂", "<tool>hello</s>world", "", "wor ld\n"):
        ids = reference.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, add_special_tokens=False) == ids
        assert tokenizer.encode(text) == [1, *ids]
        assert tokenizer.decode(ids) == reference.decode(ids)


def test_directories_with_gguf_files_are_resolved(tmp_path: Path) -> None:
    for name in ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf", "mmproj-m.gguf", "readme.md"):
        (tmp_path / name).touch()
    assert checkpoint_directory(str(tmp_path)) == tmp_path / "m-00001-of-00002.gguf"
    (tmp_path / "model.safetensors").touch()
    assert checkpoint_directory(str(tmp_path)) == tmp_path
    assert checkpoint_directory(str(tmp_path), gguf=True) == tmp_path / "m-00001-of-00002.gguf"
    (tmp_path / "other-Q8_0.gguf").touch()
    with pytest.raises(CheckpointError, match=r"holds 2 GGUF models \(m-00001-of-00002.gguf, other-Q8_0.gguf\): name"):
        checkpoint_directory(str(tmp_path), gguf=True)


def test_a_file_of_a_repository_is_named_by_its_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(model: str, *, allow_patterns: list[str], **_: object) -> str:
        assert (model, allow_patterns) == ("owner/name", ["*Q4_K_M*.gguf"])
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError, match="holds no GGUF file with Q4_K_M"):
        checkpoint_directory("owner/name:Q4_K_M")
    (tmp_path / "name-Q4_K_M.gguf").touch()
    (tmp_path / "name-Q4_K_M-extra.gguf").touch()
    assert checkpoint_directory("owner/name:Q4_K_M") == tmp_path / "name-Q4_K_M.gguf"


def test_random_blocks_of_the_tests_are_small_numbers() -> None:
    for kind in BLOCKED:
        blocks = torch.from_numpy(random_blocks(kind, (4, 512), np.random.default_rng(0)))
        assert unpack_blocks(BY_NAME[kind], blocks).floats().abs().max() < 50
    assert stored_tensors([]) == {}


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_a_file_is_converted_to_a_directory(directories: dict[str, Path], tmp_path: Path, dtype: str | None) -> None:
    path, destination = tmp_path / "model.gguf", tmp_path / "converted"
    worth = write_gguf(directories["llama"], path, "llama", lambda name: "Q4_K" if "_proj" in name else "F32")
    facts = inspect_checkpoint(str(path))
    assert (facts["file_bytes"], facts["quantization"]) == (path.stat().st_size, "gguf (4 bits, groups of 32)")
    assert run_models(["convert", str(path), str(destination), *([] if dtype is None else ["--dtype", dtype])]) == 0
    stored = load_file(destination / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {getattr(torch, dtype or "bfloat16")}
    for name, weight in worth.items():
        assert torch.equal(stored[name], torch.from_numpy(weight).to(stored[name].dtype))
    config = ModelConfig.from_directory(destination)
    assert config == replace(ModelConfig.from_directory(path), quantization=None, dtype=dtype or "bfloat16")
    text = "hello <|im_end|>"
    assert Tokenizer.from_directory(destination).encode(text) == Tokenizer.from_directory(path).encode(text)
    with pytest.raises(CheckpointError, match="is no GGUF file"):
        run_models(["convert", str(destination), str(tmp_path / "again")])


def test_a_file_is_quantized_to_a_directory(tmp_path: Path) -> None:
    directory = write_dummy_checkpoint(tmp_path / "llama", DummySpec(num_layers=1))
    path, destination = tmp_path / "model.gguf", tmp_path / "int8"
    write_gguf(directory, path, "llama", lambda name: "Q8_0" if "_proj" in name else "F32")
    write_quantized_checkpoint(path, destination, "int8", None, lambda done, total: None)
    assert ModelConfig.from_directory(destination).quantization is not None
    assert Tokenizer.from_directory(destination).vocab_size == Tokenizer.from_directory(path).vocab_size
