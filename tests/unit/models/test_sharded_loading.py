"""Each rank reads its own part of each tensor, once; names and shapes are checked against the whole model."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pagoda.errors import CheckpointError
from pagoda.models.build import build_model
from pagoda.models.config import ModelConfig
from pagoda.models.decoder import DecoderForCausalLM
from pagoda.models.loading import checkpoint
from pagoda.models.loading.loader import initialize_dummy_weights, load_weights
from pagoda.parallel.groups import ParallelGroups, PipelineParallelGroup, TensorParallelGroup
from pagoda.parallel.layout import ParallelLayout

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "attention_bias": True,
}
LAYOUTS = [(2, 1), (4, 1), (1, 3), (2, 2)]
NAMES = ["tp2", "tp4", "pp3", "tp2-pp2"]


class UnconnectedTensorGroup(TensorParallelGroup):
    """A rank's place in a group that is never used."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size


def rank_model(layout: ParallelLayout, rank: int, **overrides: Any) -> DecoderForCausalLM:
    place = layout.coordinates(rank)
    tensor = UnconnectedTensorGroup(place.tensor_rank, layout.tensor_parallel_size)
    groups = ParallelGroups(layout, place, tensor, PipelineParallelGroup())
    return build_model(ModelConfig.from_dicts({**CONFIG, **overrides}), torch.float32, "cpu", groups)


def rank_models(sizes: tuple[int, int], **overrides: Any) -> list[DecoderForCausalLM]:
    layout = ParallelLayout(*sizes)
    return [rank_model(layout, rank, **overrides) for rank in range(layout.world_size)]


def save_whole(directory: Path, **overrides: Any) -> dict[str, torch.Tensor]:
    """A random checkpoint of the whole model in `directory`."""
    whole = build_model(ModelConfig.from_dicts({**CONFIG, **overrides}), torch.float32)
    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: torch.randn(target.full_shape, generator=generator) for name, target in whole.weight_targets().items()
    }
    save_file(tensors, directory / "model.safetensors")
    return tensors


@pytest.mark.parametrize("sizes", LAYOUTS, ids=NAMES)
@pytest.mark.parametrize("tied", [False, True])
def test_ranks_hold_every_element_between_them(sizes: tuple[int, int], tied: bool, tmp_path: Path) -> None:
    tensors = save_whole(tmp_path, tie_word_embeddings=tied)
    seen = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    for model in rank_models(sizes, tie_word_embeddings=tied):
        load_weights(model, tmp_path)
        for name, target in model.weight_targets().items():
            assert torch.equal(target.destination, tensors[name][target.index])
            seen[name][target.index] += 1
    for name, counts in seen.items():
        assert counts.min() > 0, f"nobody holds some of {name}"
        if sizes[1] == 1 and "norm" not in name and "k_proj" not in name and "v_proj" not in name:
            assert counts.max() == 1, f"several ranks hold the same of {name}"


class RecordingFile:
    """Stands for `safe_open`: counts the elements that are read of each tensor, and knows their headers."""

    elements: Counter[str]
    whole: set[str]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._file = safe_open(*args, **kwargs)

    def __enter__(self) -> RecordingFile:
        self._file.__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        self._file.__exit__(*args)

    def keys(self) -> list[str]:
        return self._file.keys()

    def get_tensor(self, name: str) -> torch.Tensor:
        tensor = self._file.get_tensor(name)
        RecordingFile.elements[name] += tensor.numel()
        RecordingFile.whole.add(name)
        return tensor

    def get_slice(self, name: str) -> RecordingSlice:
        return RecordingSlice(name, self._file.get_slice(name))


class RecordingSlice:
    def __init__(self, name: str, stored: Any) -> None:
        self._name, self._stored = name, stored
        self.get_shape, self.get_dtype = stored.get_shape, stored.get_dtype

    def __getitem__(self, index: tuple[slice, ...]) -> torch.Tensor:
        part = self._stored[index]
        RecordingFile.elements[self._name] += part.numel()
        return part


@pytest.mark.parametrize("sizes", LAYOUTS, ids=NAMES)
def test_rank_reads_its_own_part_once_and_nothing_else(
    sizes: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = save_whole(tmp_path)
    monkeypatch.setattr(checkpoint, "safe_open", RecordingFile)
    for model in rank_models(sizes):
        RecordingFile.elements, RecordingFile.whole = Counter(), set()
        load_weights(model, tmp_path)
        targets = model.weight_targets()
        own = {name: target.destination.numel() for name, target in targets.items() if target.destination.numel()}
        assert dict(RecordingFile.elements) == own
        for name in RecordingFile.whole:
            assert targets[name].full_shape == targets[name].destination.shape == tensors[name].shape


def test_progress_ends_at_the_bytes_of_the_rank(tmp_path: Path) -> None:
    save_whole(tmp_path)
    model = rank_model(ParallelLayout(2, 2), 3)
    reports: list[tuple[int, int]] = []
    load_weights(model, tmp_path, lambda name, done, total: reports.append((done, total)))
    own = sum(target.destination.nbytes for target in model.weight_targets().values())
    assert reports[-1] == (own, own)


@pytest.mark.parametrize("rank", range(4))
def test_tensor_of_another_rank_is_checked_too(rank: int, tmp_path: Path) -> None:
    tensors = save_whole(tmp_path)
    wrong = {**tensors, "model.layers.2.mlp.up_proj.weight": torch.ones(12, 16)}
    save_file(wrong, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"up_proj.weight in .* has shape \[12, 16\], config.json makes it \[24, 16\]"
    ):
        load_weights(rank_model(ParallelLayout(2, 2), rank), tmp_path)
    del wrong["model.layers.0.self_attn.o_proj.bias"], wrong["model.layers.2.mlp.up_proj.weight"]
    save_file({**wrong, "surprise": torch.ones(1)}, tmp_path / "model.safetensors")
    message = r"2 tensors of the model are missing: .*o_proj.bias, .*up_proj.weight; 1 tensors are unknown .*: surprise"
    with pytest.raises(CheckpointError, match=message):
        load_weights(rank_model(ParallelLayout(2, 2), rank), tmp_path)


@pytest.mark.parametrize("sizes", LAYOUTS, ids=NAMES)
def test_tied_head_is_loaded_from_either_name_on_its_stage(sizes: tuple[int, int], tmp_path: Path) -> None:
    tensors = save_whole(tmp_path, tie_word_embeddings=True)
    embedding = tensors.pop("model.embed_tokens.weight")
    save_file({**tensors, "lm_head.weight": embedding}, tmp_path / "model.safetensors")
    for model in rank_models(sizes, tie_word_embeddings=True):
        load_weights(model, tmp_path)
        rows = model.shard.vocabulary
        for layer in (model.embed_tokens, model.lm_head):
            if layer is not None:
                assert torch.equal(layer.weight[: rows.length], embedding[rows.slice])


@pytest.mark.parametrize("sizes", LAYOUTS, ids=NAMES)
@pytest.mark.parametrize("tied", [False, True])
def test_dummy_weights_are_parts_of_those_of_one_rank(sizes: tuple[int, int], tied: bool) -> None:
    (whole,) = rank_models((1, 1), tie_word_embeddings=tied)
    initialize_dummy_weights(whole, seed=5)
    full = {name: target.destination for name, target in whole.weight_targets().items()}
    for model in rank_models(sizes, tie_word_embeddings=tied):
        initialize_dummy_weights(model, seed=5)
        for name, target in model.weight_targets().items():
            assert torch.equal(target.destination, full[name][target.index]), name


def test_bias_of_a_summed_layer_is_held_once(tmp_path: Path) -> None:
    save_whole(tmp_path)
    first, second = rank_models((2, 1))
    assert first.layers[0].self_attn.o_proj.bias is not None
    assert second.layers[0].self_attn.o_proj.bias is None
    assert set(load_file(tmp_path / "model.safetensors")) == set(first.weight_targets())
