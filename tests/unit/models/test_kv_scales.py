"""Scales of a float8 KV cache: read where a checkpoint has them, 1 elsewhere, ignored without such a cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pagoda.errors import CheckpointError
from pagoda.models.build import build_model
from pagoda.models.config import ModelConfig
from pagoda.models.decoder import DecoderForCausalLM
from pagoda.models.dummy import DummySpec, write_dummy_checkpoint
from pagoda.models.kv_scales import set_kv_scales
from pagoda.models.loading.loader import load_weights

PREFIX = "model.layers.{}.self_attn."


def checkpoint(directory: Path, scales: dict[str, torch.Tensor]) -> tuple[DecoderForCausalLM, Path]:
    """A model of two layers and a checkpoint of it with `scales`."""
    folder = write_dummy_checkpoint(directory / "model", DummySpec(num_layers=2))
    file = folder / "model.safetensors"
    save_file({**load_file(file), **scales}, file)
    return build_model(ModelConfig.from_directory(folder), torch.float32), folder


def scales_of(model: DecoderForCausalLM) -> list[tuple[float, float] | None]:
    return [layer.self_attn.kv_scales for layer in model.layers]  # type: ignore[union-attr,misc]


def test_scales_are_read_under_either_name_and_are_1_elsewhere(tmp_path: Path) -> None:
    model, folder = checkpoint(
        tmp_path,
        {
            PREFIX.format(0) + "k_scale": torch.tensor(0.5),
            PREFIX.format(0) + "v_scale": torch.tensor([0.25], dtype=torch.bfloat16),
        },
    )
    load_weights(model, folder)  # which must not mind them
    assert scales_of(model) == [None, None]
    set_kv_scales(model, folder)
    assert scales_of(model) == [(0.5, 0.25), (1.0, 1.0)]
    set_kv_scales(model, None)
    assert scales_of(model) == [(1.0, 1.0), (1.0, 1.0)]


def test_scales_beside_the_projections(tmp_path: Path) -> None:
    scales = {PREFIX.format(1) + f"{name}_proj.{name}_scale": torch.tensor(2.0) for name in ("k", "v")}
    model, folder = checkpoint(tmp_path, scales)
    set_kv_scales(model, folder)
    assert scales_of(model) == [(1.0, 1.0), (2.0, 2.0)]


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), [1.0, 2.0]])
def test_a_scale_that_is_no_positive_number_is_named(tmp_path: Path, scale: float | list[float]) -> None:
    model, folder = checkpoint(
        tmp_path,
        {PREFIX.format(1) + "k_scale": torch.tensor(scale), PREFIX.format(1) + "v_scale": torch.tensor(1.0)},
    )
    with pytest.raises(CheckpointError, match=r"model.layers.1.self_attn.k_scale .* must be one positive number"):
        set_kv_scales(model, folder)


def test_a_scale_of_keys_without_one_of_values_is_refused(tmp_path: Path) -> None:
    model, folder = checkpoint(tmp_path, {PREFIX.format(0) + "k_scale": torch.tensor(1.0)})
    with pytest.raises(CheckpointError, match=r"only one of keys and values under model.layers.0"):
        set_kv_scales(model, folder)
