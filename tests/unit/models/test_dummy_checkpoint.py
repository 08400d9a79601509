"""Made-up checkpoints: complete, reproducible, and what transformers itself reads."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from pagoda.errors import CheckpointError
from pagoda.models.dummy import DummySpec, tensor_shapes, write_dummy_checkpoint

SPECS = {
    "llama with scaled rope": DummySpec(
        family="llama", attention_bias=True, rope_scaling={"rope_type": "linear", "factor": 2.0}
    ),
    "mistral in shards": DummySpec(family="mistral", sliding_window=32, num_shards=3, dtype="float16"),
    "qwen2 in bfloat16": DummySpec(family="qwen2", dtype="bfloat16", sliding_window=16, max_window_layers=1),
    "qwen3 tied": DummySpec(family="qwen3", tie_word_embeddings=True),
    "qwen3_moe": DummySpec(family="qwen3_moe", num_experts=3, moe_intermediate_size=24),
}


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_transformers_loads_every_tensor_and_the_tokenizer(tmp_path: Path, spec: DummySpec) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = write_dummy_checkpoint(tmp_path / "model", spec)
    model, report = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(report.values())
    assert str(model.dtype) == f"torch.{spec.dtype}"
    assert model.config.max_position_embeddings == spec.max_position_embeddings
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert len(tokenizer) == spec.vocab_size
    text = "Once upon a time, 12 × 3; 日本 🙂"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert (ids[0] == tokenizer.bos_token_id) is spec.uses_bos


def test_equal_specifications_give_equal_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    first, second, third = (
        files_of(write_dummy_checkpoint(tmp_path / name, DummySpec(seed=seed)))
        for name, seed in (("first", 0), ("second", 0), ("third", 1))
    )
    assert first == second
    assert first["model.safetensors"] != third["model.safetensors"]


def test_shards_hold_each_tensor_once_and_the_index_finds_it(tmp_path: Path) -> None:
    spec = DummySpec(num_shards=5)
    directory = write_dummy_checkpoint(tmp_path / "model", spec)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert sorted(index["weight_map"]) == sorted(name for name, _ in tensor_shapes(spec))
    assert len(set(index["weight_map"].values())) == 5
    total = 0
    for name, shape in tensor_shapes(spec):
        with safe_open(str(directory / index["weight_map"][name]), "np") as shard:
            tensor = shard.get_tensor(name)
        assert tensor.shape == shape
        total += tensor.nbytes
    assert total == index["metadata"]["total_size"]


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="num_shards=1000"):
        write_dummy_checkpoint(tmp_path / "model", DummySpec(num_shards=1000))
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="exists already"):
        write_dummy_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"family": "gpt2"}, "family='gpt2'"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"num_heads": 4, "num_kv_heads": 3}, "multiple of num_kv_heads"),
        ({"vocab_size": 100}, "vocab_size=100"),
        ({"family": "llama", "sliding_window": 8}, "no sliding window"),
    ],
)
def test_impossible_specifications_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        DummySpec(**arguments)
