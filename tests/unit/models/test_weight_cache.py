"""Packed weights from a file are those that packing gives, and a file that is not whole is never used."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pagoda.execution.weight_source import WeightSource
from pagoda.models.build import build_model
from pagoda.models.config import ModelConfig
from pagoda.models.decoder import DecoderForCausalLM
from pagoda.models.loading import weight_cache, weight_cache_directory
from pagoda.models.loading.loader import initialize_dummy_weights
from pagoda.models.loading.packed import LoadedMethod, layer_name, linear_layers
from pagoda.models.loading.weight_cache import CachedWeights, WeightCacheError, WeightsToCache, cache_key
from pagoda.models.loading.weight_cache_directory import FOLDER, WeightCacheDirectory
from pagoda.models.quantization.schemes import choose_quantization
from pagoda.parallel.groups import SINGLE_RANK, ParallelGroups, PipelineParallelGroup, TensorParallelGroup
from pagoda.parallel.layout import ParallelLayout
from pagoda_kernels.mapped_files import MappedFile
from tests.support.kernel_backends import reference_kernels
from tests.support.model_families import FAMILIES, family_config

__all__ = ["reference_kernels"]
pytestmark = pytest.mark.usefixtures("reference_kernels")

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 37,
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


class UnconnectedTensorGroup(TensorParallelGroup):
    """A rank's place in a group that exchanges nothing."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size


def model_of(
    config: ModelConfig | None = None, quantization: str | None = None, groups: ParallelGroups = SINGLE_RANK
) -> DecoderForCausalLM:
    config = config or ModelConfig.from_dicts(CONFIG)
    scheme = choose_quantization(quantization, 32, config.quantization, config.linear_input_sizes)
    return build_model(config, torch.bfloat16, "cpu", groups, scheme, packed=True)


def filled(model: DecoderForCausalLM) -> DecoderForCausalLM:
    initialize_dummy_weights(model)
    return model


def tensors_of(model: DecoderForCausalLM) -> Iterator[tuple[str, torch.Tensor]]:
    """All that a model holds, as bytes."""
    for name, parameter in model.named_parameters():
        yield name, parameter.data
    for _, layer in linear_layers(model):
        if isinstance(layer.method, LoadedMethod):
            for kind, weight in layer.method.weights().items():
                for field in dataclasses.fields(weight):
                    value = getattr(weight, field.name)
                    where = f"{layer_name(layer)}/{kind}/{field.name}"
                    yield (
                        where,
                        value if isinstance(value, torch.Tensor) else torch.tensor(0 if value is None else value),
                    )


def assert_same(one: DecoderForCausalLM, other: DecoderForCausalLM) -> None:
    expected, found = dict(tensors_of(one)), dict(tensors_of(other))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == found[name].dtype
        as_bytes = [each.contiguous().flatten().view(torch.uint8) for each in (tensor, found[name])]
        assert torch.equal(*as_bytes), name


def written(directory: Path, model: DecoderForCausalLM, key: str = "key") -> Path:
    file = directory / f"{key}.weights"
    assert WeightsToCache(model, key).write(file, threading.Event())
    return file


def family_model_config(name: str) -> ModelConfig:
    config = family_config(name)
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, "Mistral4ForCausalLM")
    return ModelConfig.from_dicts({**config.to_dict(), "architectures": [architecture]})


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_gets_from_a_file_what_packing_gives(name: str, tmp_path: Path) -> None:
    config = family_model_config(name)
    loaded, mapped = filled(model_of(config)), model_of(config)
    CachedWeights.open(written(tmp_path, loaded), "key").fill(mapped)
    assert_same(loaded, mapped)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rank", [0, 1])
def test_so_does_a_quantized_model_on_each_of_its_ranks(
    quantization: str, tied: bool, rank: int, tmp_path: Path
) -> None:
    config = ModelConfig.from_dicts({**CONFIG, "tie_word_embeddings": tied, "hidden_size": 64, "head_dim": 16})
    layout = ParallelLayout(2)
    groups = ParallelGroups(layout, layout.coordinates(rank), UnconnectedTensorGroup(rank, 2), PipelineParallelGroup())
    loaded, mapped = (model_of(config, quantization, groups) for _ in range(2))
    filled(loaded)
    CachedWeights.open(written(tmp_path, loaded), "key").fill(mapped)
    assert_same(loaded, mapped)


def damaged(whole: bytes, kind: str) -> bytes:
    start = weight_cache._HEADER_START
    return {
        "empty": b"",
        "cut off": whole[:-1],
        "cut off in its header": whole[: start + 10],
        "too long": whole + bytes(1),
        "of something else": b"GGUF" + whole[4:],
        "damaged in its header": whole[: start + 9] + bytes([whole[start + 9] ^ 1]) + whole[start + 10 :],
        "with a header of any length": whole[: start - 8] + b"\xff" * 8 + whole[start:],
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "empty",
        "cut off",
        "cut off in its header",
        "too long",
        "of something else",
        "damaged in its header",
        "with a header of any length",
    ],
)
def test_a_file_that_is_not_whole_is_removed_and_said_so(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = written(tmp_path, filled(model_of()))
    file.write_bytes(damaged(file.read_bytes(), kind))
    assert WeightCacheDirectory([tmp_path], 1 << 30).open("key") is None
    assert "is not used, the weights are read from the checkpoint" in caplog.text
    assert len(caplog.messages) == 1
    assert not file.exists()


def test_a_file_of_other_weights_is_not_used(tmp_path: Path) -> None:
    file = written(tmp_path, filled(model_of()))
    with pytest.raises(WeightCacheError, match="of other weights"):
        CachedWeights.open(file, "another key")
    deeper = model_of(ModelConfig.from_dicts({**CONFIG, "num_hidden_layers": 3}))
    with pytest.raises(WeightCacheError, match=r"layers\.2"):
        CachedWeights.open(file, "key").fill(deeper)


def test_the_key_follows_files_settings_and_rank(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    (tmp_path / "config.json").write_text("{}")
    weights.write_bytes(b"weights")
    keys = [cache_key(tmp_path, "int8", 0), cache_key(tmp_path, "int4", 0), cache_key(tmp_path, "int8", 1)]
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))
    keys.append(cache_key(tmp_path, "int8", 0))
    (tmp_path / "config.json").write_text("{ }")
    keys.append(cache_key(tmp_path, "int8", 0))
    assert len(set(keys)) == len(keys)
    assert cache_key(tmp_path, "int8", 0) == keys[-1]


def test_one_of_two_writers_writes_and_a_killed_one_is_in_nobodys_way(tmp_path: Path) -> None:
    weights, file = WeightsToCache(filled(model_of()), "key"), tmp_path / "key.weights"
    partial = file.with_suffix(".partial")
    partial.write_bytes(b"of another process")
    assert not weights.write(file, threading.Event())
    assert partial.read_bytes() == b"of another process"
    long_ago = partial.stat().st_mtime - weight_cache.STALE_SECONDS - 1
    os.utime(partial, (long_ago, long_ago))
    assert weights.write(file, threading.Event())
    assert list(tmp_path.iterdir()) == [file]


def test_nothing_is_left_of_a_file_whose_writer_is_stopped_or_has_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(weight_cache_directory, "SMALLEST_BYTES", 0)
    weights, stopping = WeightsToCache(filled(model_of()), "key"), threading.Event()
    stopping.set()
    assert not weights.write(tmp_path / "key.weights", stopping)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weight_cache.os, "writev", full)
    WeightCacheDirectory([tmp_path], 1 << 30).write(weights, "key", threading.Event())
    assert "No space left on device" in caplog.text
    assert not list(tmp_path.iterdir())


def test_what_was_not_used_for_longest_makes_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_cache_directory, "SMALLEST_BYTES", 0)
    weights = {key: WeightsToCache(filled(model_of()), key) for key in "abc"}
    size = written(tmp_path, filled(model_of()), "size").stat().st_size
    (tmp_path / "size.weights").unlink()
    directory = WeightCacheDirectory([tmp_path], 2 * size)
    for index, key in enumerate("ab"):
        directory.write(weights[key], key, threading.Event())
        os.utime(tmp_path / f"{key}.weights", (index + 1, index + 1))
    assert directory.open("a") is not None
    directory.write(weights["c"], "c", threading.Event())
    assert sorted(file.stem for file in tmp_path.iterdir()) == ["a", "c"]
    WeightCacheDirectory([tmp_path], weights["b"].nbytes - 1).write(weights["b"], "b", threading.Event())
    assert sorted(file.stem for file in tmp_path.iterdir()) == ["a", "c"]


def test_auto_is_beside_the_checkpoint_or_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_cache_directory, "SMALLEST_BYTES", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    weights = WeightsToCache(filled(model_of()), "key")
    model = tmp_path / "model"
    model.mkdir()
    for place in (model, model / "model.gguf"):
        directory = WeightCacheDirectory.of("auto", place, 1 << 30)
        assert directory is not None
        directory.write(weights, "key", threading.Event())
        (model / FOLDER / "key.weights").unlink()
    (model / FOLDER).rmdir()
    (model / FOLDER).write_text("in the way: as root, no directory is read-only")
    directory.write(weights, "key", threading.Event())
    assert (tmp_path / "cache/pagoda/weights/key.weights").exists()
    assert directory.open("key") is not None
    assert WeightCacheDirectory.of("none", model, 1) is None


def test_a_source_writes_behind_the_start_and_maps_at_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_cache_directory, "SMALLEST_BYTES", 0)
    monkeypatch.setattr("pagoda.execution.weight_source._PAUSE_SECONDS", 0)
    done: list[str] = []

    def read(model: DecoderForCausalLM) -> None:
        done.append("read")
        filled(model)

    directory = WeightCacheDirectory([tmp_path], 1 << 30)
    models = []
    for kind in ("written", "mapped", "refused"):
        if kind == "refused":  # of the same key, but what it holds does not fit
            written(tmp_path, filled(model_of(ModelConfig.from_dicts({**CONFIG, "num_hidden_layers": 1}))))
        source = WeightSource(directory, "key")
        models.append(source.load(model_of, read, lambda: done.append("check"), None))
        assert (source.mapped_bytes > 0) == (kind == "mapped")
        source.finish()
        assert source._thread is not None
        source._thread.join()
        source.stop()
        assert_same(models[0], models[-1])
        assert (tmp_path / "key.weights").exists()
    assert done == ["check", "read"] * 2


def test_what_is_mapped_moves_to_other_pages_under_its_readers(tmp_path: Path) -> None:
    file = tmp_path / "bytes"
    content = torch.randint(0, 256, ((5 << 20) + 77,), dtype=torch.uint8)
    file.write_bytes(content.numpy().tobytes())
    mapped = MappedFile(file)
    mapped.populate()
    assert torch.equal(mapped.memory, content)
    stopping, moved, wrong = threading.Event(), threading.Event(), []

    def look() -> None:
        while not moved.is_set():
            wrong.extend([] if torch.equal(mapped.memory, content) else ["it differs"])

    reader = threading.Thread(target=look)
    reader.start()
    try:
        assert mapped.move_to_huge_pages(stopping)
    finally:
        moved.set()
        reader.join()
    assert not wrong
    mapped.memory[0] ^= 1
    assert file.read_bytes() == content.numpy().tobytes()
    stopping.set()
    assert not mapped.move_to_huge_pages(stopping)
    mapped.close()
