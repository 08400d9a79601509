"""The compiled encoder gives what the reference gives, and the same bits however tokens are divided among threads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from pagoda.models.encoders.config import EncoderConfig
from pagoda.models.encoders.encoder import Encoder, EncoderWeights
from pagoda.models.pooling_config import read_model
from pagoda_kernels.interface import KernelBackend
from tests.support.cpu_kernels import kernels, require_cpu_kernels
from tests.support.encoders import SIZES, VOCAB_SIZE, save_encoder
from tests.support.kernel_backends import using_backend

__all__ = ["kernels"]
require_cpu_kernels()

WIDE = {**SIZES, "hidden_size": 80, "num_attention_heads": 5, "intermediate_size": 112}
FAMILIES: dict[str, Callable[[], Any]] = {
    "norm behind": lambda: transformers.BertModel(transformers.BertConfig(**WIDE)),
    "relative bias": lambda: transformers.MPNetModel(transformers.MPNetConfig(**SIZES)),
    "norm first, gated, rotary, windows": lambda: transformers.ModernBertModel(
        transformers.ModernBertConfig(**SIZES, local_attention=16, pad_token_id=0)
    ),
}
LENGTHS = ((1,), (150,), (7, 33), (97, 150, 2), (64, 1, 15, 150, 33, 97, 64, 2, 70, 80, 90, 100, 110, 120, 130, 140))


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("encoder")
    save_encoder(path, FAMILIES[request.param]())
    return path


def loaded(directory: Path, dtype: torch.dtype, bits: int | None = None) -> Encoder:
    config = read_model(directory)
    assert isinstance(config, EncoderConfig)
    encoder = Encoder(config, dtype, torch.device("cpu"), bits)
    encoder.load(EncoderWeights.of(str(directory), config.names.prefixes))
    return encoder


def forward(encoder: Encoder, lengths: tuple[int, ...], threads: int = 1) -> torch.Tensor:
    ids = [torch.arange(length) * (length + 3) % VOCAB_SIZE for length in lengths]
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    types = torch.zeros(sum(lengths), dtype=torch.int64) if encoder.num_types else None
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        positions = torch.cat([torch.arange(length) for length in lengths])
        return encoder.forward(torch.cat(ids), positions, types, starts)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_are_those_of_the_reference(directory: Path, kernels: KernelBackend, dtype: torch.dtype) -> None:
    if dtype not in kernels.packed_dtypes:
        pytest.skip(f"{kernels.name} has no products of {dtype}")
    own = loaded(directory, dtype)
    with using_backend("reference"):
        reference = loaded(directory, dtype)
    for lengths in LENGTHS:
        expected = forward(reference, lengths).float()
        tolerance = 2e-5 if dtype == torch.float32 else 0.06 * float(expected.abs().max())
        assert (forward(own, lengths).float() - expected).abs().max() < tolerance


def test_bits_are_the_same_alone_in_a_batch_and_with_any_number_of_threads(
    directory: Path, kernels: KernelBackend
) -> None:
    for bits in (None, 8):
        encoder = loaded(directory, torch.float32, bits)
        for lengths in LENGTHS:
            found = forward(encoder, lengths)
            for threads in (2, 3):
                torch.testing.assert_close(forward(encoder, lengths, threads), found, rtol=0, atol=0)
            parts = [forward(encoder, (length,), 2) for length in lengths]
            torch.testing.assert_close(torch.cat(parts), found, rtol=0, atol=0)
