"""Families as GGUF files: the logits are those of transformers on the checkpoint that the file was made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pagoda import LLM, SamplingParams
from pagoda.models.build import build_model
from pagoda.models.config import ModelConfig
from pagoda.models.decoder import DecoderForCausalLM
from pagoda.models.dummy import DummySpec, write_dummy_checkpoint
from pagoda.models.fused_layers import fuse_layers
from pagoda.models.loading.loader import load_weights
from pagoda_kernels import backend
from tests.support.cpu_kernels import require_cpu_kernels
from tests.support.gguf_families import state_of, write_family
from tests.support.gguf_files import metadata_of
from tests.support.kernel_backends import reference_kernels
from tests.support.model_families import VOCAB_SIZE, family_config
from tests.support.model_harness import run_in_chunks, save_random_checkpoint

require_cpu_kernels()

__all__ = ["reference_kernels"]
pytestmark = pytest.mark.usefixtures("reference_kernels")

# What a GGUF file does not say, as llama.cpp takes it; sizes that types of blocks divide.
CASES: dict[str, dict[str, Any]] = {
    "qwen2-moe": {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "mlp_only_layers": []},
    "qwen3-moe": {"moe_intermediate_size": 64, "head_dim": 32},
    "gemma2": {"query_pre_attn_scalar": 32, "head_dim": 32},
    "gemma3": {"query_pre_attn_scalar": 32, "head_dim": 32},
    "phi3": {},
    "phi3-window": {},
    "gpt-oss": {"intermediate_size": 64, "head_dim": 32},
    "mixtral": {"intermediate_size": 64},
}


@pytest.fixture(scope="module", params=sorted(CASES))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    config = family_config(request.param)
    for name, value in CASES[request.param].items():
        setattr(config, name, value)
    directory = tmp_path_factory.mktemp("gguf") / request.param
    return directory, save_random_checkpoint(config, directory)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist() for length in (1, 9, 97)]


def logits_of(path: Path, *, packed: bool = False, kernels: str = "reference") -> list[torch.Tensor]:
    backend.use_backend(kernels)
    config = ModelConfig.from_directory(path)
    quantization = config.quantization if packed else None
    model: DecoderForCausalLM = build_model(
        config, torch.float32, quantization=quantization, packed=kernels == "cpu", max_model_len=120
    )
    load_weights(model, path)
    if kernels == "cpu":
        fuse_layers(model)
    return run_in_chunks(model, prompts(), block_size=8)


@torch.inference_mode()
def expected_of(model: Any) -> list[torch.Tensor]:
    return [model(torch.tensor([prompt])).logits[0].float() for prompt in prompts()]


def test_floats_give_the_logits_of_transformers(checkpoint: tuple[Path, Any], tmp_path: Path) -> None:
    directory, model = checkpoint
    write_family(directory, tmp_path / "model.gguf")
    for found, expected in zip(logits_of(tmp_path / "model.gguf"), expected_of(model), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=3e-5 * float(expected.abs().max()))


def test_blocks_give_the_logits_of_what_they_stand_for(checkpoint: tuple[Path, Any], tmp_path: Path) -> None:
    directory, model = checkpoint
    is_mxfp4 = directory.name == "gpt-oss"

    def kind_of(name: str) -> str:
        if is_mxfp4:
            return "MXFP4" if "_exps" in name else "Q8_0" if "attn" in name else "F32"
        return {"ffn_down": "Q8_0", "attn_v": "Q5_0"}.get(name.split(".")[-2].removesuffix("_exps"), "Q4_0")

    path = tmp_path / "model.gguf"
    worth = write_family(directory, path, kind_of)
    state = {name: torch.from_numpy(values.copy()) for name, values in state_of(worth, directory).items()}
    from safetensors.torch import save_file

    copied = tmp_path / "checkpoint"
    copied.mkdir()
    (copied / "config.json").write_bytes((directory / "config.json").read_bytes())
    save_file(state, copied / "model.safetensors", {"format": "pt"})
    dequantized = type(model).from_pretrained(copied, dtype=torch.float32).eval()
    expected = expected_of(dequantized)
    for found, each in zip(logits_of(path), expected, strict=True):
        torch.testing.assert_close(found, each, rtol=0, atol=3e-5 * float(each.abs().max()))
    # Packed, and with inputs rounded to int8: close.
    config = ModelConfig.from_directory(path)
    assert config.quantization is not None
    for found, each in zip(logits_of(path, packed=True, kernels="cpu"), expected, strict=True):
        assert (found - each).std() < 0.15 * each.std()


def test_a_mixture_with_its_tokenizer_answers_as_the_directory_does(tmp_path: Path) -> None:
    directory = write_dummy_checkpoint(tmp_path / "directory", DummySpec(family="qwen3_moe", num_layers=2))
    write_family(directory, tmp_path / "model.gguf", metadata=metadata_of(directory, "qwen3moe"))
    texts = []
    for model in (directory, tmp_path / "model.gguf"):
        with LLM(str(model), dtype="float32", threads=1, kv_cache_memory_bytes=8 << 20, max_num_seqs=4) as llm:
            outputs = llm.generate(["Hello, world!", "one two"], SamplingParams(temperature=0, max_tokens=12))
        texts.append([output.outputs[0].token_ids for output in outputs])
    assert texts[0] == texts[1]
